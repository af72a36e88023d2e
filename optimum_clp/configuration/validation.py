"""From the values that were given to those that hold, and all that is wrong with them; without torch and transformers.

[`CLPConfig`] is made by it. The command line calls it first, so that a mistake is told at once.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from packaging import version as package_version

from ..doors import ROUNDINGS
from ..errors import ConfigurationError, Problem
from ..precisions import INT4, INT4_FLOAT16
from ..version import __version__
from .settings import settings_of
from .stages import STAGES, PlainSettings, all_settings

PLAIN_KEYS = tuple(setting.name for setting in settings_of(PlainSettings))
_TARGETS = ("target_size_mb", "target_tokens_per_second")
_QUALITY = ("max_perplexity_increase", "min_retention")
_HOUSEKEEPING = {"model_type", "clp_version", "transformers_version", "optimum_version"}


def checked_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of a [`CLPConfig`], in order: as given, or its default.

    Args:
        given (`Mapping[str, Any]`): Arguments of [`CLPConfig`]. Stages may be dictionaries; they are copied.

    Returns:
        `dict[str, Any]`: The plain settings, and the stages as dataclasses.

    Raises:
        ConfigurationError: Lists every value that is out of range and every key that is unknown.
    """
    newer = _newer_version(given)
    problems = _unknown_keys(given, newer)
    values = {field.name: given.get(field.name, field.default) for field in dataclasses.fields(PlainSettings)}
    if any(values[name] is not None for name in _TARGETS):
        values["pruning_ratio"] = given.get("pruning_ratio")
    elif values["pruning_ratio"] is None:
        values["pruning_ratio"] = PlainSettings.pruning_ratio
    for name in STAGES:
        values[name] = _stage(name, given.get(name), problems, newer)
    if given.get("calibration_dataset") is not None:
        values["calibration"].dataset = given["calibration_dataset"]
    problems += value_problems(values)
    if problems:
        raise ConfigurationError(*problems)
    return values


def value_problems(values: Mapping[str, Any]) -> list[Problem]:
    """All that is wrong with the values of a configuration, whose stages then hold what is kept of each value.

    Args:
        values (`Mapping[str, Any]`): As [`checked_values`] returns them.
    """
    strange = [_no_stage(name, values[name]) for name, cls in STAGES.items() if not isinstance(values[name], cls)]
    if strange:
        return strange
    plain, staged = [], []
    for name, setting in all_settings().items():
        stage, dot, key = name.partition(".")
        if dot:
            value = setting.rule.kept(getattr(values[stage], key))
            setattr(values[stage], key, value)
            staged += setting.rule.problems(name, value)
        else:
            plain += setting.rule.problems(name, values[name])
    between = (
        _quality_problems,
        _target_problems,
        _budget_problems,
        _speed_problems,
        _file_problems,
        _requirement_problems,
    )
    return [*plain, *(problem for look in between for problem in look(values)), *staged]


def _quality_problems(values: Mapping[str, Any]) -> list[Problem]:
    """A quality budget belongs to `pruning_ratio="auto"`, and there is one of it."""
    given = [name for name in _QUALITY if values[name] is not None]
    ratio = values["pruning_ratio"]
    if any(values[name] is not None for name in _TARGETS):
        return []
    if ratio == "auto" and len(given) != 1:
        rule = f"it needs one quality budget, and {' and '.join(given) + ' are' if given else 'none is'} given"
        remedy = "Give max_perplexity_increase (such as 0.1) or min_retention (such as 0.9)"
        return [Problem("pruning_ratio", "auto", rule, remedy)]
    if ratio != "auto" and given:
        rule = f"the ratio is fixed to {ratio}, so there is nothing to bound"
        return [Problem(name, values[name], rule, 'Leave it out, or set pruning_ratio="auto"') for name in given]
    return []


def _target_problems(values: Mapping[str, Any]) -> list[Problem]:
    """What decides how many layers go is one of three, and a size is one of a file that is written."""
    quantization, asked = values["quantization"], [name for name in _TARGETS if values[name] is not None]
    if not asked:
        if values["pruning_ratio"] is not None:
            return []
        rule = "nothing else says how many layers go"
        return [Problem("pruning_ratio", None, rule, f"Give a number such as 0.2, or {' or '.join(_TARGETS)}")]
    rule, remedy = (
        f"{' and '.join(asked)} decide{'s' * (len(asked) == 1)} how many layers go",
        "Leave one of the two out",
    )
    given = [name for name in ("pruning_ratio", *_QUALITY) if values[name] is not None]
    problems = [Problem(name, values[name], rule, remedy) for name in given]
    for name in asked:
        what = "size" if name == "target_size_mb" else "speed"
        if not values["export"].enabled:
            problems.append(Problem(name, values[name], "no ONNX file is written", "Set export.enabled to True"))
        elif isinstance(quantization.weights, list) and INT4.name not in quantization.weights:
            rule = f"it is the {what} of the int4 file, and quantization.weights is {quantization.weights}"
            problems.append(Problem(name, values[name], rule, 'Add "int4" there, or give a pruning_ratio'))
    return problems


def _speed_problems(values: Mapping[str, Any]) -> list[Problem]:
    """What is measured is not given, and there is something to measure."""
    quantization, export = values["quantization"], values["export"]
    problems: list[Problem] = []
    if quantization.head_bits != 8 and quantization.tune_for != "speed":
        return problems
    # the method's code is imported for these alone
    method = ROUNDINGS.get(quantization.method) if quantization.method in ROUNDINGS else None
    if quantization.head_bits == 8 and method is not None and method.budget_obstacle is not None:
        remedy = 'Leave it out, or choose the method "rtn" or "gptq"'
        problems.append(Problem("quantization.head_bits", 8, method.budget_obstacle, remedy))
    if quantization.tune_for != "speed":
        return problems
    defaults = type(quantization)()
    for name in ("group_size", "accuracy_level", "head_bits"):
        value = getattr(quantization, name)
        if value != getattr(defaults, name):
            rule = 'quantization.tune_for is "speed", which chooses it'
            problems.append(Problem(f"quantization.{name}", value, rule, "Leave one of the two out"))
    why = None
    if not export.enabled or (isinstance(quantization.weights, list) and INT4.name not in quantization.weights):
        why, remedy = "no int4 file is written", 'Leave it out, or add "int4" to quantization.weights'
    elif export.format == "unpacked":
        why = "unpacked files multiply floats, whatever the form of their integers"
        remedy = 'Leave it out, or choose the format "contrib" or "qdq"'
    elif method is not None and method.accuracy_level is not None:
        why = f"the method {quantization.method!r} has groups and products of its own"
        remedy = 'Leave it out, or choose the method "rtn" or "gptq"'
    if why is not None:
        problems.append(Problem("quantization.tune_for", "speed", why, remedy))
    return problems


def _budget_problems(values: Mapping[str, Any]) -> list[Problem]:
    """A size budget needs a rounding method whose precisions can be planned."""
    method, bits = values["quantization"].method, values["quantization"].bits_per_weight
    # the method's code is imported for a budget alone
    obstacle = ROUNDINGS.get(method).budget_obstacle if bits is not None and method in ROUNDINGS else None
    if obstacle is None:
        return _six_bit_problems(values)
    remedy = 'Leave it out, or choose the method "rtn" or "gptq"'
    return [Problem("quantization.bits_per_weight", bits, obstacle, remedy)]


def _six_bit_problems(values: Mapping[str, Any]) -> list[Problem]:
    """Integers of 6 bits need a budget that gives them, and operators that are fast."""
    quantization, export = values["quantization"], values["export"]
    if quantization.six_bits is not True:
        return []
    leave = "Leave it out"
    if quantization.bits_per_weight is None and values["target_size_mb"] is None:
        rule, remedy = "no size budget gives them", f"{leave}, or give quantization.bits_per_weight or target_size_mb"
    elif export.format != "contrib":
        rule, remedy = (
            f'files of the format "{export.format}" have integers of 4 and 8 bits',
            f'{leave}, or choose "contrib"',
        )
    elif quantization.accuracy_level != 4:
        rule = f"ONNX Runtime has fast products of this kind at accuracy_level 4 alone, and it is {quantization.accuracy_level}"
        remedy = f"{leave}, or leave accuracy_level as it is"
    elif quantization.tune_for == "speed":
        rule, remedy = 'quantization.tune_for is "speed", and they are slower', "Leave one of the two out"
    elif isinstance(quantization.weights, list) and INT4_FLOAT16.name in quantization.weights:
        rule = "graphics processors have no products of this kind, and quantization.weights has the file for them"
        remedy = f'{leave}, or take "{INT4_FLOAT16.name}" out there'
    else:
        return []
    return [Problem("quantization.six_bits", True, rule, remedy)]


def _file_problems(values: Mapping[str, Any]) -> list[Problem]:
    """Something must be exported."""
    if values["export"].float_file is not False or values["quantization"].weights != []:
        return []
    rule, remedy = "quantization.weights is empty, so that no file is left", "Leave it True, or name other weights"
    return [Problem("export.float_file", False, rule, remedy)]


def _requirement_problems(values: Mapping[str, Any]) -> list[Problem]:
    """What is required must be measured."""
    evaluation = values["evaluation"]
    if evaluation.require_generation is None or evaluation.generation:
        return []
    rule, remedy = "generation is not measured", "Leave it out, or set evaluation.generation to True"
    return [Problem("evaluation.require_generation", evaluation.require_generation, rule, remedy)]


def _nearest(key: str, valid: list[str]) -> str:
    # a slip of the finger, then a part of a name, then a word of like letters: `ratio` is no `calibration`
    slip, alike = (difflib.get_close_matches(key, valid, n=1, cutoff=cutoff) for cutoff in (0.8, 0.5))
    parts = [name for name in valid if key in name.split("_")]
    close = slip or (parts if len(parts) == 1 else alike)
    return f"Did you mean {close[0]!r}?" if close else f"Valid keys are {', '.join(valid)}."


def _newer_version(given: Mapping[str, Any]) -> str:
    """Advice to upgrade, if a newer version of this package wrote the configuration; else empty."""
    written_by = str(given.get("clp_version") or __version__)
    if _is_version(written_by) and package_version.parse(written_by) > package_version.parse(__version__):
        return f" The file was written by optimum-clp {written_by}, this is {__version__}: upgrade optimum-clp"
    return ""


def _is_version(text: str) -> bool:
    try:
        package_version.parse(text)
    except package_version.InvalidVersion:
        return False
    return True


def _unknown_keys(given: Mapping[str, Any], newer: str) -> list[Problem]:
    """Problems for the keys that a configuration does not have; the version keys of a saved file are not extra."""
    valid = [*PLAIN_KEYS, *STAGES, "calibration_dataset", "target"]
    version = given.get("clp_version")
    strange = version is not None and not (isinstance(version, str) and _is_version(version))
    remedy = "Leave the key out: it says who wrote the file"
    problems = [Problem("clp_version", version, "it is no version", remedy)] if strange else []
    return problems + [
        Problem(key, value, "this version of CLPConfig has no such key", _nearest(key, valid) + newer)
        for key, value in given.items()
        if key not in valid and key not in _HOUSEKEEPING
    ]


def _no_stage(name: str, value: Any) -> Problem:
    wanted = STAGES[name].__name__
    return Problem(name, value, f"it must be a {wanted} or a dict", f"Give {wanted}(...)")


def _stage(name: str, value: Any, problems: list[Problem], newer: str) -> Any:
    """`value` as the stage's dataclass; what is wrong with it is added to `problems`."""
    cls: Any = STAGES[name]
    if value is None:
        return cls()
    if isinstance(value, cls):
        return dataclasses.replace(value)
    if not isinstance(value, dict):
        problems.append(_no_stage(name, value))
        return cls()
    valid = [f.name for f in dataclasses.fields(cls)]
    for key in value:
        if key not in valid:
            rule = f"{cls.__name__} has no such key"
            problems.append(Problem(f"{name}.{key}", value[key], rule, _nearest(key, valid) + newer))
    return cls(**{k: v for k, v in value.items() if k in valid})
