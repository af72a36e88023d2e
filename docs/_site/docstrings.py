"""Docstrings in Hugging Face's form, as mkdocstrings reads them.

``name (`A` or `B`, *optional*): ...`` loses its marks, ``[`~CLPPruner.search`]`` becomes a link where the page of that object is on
the site, and `{settings}` is filled in as the class does it when it is imported.
"""

import importlib
import inspect
import re
from typing import Any

import griffe

PLACES = {
    "CLPPruner": "optimum_clp.pruner.CLPPruner",
    "CLPConfig": "optimum_clp.configuration.clp_config.CLPConfig",
    **{
        f"{name}Config": f"optimum_clp.configuration.stages.{name}Config"
        for name in ("Calibration", "Search", "Tuning", "Quantization", "Export", "Evaluation")
    },
    "OnnxCausalLM": "optimum_clp.runtime.causal_lm.OnnxCausalLM",
    "load_quantized": "optimum_clp.quantization.load_quantized",
    "save_quantized": "optimum_clp.quantization.save_quantized",
    "without_compiler": "optimum_clp.quantization.without_compiler",
    "export_onnx": "optimum_clp.exporters.export.export_onnx",
    "measure_generation": "optimum_clp.evaluation.generation.measure_generation",
    "plan_pruning": "optimum_clp.planning.plan.plan_pruning",
    "PruningPlan": "optimum_clp.planning.plan.PruningPlan",
    "CLPReport": "optimum_clp.report.report.CLPReport",
    "LayerSegment": "optimum_clp.segments.LayerSegment",
    "SearchResult": "optimum_clp.search.result.SearchResult",
    "ScoredCut": "optimum_clp.search.result.ScoredCut",
    "TuningResult": "optimum_clp.tuning.result.TuningResult",
    **{
        f"{name}Error": f"optimum_clp.errors.{name}Error"
        for name in (
            "CLP",
            "Configuration",
            "Model",
            "Calibration",
            "Search",
            "Cut",
            "Tuning",
            "Quantization",
            "Export",
        )
    },
    "OutputError": "optimum_clp.errors.OutputError",
    "BusyError": "optimum_clp.errors.BusyError",
    "DeviceMemoryError": "optimum_clp.errors.DeviceMemoryError",
}
_REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?!\[|\()")
_TYPE = re.compile(r"^(\s+\**\w+) \(([^()]*(?:\([^()]*\)[^()]*)*)\):", re.MULTILINE)
_RETURNED = re.compile(r"^(\s+)(\[?`[^:\n]*): ", re.MULTILINE)
_SECTION = re.compile(r"^(Args|Returns|Raises)( \([^)]*\))?:$", re.MULTILINE)


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites every docstring that is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """One object's."""
        if obj.docstring is None:
            return
        text = obj.docstring.value
        if "{settings}" in text:
            text = inspect.cleandoc(imported(obj.path).__doc__)
        obj.docstring.value = rewritten(text)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Defaults of the settings, which stand in the source as calls."""
        for name, place in PLACES.items():
            if name.endswith("Config"):
                described, made = pkg[place.partition(".")[2]], imported(place)()
                for key in inspect.signature(type(made)).parameters:
                    default = repr(getattr(made, key, None)) if name != "CLPConfig" else plain_default(made, key)
                    if key in described.members:
                        described.members[key].value = default
                    if "__init__" in described.members:
                        described.members["__init__"].parameters[key].default = default


def imported(place: str) -> Any:
    """The object itself."""
    module, _, name = place.rpartition(".")
    return getattr(importlib.import_module(module), name)


def plain_default(made: Any, key: str) -> str | None:
    """Default of an argument of `CLPConfig`; none for `**unknown`."""
    parameter = inspect.signature(type(made)).parameters[key]
    return None if parameter.kind is parameter.VAR_KEYWORD else repr(parameter.default)


def rewritten(text: str) -> str:
    """A docstring in the form that the reader of Google's style knows."""
    head, *sections = re.split(r"(?m)^(?=(?:Args|Returns|Raises|Example)\b[^\n]*:$)", text)
    sections = [_SECTION.sub(r"\1:", section, count=1) for section in sections]
    sections = [_TYPE.sub(lambda m: f"{m[1]} ({plain(m[2])}):", section) for section in sections]
    sections = [
        _RETURNED.sub(lambda m: f"{m[1]}{plain(m[2])}: ", section) if section.startswith("Returns") else section
        for section in sections
    ]
    sections = [re.sub(r"^Example:", "Examples:", section) for section in sections]
    return _REFERENCE.sub(linked, "".join([head, *sections]))


def plain(annotation: str) -> str:
    """A type without its marks: `int | None` for what was written as ``int`` or ``None`` in backticks."""
    annotation = re.sub(r",? *\*optional\*|, defaults to .*", "", annotation)
    annotation = re.sub(r"\[`~?([\w.]+)`\]", r"\1", annotation).replace("`", "").replace(" or ", " | ")
    depth, parts = 0, []
    for part in annotation.split(", "):  # a comma outside brackets is one more "or"
        parts += [", " if depth else " | ", part]
        depth += part.count("[") - part.count("]")
    return "".join(parts[1:]) or "Any"


def linked(found: re.Match[str]) -> str:
    """A link to the object's place on the site, or its name alone."""
    name, _, member = found.group(1).partition(".")
    place = PLACES.get(name)
    if place is None:
        return f"`{found.group(1)}`"
    return f"[`{found.group(1)}`][{'.'.join(filter(None, [place, member]))}]"
