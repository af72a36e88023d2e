"""What has failed after the weights were there, and what repeats it."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from .section import Key, to_section

TUNING = "tuning"


@dataclass(frozen=True)
class Failure:
    """An entry of `failures`."""

    stage: Annotated[str, Key("What has failed.")]
    error: Annotated[str, Key("Why.")]
    command: Annotated[str, Key("What repeats it.")]


def failures_section(errors: Mapping[str, str], folder: str) -> list[dict[str, Any]] | None:
    """The section of the report; `None` if nothing has failed.

    Args:
        errors (`Mapping[str, str]`): For each stage its error, in a line.
        folder (`str`): The output folder's name: where it lies is nobody's business.
    """
    return [to_section(Failure(stage, error, _command(stage, folder))) for stage, error in errors.items()] or None


def failure_lines(failures: list[dict[str, Any]] | None, folder: str) -> str:
    """For a terminal; empty if nothing has failed.

    Args:
        failures (`list[dict]` or `None`): The section of the report.
        folder (`str`): The output folder, as the reader has called it.
    """
    lines = []
    for entry in failures or ():
        lines += [f"Failed: {entry['stage']} ({entry['error']})"]
        lines += [f"  repeat it with: {_command(entry['stage'], folder)}"]
    return "\n".join(lines)


def _command(stage: str, folder: str) -> str:
    if stage == TUNING:
        return f"optimum-clp tune --model {shlex.quote(folder)} --learning-rate RATE {shlex.quote(folder + '-tuned')}"
    return f"optimum-clp finish --model {shlex.quote(folder)}"
