"""How a finished folder takes the place of what was there: by one rename, or, at a mount point, entry by entry.

Each step leaves hidden names from which whoever comes next sees how far it was: a killed process leaves nothing that cannot
be put in order.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path

# an empty disk has it, and it belongs to the system
_OF_THE_DISK = ("lost+found",)
_INSIDE = ".optimum_clp"


def content_of(path: Path) -> list[Path]:
    """What lies in a folder, but for what is the disk's and our own."""
    return [p for p in path.iterdir() if p.name not in _OF_THE_DISK and not p.name.startswith(f"{_INSIDE}.")]


def delete(folder: Path) -> None:
    """Remove a folder, also one whose own folders may not be written to."""
    with contextlib.suppress(OSError):
        folder.chmod(0o700)
    for parent, names, _ in os.walk(folder):
        for inner in (Path(parent, name) for name in names):
            if not inner.is_symlink():
                with contextlib.suppress(OSError):
                    inner.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


class Placing:
    """A new folder, written under a hidden name beside its place, and renamed.

    Args:
        path (`Path`): The place, absolute.
    """

    def __init__(self, path: Path):
        self.path, self.home, self.stem = path, path.parent, f".{path.name}"

    def named(self, suffix: str, token: str = "") -> Path:
        """A hidden name: `tmp` for what is being written, `old` for what was there, `finished` for what is kept.

        Args:
            suffix (`str`): What it is.
            token (`str`): 8 hexadecimal digits, of one replacement.
        """
        return self.home / f"{self.stem}{token and '.'}{token}.{suffix}"

    def replace(self, token: str) -> None:
        """Let the new folder take the place of the old one, which then lies under its hidden name."""
        if self.path.exists():
            self.path.rename(self.named("old", token))
        self.named("tmp", token).rename(self.path)

    def put_back(self, token: str) -> None:
        """Undo as much of `replace` as was done."""
        old = self.named("old", token)
        if old.exists() and not self.path.exists():
            old.rename(self.path)

    def put_in_order(self) -> None:
        """Finish what a killed process has begun to put in place, and remove what it had not finished."""
        pattern = re.compile(re.escape(self.stem) + r"\.([0-9a-f]{8})\.(tmp|old|gone)")
        found = {match[1] for p in self.home.iterdir() if (match := pattern.fullmatch(p.name))}
        for token in sorted(found):
            with contextlib.suppress(OSError):
                self._finish(token)
            for suffix in ("tmp", "old", "gone"):
                delete(self.named(suffix, token))

    def _finish(self, token: str) -> None:
        new, old = self.named("tmp", token), self.named("old", token)
        if old.exists() and not self.path.exists():
            # only a finished folder's place is made free
            (new if new.exists() else old).rename(self.path)


class MountedPlacing(Placing):
    """A new folder within its place, which cannot be renamed: its entries take the place of the former ones.

    First the former entries move to `old`, which then becomes `gone`; then the new ones move in.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self.home, self.stem = path, _INSIDE

    def replace(self, token: str) -> None:
        old, gone = self.named("old", token), self.named("gone", token)
        if not gone.exists():
            old.mkdir(exist_ok=True)
            _move(content_of(self.path), old)
            old.rename(gone)
        _move(list(self.named("tmp", token).iterdir()), self.path)
        self.named("tmp", token).rmdir()
        gone.rename(old)

    def put_back(self, token: str) -> None:
        new, old, gone = (self.named(suffix, token) for suffix in ("tmp", "old", "gone"))
        if gone.exists():  # all that lies there is new
            new.mkdir(exist_ok=True)
            _move(content_of(self.path), new)
            gone.rename(old)
        if old.exists():
            _move(list(old.iterdir()), self.path)
            old.rmdir()

    def _finish(self, token: str) -> None:
        new, old, gone = (self.named(suffix, token) for suffix in ("tmp", "old", "gone"))
        if new.exists() and (old.exists() or gone.exists()):
            self.replace(token)


def placing_at(path: Path) -> Placing:
    """How a folder is put there."""
    return MountedPlacing(path) if os.path.ismount(path) else Placing(path)


def _move(entries: list[Path], folder: Path) -> None:
    for entry in entries:
        entry.rename(folder / entry.name)
