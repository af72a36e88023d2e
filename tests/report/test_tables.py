import math

import pytest

from optimum_clp.report.tables import (
    Column,
    cell,
    describe_loss,
    format_bytes,
    format_count,
    is_known,
    markdown_table,
    record_cells,
    text_table,
)

ROWS = [("name", "n", "why"), ("a", 1, ""), ("longer", 23, "so")]


def test_columns_are_as_wide_as_their_widest_cell():
    assert text_table(ROWS, "lrl").splitlines() == ["name     n  why", "a        1", "longer  23  so"]
    assert text_table(ROWS).splitlines() == ["name     n  why", "a        1", "longer  23   so"]
    assert text_table(ROWS[1:], "lrl", widths=(8, 4)).splitlines() == ["a            1", "longer      23  so"]
    assert text_table(ROWS, "l", ruled=True).splitlines()[1] == "------  --  ---"
    assert text_table([]) == ""


def test_markdown_says_how_columns_are_aligned():
    assert markdown_table([("a", "b"), ("1", "2")], "lr").splitlines() == ["| a | b |", "|:--|--:|", "| 1 | 2 |"]
    assert markdown_table([("a", "b")]).splitlines() == ["| a | b |", "| --- | --- |"]
    assert markdown_table([("a",)], "lr").splitlines()[1] == "|:--|"


def test_a_column_without_any_value_is_left_out():
    columns = (Column("name", "who"), Column("bytes", "size", format_bytes), Column("kl", "KL", ".2f"))
    records = [{"name": "a", "bytes": 2000, "kl": None}, {"name": "b"}]
    assert record_cells(records, columns) == [["who", "size"], ["a", "2.00 kB"], ["b", "-"]]
    assert record_cells([{**records[0], "kl": math.nan}], columns, missing="") == [
        ["who", "size", "KL"],
        ["a", "2.00 kB", ""],
    ]


@pytest.mark.parametrize(
    ("value", "show", "text"),
    [
        (None, ".2f", "-"),
        (math.nan, ".2f", "-"),
        (math.inf, ".2f", "-"),
        (0.125, "+.1%", "+12.5%"),
        (1234, ",", "1,234"),
    ],
)
def test_a_cell_is_a_value_or_a_dash(value, show, text):
    assert cell(value, show) == text
    assert is_known(value) == (text != "-")


def test_units_are_decimal():
    assert [format_bytes(n) for n in (0, 999, 1000, 2_500_000, 3e9, 1.3e12)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "2.50 MB",
        "3.00 GB",
        "1.30 TB",
    ]
    assert [format_count(n) for n in (12, 1500, 3.7e6, 8e9, 2e12)] == [
        "12",
        "1.50 k",
        "3.70 M",
        "8.00 B",
        "2.00 T",
    ]


def test_a_loss_is_named_by_its_parts():
    assert describe_loss({"kd": 1.0, "ce": 0.0}) == "kd"
    assert describe_loss({"kd": 0.9, "ce": 0.1, "hidden": 0.0}) == "0.9 kd + 0.1 ce"
