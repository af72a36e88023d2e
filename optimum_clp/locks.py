"""One process at a time: locks on places of the disk, which say who holds them, and end with their owner."""

import json
import logging
import os
import socket
import stat
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

_OPEN = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_PAUSE = 0.2


@dataclass(frozen=True)
class Holder:
    """Who holds a lock; a process that is about to say so is not known yet."""

    pid: int | None = None
    host: str | None = None
    since: str | None = None

    @classmethod
    def here(cls) -> "Holder":
        """This process."""
        return cls(os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S"))

    @property
    def is_this_process(self) -> bool:
        """Whether a call further up in this process holds it."""
        return (self.pid, self.host) == (os.getpid(), socket.gethostname())

    def __str__(self) -> str:
        if self.pid is None:
            return "another process"
        where = "" if self.host == socket.gethostname() else f" on {self.host}"
        return f"process {self.pid}{where} (since {self.since})"


class Lock:
    """A file that one process has locked.

    The kernel holds the lock (`flock`), and lets go of it when the process ends, however it ends: a file that a killed
    process has left is nobody's. The owner's number, machine and time are in it for others to read; it is removed with the
    lock. Where a file system has no locks, nobody is kept out.

    Args:
        file (`Path`): In an existing folder.
    """

    def __init__(self, file: Path):
        self.file = file
        self._descriptor: int | None = None

    def acquire(self) -> Holder | None:
        """Take the lock.

        Returns:
            [`Holder`] or `None`: Who holds it, if another process does; `None` once it is ours.

        Raises:
            OSError: If the file cannot be made.
        """
        while True:
            if self.file.is_symlink() or (self.file.exists() and not stat.S_ISREG(self.file.lstat().st_mode)):
                raise OSError(f"{self.file} is no ordinary file")
            descriptor = os.open(self.file, _OPEN, 0o600)
            if not _locked(descriptor):
                holder = _read(descriptor)
                os.close(descriptor)
                return holder
            # its owner may have removed it between our opening and our locking: then it is another file than the next one's
            with suppress(OSError):
                if os.path.samestat(os.fstat(descriptor), self.file.lstat()):
                    break
            os.close(descriptor)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(asdict(Holder.here())).encode())
        self._descriptor = descriptor
        return None

    def wait(self, what: str) -> None:
        """Take the lock, once whoever holds it has let go of it; says for whom it waits.

        Args:
            what (`str`): What the lock is on, for the warning.
        """
        holder = self.acquire()
        if holder is not None:
            logger.warning(f"{what} is in use by {holder}: waiting until it has ended.")
        while holder is not None:
            time.sleep(_PAUSE)
            holder = self.acquire()

    def release(self) -> None:
        """Let go of it; nothing happens if it is not ours."""
        if self._descriptor is None:
            return
        with suppress(OSError):
            self.file.unlink()
        os.close(self._descriptor)
        self._descriptor = None


def _locked(descriptor: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this file system has none
        pass
    return True


def _read(descriptor: int) -> Holder:
    try:
        values = json.loads(os.pread(descriptor, 1000, 0))
        return Holder(int(values["pid"]), str(values["host"]), str(values["since"]))
    except (OSError, ValueError, TypeError, KeyError):
        return Holder()  # it has been locked this moment
