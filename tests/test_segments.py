import pytest

from optimum_clp.errors import ConfigurationError
from optimum_clp.segments import (
    LayerSegment,
    candidate_segments,
    check_segments,
    endpoint_layers,
    kept_layers,
    number_of_layers_to_remove,
)


@pytest.mark.parametrize(
    ("ratio", "layers", "count"), [(0.2, 16, 3), (0.1, 5, 1), (0.3, 5, 2), (0.25, 2, 1), (0.2, 80, 16), (0.5, 3, 2)]
)
def test_number_of_layers_is_rounded_half_up(ratio, layers, count):
    assert number_of_layers_to_remove(ratio, layers) == count


@pytest.mark.parametrize(
    ("ratio", "layers", "message"),
    [
        (0.05, 5, "pruning_ratio is 0.05: it removes none of the model's 5 layers. The nearest valid ratio is 0.2."),
        (0.95, 5, "pruning_ratio is 0.95: it leaves none of the model's 5 layers. The nearest valid ratio is 0.8."),
        (0.2, 1, "a model of one layer has no layer to spare"),
    ],
)
def test_ratios_that_remove_nothing_or_all_are_refused(ratio, layers, message):
    with pytest.raises(ConfigurationError) as error:
        number_of_layers_to_remove(ratio, layers)
    assert message in str(error.value)


def test_the_nearest_ratio_that_the_message_names_works():
    for layers in range(2, 100):
        assert number_of_layers_to_remove(float(f"{1 / layers:.4g}"), layers) == 1
        assert number_of_layers_to_remove(float(f"{(layers - 1) / layers:.4g}"), layers) == layers - 1


@pytest.mark.parametrize("bounds", [(-1, 2), (2, 2), (3, 2), (0.5, 2)])
def test_a_segment_needs_ascending_integers(bounds):
    with pytest.raises(ConfigurationError, match="a segment is a half-open range of layers"):
        LayerSegment(*bounds)


def test_candidates_are_all_starts():
    assert [s.start for s in candidate_segments(5, 2)] == [0, 1, 2, 3]
    assert all(len(s) == 2 for s in candidate_segments(5, 2))


def test_segments_are_sorted_and_touching_ones_merge():
    assert check_segments([(6, 8), (1, 3), (3, 4)], 10) == (LayerSegment(1, 4), LayerSegment(6, 8))


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "at least one segment is needed"),
        ([(4, 9)], "the model has 8 layers. Keep every stop at or below 8"),
        ([(1, 4), (3, 5)], "segments must not overlap"),
        ([(0, 8)], "no layer of 8 would be left"),
    ],
)
def test_segments_that_do_not_fit_are_refused(segments, message):
    with pytest.raises(ConfigurationError, match=message):
        check_segments(segments, 8)


@pytest.mark.parametrize(
    ("segments", "width", "expected"),
    [
        ([(4, 7)], 1, [3, 4]),
        ([(4, 7)], 2, [2, 3, 4, 5]),
        ([(0, 2)], 1, [0]),
        ([(7, 10)], 1, [6]),
        ([(1, 3), (5, 6)], 1, [0, 1, 2, 3]),
    ],
)
def test_endpoints_are_the_kept_layers_next_to_the_cut(segments, width, expected):
    segments = [LayerSegment(*s) for s in segments]
    assert endpoint_layers(segments, 10, width) == expected
    kept = kept_layers(segments, 10)
    removed = set(range(10)) - set(kept)
    if width == 1:
        assert all({kept[j] - 1, kept[j] + 1} & removed for j in expected)
