"""Weights that lie in files and are mapped into memory: which ones they are, and letting their pages go.

A checkpoint in safetensors is mapped on the CPU: its weights take no memory of this process's own (`RssAnon`), pages are read
when they are touched, and the kernel takes them back when it needs room. Here they are given back earlier, as soon as a
layer is done with, so that a process holds no more of them than it uses.
"""

import bisect
import ctypes
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor, nn

from .errors import ModelError

_TABLE = Path("/proc/self/smaps")


class MappedWeights:
    """The parts of this process's memory that are files, as they are now; nothing where the system does not tell (not Linux).

    Only mappings of which no page was written to: pages that were are this process's own, and letting them go would bring back what
    the file says.

    Args:
        table (`Path`): Where the system tells; as Linux's `/proc/self/smaps`.
    """

    def __init__(self, table: Path = _TABLE):
        self._ranges = sorted(_file_ranges(table))
        self._starts = [start for start, _, _ in self._ranges]

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in a file, with all of its storage's numbers that it shows."""
        return self.file_of(tensor) is not None

    def file_of(self, tensor: Tensor) -> Path | None:
        """The file that a tensor lies in, if it lies in one."""
        if tensor.is_meta or tensor.device.type != "cpu" or not tensor.nbytes:
            return None
        index = bisect.bisect_right(self._starts, tensor.data_ptr()) - 1
        if index < 0 or tensor.data_ptr() + tensor.nbytes > self._ranges[index][1]:
            return None
        return Path(self._ranges[index][2])

    def bytes_of(self, module: nn.Module) -> int:
        """Bytes of a module's weights that lie in files; what is there twice counts once."""
        found = {t.data_ptr(): t.nbytes for t in tensors_of(module) if self.holds(t)}
        return sum(found.values())

    def files_of(self, module: nn.Module) -> list[Path]:
        """The files that a module's weights lie in."""
        return sorted({file for file in map(self.file_of, tensors_of(module)) if file is not None})

    def let_go(self, tensors: Iterable[Tensor]) -> int:
        """Give the pages of tensors back that lie in files. What they hold does not change: it is read again when it is needed.

        Returns:
            `int`: Bytes of whole pages that were given back.
        """
        pages = [_inner_pages(tensor) for tensor in tensors if self.holds(tensor)]
        return sum(_advise(start, stop) for start, stop in pages if start < stop)


class FileStamps:
    """What tells that files were changed: their sizes, and when they were written to.

    A file that is removed, or replaced by another one, is still there for whoever has mapped it; one that is written to is another model.

    Args:
        files (`Iterable[Path]`): As they are now.
    """

    def __init__(self, files: Iterable[Path]):
        self._stamps = {file: _stamp(file) for file in files}

    def changed(self) -> Path | None:
        """The first file that was written to since."""
        for file, before in self._stamps.items():
            now = _stamp(file)
            if before is not None and now is not None and now != before and now[0] == before[0]:
                return file
        return None

    def check(self) -> None:
        """Check that no file was written to.

        Raises:
            ModelError: If one was.
        """
        if (file := self.changed()) is not None:
            raise ModelError.of(
                "model",
                str(file),
                "it was written to while its weights were read, and they are no longer one model's",
                "Let nobody write there, and start again: what was measured of other rows is kept",
            )


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers of a module."""
    yield from module.parameters()
    yield from module.buffers()


def _inner_pages(tensor: Tensor) -> tuple[int, int]:
    """The whole pages of a tensor: those at its ends hold its neighbours' numbers, too."""
    size, start = mmap.PAGESIZE, tensor.data_ptr()
    return -(-start // size) * size, (start + tensor.nbytes) // size * size


def _advise(start: int, stop: int) -> int:
    """Bytes that were given back: 0 if the system would not."""
    call = ctypes.CDLL(None, use_errno=True).madvise
    failed = call(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), ctypes.c_int(mmap.MADV_DONTNEED))
    return 0 if failed else stop - start


def _file_ranges(table: Path) -> Iterator[tuple[int, int, str]]:
    """Address ranges that map a file and have no page of the process's own, and the file's name."""
    try:
        lines = table.read_text().splitlines()
    except OSError:
        return
    current: tuple[int, int, str] | None = None
    for line in lines:
        head, _, rest = line.partition(" ")
        if not head.endswith(":"):  # a mapping: its addresses, rights, offset, device, inode and path
            fields = rest.split(maxsplit=4)
            start, _, stop = head.partition("-")
            is_file = len(fields) == 5 and fields[3] != "0" and fields[4].startswith("/")
            current = (int(start, 16), int(stop, 16), fields[4]) if is_file else None
        elif head == "Anonymous:" and current is not None:
            if rest.split() == ["0", "kB"]:
                yield current
            current = None
