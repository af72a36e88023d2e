"""`report.html`: the report as a page to look at, in one file that needs no network.

Made with Jinja, which escapes all that a report says (names and text come from strangers), and plain SVG: plotly, which was
looked at, is 3 to 4 MB in every output folder, and its charts cannot be styled for a dark page by CSS alone. The page's own
policy lets nothing run but the one script in it, whose hash it names, and nothing be fetched.
"""

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..disk_room import write_whole
from . import charts
from .charts import layers_text
from .drawings import search_drawings, tuning_drawings
from .files import file_cells
from .generation import asked, generation_cells, requirement_line
from .legend import GLOSSARY, meaning
from .origin import base_name, origin_of
from .public import public_config
from .recognition import recognition_tables
from .report import CLPReport
from .tables import Column, cell, format_bytes, format_count, is_known, memory_cell, record_cells

if TYPE_CHECKING:
    from ..configuration.clp_config import CLPConfig

REPORT_PAGE = "report.html"
_PARTS = Path(__file__).parent
# shown from the start; the others can be switched on
_FIRST_SHOWN = ("dense", "cut", "tuned", "onnx int4")
_NAMES = {"onnx": "float ONNX", "onnx int8": "int8 ONNX", "onnx int4": "int4 ONNX"}
_ROWS = (
    Column("num_layers", "layers"),
    Column("num_parameters", "parameters", format_count),
    Column("bytes", "size", format_bytes),
    Column("perplexity", "perplexity", ".3f"),
    Column("kl", "KL to dense (nats)", ".4f"),
    Column("top1_agreement", "same first choice", ".1%"),
    Column("prefill_tokens_per_second", "prompt tokens/s", ",.0f"),
    Column("decode_tokens_per_second", "written tokens/s", ",.1f"),
    Column("memory", "RAM", memory_cell),
)
_BARS = ("bytes", "perplexity", "kl", "decode_tokens_per_second", "prefill_tokens_per_second")


def write_report_page(report: CLPReport, config: "CLPConfig", folder: str | os.PathLike, *, title: str = "") -> Path:
    """Write `report.html` into `folder`.

    Args:
        report ([`CLPReport`]): What was done and measured.
        config ([`CLPConfig`]): The recipe; local folders in it are left out.
        folder (`str` or `os.PathLike`): The output folder; it must exist.
        title (`str`): What stands above it; made from the dense model's name if not given.

    Returns:
        `Path`: The file.
    """
    path = Path(folder) / REPORT_PAGE
    # a lone surrogate, which JSON may hold, has no UTF-8
    write_whole(path, report_page(report, config, Path(folder), title=title), errors="replace")
    return path


def report_page(report: CLPReport, config: "CLPConfig", folder: Path | None = None, *, title: str = "") -> str:
    """The page as text; with the sizes of the weights in `folder`, if there is one."""
    values = report.to_dict()
    style, script = (_part(name) for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    environment = Environment(
        loader=FileSystemLoader(_PARTS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["meaning"] = meaning
    return environment.get_template("page.html.jinja").render(
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        title=title or f"{base_name(report.base_model)}-clp",
        base=_base(report),
        summary=_summary(values),
        report=values,
        names=_NAMES,
        measures=_measures(values),
        measured_on=f"{report.measured_on()} {report.memory_needed()}" if values["evaluation"] else "",
        tiles=_tiles(values),
        verdicts=(values["evaluation"] or {}).get("verdicts", ()),
        requirements=[requirement_line(entry) for entry in (values["evaluation"] or {}).get("requirements", ())],
        search=search_drawings(values["search"], values["cut"]),
        tuning=tuning_drawings(values["tuning"]),
        speech=_speech(values["evaluation"]),
        recognition=list(recognition_tables(values["evaluation"] or {})),
        files=file_cells(values, folder),
        glossary=GLOSSARY,
        recipe=_recipe(report, config),
    )


def _part(name: str) -> str:
    return (_PARTS / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a content security policy calls an inline style or script by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _base(report: CLPReport) -> dict[str, str | None]:
    repository = origin_of(report.base_model).repository
    # what is in the path of an address can be nothing else there
    link = f"https://huggingface.co/{quote(repository, safe='/')}" if repository else None
    return {"name": repository or base_name(report.base_model), "link": link}


def _summary(values: Mapping[str, Any]) -> str:
    """What follows the dense model's name."""
    kind, cut, tuning = (values["base_model"] or {}).get("model_type"), values["cut"], values["tuning"]
    text = f" ({kind})" if kind else ""
    if cut:
        which = "layer" if len(cut["removed_layers"]) == 1 else "layers"
        text += f" without {which} {layers_text(cut['segments'])} of its {cut['num_layers_before']}"
    return f"{text}{', tuned next to the cut' if tuning and tuning['improved'] else ''}."


def _shown_name(name: str) -> str:
    return _NAMES.get(name, name)


def _measures(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """A table with a row for each model or file, and bars for the figures that are looked at first."""
    rows = (values["evaluation"] or {}).get("rows") or []
    if not rows:
        return None
    named = [{**row, "name": _shown_name(row["name"])} for row in rows]
    drawn = []
    for column in _ROWS:
        if column.key in _BARS:
            known = [(row["name"], row[column.key]) for row in named if is_known(row.get(column.key))]
            bars = [(name, value, cell(value, column.show)) for name, value in known]
            if bars:
                drawn.append((column.title, charts.bars(column.title, bars)))
    return {"cells": record_cells(named, (Column("name", ""), *_ROWS)), "bars": drawn}


def _tiles(values: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The few figures that stand first: what it is, the figure, and what it was before."""
    cut = values["cut"]
    if cut:
        gone, before = len(cut["removed_layers"]), cut["num_layers_before"]
        yield "layers", f"{cut['num_layers_after']}", f"of {before}; {layers_text(cut['segments'])} removed"
        share = cut["num_parameters_after"] / cut["num_parameters_before"] - 1
        was = f"of {format_count(cut['num_parameters_before'])} ({share:+.1%})"
        yield "parameters", format_count(cut["num_parameters_after"]), was if gone else ""
    rows = {row["name"]: row for row in (values["evaluation"] or {}).get("rows") or ()}
    dense, own = rows.get("dense"), rows.get("tuned") or rows.get("cut")
    if dense and own:
        if is_known(own.get("kl")):
            yield "KL to dense", f"{own['kl']:.3f}", "nats per token"
        for column in _ROWS:
            if column.key in ("perplexity", "decode_tokens_per_second") and is_known(own.get(column.key)):
                yield (
                    column.title,
                    cell(own[column.key], column.show),
                    f"dense: {cell(dense[column.key], column.show)}",
                )
    needs = {name: row["memory"] for name, row in rows.items() if row.get("memory")}
    if needs:
        name = min(needs, key=lambda name: rows[name]["bytes"])
        yield (
            "RAM to run it",
            memory_cell(needs[name]),
            f"{_shown_name(name)}, {needs[name]['num_tokens']:,} tokens of context",
        )
    smallest = min(((row["bytes"], name) for name, row in rows.items() if name in _NAMES), default=None)
    if smallest:
        size, name = smallest
        yield (
            "smallest file",
            format_bytes(size),
            _shown_name(name) + (f"; dense: {format_bytes(dense['bytes'])}" if dense else ""),
        )


@dataclass(frozen=True)
class ShownAnswer:
    """An answer, parted where its loop begins.

    Args:
        name (`str`): As in the rows of `evaluation`.
        said (`str`): Up to the loop, or all of it.
        loop (`str`): The loop; empty without one.
        marks (`tuple[tuple[str, str], ...]`): Kind (`"bad"`, `"good"` or `""`) and words of what is marked.
        first (`bool`): Whether it is shown from the start.
    """

    name: str
    said: str
    loop: str
    marks: tuple[tuple[str, str], ...]
    first: bool


def _speech(evaluation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    generation = (evaluation or {}).get("generation")
    if not generation:
        return None
    # a saved report has them in the alphabet's order
    names = [row["name"] for row in generation["rows"]]
    examples = [
        (
            example["prompt"],
            [_answer(name, example["answers"][name], example) for name in names if name in example["answers"]],
        )
        for example in generation["examples"]
    ]
    return {
        "cells": generation_cells(generation, _NAMES),
        "asked": asked(generation),
        "examples": examples,
        "models": [(name, _shown_name(name), name in _FIRST_SHOWN) for name in names],
        "continues": generation["asked"] == "text",
    }


def _answer(name: str, text: str, example: Mapping[str, Any]) -> ShownAnswer:
    note = example.get("notes", {}).get(name)
    if note is None:  # of an earlier version, which kept the beginning alone
        return ShownAnswer(name, f"{text}…" if len(text) >= 200 else text, "", (), name in _FIRST_SHOWN)
    tokens = f"{note['num_tokens']} token{'s' if note['num_tokens'] != 1 else ''}"
    marks = [("bad", "loops")] if note["loop_at"] is not None else []
    marks.append(("good", f"ends after {tokens}") if note["ended"] else ("", f"stopped after {tokens}"))
    text = text if note["whole"] else f"{text}…"
    at = len(text) if note["loop_at"] is None else note["loop_at"]
    return ShownAnswer(name, text[:at], text[at:], tuple(marks), name in _FIRST_SHOWN)


def _recipe(report: CLPReport, config: "CLPConfig") -> dict[str, Any]:
    public = public_config(config)
    own, plain = _flat(public.to_dict()), _flat(type(config)().to_dict())
    versions = {"clp_version", "optimum_version", "transformers_version"}
    repository = origin_of(report.base_model).repository
    return {
        "json": json.dumps(public.to_dict(), indent=2, sort_keys=True, ensure_ascii=False),
        "changed": [
            (name, _in_words(value))
            for name, value in own.items()
            if name not in versions and value != plain.get(name)
        ],
        "seed": config.seed,
        "model": repository or f"path/to/{base_name(report.base_model)}",
        "revision": (report.base_model or {}).get("revision"),
        "is_folder": repository is None,
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _in_words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
