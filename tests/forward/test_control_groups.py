import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from optimum_clp.forward.control_groups import free_in_control_groups


def system(folder, own, **files):
    """A system's folders: what `/proc/self/cgroup` says, and files below `/sys/fs/cgroup` by their paths."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text(own)
    for name, content in files.items():
        file = folder / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return folder


def free(folder, own, files, private=300):
    return free_in_control_groups(private, system(folder, own, **files))


def test_the_smallest_limit_on_the_way_up_counts_in_version_2(tmp_path):
    files = {"memory.max": "max\n", "a/memory.max": "900\n", "a/b/memory.max": "5000\n", "a/b/c/memory.max": "max\n"}
    assert free(tmp_path, "0::/a/b/c\n", files) == 600
    assert free(tmp_path / "other", "0::/x/y\n", files) == math.inf  # another's limits are not its own
    assert free(tmp_path / "group", "0::/a\n", files | {"a/memory.max": "250\n"}) == 0


def test_the_smallest_limit_on_the_way_up_counts_in_version_1(tmp_path):
    own = "9:cpu,cpuacct:/a/b\n4:memory:/docker/one\n1:name=systemd:/init:scope\n"
    unlimited = "9223372036854771712\n"
    files = {
        "memory/memory.limit_in_bytes": unlimited,
        "memory/docker/memory.limit_in_bytes": "4000\n",
        "memory/docker/one/memory.limit_in_bytes": "1000\n",
        "cpu,cpuacct/a/b/memory.limit_in_bytes": "1\n",
    }
    assert free(tmp_path, own, files) == 700
    # both versions at once: version 2 has no memory then
    both = files | {"unified/memory.max": "max\n", "unified/service/memory.max": "500\n"}
    assert free(tmp_path / "both", f"{own}0::/service\n", both) == 200


@pytest.mark.parametrize("own", ["4:memory:/docker/1f\n0::/\n", "4:memory:/../../elsewhere\n", "nothing\n"])
def test_a_container_sees_its_own_group_as_the_root(tmp_path, own):
    found = free(tmp_path, own, {"memory/memory.limit_in_bytes": "1000\n"})
    assert found == (math.inf if own == "nothing\n" else 700)


def test_without_a_word_of_the_system_the_root_is_read(tmp_path):
    system(tmp_path, "", **{"memory.max": "1000\n"})
    (tmp_path / "proc/self/cgroup").unlink()
    assert free_in_control_groups(300, tmp_path) == 700
    assert free_in_control_groups(300, tmp_path / "none") == math.inf


def test_what_others_of_the_group_hold_is_not_free_and_cached_files_are(tmp_path):
    files = {"a/memory.max": "1000\n", "a/memory.stat": "anon 650\nfile 340\ninactive_anon 9\n"}
    assert free(tmp_path, "0::/a\n", files) == 350
    first = {"memory/memory.limit_in_bytes": "1000\n", "memory/memory.stat": "cache 1\nrss 5\ntotal_rss 400\n"}
    assert free(tmp_path / "v1", "1:memory:/\n", first) == 600


@pytest.mark.skipif(not os.access("/sys/fs/cgroup/memory", os.W_OK), reason="needs a writable control group")
def test_a_real_group_below_the_root_is_seen():
    group = Path("/sys/fs/cgroup/memory") / f"optimum-clp-test-{os.getpid()}"
    code = (
        "import sys, pathlib, os; pathlib.Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid()));"
        "from optimum_clp.forward.control_groups import free_in_control_groups as free; print(free(100 * 2**20))"
    )
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(700 * 2**20))
        run = subprocess.run([sys.executable, "-c", code, str(group)], capture_output=True, text=True)
    finally:
        group.rmdir()
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == 600 * 2**20
