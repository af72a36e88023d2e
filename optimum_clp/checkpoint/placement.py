"""In which numbers and where a model is loaded: what was asked for, looked at before any file is read.

transformers says the same of a wrong value, but as an error of reading, which sends people to look at the model's files.
"""

from typing import Any

import torch

from ..configuration.rules import is_word
from ..errors import ConfigurationError

_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")


def floating_dtype(chosen: str | torch.dtype) -> torch.dtype:
    """A type of weights by its name.

    Args:
        chosen (`str` or `torch.dtype`): Such as `"bfloat16"` or `"torch.bfloat16"`.

    Raises:
        ConfigurationError: If it is none, or one of integers.
    """
    named = getattr(torch, chosen.removeprefix("torch."), None) if isinstance(chosen, str) else chosen
    if not (isinstance(named, torch.dtype) and named.is_floating_point):
        rule = "it must be a floating-point type of torch, or auto"
        raise ConfigurationError.of("dtype", chosen, rule, "Choose float32, bfloat16 or float16")
    return named


def check_device_map(device_map: Any) -> None:
    """Check that a string names a device, or a way to spread a model; maps and devices are transformers' to judge.

    Raises:
        ConfigurationError: If it does not.
    """
    if not isinstance(device_map, str) or device_map in _SPREAD:
        return
    try:
        torch.device(device_map)
    except (RuntimeError, UnicodeEncodeError, ValueError) as error:
        rule = f"it is neither a device of torch nor one of {', '.join(_SPREAD)}"
        raise ConfigurationError.of("device", device_map, rule, "Give for example cpu, cuda, cuda:1 or mps") from error


def check_revision(revision: str | None) -> None:
    """Check that a branch, tag or commit may have this name; whether there is one, the Hub knows.

    Raises:
        ConfigurationError: If it is empty, or has what no name has.
    """
    if revision is not None and not is_word(revision):
        rule = "no branch, tag or commit has this name"
        raise ConfigurationError.of("revision", revision, rule, "Give one of the model's page, or leave it out")
