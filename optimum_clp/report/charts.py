"""Charts of the report's page.

A chart is drawn for a width in pixels, since text that shrinks with the screen cannot be read: the page has a wide and a
narrow one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from .svg import BOTTOM, LEFT, RIGHT, TOP, Chart, Scale, add_node, add_text, finished, new_drawing, scale_over
from .tables import is_known

WIDE, NARROW = 860, 340
_CROWD = 300
# from the smallest to the largest value: beyond it a linear axis shows the large ones alone
_LOGARITHMIC = 8


@dataclass(frozen=True)
class Series:
    """A line with its points.

    Args:
        name (`str`): In the legend.
        points (`Sequence[tuple[float, float, str]]`): Place, value, and what is said of it.
        style (`str`): Class of the style sheet: `"s0"` to `"s4"`.
        line (`bool`): Whether the points are joined.
    """

    name: str
    points: Sequence[tuple[float, float, str]]
    style: str
    line: bool = True


def landscape(search: Mapping[str, Any], cuts: Sequence["ScoredLine"], width: int) -> Markup | None:
    """The KL of every scored cut: a single segment at its first layer, several as bars over their layers.

    Args:
        search (`Mapping`): The `search` section of a report.
        cuts (`Sequence[ScoredLine]`): As [`scored_lines`] gives them.
        width (`int`): Pixels.

    Returns:
        `Markup` or `None`: `None` where no cut has a figure.
    """
    shown = [cut for cut in cuts if is_known(cut.kl)]
    if not shown:
        return None
    values = [cut.kl for cut in shown]
    chart = _over_layers("Every scored cut and its KL to the dense model", search, values, width, 300)
    chart.crowded = len(shown) > _CROWD
    alone = any(len(cut.segments) == 1 for cut in shown)
    chart.axes("first layer of the cut" if alone else "layers of the cut", "KL to dense (nats per token)")
    single = sorted((cut for cut in shown if len(cut.segments) == 1), key=lambda cut: cut.segments[0][0])
    for run in _neighbours(single):
        chart.line([(cut.segments[0][0], cut.kl) for cut in run], "s0 faint")
    # what was chosen lies on top
    for cut in sorted(shown, key=lambda cut: cut.chosen):
        _draw_cut(chart, cut)
    return chart.markup()


def strip(search: Mapping[str, Any], gone: set[int], width: int) -> Markup:
    """The stack of layers, below the landscape: those that went are marked, and those of the cut that is pointed at."""
    height = 22
    root = new_drawing("Layers of the dense model", width, height)
    x = Scale(-0.75, search["num_layers"] - 0.25, LEFT, width - RIGHT)
    thick = max(1.0, 0.8 * (x(1) - x(0)))
    add_text(root, "layers", LEFT - 6, 15, "tick end")
    for layer in range(search["num_layers"]):
        style = "layer gone" if layer in gone else "layer"
        box = add_node(root, "rect", style, x=x(layer) - thick / 2, y=3, width=thick, height=16)
        box.set("data-layer", str(layer))
    return finished(root)


def importance(search: Mapping[str, Any], values: Sequence[float | None], gone: set[int], width: int) -> Markup | None:
    """A bar for each layer.

    Args:
        search (`Mapping`): The `search` section of a report.
        values (`Sequence[float | None]`): Of each layer, as `layer_importance` gives them.
        gone (`set[int]`): The layers that went.
        width (`int`): Pixels.
    """
    known = [(layer, value) for layer, value in enumerate(values) if is_known(value)]
    if not known:
        return None
    heights = [value for _, value in known]
    chart = _over_layers("Importance of each layer", search, heights, width, 200)
    chart.axes("layer", "importance" if search.get("layer_scores") else "least KL of a cut with it")
    thick = max(1.0, 0.8 * (chart.x(1) - chart.x(0)))
    for layer, value in known:
        state = "removed" if layer in gone else "stays"
        group = chart.mark(f"Layer {layer} ({state}): {value:.4g}", segments=f"{layer}-{layer + 1}")
        foot, top = sorted((chart.y(max(chart.y.low, 0.0)), chart.y(value)), reverse=True)
        bar = {"x": chart.x(layer) - thick / 2, "y": top, "width": thick, "height": max(foot - top, 1)}
        add_node(group, "rect", "s1" if layer in gone else "s0", **bar)
    return chart.markup()


def curves(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    width: int,
    *,
    log_x: bool = False,
    log_y: bool = False,
    borders: Sequence[tuple[float, str]] = (),
    levels: Mapping[str, float] | None = None,
    ring: tuple[float, float, str] | None = None,
    spans: Sequence[tuple[float, float, float, str]] = (),
) -> Markup | None:
    """Lines over a common axis.

    Args:
        title (`str`): For readers who do not see it.
        series (`Sequence[Series]`): The lines; what is not finite is to be left out by the caller.
        x_label, y_label (`str`): What the axes count.
        width (`int`): Pixels.
        log_x (`bool`): A logarithmic axis, where all places are above 0.
        log_y (`bool`): A logarithmic axis, where all values are above 0 and the largest is more than 3 times the least.
        borders (`Sequence[tuple[float, str]]`): Places of dotted lines upwards, with what they are.
        levels (`Mapping[str, float]`, *optional*): Dashed lines across, with what they are.
        ring (`tuple`, *optional*): Place, value and words of a point that is ringed.
        spans (`Sequence[tuple]`): Place, low, high and words of vertical bars.
    """
    points = [point for line in series for point in line.points]
    if not points:
        return None
    places = [x for x, _, _ in points] + [x for x, *_ in spans]
    values = [y for _, y, _ in points] + list((levels or {}).values()) + [v for _, a, b, _ in spans for v in (a, b)]
    height = 280
    chart = Chart(
        title,
        scale_over(places, LEFT, width - RIGHT, log=log_x and min(places) > 0, zero=False),
        scale_over(values, height - BOTTOM, TOP, log=log_y and 0 < 3 * min(values) < max(values)),
        width,
        height,
    )
    chart.axes(x_label, y_label)
    for name, value in (levels or {}).items():
        place = chart.y(value)
        group = chart.mark(f"{name}: {value:.4g}")
        add_node(group, "line", "level", x1=chart.x.start, x2=chart.x.stop, y1=place, y2=place)
    for x, words in borders:
        add_node(chart.mark(words), "line", "border", x1=chart.x(x), x2=chart.x(x), y1=chart.y.start, y2=chart.y.stop)
    for x, low, high, words in spans:
        group = chart.mark(words)
        add_node(group, "line", "span", x1=chart.x(x), x2=chart.x(x), y1=chart.y(low), y2=chart.y(high))
    for line in series:
        if line.line and len(line.points) > 1:
            chart.line([(x, y) for x, y, _ in line.points], line.style)
    for line in series:
        for x, y, words in line.points:
            chart.point(chart.mark(f"{line.name}, {words}"), x, y, line.style, 3)
    if ring is not None:
        x, y, words = ring
        add_node(chart.mark(words), "circle", "ring", cx=chart.x(x), cy=chart.y(y), r=9)
    return chart.markup()


def bars(title: str, rows: Sequence[tuple[str, float, str]]) -> Markup:
    """A horizontal bar for each model or file, on a common scale from 0.

    Args:
        title (`str`): What is measured.
        rows (`Sequence[tuple[str, float, str]]`): Name, value (at least 0), and the value in words.
    """
    step, name_width, said_width = 26, 84, 84
    root = new_drawing(title, NARROW, step * len(rows) + 4)
    most = max((value for _, value, _ in rows), default=0) or 1
    room = NARROW - name_width - said_width
    for index, (name, value, words) in enumerate(rows):
        middle = step * index + step / 2 + 2
        add_text(root, name, name_width - 8, middle + 4, "label end")
        length = max(1.0, room * value / most)
        add_node(root, "rect", _style_of(name), x=name_width, y=middle - 8, width=length, height=16, rx=2)
        add_text(root, words, name_width + length + 6, middle + 4, "value")
    return finished(root)


@dataclass(frozen=True)
class ScoredLine:
    """A scored cut as a reader sees it.

    Args:
        segments (`tuple[tuple[int, int], ...]`): `[start, stop)` of each.
        kl (`float`): Nats per token.
        error (`float` or `None`): Its standard error.
        num_rows (`int` or `None`): Rows that it was measured on.
        fewer (`bool`): Whether others were measured on more.
        chosen (`bool`): Whether it is the choice.
        words (`str`): All of this.
    """

    segments: tuple[tuple[int, int], ...]
    kl: float
    error: float | None
    num_rows: int | None
    fewer: bool
    chosen: bool
    words: str


def layers_text(segments: Iterable[Sequence[int]]) -> str:
    """`"13 to 18"`, or `"2 and 7 to 8"`: the layers in `[start, stop)` segments."""
    return " and ".join(str(a) if b == a + 1 else f"{a} to {b - 1}" for a, b in segments)


def _over_layers(title: str, search: Mapping[str, Any], values: Sequence[float], width: int, height: int) -> Chart:
    x = Scale(-0.75, search["num_layers"] - 0.25, LEFT, width - RIGHT)
    log = min(values) > 0 and max(values) > _LOGARITHMIC * min(values)
    return Chart(title, x, scale_over(values, height - BOTTOM, TOP, log=log), width, height)


def _draw_cut(chart: Chart, cut: ScoredLine) -> None:
    said = " ".join(f"{start}-{stop}" for start, stop in cut.segments)
    group = chart.mark(cut.words, segments=said)
    style = f"{'s1' if cut.chosen else 's0'}{' fewer' if cut.fewer else ''}"
    if len(cut.segments) > 1:
        for start, stop in cut.segments:
            place = {
                "x1": chart.x(start - 0.5),
                "x2": chart.x(stop - 0.5),
                "y1": chart.y(cut.kl),
                "y2": chart.y(cut.kl),
            }
            if not chart.crowded:
                add_node(group, "line", "target", **place)
            thin = " thin" if chart.crowded and not cut.chosen else ""
            add_node(group, "line", f"bar {style}{thin}", **place)
        return
    x, low, high = cut.segments[0][0], cut.kl, cut.kl
    if is_known(cut.error):
        low, high = max(chart.y.low, cut.kl - cut.error), min(chart.y.high, cut.kl + cut.error)
        add_node(group, "line", f"error {style}", x1=chart.x(x), x2=chart.x(x), y1=chart.y(low), y2=chart.y(high))
    chart.point(group, x, cut.kl, f"dot {style}")
    if cut.chosen:
        add_node(group, "circle", "ring", cx=chart.x(x), cy=chart.y(cut.kl), r=9)


def _neighbours(cuts: Sequence[ScoredLine]) -> Iterator[list[ScoredLine]]:
    """Runs of cuts whose first layers follow one another; a start that was not scored breaks the line."""
    run: list[ScoredLine] = []
    for cut in cuts:
        if run and cut.segments[0][0] > run[-1].segments[0][0] + 1:
            yield run
            run = []
        run.append(cut)
    if run:
        yield run


def _style_of(name: str) -> str:
    return {"dense": "s2", "cut": "s1", "tuned": "s0"}.get(name, "s3")
