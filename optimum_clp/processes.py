"""Several processes with one job (`accelerate launch`): who writes, and who waits."""

import os

import torch
import torch.distributed as dist
from accelerate.state import PartialState


def join_group() -> None:
    """Join the group of processes that a launcher has started; nothing happens in a process that is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        PartialState(cpu=not torch.cuda.is_available())


def own_device_map() -> dict[str, int] | None:
    """In a group on accelerators: the whole model on this process's own; otherwise `None`."""
    if dist.is_initialized() and dist.get_world_size() > 1 and torch.cuda.is_available():
        return {"": int(os.environ.get("LOCAL_RANK", "0"))}
    return None


def is_first() -> bool:
    """Whether this process is the one that writes files and prints; a process alone is."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all() -> None:
    """Wait until every process of the group is here."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
