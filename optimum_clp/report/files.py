"""The files of an output folder as rows of a table, for card and page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..precisions import FLOAT32, PRECISIONS
from .tables import Column, format_bytes, is_known, record_cells

# max|difference| / max|logit| of the files of benchmarks/ and of what newcomers made; int4: 0.16 to 0.44, int8: 0.016 to 0.022
_USUAL = {
    "float32": "below 1e-05",
    "float16": "0.001 to 0.03",
    "int8": "0.01 to 0.03",
    "int4": "0.1 to 0.5",
    "int4_float16": "0.1 to 0.5",
}
_COLUMNS = (
    Column("file", "file"),
    Column("weights", "weights"),
    Column("bytes", "size", format_bytes),
    Column("bits_per_weight", "bits per weight", ".2f"),
    Column("rounding", "rounded by"),
    Column("cost", "perplexity added", "+.1%"),
    Column("logits", "worst logit"),
)


def file_cells(
    report: Mapping[str, Any], folder: Path | None, left_out: Sequence[str] = (), code: bool = False
) -> list[list[str]]:
    """A row of cells for each file of weights, the head first; empty if there are none.

    Args:
        report (`Mapping`): The report's values: its `export`, `quantization` and `evaluation`.
        folder (`Path` or `None`): Where the checkpoint's files lie, which are in no report.
        left_out (`Sequence[str]`): Keys of columns that are not shown.
        code (`bool`): Names of files in Markdown's marks of code.
    """
    weights = sorted(folder.glob("*.safetensors")) if folder is not None else []
    records: list[dict[str, Any]] = [{"file": path.name, "bytes": path.stat().st_size} for path in weights]
    perplexities = {row["name"]: row["perplexity"] for row in (report["evaluation"] or {}).get("rows") or ()}
    for entry in (report["export"] or {}).get("files", ()):
        error, usual = entry.get("max_relative_error"), _USUAL.get(entry["weights"])
        logits = None if not is_known(error) else f"{error:.2g}" + (f" (usual: {usual})" if usual else "")
        records.append({**entry, "logits": logits, "cost": _cost(entry["weights"], perplexities)})
    records += [
        {**entry, "file": f"{entry['folder']}/", "weights": f"{entry['weights']} (quanto)"}
        for entry in report["quantization"] or ()
    ]
    for record in records:
        record["file"] = f"`{record['file']}`" if code else record["file"]
    columns = [column for column in _COLUMNS if column.key not in left_out]
    return record_cells(records, columns, missing="") if records else []


def _cost(weights: str, perplexities: Mapping[str, float | None]) -> float | None:
    """What rounding has added to the perplexity, as a share of it; `None` of floats, and where it was not measured."""
    precision = PRECISIONS.get(weights)
    if precision is None or not precision.is_rounded:
        return None
    floats = next((perplexities[name] for name in (FLOAT32.row_name, "tuned", "cut") if name in perplexities), None)
    own = perplexities.get(precision.row_name)
    if not is_known(own) or not is_known(floats) or floats <= 0:
        return None
    return round(own / floats - 1, 3) + 0.0  # no -0.0
