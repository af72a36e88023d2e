import json
import math

import pytest

from optimum_clp.configuration.clp_config import CLPConfig
from optimum_clp.configuration.sizes import accelerator_memory, main_memory, memory_bounds, size_in_bytes
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


@pytest.mark.parametrize(
    ("written", "main", "accelerators"),
    [
        (None, None, {}),
        ("24GiB", 24 * 2**30, {}),
        ("0=20GiB,cpu=64GiB", 64 * 2**30, {0: 20 * 2**30}),
        (" 1 = 1GB , 0 = 2GB", None, {0: 2 * 10**9, 1: 10**9}),
        ({0: "20GiB", "cpu": 5}, 5, {0: 20 * 2**30}),
        ({"cpu": "1KB"}, 1000, {}),
    ],
)
def test_a_bound_for_each_device(written, main, accelerators):
    assert (main_memory(written), accelerator_memory(written)) == (main, accelerators)
    recipe = CLPConfig(max_memory=written)
    again = CLPConfig.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe and memory_bounds(again.max_memory) == memory_bounds(written)


@pytest.mark.parametrize(
    "written",
    ["cuda=1GB", "0=", "=1GB", "0=1GB,0=2GB", "cpu=0", "0=1GB,,cpu=1GB", {}, {0: "1GB", "0": "1GB"}]
    + [{0: None}, {True: "1GB"}, {-1: "1GB"}, {"cpu": "99999999TB"}, {1.0: "1GB"}, {"disk": "1GB"}],
)
def test_what_is_no_bound_for_a_device(written):
    with pytest.raises(ConfigurationError, match=r'or one for each device: "0=20GiB,cpu=64GiB", or None\. Give'):
        CLPConfig(max_memory=written)
