import ctypes
import platform

import pytest

from optimum_clp.freed_memory import return_freed_memory


def resident_bytes():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmRSS"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators decide for themselves")
def test_holes_between_things_that_stay_are_returned():
    # each of them under the 128 KiB from which on memory is the system's right away
    blocks = [bytearray(b"x") * 100_000 for _ in range(1000)]
    before = resident_bytes()
    blocks = blocks[::10]
    return_freed_memory()
    assert before - resident_bytes() > 50_000_000 and len(blocks) == 100


@pytest.mark.parametrize("error", [OSError, TypeError])
def test_a_system_without_it_does_nothing(error, monkeypatch):
    asked = []

    def missing(name):
        asked.append(name)
        raise error

    monkeypatch.setattr(ctypes, "CDLL", missing)
    return_freed_memory()
    assert asked == [None]
