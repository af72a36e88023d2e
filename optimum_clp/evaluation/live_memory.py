"""Peak of live tensor bytes: what a run needs, whatever the allocator keeps."""

import weakref

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensorBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, until they die.

    Args:
        model (`nn.Module`, *optional*): Its parameters and buffers count from the start.

    Attributes:
        live (`int`): Bytes alive now.
        peak (`int`): Most bytes alive at once.
    """

    def __init__(self, model: nn.Module | None = None):
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()
        for tensor in (*model.parameters(), *model.buffers()) if model is not None else ():
            self._add(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
