import math
from xml.etree import ElementTree

import pytest
from report_example import example_report

from optimum_clp.report.charts import (
    Scale,
    ScoredLine,
    Series,
    bars,
    curves,
    importance,
    landscape,
    layers_text,
    strip,
)

SEARCH = {"num_layers": 16, "segments": [[7, 10]], "layer_scores": []}


def cut(start, stop, kl, **changes):
    values = {"error": None, "num_rows": 8, "fewer": False, "chosen": False, "words": f"cut {start}"}
    return ScoredLine(((start, stop),), kl, **{**values, **changes})


def marks(markup):
    return [group for group in ElementTree.fromstring(markup).iter("g") if group.get("class") == "mark"]


@pytest.mark.parametrize(
    ("scale", "value", "place"),
    [
        (Scale(0, 10, 100, 200), 5, 150),
        (Scale(0, 10, 200, 100), 10, 100),  # upwards
        (Scale(1, 100, 0, 50, log=True), 10, 25),
        (Scale(1, 100, 0, 50, log=True), -3, 0),  # below all that is shown
    ],
)
def test_a_value_has_its_place(scale, value, place):
    assert scale(value) == pytest.approx(place)


@pytest.mark.parametrize(
    ("scale", "number", "ticks"),
    [
        (Scale(0, 1, 0, 100), 5, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (Scale(-0.75, 29.25, 0, 100), 4, [0, 10, 20]),
        (Scale(0.9, 12, 0, 100, log=True), 5, [1, 3, 10]),
        (Scale(1e-5, 1e5, 0, 100, log=True), 5, [1e-3, 1, 1e3]),
    ],
)
def test_ticks_are_round_and_within(scale, number, ticks):
    assert scale.ticks(number) == pytest.approx(ticks)


def test_every_cut_is_a_mark_at_its_place_and_the_choice_is_ringed():
    cuts = [cut(i, i + 3, kl) for i, kl in enumerate((4.0, 2.0, 1.0))]
    cuts[1] = cut(1, 4, 2.0, chosen=True, error=0.5)
    drawn = marks(landscape(SEARCH, cuts, 860))
    assert [mark.get("data-segments") for mark in drawn] == ["0-3", "2-5", "1-4"]  # the choice last, on top
    assert [mark.get("aria-label") for mark in drawn] == ["cut 0", "cut 2", "cut 1"]
    dots = [next(c for c in mark.iter("circle") if "dot" in c.get("class")) for mark in drawn]
    xs, ys = ([float(dot.get(key)) for dot in dots] for key in ("cx", "cy"))
    assert xs[0] < xs[2] < xs[1] and xs[1] - xs[0] == pytest.approx(2 * (xs[2] - xs[0]), abs=0.2)
    # linear, from 0: heights above the foot are as the values
    foot = 300 - 38
    assert (foot - ys[0]) / (foot - ys[2]) == pytest.approx(2, rel=0.01)
    rings = [mark for mark in drawn if any(c.get("class") == "ring" for c in mark)]
    assert rings == [drawn[2]] and any("error" in node.get("class") for node in drawn[2])


def test_several_segments_are_bars_over_their_layers():
    both = ScoredLine(((2, 4), (9, 10)), 1.5, None, 8, False, False, "two")
    (mark,) = marks(landscape(SEARCH, [both], 860))
    found = [line for line in mark.iter("line") if "bar" in line.get("class")]
    lengths = [float(line.get("x2")) - float(line.get("x1")) for line in found]
    assert lengths[0] == pytest.approx(2 * lengths[1], abs=0.3) and mark.get("data-segments") == "2-4 9-10"


def test_what_has_no_figure_is_not_drawn():
    assert landscape(SEARCH, [cut(0, 3, math.nan)], 860) is None
    assert importance(SEARCH, [None] * 16, set(), 860) is None
    assert curves("t", [Series("a", [], "s0")], "x", "y", 860) is None


def test_layers_that_went_are_marked():
    boxes = list(ElementTree.fromstring(strip(SEARCH, {7, 8, 9}, 340)).iter("rect"))
    assert [int(box.get("data-layer")) for box in boxes if "gone" in box.get("class")] == [7, 8, 9]
    assert len(boxes) == 16
    drawn = marks(importance(SEARCH, [float(i) for i in range(16)], {7}, 340))
    assert drawn[7].get("aria-label") == "Layer 7 (removed): 7" and len(drawn) == 16


def test_bars_are_as_long_as_their_values():
    root = ElementTree.fromstring(
        bars("size", [("dense", 200.0, "200 B"), ("onnx", 50.0, "50 B"), ("none", 0.0, "0 B")])
    )
    lengths = [float(node.get("width")) for node in root.iter("rect")]
    assert lengths[0] == pytest.approx(4 * lengths[1], abs=0.3) and lengths[2] == 1
    assert bars("nothing", [("dense", 0.0, "0")])


def test_one_value_and_equal_values_have_a_scale():
    one = Series("a", [(3, 0.5, "p")], "s0")
    for chart in (curves("t", [one], "x", "y", 860, log_x=True), landscape(SEARCH, [cut(0, 1, 0.0)], 340)):
        assert "nan" not in chart and "inf" not in chart


def test_text_cannot_leave_its_place():
    evil = '</text></svg><script>alert(1)</script>"><img src=x onerror=alert(2)>'
    for markup in (
        landscape(SEARCH, [cut(0, 3, 1.0, words=evil)], 860),
        bars(evil, [(evil, 1.0, evil)]),
        curves(evil, [Series(evil, [(1, 1.0, evil)], "s0")], evil, evil, 340, levels={evil: 1.0}),
    ):
        root = ElementTree.fromstring(markup)
        assert {node.tag for node in root.iter()} <= {"svg", "g", "line", "polyline", "circle", "rect", "text"}
        assert "<script" not in markup and "<img" not in markup


def test_layers_in_words():
    assert layers_text([[13, 19]]) == "13 to 18" and layers_text([(2, 3), (7, 9)]) == "2 and 7 to 8"
    assert example_report().search["segments"] == [[7, 10]]
