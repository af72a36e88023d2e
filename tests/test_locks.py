import json
import os
import subprocess
import sys

import pytest
from notices import notice

from optimum_clp.locks import Holder, Lock

HOLD = """
import sys, time
from pathlib import Path
from optimum_clp.locks import Lock
lock = Lock(Path(sys.argv[1]))
assert lock.acquire() is None
print(flush=True)
time.sleep(float(sys.argv[2]))
"""


def holding(file, seconds):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(file), str(seconds)], stdout=subprocess.PIPE)
    other.stdout.readline()
    return other


def test_a_second_process_waits_and_says_for_whom(tmp_path):
    other, lock = holding(tmp_path / "lock", 1.0), Lock(tmp_path / "lock")
    holder = lock.acquire()
    assert holder.pid == other.pid and not holder.is_this_process
    with notice(rf"The cache is in use by process {other.pid} \(since .*\): waiting until it"):
        lock.wait("The cache")
    # it has ended without letting go of anything
    assert other.wait() == 0 and Lock(tmp_path / "lock").acquire().is_this_process
    lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", ["", "nonsense", json.dumps({"pid": os.getppid(), "host": "x", "since": "y"}), "[1]"])
def test_what_a_killed_process_has_left_is_nobodys(tmp_path, left):
    (tmp_path / "lock").write_text(left)
    lock = Lock(tmp_path / "lock")
    lock.wait("It")
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    lock.release()
    lock.release()


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("x")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="is no ordinary file"):
        Lock(tmp_path / "lock").acquire()
    assert (tmp_path / "precious").read_text() == "x"


def test_who_is_said_to_hold_it():
    assert str(Holder()) == "another process"
    assert str(Holder(7, "elsewhere", "noon")) == "process 7 on elsewhere (since noon)"


IN_A_GROUP = """
import logging, sys
from pathlib import Path
import torch.distributed as dist
from optimum_clp.checkpoint.output import claimed_output
from optimum_clp.errors import OutputError
from optimum_clp.processes import entered_by_first, leave_group, wait_for_all
from optimum_clp.resume import Caches
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
logging.basicConfig(format="%(message)s", stream=sys.stdout)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
caches = Caches()
with caches.run():
    # a third process holds it: the first of the group waits for that one, and the second for the first
    found = caches.take(folder / "tuning", folder=True)
    print(found == folder / "tuning", (folder / "tuning.lock").exists())
    wait_for_all()
try:
    with entered_by_first(claimed_output(folder / "out")):
        print("the block must not run")
except OutputError as error:
    print(error)
wait_for_all()
print((folder / "tuning").exists(), (folder / "tuning.lock").exists())
leave_group()
"""


def test_a_group_of_two_processes_waits_or_is_refused_as_one(tmp_path):
    claimed, cache = (holding(tmp_path / name, 300) for name in (".out.lock", "tuning.lock"))
    command = [sys.executable, "-u", "-W", "ignore", "-c", IN_A_GROUP]
    pair = [subprocess.Popen([*command, str(r), str(tmp_path)], stdout=subprocess.PIPE, text=True) for r in (0, 1)]
    assert f"is in use by process {cache.pid} (since" in pair[0].stdout.readline()
    cache.kill()
    first, second = (process.communicate(timeout=120)[0].splitlines() for process in pair)
    claimed.kill()
    assert first[0] == second[0] == "True True"
    assert first[1] == second[1] and f"process {claimed.pid}" in first[1] and "is writing to it" in first[1]
    assert first[2:] == second[2:] == ["False False"]
    assert cache.wait() < 0 and claimed.wait() < 0
