"""Several processes with one job (`accelerate launch`): who writes, who waits, and what they send one another.

A process that is alone, also where PyTorch was built without `torch.distributed`, is a group of one.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from torch import Tensor


def join_group() -> None:
    """Join the group of processes that a launcher has started; nothing happens in a process that is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _in_group():
        PartialState(cpu=not torch.cuda.is_available())


def own_device_map() -> dict[str, int] | None:
    """In a group on accelerators: the whole model on this process's own; otherwise `None`."""
    if world_size() > 1 and torch.cuda.is_available():
        return {"": int(os.environ.get("LOCAL_RANK", "0"))}
    return None


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
    return int(os.environ.get("RANK", "0")) == 0


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


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()
