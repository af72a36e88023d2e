import math

import pytest

from optimum_clp.configuration.clp_config import CLPConfig
from optimum_clp.configuration.sizes import size_in_bytes
from optimum_clp.errors import ConfigurationError


@pytest.mark.parametrize(
    ("written", "expected"),
    [(90, 90), ("90", 90), ("24GiB", 24 * 2**30), ("1.5 gb", 1_500_000_000), ("500MB", 500_000_000), ("2kib", 2048)],
)
def test_sizes_in_bytes(written, expected):
    assert size_in_bytes(written) == expected


@pytest.mark.parametrize("written", ["", "GiB", "24 Gi", "-5GB", "1GB2MB", None, True, math.nan, [1]])
def test_what_is_no_size(written):
    with pytest.raises(ValueError, match="is no size"):
        size_in_bytes(written)


@pytest.mark.parametrize("written", ["0GB", 0, -1, "much", "99999999TB", 1e300, "9" * 400, 10**400])
def test_a_bound_on_memory_is_a_size_above_0(written):
    with pytest.raises(
        ConfigurationError, match='max_memory is .*: it must be a size of memory above 0, such as "24GiB"'
    ):
        CLPConfig(max_memory=written)
    assert CLPConfig(max_memory="24GiB").max_memory == "24GiB"
