"""Frozen layers that no process holds whole: each one of a group has a part of their weights, and a layer while it runs.

Under FSDP the trained modules are accelerate's to shard; what lies between and above them is frozen, and PyTorch's `fully_shard` deals it
out here. That is for layers that lie in main memory and run on an accelerator ([`StreamedForward`]): from the other accelerators of the
group a layer comes many times faster than from there.
"""

import copy
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ..forward.hooks import replaced_forward
from ..forward.streamed_layers import ROTATING, LayerCopies, move_tensors, settle, streamed_forward
from ..processes import world_size

logger = logging.getLogger(__name__)


def asks_for_sharding() -> bool:
    """Whether a group of processes was started with FSDP; accelerate itself shards on accelerators alone."""
    return world_size() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")


@contextmanager
def sharded(layers: Sequence[nn.Module]) -> Iterator[list[nn.Module]]:
    """Let each process of the group hold a part of some layers until the block ends. All of them run the same layers.

    The layers themselves, and where they lie, are as they were: what runs are twins of them.

    Args:
        layers (`Sequence[nn.Module]`): Frozen; those among them that run elsewhere than where they lie are dealt out.

    Yields:
        `list[nn.Module]`: The twins; none where a process is alone, was not started with FSDP, or has no room for its part.
    """
    found = [(layer, forward) for layer in layers if (forward := streamed_forward(layer)) is not None]
    if not found or not asks_for_sharding():
        yield []
        return
    copies = found[0][1].copies
    sizes = [sum(tensor.nbytes for tensor in forward.tensors()) for _, forward in found]
    if not _has_room(copies, sizes):
        yield []
        return
    mesh = init_device_mesh(copies.device.type, (world_size(),))
    staying = copies.staying
    with ExitStack() as stack:
        stack.callback(lambda: copies.keep(staying))
        copies.keep(0)
        twins = []
        for layer, _ in found:
            twin = _twin(layer, copies.device)
            fully_shard(twin, mesh=mesh, reshard_after_forward=True)
            stack.enter_context(replaced_forward(layer, twin))
            twins.append(twin)
        yield twins


def _has_room(copies: LayerCopies, sizes: Sequence[int]) -> bool:
    """Whether this process's part fits into what may be held for copies that stay, and half of what is computed with."""
    part, room = sum(sizes) / world_size(), copies.staying * max(sizes) + copies.work_memory / 2
    if part + ROTATING * max(sizes) <= room:
        return True
    logger.warning(
        f"tuning: the frozen layers are not sharded, and come from main memory: {part / 2**30:.2f} GiB of each process "
        f"and two layers would not fit the {room / 2**30:.2f} GiB that it may hold."
    )
    return False


def _twin(layer: nn.Module, device: torch.device) -> nn.Module:
    """The same layer over copies of its weights on a device."""
    # neither its tensors nor its forward, which knows all other layers
    shared: list[Any] = [*layer.parameters(), *layer.buffers(), streamed_forward(layer)]
    twin = copy.deepcopy(layer, {id(each): each for each in shared})
    settle(twin, move=False)
    move_tensors(twin, device, {})
    return twin


def local_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters that this process holds."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in module.parameters())
