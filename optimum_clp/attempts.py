"""Stages that may fail one by one, once there is something that must not be lost."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from .errors import CLPError

logger = logging.getLogger(__name__)


class Attempts:
    """What was tried, and what has failed.

    Args:
        strict (`bool`): The first failure is the caller's: nothing is held back.

    Attributes:
        failed (`dict[str, str]`): For each stage that has failed its error, in one line.
    """

    def __init__(self, strict: bool = False):
        self.strict = strict
        self.failed: dict[str, str] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What follows is a stage: if it fails, that is noted, the log says so, and the rest goes on.

        Args:
            name (`str`): What a reader calls it.
        """
        try:
            yield
        except Exception as error:
            if self.strict:
                raise
            self.note(name, error)

    def interrupted(self, names: Iterable[str]) -> None:
        """Somebody has ended the work before these stages were done."""
        self.failed |= dict.fromkeys(names, "interrupted")

    def note(self, name: str, error: Exception) -> None:
        """A stage has failed."""
        text = " ".join(str(error).split())
        self.failed[name] = text if isinstance(error, CLPError) else f"{type(error).__name__}: {text or 'no message'}"
        logger.error(f"{name} failed, and the rest goes on: {self.failed[name]}")
