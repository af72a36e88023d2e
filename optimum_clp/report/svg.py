"""Axes and marks of a chart as inline SVG, made with the standard library, which escapes whatever a report says.

Colours come from the page's style sheet, by class, so that one chart serves light and dark. Each mark says what it is in
its `aria-label`, which the page shows beside the pointer.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree

from markupsafe import Markup

LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 38


@dataclass(frozen=True)
class Scale:
    """From values to places.

    Args:
        low, high (`float`): The values at both ends; unlike, and above 0 for a logarithmic scale.
        start, stop (`float`): Their places, in pixels.
        log (`bool`): Logarithmic.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value, in pixels."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log10(max(number, self.low)) for number in (value, low, high))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self, number: int) -> list[float]:
        """About `number` round values within the scale."""
        if self.log:
            return self._log_ticks(number)
        step = 10 ** math.floor(math.log10((self.high - self.low) / number))
        step *= next((k for k in (1, 2, 5, 10) if (self.high - self.low) / (k * step) <= number), 10)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _log_ticks(self, number: int) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        parts = next((p for p in ((1, 2, 5), (1, 3), (1,)) if len(p) * len(decades) <= 2 * number), (1,))
        every = max(1, math.ceil(len(decades) / number))
        found = [part * 10.0**decade for decade in decades if decade % every == 0 for part in parts]
        return [value for value in found if self.low <= value <= self.high]


@dataclass
class Chart:
    """A drawing with two axes.

    Args:
        title (`str`): What a reader who does not see it is told.
        x, y ([`Scale`]): Of the two axes.
        width, height (`int`): Pixels.

    Attributes:
        crowded (`bool`): So many marks that none is made larger to be hit.
    """

    title: str
    x: Scale
    y: Scale
    width: int
    height: int
    crowded: bool = field(default=False, init=False)
    root: ElementTree.Element = field(init=False)

    def __post_init__(self) -> None:
        self.root = new_drawing(self.title, self.width, self.height)

    def axes(self, x_label: str, y_label: str) -> None:
        """Grid, ticks and what they count."""
        left, right, bottom, top = self.x.start, self.x.stop, self.y.start, self.y.stop
        for value in self.y.ticks(5):
            height = self.y(value)
            add_node(self.root, "line", "grid", x1=left, x2=right, y1=height, y2=height)
            add_text(self.root, f"{value:g}", left - 6, height + 4, "tick end")
        for value in self.x.ticks(max(3, (self.width - LEFT) // 80)):
            place = self.x(value)
            add_node(self.root, "line", "axis", x1=place, x2=place, y1=bottom, y2=bottom + 4)
            add_text(self.root, in_units(value), place, bottom + 17, "tick middle")
        add_node(self.root, "line", "axis", x1=left, x2=right, y1=bottom, y2=bottom)
        add_text(self.root, x_label, (left + right) / 2, bottom + 33, "label middle")
        label = add_text(self.root, y_label, 0, 0, "label middle")
        label.set("transform", f"translate(12 {(top + bottom) / 2:.1f}) rotate(-90)")

    def line(self, points: Iterable[tuple[float, float]], style: str) -> None:
        """A line through values."""
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        add_node(self.root, "polyline", f"line {style}", points=path)

    def mark(self, tip: str, **data: str) -> ElementTree.Element:
        """A group that says `tip` when it is pointed at."""
        group = add_node(self.root, "g", "mark", role="img")
        group.set("aria-label", tip)
        for name, value in data.items():
            group.set(f"data-{name}", value)
        return group

    def point(self, group: ElementTree.Element, x: float, y: float, style: str, radius: float = 4) -> None:
        """A dot, with a larger one that cannot be seen and is easier to hit."""
        place = {"cx": self.x(x), "cy": self.y(y)}
        if not self.crowded:
            add_node(group, "circle", "target", **place, r=radius + 6)
        add_node(group, "circle", style, **place, r=radius)

    def markup(self) -> Markup:
        """The drawing as it goes into the page."""
        return finished(self.root)


def scale_over(values: Sequence[float], start: float, stop: float, *, log: bool = False, zero: bool = True) -> Scale:
    """A scale that holds all values: from 0, or a little beyond the outermost ones."""
    low, high = min(values), max(values)
    if log:
        return Scale(low / 1.3, high * 1.3, start, stop, True)
    if zero:
        low, high = min(0.0, low), max(0.0, high) * 1.06
    margin = 0.03 * (high - low)
    low, high = (low, high) if zero else (low - margin, high + margin)
    return Scale(low, high if high > low else low + 1, start, stop)


def in_units(value: float) -> str:
    """A tick of an axis that counts: 2,000,000 is `2 M`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 10 * size or value >= size > 1e3:
            return f"{value / size:g} {unit}"
    return f"{value:,g}"


def new_drawing(title: str, width: int, height: int) -> ElementTree.Element:
    """An empty drawing, `width` by `height` pixels, which shrinks where there is less room; `title` is for who does not see it."""
    root = ElementTree.Element("svg", {"viewBox": f"0 0 {width} {height}", "width": str(width), "height": str(height)})
    root.set("class", "chart")
    root.set("role", "group")
    root.set("aria-label", title)
    return root


def add_node(parent: ElementTree.Element, tag: str, style: str, **attributes: float | str) -> ElementTree.Element:
    """A node in `parent`: its class, and attributes in pixels or as they are; `add_node(g, "circle", "dot", cx=3.0)`."""
    shown = {
        key: value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
        for key, value in attributes.items()
    }
    return ElementTree.SubElement(parent, tag, {"class": style, **shown})


def add_text(parent: ElementTree.Element, words: str, x: float, y: float, style: str) -> ElementTree.Element:
    """Words at a place: text of the node, never markup."""
    node = add_node(parent, "text", style, x=x, y=y)
    node.text = words
    return node


def finished(root: ElementTree.Element) -> Markup:
    """A drawing as it goes into a page."""
    # the only place where text becomes markup: the serializer has escaped it
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))
