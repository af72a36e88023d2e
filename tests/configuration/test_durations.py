import math

import pytest

from optimum_clp.configuration.clp_config import CLPConfig
from optimum_clp.configuration.durations import seconds
from optimum_clp.errors import ConfigurationError


@pytest.mark.parametrize(
    ("written", "expected"),
    [(90, 90), (0.5, 0.5), ("90s", 90), ("20min", 1200), ("1h30min", 5400), ("2 h", 7200), ("1d 1.5h", 91800)],
)
def test_lengths_of_time_in_seconds(written, expected):
    assert seconds(written) == expected


@pytest.mark.parametrize("written", ["", "20", "20 minutes", "min", "-5min", "5min1h", None, True, math.nan, [1]])
def test_what_is_no_length_of_time(written):
    with pytest.raises(ValueError, match="is no length of time"):
        seconds(written)


@pytest.mark.parametrize("written", ["0s", 0, -1, "soon", "400d", 1e300, "9" * 400, 10**400])
def test_a_budget_is_a_length_of_time_above_0(written):
    with pytest.raises(
        ConfigurationError, match="budget is .*: it must be a length of time above 0 and below a year, such as 90 "
    ):
        CLPConfig(budget=written)
    assert CLPConfig(budget="20min").budget == "20min"
