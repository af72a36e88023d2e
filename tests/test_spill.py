import errno
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from optimum_clp.mapped_weights import MappedWeights
from optimum_clp.spill import Spill


def test_what_is_kept_beyond_the_limit_lies_in_a_file_without_a_name(tmp_path):
    spill = Spill(tmp_path / "new", memory=4000)
    first, second = torch.rand(1000), torch.rand(30, 50).T
    kept, written = spill.keep(first), spill.keep(second)
    assert kept is first and spill.free_memory == 0
    mapped = MappedWeights()
    assert mapped.holds(written) and not mapped.holds(kept)
    assert torch.equal(written, second) and written.is_contiguous()
    assert not os.listdir(tmp_path / "new")


def test_arrays_keep_their_dtype(tmp_path):
    numbers = np.arange(200, dtype=np.uint8).reshape(10, 20)
    kept = Spill(tmp_path, memory=0).keep_array(numbers)
    assert not np.may_share_memory(kept, numbers)
    assert kept.dtype == np.uint8 and np.array_equal(kept, numbers)
    assert Spill().keep_array(numbers) is numbers


def test_small_tensors_stay_in_memory_and_cost_no_room(tmp_path):
    spill = Spill(tmp_path, memory=100.0, smallest=64)
    small, exact = torch.zeros(15), torch.zeros(16)
    assert spill.keep(small) is small and spill.free_memory == 100
    assert spill.keep(exact) is exact and spill.free_memory == 36
    written, empty = spill.keep(torch.zeros(16)), spill.allocate((0,), torch.float32)
    assert MappedWeights().holds(written) and not MappedWeights().holds(empty)
    assert spill.free_memory == 36


def test_without_a_folder_everything_stays():
    spill = Spill(memory=0)
    tensor = torch.zeros(10)
    assert spill.keep(tensor) is tensor


def test_a_full_disk_is_told_before_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_clp.spill.shutil.disk_usage", lambda folder: SimpleNamespace(free=2e9))
    with pytest.raises(OSError, match="4.0 GB are needed, 2.0 GB are free") as error:
        Spill(tmp_path, 0).allocate((10**6, 1000), torch.float32)
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path)


SPILLING = """
import sys, time, torch
from pathlib import Path
from optimum_clp.exporters.room import ExportRoom
from optimum_clp.spill import Spill
kept = [kind.keep(torch.ones(1 << 20)) for kind in (Spill(Path(sys.argv[1]), 0), ExportRoom(Path(sys.argv[1])))]
print(sum(len(line) > 1 and "states-" in line for line in open("/proc/self/maps")), flush=True)
time.sleep(300)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the maps of a process are Linux's")
def test_nothing_is_left_of_a_process_that_is_killed(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SPILLING, str(tmp_path / "room")], stdout=subprocess.PIPE, text=True
    )
    assert int(process.stdout.readline()) >= 2, "both lie in files"
    process.kill()
    assert process.wait() == -signal.SIGKILL and list((tmp_path / "room").iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve")
def test_the_disks_blocks_are_taken_at_once(tmp_path, monkeypatch):
    """A mapped page that finds no block later would end the process."""
    reserved, reserve = [], os.posix_fallocate

    def taken(descriptor, start, size):
        reserve(descriptor, start, size)
        reserved.append((start, size, 512 * os.fstat(descriptor).st_blocks >= size))

    monkeypatch.setattr(os, "posix_fallocate", taken)
    Spill(tmp_path, 0).allocate((1000, 1000), torch.float32)
    assert reserved == [(0, 4_000_000, True)]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve")
def test_a_disk_that_fills_up_meanwhile_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"0\.0 GB are needed, [\d.]+ GB are free") as error:
        Spill(tmp_path, 0).allocate((1000, 1000), torch.float32)
    assert error.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve")
def test_a_file_system_that_cannot_reserve_is_used_as_it_is(tmp_path, monkeypatch):
    def unknown(descriptor, start, size):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unknown)
    assert Spill(tmp_path, 0).allocate((10, 10), torch.float32).fill_(3).sum() == 300
