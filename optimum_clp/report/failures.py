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
        folder (`str`): The output folder, as the reader calls it.
    """
    place = shlex.quote(folder)
    found = []
    for stage, error in errors.items():
        command = f"optimum-clp finish --model {place}"
        if stage == TUNING:
            command = f"optimum-clp tune --model {place} --learning-rate RATE {shlex.quote(folder + '-tuned')}"
        found.append(to_section(Failure(stage, error, command)))
    return found or None


def failure_lines(failures: list[dict[str, Any]] | None) -> str:
    """For a terminal; empty if nothing has failed."""
    lines = []
    for entry in failures or ():
        lines += [f"Failed: {entry['stage']} ({entry['error']})", f"  repeat it with: {entry['command']}"]
    return "\n".join(lines)
