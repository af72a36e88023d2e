"""How far work is, on standard error, if it takes longer than two seconds: a bar on a terminal, a line in a log."""

import sys
import time
from typing import Any

from tqdm.auto import tqdm

_DELAY = 2.0
# seconds until a log is told that work goes on; from there on each line comes when twice the time has passed
_FIRST_LINE = 60.0


def progress_bar(total: int, description: str, quiet: bool = False) -> Any:
    """To be used as a context manager and advanced with `.update(n)`.

    Args:
        total (`int`): Number of steps.
        description (`str`): What is being done.
        quiet (`bool`): Show nothing.
    """
    if quiet or draws_bars():
        return tqdm(total=total, desc=description, disable=quiet, delay=_DELAY, leave=False, dynamic_ncols=True)
    return ProgressLines(total, description)


def say(line: str) -> None:
    """A line on standard error, before or between the bars."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


def draws_bars() -> bool:
    """Whether what goes to standard error is looked at by somebody: a terminal, or a notebook."""
    # a bar in a file is one line of a hundred thousand characters
    return sys.stderr.isatty() or any(base.__name__ == "tqdm_notebook" for base in tqdm.__mro__)


class ProgressLines:
    """A line at the end; before that, of work that takes minutes, one after a minute, after two, four, eight.

    Args:
        total (`int`): Number of steps.
        description (`str`): What is being done.
    """

    def __init__(self, total: int, description: str):
        self.total, self.description = total, description
        self.done, self._began, self._next = 0, time.monotonic(), _FIRST_LINE

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, error_type: Any, *_: Any) -> None:
        if time.monotonic() - self._began >= _DELAY:
            self._say("interrupted" if error_type else "done")

    def update(self, steps: int = 1) -> None:
        """So many steps more have been done."""
        self.done += steps
        passed = time.monotonic() - self._began
        if passed >= self._next:
            self._say(f"{self.done:,} of {self.total:,}")
            self._next = 2 * passed

    def _say(self, words: str) -> None:
        seconds = time.monotonic() - self._began
        print(f"{self.description}: {words} ({seconds:.0f} s)", file=sys.stderr, flush=True)
