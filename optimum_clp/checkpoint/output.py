"""Output folders that appear whole or not at all.

Work goes into a hidden sibling of the target, on the same file system, and is renamed at the end. A run that fails,
or is interrupted, leaves the target as it was.
"""

import contextlib
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..errors import OutputError


def check_output(target: str | os.PathLike, overwrite: bool = False) -> Path:
    """Check that `target` can become an output folder, before any work is done. Nothing is written.

    Args:
        target (`str` or `os.PathLike`): The folder to be written; its parents are made later if they are missing.
        overwrite (`bool`): Allow a folder that is not empty. Its whole content is going to be replaced.

    Returns:
        `Path`: The absolute path, symbolic links resolved.

    Raises:
        OutputError: If `target` is a file, is not empty and `overwrite` is false, cannot be written, or must not be
            replaced: the file system's root, the home folder, the current folder or one that holds these, a mount
            point, a git repository.
    """
    path = Path(target).resolve()
    problem = _protected(path) or _unusable(path) or _content_at_risk(path, overwrite)
    if problem:
        raise OutputError.of("output folder", str(target), *problem)
    return path


def _unusable(path: Path) -> tuple[str, str] | None:
    if path.exists() and not path.is_dir():
        return "it is a file", "Choose a new folder"
    parent = next(p for p in path.parents if p.exists())
    if not parent.is_dir():
        return f"its parent {parent} is a file", "Choose a folder under another one"
    if not os.access(parent, os.W_OK | os.X_OK):
        return f"{parent} may not be written to", "Choose a folder that you may write to"
    return None


def _protected(path: Path) -> tuple[str, str] | None:
    remedy = "Name a new folder inside it"
    for what, place in (("the current folder", Path.cwd()), ("the home folder", Path.home())):
        if path == place.resolve():
            return f"it is {what}, which is never replaced", remedy
        if path in place.resolve().parents:
            return f"it holds {what}, and is never replaced", remedy
    if os.path.ismount(path):
        return "it is a mount point, which cannot be replaced as a whole", remedy
    return None


def _content_at_risk(path: Path, overwrite: bool) -> tuple[str, str] | None:
    if not path.is_dir() or not any(path.iterdir()):
        return None
    if not overwrite:
        return (
            "it is not empty",
            "Choose a new folder, or replace its whole content with overwrite=True (--overwrite on the command line)",
        )
    if (path / ".git").exists():
        return "it is a git repository, whose history would be lost", "Choose a new folder"
    return None


@contextlib.contextmanager
def staged_folder(target: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A fresh folder to write into, which becomes `target` when the block ends without an exception.

    On any exception, `KeyboardInterrupt` included, the fresh folder is deleted and `target` is what it was. With
    `overwrite`, the old folder is moved aside, replaced, and then deleted; files that are still memory-mapped from it
    (a model that was read from there) stay readable. Files get the permissions that the umask gives.

    Args:
        target (`str` or `os.PathLike`): The folder to be written; missing parents are made.
        overwrite (`bool`): Replace a folder that is not empty, with all that is in it.

    Yields:
        `Path`: The fresh, empty folder, a hidden sibling of `target`.

    Raises:
        OutputError: As [`check_output`]. Also if the finished folder cannot take its place (somebody else has written
            to `target` in the meantime): then the result is kept, and the message says where.
    """
    path = check_output(target, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = _sibling(path, "tmp")
        staged.mkdir()
    except OSError as error:
        rule = f"it cannot be made ({error.strerror})"
        raise OutputError.of("output folder", str(target), rule, "Choose another folder") from error
    try:
        yield staged
        _honour_umask(staged)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    _swap(staged, path, overwrite)


def _sibling(path: Path, suffix: str) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.{suffix}"


def _honour_umask(folder: Path) -> None:
    # safetensors 0.8 writes with mode 0600; the folder itself was made by mkdir, so its mode shows the umask
    allowed = stat.S_IMODE(folder.stat().st_mode)
    for entry in folder.rglob("*"):
        if not entry.is_symlink():
            wanted = allowed & (0o777 if entry.is_dir() else 0o666)
            entry.chmod(stat.S_IMODE(entry.stat().st_mode) | wanted)


def _swap(staged: Path, path: Path, overwrite: bool) -> None:
    """Rename `staged` to `path`; what was at `path` is deleted last, and put back if anything fails before."""
    old = _sibling(path, "old")
    try:
        check_output(path, overwrite)
        if path.exists():
            path.rename(old)
        staged.rename(path)
    except BaseException as error:
        if old.exists() and not path.exists():
            old.rename(path)
        if not isinstance(error, OSError):
            raise
        reason = error.problems[0].rule if isinstance(error, OutputError) else (error.strerror or str(error))
        remedy = f"Nothing is lost: the finished folder is {staged}. Move it to where you want it"
        raise OutputError.of("output folder", str(path), f"it could not be replaced ({reason})", remedy) from error
    if old.exists():
        shutil.rmtree(old, ignore_errors=True)
        if old.exists():
            warnings.warn(f"{path} is written; its former content could not be deleted from {old}", stacklevel=4)
