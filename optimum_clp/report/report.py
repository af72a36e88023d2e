"""What was measured: `clp_report.json`, and the table that is printed from it.

Every stage writes its own section when it has run. A section that is `None` belongs to a stage that has not run, and
nothing that is shown to a reader (the table, the model card, the plots) says anything about it. The format is in
`docs/clp_report.schema.json`.
"""

import copy
import dataclasses
import datetime
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any

from ..disk_room import write_whole
from ..doors import report_schema
from ..errors import ConfigurationError
from ..json_files import JsonProblem, check, read_object
from ..version import __version__
from .generation import generation_text, requirement_line
from .legend import legend
from .recognition import recognition_legend, recognition_tables
from .schema import for_reading
from .section import Key, json_ready
from .tables import (
    Column,
    form_line,
    format_bytes,
    format_count,
    markdown_table,
    memory_cell,
    record_cells,
    text_table,
    threads,
)

REPORT_NAME = "clp_report.json"
SCHEMA_VERSION = 1
_LISTS = ("quantization", "failures")
_SECTIONS = (
    "environment",
    "base_model",
    "calibration",
    "search",
    "cut",
    "tuning",
    "quantization",
    "export",
    "evaluation",
    "failures",
)
_HEADER = ("schema_version", "clp_version", "created")
_ABSOLUTE_PATH = re.compile(r"(?<![\w:/\\.])(?:~?[/\\]|[A-Za-z]:[/\\])(?:[^\s/\\\"'(),;]+[/\\]+)*(?=[^\s/\\])")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclasses.dataclass
class CLPReport:
    """What each stage did and what was measured, saved as `clp_report.json`.

    The sections are plain JSON-ready values; `docs/report.md` describes every key.

    Args:
        base_model (`dict` or `None`): The dense model: `name_or_path`, `revision`, `model_type`, `num_layers`,
            `num_parameters`, `dtype`.
        calibration (`dict` or `None`): Where the text came from and how many rows each split has.
        search (`dict` or `None`): The segments, every scored cut (KL in nats per token), layers' scores, the gate's way.
        cut (`dict` or `None`): The layers that were removed.
        tuning (`dict` or `None`): What was trained, and its losses in nats per token.
        quantization (`list[dict]` or `None`): One entry for each optimum-quanto folder; sizes in bytes.
        export (`dict` or `None`): One entry for each ONNX file; sizes in bytes.
        evaluation (`dict` or `None`): The text that was measured on, and one row for each model or file.
        failures (`list[dict]` or `None`): What has failed after the weights were there, and what repeats it.
        environment (`dict` or `None`): See [`environment_info`].
        created (`str`): ISO 8601 time in UTC.
        clp_version (`str`): Version of this package that made the report.
        schema_version (`int`): Version of the format.
    """

    base_model: Annotated[dict[str, Any] | None, Key("The dense model.")] = None
    calibration: Annotated[dict[str, Any] | None, Key("Text that was searched, tuned and measured on.")] = None
    search: Annotated[dict[str, Any] | None, Key("How the layers were chosen.")] = None
    cut: Annotated[dict[str, Any] | None, Key("What was removed.")] = None
    tuning: Annotated[dict[str, Any] | None, Key("Cutoff endpoint tuning. Losses in nats per token.")] = None
    quantization: Annotated[list[dict[str, Any]] | None, Key("Folders with optimum-quanto weights.")] = None
    export: Annotated[dict[str, Any] | None, Key("ONNX files.")] = None
    evaluation: Annotated[dict[str, Any] | None, Key("One row for each model or file.")] = None
    failures: Annotated[
        list[dict[str, Any]] | None, Key("What has failed after the weights were there.", added=True)
    ] = None
    environment: Annotated[dict[str, Any] | None, Key("Versions and machine.")] = None
    created: Annotated[
        str,
        Key("ISO 8601, UTC.", pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d+)?(\+00:00|Z)$"),
    ] = dataclasses.field(default_factory=_now)
    clp_version: Annotated[str, Key("Version of optimum-clp that made the report.")] = __version__
    schema_version: Annotated[int, Key(choices=(SCHEMA_VERSION,))] = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The report as a new dictionary that is valid JSON: NaN and infinities are `None`.

        Local folders in the descriptions of the text are left out, so that a published report does not name them;
        `base_model.name_or_path` stays as the user gave it, because a later stage loads the dense model from there.
        """
        output = {name: json_ready(getattr(self, name)) for name in (*_HEADER, *_SECTIONS)}
        for section, key in (("calibration", "source"), ("evaluation", "text")):
            if output[section] and isinstance(output[section].get(key), str):
                output[section][key] = _ABSOLUTE_PATH.sub("", output[section][key])
        for entry in output["failures"] or ():
            entry["error"] = _ABSOLUTE_PATH.sub("", entry["error"])
        return output

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CLPReport":
        """Make a report from a dictionary, as read from `clp_report.json`.

        Raises:
            ConfigurationError: If a newer version of this package wrote it, or if it is not a report.
        """
        if not isinstance(values, dict):
            raise _malformed("report", values, "a report is a JSON object")
        version = values.get("schema_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise _malformed("schema_version", version, "a report has a whole number here")
        if version > SCHEMA_VERSION:
            raise ConfigurationError.of(
                "schema_version",
                version,
                f"this is optimum-clp {__version__}, which reads reports up to version {SCHEMA_VERSION}",
                f"The report was written by optimum-clp {values.get('clp_version', '(unknown)')}: upgrade optimum-clp",
            )
        for name, value in values.items():
            if name not in _HEADER and name not in _SECTIONS:
                raise _malformed(name, value, f"a report has no such section, only {', '.join(_SECTIONS)}")
            expected: type = str if name in _HEADER else list if name in _LISTS else dict
            optional = name in _SECTIONS and value is None
            if name != "schema_version" and not optional and not isinstance(value, expected):
                raise _malformed(name, value, f"it must be of type {expected.__name__}")
        _check_segments(values.get("cut"))
        return cls(**copy.deepcopy(values))

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `clp_report.json` (sorted keys, indented) into `folder`, which is made if missing.

        Returns:
            `Path`: The file.
        """
        path = Path(folder) / REPORT_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
        # the name of a file that is no UTF-8 has half characters, which JSON writes as escapes
        write_whole(path, text + "\n", errors="backslashreplace")
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "CLPReport":
        """Read `clp_report.json` from `folder` (or from the file itself).

        Raises:
            ConfigurationError: If the file is missing, is not JSON, is not a report, or is from a newer version.
        """
        path = Path(folder)
        path = path / REPORT_NAME if path.is_dir() or path.suffix != ".json" else path
        if not path.is_file():
            remedy = "Give a folder that optimum-clp wrote"
            raise ConfigurationError.of(REPORT_NAME, str(path), "there is no such file", remedy)
        try:
            values = read_object(path)
            report = cls.from_dict(values)
            # a stage that has gone on for hours writes card, plots and table of what the others have left here
            check(values, {**for_reading(report_schema()), "required": []})
        except JsonProblem as problem:
            if problem.name:
                raise _malformed(problem.name, problem.value, f"it {problem.rule}") from problem
            raise _malformed(REPORT_NAME, str(path), f"it {problem.rule}") from problem
        return report

    def to_table(self, markdown: bool = False) -> str:
        """The evaluation as a table with one row for each model or file, and below it what was measured on.

        Args:
            markdown (`bool`): Write a Markdown table instead of one aligned for a terminal.

        Returns:
            `str`: Empty while nothing has been evaluated. A column without any value is left out.
        """
        rows = (self.evaluation or {}).get("rows") or []
        if not rows:
            return ""
        cells = record_cells(rows, (Column("name", "" if markdown else "model"), *_COLUMNS))
        words = legend(cells[0], markdown=markdown, linked=True)
        if markdown:
            measured = " ".join(filter(None, (self.measured_on(), self.memory_needed())))
            return f"{markdown_table(cells, 'lr')}\n\n{measured}\n\n{words}"
        parts = (text_table(cells, ruled=True), words, self.measured_on(), self.memory_needed())
        return "\n".join(filter(None, parts)) + self._in_use()

    def _in_use(self) -> str:
        """What else was measured, and what follows from it, for a terminal; empty if nothing was."""
        evaluation = self.evaluation or {}
        generation = generation_text(evaluation.get("generation"), evaluation.get("verdicts", ()))
        required = "\n".join(map(requirement_line, evaluation.get("requirements", ())))
        tables = (text_table(table, ruled=True) for table in recognition_tables(evaluation))
        parts = (
            *tables,
            recognition_legend(evaluation),
            generation,
            required,
            self.size_reached(),
            self.speed_reached(),
            self.type_rule_broken(),
        )
        return "".join(f"\n\n{part}" for part in parts if part)

    def type_rule_broken(self) -> str:
        """What other runtimes should know of the kinds of the layers that are left; empty if there is nothing."""
        cut = self.cut or {}
        if cut.get("type_rule") != "broken":
            return ""
        return (
            "Kinds of layers no longer alternate by the rule of this model type. Runtimes that read them in config.json are right; those that "
            f"compute them from a layer's number, as llama.cpp and mlx-lm do for many types, are wrong without a word. A cut of {cut['layer_period']} layers, or of a multiple, would keep the rule."
        )

    def size_reached(self) -> str:
        """One sentence on the size that the recipe asked for; empty if it asked for none."""
        size = (self.export or {}).get("size_target")
        if not size:
            return ""
        bits = f", at {size['bits_per_weight']:.2f} bits per weight" if size["bits_per_weight"] is not None else ""
        missed = "" if size["met"] else ": missed"
        return f"The int4 file was to have {size['target_size_mb']:g} MB, and has {format_bytes(size['bytes'])}{bits}{missed}."

    def memory_needed(self) -> str:
        """One sentence on the memory that the smallest file needs to run; empty if none was measured."""
        rows = [row for row in (self.evaluation or {}).get("rows") or [] if row.get("memory")]
        if not rows:
            return ""
        smallest = min(rows, key=lambda row: row["bytes"])
        used = smallest["memory"]
        more = format_bytes(1000 * used["cache_per_token"])
        return (
            f"The {smallest['name']} file needs {format_bytes(used['peak'])} of RAM to run with {used['num_tokens']:,} tokens of "
            f"context, alone in a process ({format_bytes(used['before'])} of it Python and ONNX Runtime), and {more} for 1,000 "
            "tokens more."
        )

    def speed_reached(self) -> str:
        """Sentences on the speed that the recipe asked for, and on the form that was fastest; empty if it asked for neither."""
        export, said = self.export or {}, []
        if speed := export.get("speed_target"):
            missed = "" if speed["met"] else ": missed"
            said.append(
                f"The int4 file was to decode {speed['target_tokens_per_second']:g} tokens per second, and decodes "
                f"{speed['tokens_per_second']:.4g} with {threads(speed['threads'])}{missed}."
            )
        if choice := export.get("speed_choice"):
            said.append(
                f"Fastest of {len(choice['measured'])} forms of the int4 file on the machine that made it: {form_line(choice)}."
            )
        return " ".join(said)

    def measured_on(self) -> str:
        """One sentence that says which text and which machine the figures of `evaluation` belong to."""
        evaluation, environment = self.evaluation or {}, self.environment or {}
        found = sorted({row["num_tokens"] for row in evaluation.get("rows") or [] if row.get("num_tokens")})
        tokens = f", {' or '.join(f'{number:,}' for number in found)} tokens" if found else ""
        count = environment.get("num_threads")
        machine = f", on {environment['device']}" if environment.get("device") else ""
        machine += f" with {threads(count)}" if machine and count else ""
        return f"Measured on {self.to_dict()['evaluation'].get('text') or 'unnamed text'}{tokens}{machine}."


def _malformed(name: str, value: Any, rule: str) -> ConfigurationError:
    remedy = f"Make {REPORT_NAME} again with optimum-clp; docs/clp_report.schema.json describes it"
    return ConfigurationError.of(name, value, rule, remedy)


def _check_segments(cut: dict[str, Any] | None) -> None:
    """A later stage cuts the dense model again from here, so these bounds have to be sound."""
    if cut is None:
        return
    segments = cut.get("segments")
    sound = isinstance(segments, list) and all(
        isinstance(s, (list, tuple)) and len(s) == 2 and all(type(bound) is int for bound in s) and 0 <= s[0] < s[1]
        for s in segments
    )
    if not (sound and segments):
        raise _malformed("cut.segments", segments, "it must be a list of [start, stop] with 0 <= start < stop")


_COLUMNS = (
    Column("num_layers", "layers"),
    Column("num_parameters", "parameters", format_count),
    Column("bytes", "size", format_bytes),
    Column("perplexity", "perplexity", ".3f"),
    Column("kl", "KL to dense", ".4f"),
    Column("prefill_tokens_per_second", "prefill tok/s", ",.0f"),
    Column("decode_tokens_per_second", "decode tok/s", ",.0f"),
    Column("memory", "RAM", memory_cell),
)
