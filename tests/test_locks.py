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
