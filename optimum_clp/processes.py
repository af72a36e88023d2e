"""Several processes with one job (`accelerate launch`): who writes, who waits, and what they send one another.

A process that is alone, also where PyTorch was built without `torch.distributed`, is a group of one.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from torch import Tensor

from .errors import CLPError, ConfigurationError

T = TypeVar("T")

# what launchers set and accelerate reads as numbers
_NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")


def check_launcher() -> None:
    """Refuse an environment of which accelerate would make nothing, or something else.

    Raises:
        ConfigurationError: Names the variable.
    """
    for name in _NUMBERS:
        _number(name, 0)
    total = _number("WORLD_SIZE", 1)
    if total > 1 and not _in_group():
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                rule = f"WORLD_SIZE is {total}, and processes find one another by this environment variable too"
                raise ConfigurationError.of(name, None, rule, "Unset WORLD_SIZE, or start with `accelerate launch`")
    if total >= 1 and not 0 <= _number("RANK", 0) < total:
        rule = f"it must be below WORLD_SIZE, which is {total}"
        raise ConfigurationError.of("RANK", os.environ["RANK"], rule, "Unset both, or start with `accelerate launch`")


def _number(name: str, default: int) -> int:
    value = os.environ.get(name)
    if value is None:
        return default
    try:
        return int(value)
    except ValueError:
        rule = "this environment variable is a launcher's, and must be a whole number"
        raise ConfigurationError.of(name, value, rule, f"Unset {name}, or start with `accelerate launch`") from None


def join_group() -> None:
    """Join the group of processes that a launcher has started; nothing happens in a process that is alone."""
    check_launcher()
    if _number("WORLD_SIZE", 1) > 1 and not _in_group():
        PartialState(cpu=not torch.cuda.is_available())


def leave_group() -> None:
    """Leave the group of processes, with one's work done; nothing happens in a process that is alone.

    A process that ends within a group is now and then ended by SIGABRT after all is written: a thread of the backend
    finds the interpreter gone ("terminate called without an active exception"), and the launcher calls the run failed.
    """
    if _in_group():
        dist.destroy_process_group()


def own_device_map() -> dict[str, int] | None:
    """In a group on accelerators: the whole model on this process's own; otherwise `None`."""
    if world_size() > 1 and torch.cuda.is_available():
        return {"": launched_local_rank()}
    return None


def launched_local_rank() -> int:
    """This process's place on its machine, from 0, by what a launcher says: the number of its accelerator."""
    return _number("LOCAL_RANK", 0)


def world_size() -> int:
    """Processes in the group."""
    return dist.get_world_size() if _in_group() else 1


def rank() -> int:
    """This process's place in the group, from 0."""
    return dist.get_rank() if _in_group() else 0


def is_first() -> bool:
    """Whether this process is the one that writes files and prints; a process alone is."""
    return rank() == 0


def was_launched_first() -> bool:
    """As [`is_first`] by what a launcher says, whether or not the processes have become a group yet."""
    return _number("RANK", 0) == 0


def wait_for_all() -> None:
    """Wait until every process of the group is here."""
    if world_size() > 1:
        dist.barrier()


def broadcast(tensor: Tensor, source: int = 0) -> Tensor:
    """Let every process of the group have one's tensor.

    Args:
        tensor (`Tensor`): Of the same shape and dtype in all of them; on the accelerator where there is one, as NCCL sends
            from nowhere else. Its contents are overwritten, but in the process `source`.
        source (`int`): Whose tensor it is.

    Returns:
        `Tensor`: The tensor of `source`.
    """
    if world_size() == 1:
        return tensor
    sent = tensor.contiguous()
    dist.broadcast(sent, src=source)
    return sent


def gathered(value: Any) -> list[Any]:
    """What every process of the group has, in their order.

    Args:
        value: Can be pickled.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def by_first(call: Callable[[], T]) -> T:
    """What the first process's call gives, or raises, in all processes of the group: none waits for one that has failed.

    Args:
        call (`Callable`): Made in the first process alone; what it returns can be pickled.
    """
    if world_size() == 1:
        return call()
    value: Any = None
    error: Exception | None = None
    if is_first():
        try:
            value = call()
        except Exception as raised:
            error = raised
    # what another library has raised may not be to be pickled
    told = error if error is None or isinstance(error, CLPError) else RuntimeError(f"{type(error).__name__}: {error}")
    told, value = gathered((told, value))[0]
    if told is not None:
        raise told if error is None else error
    return value


@contextmanager
def entered_by_first(block: AbstractContextManager[Any]) -> Iterator[None]:
    """A `with` block that the first process enters and leaves; what entering raises is raised in all of them."""
    with ExitStack() as stack:
        by_first(lambda: stack.enter_context(block))
        yield


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()
