"""Files that only this user reads, and that are what they were written as: no link is followed, nothing is half there.

A digest covers a file's bytes and the place that it was written for, so that another run's file is as wrong as a flipped bit.
"""

import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import IO

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def place_of(path: Path) -> str:
    """What a digest calls a place: the last two parts of its path, one of which is a hash of all that its contents depend on;
    so a cache folder may be moved."""
    return "/".join(path.parts[-2:])


def digest(text: str | bytes, place: str) -> str:
    """Of a text that was written for a place: 32 hexadecimal digits."""
    contents = text.encode() if isinstance(text, str) else text
    return hashlib.sha256(place.encode() + b"\0" + contents).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        OSError: If it is no ordinary file, or cannot be read.
    """
    with open_plain(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_plain(path: Path) -> bool:
    """Whether there is an ordinary file: no link, folder or pipe."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def is_there(path: Path) -> bool:
    """Whether the name is taken, also by a link that leads nowhere."""
    return os.path.lexists(path)


def open_plain(path: Path) -> BufferedReader:
    """An ordinary file, to be read.

    Raises:
        OSError: If it is none, or cannot be read.
    """
    if not is_plain(path):
        raise OSError(f"{path} is no ordinary file")
    return os.fdopen(os.open(path, os.O_RDONLY | _NO_FOLLOW), "rb")


def append_line(path: Path, line: str) -> None:
    """Add a line to a file that belongs to this user alone, which is made if it is missing."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NO_FOLLOW, 0o600), "wb") as stream:
        stream.write(line.encode() + b"\n")


@contextmanager
def replaced_file(path: Path) -> Iterator[IO[bytes]]:
    """A new file for this user alone that takes the place of another, or a link's, when the block ends without an exception."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o600), "wb") as stream:
            yield stream
        if path.is_dir() and not path.is_symlink():
            remove(path)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def make_private(folder: Path) -> None:
    """Take the permissions of everybody else from all files in a folder."""
    for entry in folder.rglob("*"):
        if not entry.is_symlink():
            entry.chmod(0o700 if entry.is_dir() else 0o600)


def remove(path: Path) -> None:
    """Remove what has this name, whatever it is: of a link, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
