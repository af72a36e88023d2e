"""What is left of a container's memory: the limits of this process's control groups, of version 1 and 2."""

import math
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# where the groups' file systems are: the only one of version 2, its place beside version 1, and version 1's for memory
_VERSION_2 = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
_VERSION_1 = ("sys/fs/cgroup/memory",)


def free_in_control_groups(private: int, system: Path = Path("/")) -> float:
    """Bytes that this process can still have by the limits of its group and of all groups above it; without end if there is none.

    Of what a group holds, its processes' own memory counts, and not the system's cache of files, which gives way.

    Args:
        private (`int`): Bytes of this process's own.
        system (`Path`): Where the system's folders are.
    """
    return min((_free(limit, usage, private) for limit, usage in _groups(system)), default=math.inf)


def _free(limit: Path, statistics: Path, private: int) -> float:
    try:
        most = int(limit.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return math.inf
    try:
        # of version 1 with all groups below, of version 2 as it is
        held = re.search(r"^(?:total_rss|anon) (\d+)$", statistics.read_text(), re.MULTILINE)
    except OSError:
        held = None
    return max(0, most - max(private, int(held[1]) if held else 0))


def _groups(system: Path) -> Iterator[tuple[Path, Path]]:
    """Limit and statistics of each group that this process is in."""
    for roots, file, path in _own_paths(system):
        # a container may see its own group as the root, while its path is told as the machine has it
        for group in {PurePosixPath("/"), path, *path.parents}:
            for root in roots:
                folder = system / root / str(group).lstrip("/")
                yield folder / file, folder / "memory.stat"


def _own_paths(system: Path) -> Iterator[tuple[tuple[str, ...], str, PurePosixPath]]:
    try:
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    # where the system does not say it, what a container has at its root
    for line in lines or ["0::/", "1:memory:/"]:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if ".." in path.split("/"):  # a group outside what is seen here
            path = "/"
        if not controllers:
            yield _VERSION_2, "memory.max", PurePosixPath(path or "/")
        elif "memory" in controllers.split(","):
            yield _VERSION_1, "memory.limit_in_bytes", PurePosixPath(path or "/")
