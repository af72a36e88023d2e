"""Errors that tell the user what is wrong and what to do.

Every message has the same four parts: the name of the thing, its value, the rule that it breaks, and the remedy.
"""

import re
import reprlib
from dataclasses import dataclass
from typing import Any, Self

# of a message, a rule says most: lists of names are long, a value of 5,000 characters is nobody's rule
_MAX_VALUE, _MAX_WORD, _MAX_PART = 200, 250, 1500
# a remedy may say where a finished folder lies
_MAX_PATH = 1000


def shown(value: Any, limit: int = _MAX_VALUE) -> str:
    """A value as an error shows it: its `repr`, cut after `limit` characters, and never made whole where it is huge."""
    if isinstance(value, (str, bytes)):
        # a margin: quotes, and characters that are written as several
        value = value[: limit + 2]
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 4 * limit:
        return (
            f"{'-' if value < 0 else ''}0x{abs(value) >> (value.bit_length() - 64):x}... ({value.bit_length()} bits)"
        )
    try:
        text = _Shown(limit).repr(value) if isinstance(value, (list, tuple, dict, set)) else repr(value)
    except Exception:  # an object whose repr raises is still to be named
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class _Shown(reprlib.Repr):
    """`repr` of containers that stops once there is more than anyone sees."""

    def __init__(self, limit: int):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 6, limit + 2, limit + 2, limit
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = limit


def shortened(text: str, longest_word: int = _MAX_WORD) -> str:
    """A sentence for a reader: the middle of a very long word, and what follows the first 1,500 characters, is left out."""
    text = re.sub(rf"\S{{{longest_word},}}", lambda word: f"{word[0][: longest_word - 53]}...{word[0][-50:]}", text)
    return text if len(text) <= _MAX_PART else f"{text[: _MAX_PART - 3]}..."


@dataclass(frozen=True)
class Problem:
    """One mistake.

    Args:
        name (`str`): What is wrong, as the user calls it (`"pruning_ratio"`, `"model"`).
        value (`Any`): The value that was found; shown with `repr`, cut after 200 characters.
        rule (`str`): The rule that the value breaks, a clause without final stop.
        remedy (`str`): What to do, a sentence without final stop.
    """

    name: str
    value: Any
    rule: str
    remedy: str

    def __str__(self) -> str:
        name, rule, remedy = shortened(self.name), shortened(self.rule), shortened(self.remedy, _MAX_PATH)
        stop = "" if remedy.endswith(("?", ".")) else "."
        return f"{name} is {shown(self.value)}: {rule}. {remedy}{stop}"


class CLPError(Exception):
    """Base of all errors of this package; carries one or more [`Problem`]s.

    Args:
        *problems (`Problem`): What is wrong. With more than one, the message numbers them.
    """

    def __init__(self, *problems: Problem):
        self.problems = problems
        if len(problems) == 1:
            message = str(problems[0])
        else:
            message = f"{len(problems)} problems:" + "".join(f"\n  {i}. {p}" for i, p in enumerate(problems, 1))
        super().__init__(message)

    @classmethod
    def of(cls, name: str, value: Any, rule: str, remedy: str, **details: Any) -> Self:
        """The error for one mistake; what it takes is a [`Problem`]'s, and what the class's constructor takes by name."""
        return cls(Problem(name, value, rule, remedy), **details)


class ConfigurationError(CLPError, ValueError):
    """A configuration value is out of range, of the wrong type, or unknown."""


class ModelError(CLPError, ValueError):
    """The model cannot be read, or is not one that this package can cut."""


class CalibrationError(CLPError, ValueError):
    """The text cannot be read, or there is too little of it."""


class SearchError(CLPError, RuntimeError):
    """The search cannot give an answer (for example because every score is NaN)."""


class CutError(CLPError, RuntimeError):
    """The cut model is not what it should be; nothing was written."""


class TuningError(CLPError, RuntimeError):
    """Endpoint tuning went wrong; the last good weights were kept.

    Args:
        *problems (`Problem`): What is wrong.
        result (`TuningResult`, *optional*): The record of the steps that were taken.
    """

    def __init__(self, *problems: Problem, result: Any = None):
        super().__init__(*problems)
        self.result = result


class QuantizationError(CLPError, RuntimeError):
    """The quantized model is not what it should be."""


class ExportError(CLPError, RuntimeError):
    """The exported file does not match the PyTorch model, or could not be made."""


class BusyError(CLPError, RuntimeError):
    """What is asked for is in use by somebody else."""


class DeviceMemoryError(CLPError, MemoryError):
    """A device has no memory for what is computed, half a batch at a time either."""


class OutputError(CLPError, OSError):
    """The output folder cannot be used as it is."""
