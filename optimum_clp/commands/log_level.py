"""`--log-level`: how much a command tells on standard error while it works."""

import argparse
import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

LEVELS = ("debug", "info", "warning", "error", "critical")
DEFAULT = "info"
_LIBRARY = "optimum_clp"


def add_log_level(parser: argparse._ActionsContainer) -> None:
    """Add `--log-level`."""
    parser.add_argument(
        "--log-level",
        choices=LEVELS,
        default=DEFAULT,
        help="least level of what is told on standard error; above info without progress, above warning without what other "
        f"libraries warn of (default: {DEFAULT})",
    )


def hides_progress(args: argparse.Namespace) -> bool:
    """Whether neither bars nor lines say how far the work is: with `--quiet`, a level above info, or in another process
    than the first one that a launcher has started."""
    return args.quiet or LEVELS.index(own_level(args.log_level)) > LEVELS.index("info")


def own_level(level: str) -> str:
    """The level of this process: of several that a launcher has started (`accelerate launch`) the first one tells for all,
    and the others tell their errors alone."""
    # processes.py says the same, and loads torch
    others = os.environ.get("RANK", "0").strip() != "0"
    return max(level, "error", key=LEVELS.index) if others else level


@contextlib.contextmanager
def logged(level: str) -> Iterator[None]:
    """Within the block, records of this package are lines on standard error; afterwards logging is as it was.

    Above `warning` the Python warnings and the log records of other libraries are held back as well. The root logger is
    left alone.

    Args:
        level (`str`): One of `LEVELS`.
    """
    logger, number = logging.getLogger(_LIBRARY), logging.getLevelNamesMapping()[level.upper()]
    before, lines, disabled = (logger.level, logger.propagate), _Lines(), logging.root.manager.disable
    with warnings.catch_warnings():
        logger.addHandler(lines)
        logger.setLevel(number)
        logger.propagate = False  # whoever has set up the root logger would see each line twice
        if number > logging.WARNING:
            warnings.simplefilter("ignore")
            logging.disable(max(disabled, number - 1))
        try:
            yield
        finally:
            logging.disable(disabled)
            logger.removeHandler(lines)
            logger.setLevel(before[0])
            logger.propagate = before[1]


class _Lines(logging.Handler):
    """A line for each record, beside the progress bars; the same notice is told once."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        from ..progress import say

        try:
            line = record.getMessage()
            if record.levelno != logging.INFO:
                line = f"optimum-clp: {record.levelname.lower()}: {line}"
            if record.levelno < logging.WARNING or line not in self._told:
                say(line)
            self._told.add(line)
        except Exception:
            self.handleError(record)
