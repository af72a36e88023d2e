"""Files on a disk that may have no room for them: one error that says what is needed and what is free, and nothing half-written."""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import CLPError, OutputError
from .private_files import remove

# EFBIG: a file system, or a limit of this process, that takes no file of such a size
_FULL = {errno.ENOSPC: "it is full", errno.EDQUOT: "a quota is used up", errno.EFBIG: "it takes no file of this size"}
# what libraries in Rust and C++ say of it, which raise errors of their own
_SAID = re.compile(r"No space left on device|Disk quota exceeded|File too large|os error (?:28|122|27)\b")
_REMEDY = "Free some space, or write to a larger disk"


@contextmanager
def room_for(
    what: str, folder: Path, needed: int | None, error: type[CLPError] = OutputError, remedy: str = _REMEDY
) -> Iterator[None]:
    """What the block writes finds room, or one error says that it does not: before the block, if the disk has less than is needed now, or
    where it fills up meanwhile.

    Args:
        what (`str`): What is written, as a reader calls it.
        folder (`Path`): Where; its parent is named, as the folder itself is a hidden one that is renamed at the end.
        needed (`int` or `None`): Bytes that will be written, where that is known.
        error (`type[CLPError]`): Raised.
        remedy (`str`): What to do, a sentence without final stop.

    Raises:
        CLPError: `error`, if there is no room.
    """
    free = free_bytes(folder)
    if free is not None and needed is not None and free < needed:
        raise _no_room(what, folder, needed, free, "", error, remedy)
    try:
        yield
    except Exception as found:
        why = _why_full(found)
        if why is None:
            raise
        raise _no_room(what, folder, needed, free, f" ({why})", error, remedy) from found


def free_bytes(folder: Path) -> int | None:
    """What this user may write to the disk of a folder, in bytes; `None` where the system does not say it."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


@contextmanager
def nothing_half_written(folder: Path) -> Iterator[None]:
    """What the block has begun to write in a folder is gone again if the block ends with an exception."""
    before = set(folder.rglob("*"))
    try:
        yield
    except BaseException:
        for path in set(folder.rglob("*")) - before:
            remove(path)
        raise


def write_whole(path: Path, text: str, errors: str = "strict") -> None:
    """Write a text as UTF-8: afterwards the file has all of it, or, after an exception, what it had before.

    Args:
        path (`Path`): The file, in a folder that exists.
        text (`str`): Its new content.
        errors (`str`): As of `open`.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8", errors=errors)
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def _why_full(error: BaseException | None) -> str | None:
    """What an error, or one below it, says of a disk without room; `None` if it is about something else, or has said it already."""
    while error is not None and not isinstance(error, CLPError):
        if isinstance(error, OSError) and error.errno in _FULL:
            return _FULL[error.errno]
        if not isinstance(error, OSError) and (found := _SAID.search(str(error))):
            return found[0]
        error = error.__cause__ or error.__context__
    return None


def _no_room(
    what: str, folder: Path, needed: int | None, free: int | None, why: str, error: type[CLPError], remedy: str
) -> CLPError:
    sizes = [] if needed is None else [f"{_shown(needed)} are needed"]
    sizes += [] if free is None else [f"{_shown(free)} {'were' if why else 'are'} free"]
    rule = f"it has no room for {what}{why}{': ' if sizes else ''}{', '.join(sizes)}"
    return error.of("disk", str(folder.parent), rule, remedy)


def _shown(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
