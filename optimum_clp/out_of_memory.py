"""A device that has no memory for what is computed: the batch is halved once, and after that it is an error.

accelerate's `find_executable_batch_size` begins a whole function again with fewer rows, as often as it takes. Here the rows that failed
are computed again, in halves, and all that was computed before stays; a batch that does not fit by half is told, since each further
halving costs speed that a smaller setting, or a bound on memory, would not.
"""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from .errors import DeviceMemoryError

logger = logging.getLogger(__name__)

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the CPU, has no memory for a tensor."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


def device_memory_error(error: BaseException, doing: str, rule: str, remedy: str) -> DeviceMemoryError:
    """The error for a device without memory.

    Args:
        error (`BaseException`): What PyTorch has raised.
        doing (`str`): What was computed.
        rule (`str`): What was tried.
        remedy (`str`): What else to do.
    """
    said = " ".join(str(error).split())[:200].rstrip(".")
    more = "shorter rows (calibration.sequence_length), or a bound within which layers come and go (max_memory)"
    return DeviceMemoryError.of("device memory", doing, f"{rule} ({said})", f"{remedy}, {more}")


class Halving:
    """Rows that run together: half of them, once a device has had no memory for all.

    Args:
        doing (`str`): What is computed, for messages.
        setting (`str`): What decides how many rows run together.
        allowed (`bool`): `False` where other processes count on the same number of passes.
        then (`Callable`, *optional*): Called once the rows are halved, for what parts them further.
    """

    def __init__(self, doing: str, setting: str, *, allowed: bool = True, then: Callable[[], None] = lambda: None):
        self.doing, self.setting, self.allowed, self.then = doing, setting, allowed, then
        self.done = False

    def over(self, rows: Any, run: Callable[[Any], T]) -> list[T]:
        """Compute something of some rows, in one part or in two.

        Args:
            rows: Anything with a length that can be sliced: what is done together.
            run (`Callable`): Called with the rows, or with one half and then the other; again for all of it if it has failed.

        Returns:
            `list`: What it has returned, in order.

        Raises:
            DeviceMemoryError: If there is no memory for half of the rows either.
        """
        try:
            return [run(part) for part in (halves(rows) if self.done else [rows])]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.begin(len(rows), error)
        # out of the handler: what the failed pass has made is held by its traceback until here
        clear_device_cache(garbage_collection=True)
        return self.over(rows, run)

    def begin(self, rows: int, error: BaseException) -> None:
        """Run half of the rows from now on.

        Raises:
            DeviceMemoryError: If that is so already, if there is one row, or if other processes would not.
        """
        remedy = f"Lower {self.setting}"
        if not self.allowed:
            rule = "there is too little, and in a group of processes no batch is halved by one of them"
            raise device_memory_error(error, self.doing, rule, remedy) from error
        if self.done or rows < 2:
            rule = "there is too little for one row" if rows < 2 else f"there is too little for half of {rows} rows"
            raise device_memory_error(error, self.doing, rule, remedy) from error
        self.done = True
        self.then()
        said = " ".join(str(error).split())[:200]
        logger.warning(
            f"{self.doing}: no memory for {rows} rows at once, so that half of them run from now on ({said}); "
            f"a lower {self.setting} does without the failed pass."
        )


def halves(rows: Any) -> list[Any]:
    """The first half of some rows, at least as long, and the rest if there is one."""
    middle = (len(rows) + 1) // 2
    return [rows[:middle], rows[middle:]] if len(rows) > 1 else [rows]
