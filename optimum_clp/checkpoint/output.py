"""Output folders that appear whole or not at all.

Work goes into a hidden sibling of the target, on the same file system, and is renamed at the end. A run that fails,
or is interrupted, leaves the target as it was. A mount point cannot be renamed: work goes into a hidden folder in it, whose
entries take the place of the former ones at the end. What a killed run has left is put in order by the next one.
"""

import contextlib
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import OutputError
from ..locks import Lock
from .placing import Placing, content_of, delete, placing_at

logger = logging.getLogger(__name__)


def check_output(target: str | os.PathLike, overwrite: bool = False) -> Path:
    """Check that `target` can become an output folder, before any work is done. Nothing is written.

    Args:
        target (`str` or `os.PathLike`): The folder to be written; its parents are made later if they are missing.
        overwrite (`bool`): Allow a folder that is not empty. Its whole content is going to be replaced.

    Returns:
        `Path`: The absolute path, symbolic links resolved.

    Raises:
        OutputError: If `target` is a file, is not empty and `overwrite` is false, cannot be written, or must not be
            replaced: the file system's root, the home folder, the current folder or one that holds these, a git repository.
    """
    try:
        path = Path(target).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links; a current folder that is gone
        rule = f"it leads nowhere ({getattr(error, 'strerror', None) or error}): the current folder may be gone"
        raise OutputError.of("output folder", str(target), rule, "Give an absolute path") from error
    problem = _protected(path) or _unusable(path) or _content_at_risk(path, overwrite)
    if problem:
        raise OutputError.of("output folder", str(target), *problem)
    return path


def _unusable(path: Path) -> tuple[str, str] | None:
    if path.exists() and not path.is_dir():
        return "it is a file", "Choose a new folder"
    place = path if os.path.ismount(path) else next(p for p in path.parents if p.exists())
    if not place.is_dir():
        return f"its parent {place} is a file", "Choose a folder under another one"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{place} may not be written to", "Choose a folder that you may write to"
    return None


def _protected(path: Path) -> tuple[str, str] | None:
    remedy = "Name a new folder inside it"
    for what, find in (("the current folder", Path.cwd), ("the home folder", Path.home)):
        try:
            place = find().resolve()
        except (OSError, RuntimeError):  # there is none
            continue
        if path == place:
            return f"it is {what}, which is never replaced", remedy
        if path in place.parents:
            return f"it holds {what}, and is never replaced", remedy
    if path == path.parent:
        return "it is the root of the file system, which is never replaced", remedy
    return None


def _content_at_risk(path: Path, overwrite: bool) -> tuple[str, str] | None:
    if not path.is_dir() or not content_of(path):
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
def claimed_output(target: str | os.PathLike | None, overwrite: bool = False) -> Iterator[Path | None]:
    """Keep an output folder for this process until the block ends, and put in order what a killed run has left there.

    Args:
        target (`str`, `os.PathLike` or `None`): The folder, checked as by [`check_output`]; its parents are made, and are gone
            again if nothing has come to lie in them. Nothing is done for `None`.
        overwrite (`bool`): Allow a folder that is not empty.

    Yields:
        `Path` or `None`: The absolute path.

    Raises:
        OutputError: As [`check_output`]; or if another process writes there.
    """
    if target is None:
        yield None
        return
    place = placing_at(check_output(target, True))
    with contextlib.ExitStack() as stack:
        try:
            stack.callback(_remove_empty, _made(place.home))
            lock = Lock(place.named("lock"))
            stack.callback(lock.release)
            holder = lock.acquire()
        except OSError as error:
            raise _not_made(str(target), error) from error
        if holder is None:
            place.put_in_order()
        elif not holder.is_this_process:
            remedy = "Wait until it has ended, or choose another folder"
            raise OutputError.of("output folder", str(target), f"{holder} is writing to it", remedy)
        yield check_output(target, overwrite)


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
        `Path`: The fresh, empty folder, a hidden sibling of `target`; within it, if it is a mount point.

    Raises:
        OutputError: As [`claimed_output`]. Also if the finished folder cannot take its place (somebody else has written
            to `target` in the meantime): then the result is kept, and the message says where.
    """
    with claimed_output(target, overwrite) as path:
        assert path is not None
        place, token = placing_at(path), secrets.token_hex(4)
        staged = place.named("tmp", token)
        try:
            staged.mkdir()
        except OSError as error:
            raise _not_made(str(target), error) from error
        try:
            yield staged
            _honour_umask(staged)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        _swap(place, token, overwrite)


def _not_made(target: str, error: OSError) -> OutputError:
    if isinstance(error, OutputError):
        return error
    rule = f"it cannot be made ({error.strerror or error})"
    return OutputError.of("output folder", target, rule, "Choose another folder")


def _made(folder: Path) -> list[Path]:
    """Make a folder; gives back it and its parents, as far as they were missing, the innermost first."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _honour_umask(folder: Path) -> None:
    # safetensors 0.8 writes with mode 0600; the folder itself was made by mkdir, so its mode shows the umask
    allowed = stat.S_IMODE(folder.stat().st_mode)
    for entry in folder.rglob("*"):
        if not entry.is_symlink():
            wanted = allowed & (0o777 if entry.is_dir() else 0o666)
            entry.chmod(stat.S_IMODE(entry.stat().st_mode) | wanted)


def _swap(place: Placing, token: str, overwrite: bool) -> None:
    """Put the new folder in place; what was there is deleted last, and put back if anything fails before."""
    path, staged, old = place.path, place.named("tmp", token), place.named("old", token)
    try:
        check_output(path, overwrite)
        place.replace(token)
    except BaseException as error:
        place.put_back(token)
        if not isinstance(error, OSError):
            raise
        reason = error.problems[0].rule if isinstance(error, OutputError) else (error.strerror or str(error))
        # under a name that no later run takes for a leftover
        kept = place.named("finished", token)
        with contextlib.suppress(OSError):
            staged = staged.rename(kept)
        remedy = f"Nothing is lost: the finished folder is {staged}. Move it to where you want it"
        raise OutputError.of("output folder", str(path), f"it could not be replaced ({reason})", remedy) from error
    if old.exists():
        delete(old)
        if old.exists():
            logger.warning(f"{path} is written; its former content could not be deleted from {old}")
