"""Room for large tensors: main memory up to a limit, and files that are mapped into memory beyond it.

What lies in a mapped file is not this process's own memory (`RssAnon`): the kernel writes it to the disk and takes its pages when
it needs room.
"""

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class Spill:
    """Tensors in main memory as long as there is room, in mapped files of a folder afterwards.

    The files have no names: nothing is left of them when the process ends, however it does.

    Args:
        folder (`Path` or `None`): For the files, made when it is needed; `None` keeps everything in memory.
        memory (`float`): Bytes that may lie in memory, over everything that was ever allocated here.
        smallest (`int`): Tensors of fewer bytes lie in memory and are not counted: a mapping is a page at least.
    """

    def __init__(self, folder: Path | None = None, memory: float = math.inf, *, smallest: int = 0):
        self.folder = folder
        self.free_memory = memory
        self.smallest = smallest

    def no_room(self, folder: Path, needed: int, free: int) -> Exception:
        """What is raised if the disk has no room."""
        return OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free", str(folder))

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on the CPU.

        Raises:
            Exception: [`no_room`]'s, if the disk has none.
        """
        size = math.prod(shape) * dtype.itemsize
        if not self._goes_to_disk(size):
            self.free_memory -= size if size >= self.smallest else 0
            return torch.empty(tuple(shape), dtype=dtype)
        assert self.folder is not None
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (free := shutil.disk_usage(self.folder).free) < size:
            raise self.no_room(self.folder, size, free)
        descriptor, file = tempfile.mkstemp(".bin", "states-", self.folder)
        try:
            self._reserve(descriptor, size)
            stored = torch.from_file(file, shared=True, size=math.prod(shape), dtype=dtype).view(*shape)
        finally:
            os.close(descriptor)
            # the mapping keeps the contents alive, and the name would outlive a process that is killed
            os.unlink(file)
        return stored

    def keep(self, tensor: Tensor) -> Tensor:
        """A tensor's numbers where they may stay: the tensor itself, or a copy in a file, contiguous."""
        if not self._goes_to_disk(tensor.nbytes):
            self.free_memory -= tensor.nbytes if tensor.nbytes >= self.smallest else 0
            return tensor
        return self.allocate(tensor.shape, tensor.dtype).copy_(tensor)

    def keep_array(self, array: np.ndarray) -> np.ndarray:
        """The same for a numpy array of a dtype that torch has."""
        return array if not self._goes_to_disk(array.nbytes) else self.keep(torch.from_numpy(array)).numpy()

    def _reserve(self, descriptor: int, size: int) -> None:
        """Take the disk's blocks now: a page of a mapping that finds none later ends the process with a signal."""
        if not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            # file systems that cannot reserve anything are used as they are
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                return
            assert self.folder is not None
            raise self.no_room(self.folder, size, shutil.disk_usage(self.folder).free) from error

    def _goes_to_disk(self, size: int) -> bool:
        return self.folder is not None and size >= max(1, self.smallest) and size > self.free_memory
