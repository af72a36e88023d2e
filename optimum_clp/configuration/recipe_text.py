"""A recipe as YAML for people: what is set, and as comments what one would turn next, each with a line of help."""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import yaml

from .clp_config import CLPConfig
from .settings import Setting
from .stages import STAGES, all_settings
from .yaml_text import parse_yaml

# what one would turn next, and a value to begin with where the default is None or an empty list
DIALS: Mapping[str, Any] = {
    "num_segments": 2,
    "budget": "60min",
    "max_memory": "24GiB",
    "seed": 1,
    "calibration.dataset": "corpus.txt",
    "calibration.mask": "assistant",
    "calibration.sequence_length": 512,
    "calibration.train_sequences": 2048,
    "search.strategy": "exhaustive",
    "tuning.learning_rate": 4e-4,
    "tuning.endpoint_width": 2,
    "tuning.batch_size": 16,
    "tuning.gradient_accumulation_steps": 2,
    "tuning.on_policy_rounds": 4,
    "quantization.weights": ["int4"],
    "quantization.bits_per_weight": 5.0,
    "quantization.group_size": 64,
    "export.format": "qdq",
    "export.logits_to_keep": 1,
    "evaluation.texts": ["wikitext2", "c4"],
    "evaluation.require_retention": 0.9,
}
# up to here every whole number is a float
_WHOLE = 2**53
_PLAIN = re.compile(r"[A-Za-z0-9~][\w./~+-]*(?:[:@][\w./~+-]+)*")


def recipe_yaml(config: CLPConfig, head: Iterable[str] = ()) -> str:
    """The text of a recipe that is this configuration, and no more: what has its default is left out, or is a comment.

    Args:
        config ([`CLPConfig`]): The configuration.
        head (`Iterable[str]`): Lines of comment above it, without `#`.

    Returns:
        `str`: YAML, with a newline at its end; [`CLPConfig.from_file`] of it is `config`.
    """
    # a name with a line end in it must not end the comment
    lines = [f"# {part}".rstrip() for line in head for part in line.splitlines() or [""]]
    settings = all_settings()
    plain = [setting for name, setting in settings.items() if "." not in name]
    # a size chooses bits, and a time rows
    sized = config.target_size_mb is not None or config.target_tokens_per_second is not None
    passed_over = ["quantization.bits_per_weight"] if sized else []
    # measured, and not given
    passed_over += ["quantization.group_size"] if config.quantization.tune_for == "speed" else []
    passed_over += [] if config.budget is None else ["calibration.train_sequences"]
    lines += ["", *_stage_lines(config, plain, "", passed_over)]
    for stage in STAGES:
        own = [setting for name, setting in settings.items() if name.startswith(f"{stage}.")]
        if found := _stage_lines(getattr(config, stage), own, "  ", passed_over):
            lines += ["", f"{stage}:", *found]
    return "\n".join(lines).lstrip() + "\n"


def _stage_lines(values: Any, settings: Iterable[Setting], indent: str, passed_over: Collection[str]) -> list[str]:
    lines = []
    for setting in settings:
        value = getattr(values, setting.key)
        # how many layers go is always said
        if value is not None and (value != setting.default or setting.name == "pruning_ratio"):
            lines.append(f"{indent}{setting.key}: {flow(value)}  # {_help(setting)}")
        elif setting.name in DIALS and setting.name not in passed_over:
            lines.append(f"{indent}# {setting.key}: {flow(DIALS[setting.name])}  # {_help(setting)}")
    return lines


def _help(setting: Setting) -> str:
    names = list(map(str, setting.rule.choices))
    choices = f": {', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else ""
    default = f" (default: {setting.default_in_words})" if setting.default_in_words else ""
    return f"{setting.help}{choices}{default}"


def flow(value: Any) -> str:
    """A value on one line of YAML, as [`parse_yaml`] reads it.

    Args:
        value (`Any`): A string, a number, a truth value, `None`, or a list or dictionary of these.
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(str(key))}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, float) and value.is_integer() and abs(value) < _WHOLE:
        return str(int(value))
    if not isinstance(value, str):
        return json.dumps(value)
    if _PLAIN.fullmatch(value) and parse_yaml(value.encode()) == value:
        return value
    # what PyYAML writes plain, it might read as a string by YAML 1.1
    return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=2**31).strip()
