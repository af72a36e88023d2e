"""Settings for common places where a model will run: `CLPConfig(target=...)` and `--target`."""

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigurationError

# What `docs/runtimes.md` measured; a recipe keeps the settings, and not the target's name. Each target says all of them, so that
# the last one given holds.
TARGETS: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
        "quantization": {"weights": ["int8", "int4"]},
        "export": {"format": "contrib", "float_file": True, "logits_to_keep": 0},
    },
    "web": {
        "quantization": {"weights": ["int4", "int4_float16"]},
        "export": {"format": "unpacked", "float_file": False, "logits_to_keep": 1},
    },
    "gpu": {
        "quantization": {"weights": ["float16", "int4_float16"]},
        "export": {"format": "contrib", "float_file": False, "logits_to_keep": 0},
    },
    "arm": {
        "quantization": {"weights": ["int4"]},
        "export": {"format": "contrib", "float_file": False, "logits_to_keep": 1},
    },
}
# Where `quantization.tune_for="speed"` cannot measure, since the files run elsewhere: by what ONNX Runtime's kernels ask for
# (`docs/how_to/speed_target.md` has the sources). None of it was measured.
_FORMS: dict[str, dict[str, Any]] = {
    "web": {"group_size": 32, "accuracy_level": 4},
    "gpu": {"group_size": 32, "accuracy_level": 4},
    "arm": {"group_size": 32, "accuracy_level": 4},
}
# for help and docs
TARGETS_SAY = {
    "cpu": "float32, int8 and int4, what is made if nothing is said",
    "web": "browsers: int4, made floats at load for WebAssembly, and int4 with float16 for WebGPU",
    "gpu": "float16, and int4 with float16",
    "arm": "phones and other Arm processors: int4 alone",
}


def with_target(values: Mapping[str, Any], target: str | None, *, over: bool = False) -> dict[str, Any]:
    """A recipe's values and those of a target.

    Args:
        values (`Mapping[str, Any]`): Keys of [`CLPConfig`], its stages as dictionaries.
        target (`str`, *optional*): `"cpu"`, `"web"`, `"gpu"` or `"arm"`; none changes nothing.
        over (`bool`): The target's settings replace those that are given; otherwise they stand back.

    Returns:
        `dict[str, Any]`: A copy.

    Raises:
        ConfigurationError: If there is no such target, or a stage that it sets is no dictionary.
    """
    merged = dict(values)
    if target is None:
        return merged
    if not isinstance(target, str) or target not in TARGETS:
        known = ", ".join(map(repr, TARGETS))
        raise ConfigurationError.of("target", target, f"it must be one of {known}", f"Choose one of {known}")
    for stage, settings in TARGETS[target].items():
        given = values.get(stage)
        if given is not None and not isinstance(given, dict):
            rule = (
                f"{stage} is given as an object, which says everything, and the target {target!r} sets some of it too"
            )
            raise ConfigurationError.of("target", target, rule, f"Give {stage} as a dictionary of what differs")
        merged[stage] = {**(given or {}), **settings} if over else {**settings, **(given or {})}
    return with_speed_of(merged, target)


def with_speed_of(values: Mapping[str, Any], target: str | None) -> dict[str, Any]:
    """A recipe's values, in which a form for speed that cannot be measured here is the target's.

    Args:
        values (`Mapping[str, Any]`): Keys of [`CLPConfig`].
        target (`str`, *optional*): A name of `TARGETS`; none and `"cpu"` change nothing: this machine is measured.

    Returns:
        `dict[str, Any]`: A copy.
    """
    merged = dict(values)
    quantization = merged.get("quantization")
    if target in _FORMS and isinstance(quantization, dict) and quantization.get("tune_for") == "speed":
        merged["quantization"] = {**_FORMS[target], **quantization, "tune_for": "size"}
    return merged
