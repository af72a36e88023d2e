"""What the contract suite found for every architecture, as `docs/architectures.json`, and the table made from it.

`make architectures` runs the suite, its slow tier included, in both environments and writes both files. In CI every
test of the suite compares what it finds with the record, and one test compares the table with the record.
"""

import json
from pathlib import Path

import transformers

from optimum_clp.architecture.table import REFUSED

DOCS = Path(__file__).parent.parent / "docs"
RECORD, TABLE = DOCS / "architectures.json", DOCS / "architectures.md"
MAJOR = transformers.__version__.partition(".")[0]
START, END = "<!-- table made by `make architectures`: do not edit -->", "<!-- end of the table -->"
COLUMNS = ("cut", "gate", "tune", "quanto_int8", "quanto_int4", "onnx_float", "onnx_int8", "onnx_int4")
HEADINGS = ("cut", "gate", "tune", "quanto int8", "quanto int4", "ONNX float", "ONNX int8", "ONNX int4")


def load_record():
    """`{major version: {"transformers": version, "types": {name: {column: text}}}}`."""
    return json.loads(RECORD.read_text()) if RECORD.is_file() else {}


def recorded(name: str) -> dict:
    """What is on record for one member of the zoo and the installed transformers."""
    return load_record().get(MAJOR, {}).get("types", {}).get(name, {})


def merge(found: dict[str, dict[str, str]]) -> None:
    """Put what a run has found into the record; what it has not looked at stays. Types that are gone are dropped."""
    from zoo import ZOO

    record = load_record()
    types = record.setdefault(MAJOR, {}).setdefault("types", {})
    record[MAJOR]["transformers"] = transformers.__version__
    for name, columns in found.items():
        types.setdefault(name, {}).update(columns)
    names = {tiny.name for tiny in ZOO}
    record[MAJOR]["types"] = {name: types[name] for name in sorted(types) if name in names}
    RECORD.write_text(json.dumps(dict(sorted(record.items())), indent=1) + "\n")


def render(record: dict) -> str:
    """The table as Markdown; one cell for both versions where they agree, else `5.x / 4.57`."""
    five, four = record.get("5", {"types": {}})["types"], record.get("4", {"types": {}})["types"]
    versions = " and ".join(record[major]["transformers"] for major in sorted(record, reverse=True))
    notes: dict[str, str] = {}

    def cell(columns: dict, column: str) -> str:
        text = columns.get(column, "not run")
        what, colon, reason = text.partition(": ")
        if not colon:
            return what
        return f"{what} [{notes.setdefault(reason, str(len(notes) + 1))}]"

    lines = [
        f"transformers {versions}. One entry: the same in both, or the type is in one only (column *in*); `a / b`: transformers 5 / 4.",
        "",
        "| model type | in | " + " | ".join(HEADINGS) + " |",
        "|---" * (len(HEADINGS) + 2) + "|",
    ]
    for name in sorted(five.keys() | four.keys()):
        present = [types[name] for types in (five, four) if name in types]
        where = "both" if len(present) == 2 else "5" if name in five else "4"
        cells = []
        for column in COLUMNS:
            texts = list(dict.fromkeys(cell(columns, column) for columns in present))
            cells.append(" / ".join(texts))
        lines.append(f"| `{name}` | {where} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {reason}" for reason, number in notes.items()), ""]
    lines += ["Refused, before any weight is read:", "", "| model type | why | what helps |", "|---|---|---|"]
    reasons: dict[tuple, list[str]] = {}
    for model_type, why in REFUSED.items():
        reasons.setdefault(why, []).append(f"`{model_type}`")
    lines += [f"| {', '.join(types)} | {why[0]} | {why[1]} |" for why, types in reasons.items()]
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page with its table made anew."""
    before, _, rest = text.partition(START)
    return f"{before}{START}\n\n{render(load_record())}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    TABLE.write_text(page(TABLE.read_text()))
