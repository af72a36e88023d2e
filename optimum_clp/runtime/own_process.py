"""How a module is run in a process of its own, which can import what this one can."""

import os
import subprocess
import sys
from pathlib import Path

# runs a module, given folders to look for it in
_CHILD = (
    "import os, runpy, sys; name, paths = sys.argv[1:3]; del sys.argv[1:3]; "
    "sys.path += paths.split(os.pathsep); runpy.run_module(name, run_name='__main__', alter_sys=True)"
)
_ROOT = str(Path(__file__).parents[2])


def command_of(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module in a process of its own.

    Args:
        module (`str`): Its full name.
        arguments (`str`): What it is given.
    """
    # what this process can import, behind the child's own library: a script's folder may have modules of any name (-P)
    paths = [*(os.path.abspath(path) for path in sys.path), _ROOT]
    return [sys.executable, "-P", "-c", _CHILD, module, os.pathsep.join(paths), *arguments]


def run_to_its_end(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module in a process of its own, and wait for it.

    Args:
        module (`str`): Its full name.
        arguments (`str`): Its command line.

    Returns:
        `subprocess.CompletedProcess`: With the exit status, and what it has said on standard error.
    """
    return subprocess.run(
        command_of(module, *arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def last_words(process: subprocess.CompletedProcess[str]) -> str:
    """The last line that a process has said on standard error, for a message."""
    return (process.stderr.strip().splitlines() or ["no message"])[-1][:300]
