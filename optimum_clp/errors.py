"""Errors that tell the user what is wrong and what to do.

Every message has the same four parts: the name of the thing, its value, the rule that it breaks, and the remedy.
"""

from dataclasses import dataclass
from typing import Any, Self


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
        shown = repr(self.value)
        if len(shown) > 200:
            shown = shown[:197] + "..."
        stop = "" if self.remedy.endswith(("?", ".")) else "."
        return f"{self.name} is {shown}: {self.rule}. {self.remedy}{stop}"


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


class OutputError(CLPError, OSError):
    """The output folder cannot be used as it is."""
