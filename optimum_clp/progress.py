"""How far work is, on standard error: the place of each stage in a run, and of work that takes longer than two seconds a bar
on a terminal, a line in a log."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


class Stages:
    """The stages of a run, each of which says its place and what it is for when it begins; without a run nothing is said."""

    def __init__(self) -> None:
        self._stages: Mapping[str, str] = {}
        self._began = 0.0

    @contextmanager
    def run(self, stages: Mapping[str, str], quiet: bool = False) -> Iterator[None]:
        """A run of these stages; at its end it says how long all of them took.

        Args:
            stages (`Mapping[str, str]`): Their names in the order in which they come, and what each is for.
            quiet (`bool`): Say nothing.
        """
        self._stages, self._began = {} if quiet else stages, time.monotonic()
        try:
            yield
            if self._stages:
                say(f"All {len(self._stages)} stages: {in_words(time.monotonic() - self._began)}.")
        finally:
            self._stages = {}

    def begin(self, name: str) -> None:
        """A stage begins; one that is not of this run says nothing."""
        if name in self._stages:
            place, passed = list(self._stages).index(name) + 1, time.monotonic() - self._began
            after = f" (after {in_words(passed)})" if passed >= _DELAY else ""
            say(f"[{place} of {len(self._stages)}] {name}: {self._stages[name]}{after}")


def in_words(seconds: float) -> str:
    """A time: `"9 s"`, `"12 min 5 s"`, `"3 h 20 min"`."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
