import json
import os
import re
import shutil
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from optimum_clp.checkpoint.output import check_output, claimed_output, staged_folder
from optimum_clp.checkpoint.placing import MountedPlacing, Placing
from optimum_clp.errors import OutputError


def listing(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def old(tmp_path):
    folder = tmp_path / "old"
    (folder / "onnx").mkdir(parents=True)
    (folder / "config.json").write_text("old config")
    (folder / "onnx" / "model.onnx").write_text("old model")
    return folder


def test_new_folder_appears_only_at_the_end(tmp_path):
    target = tmp_path / "a" / "b"
    with staged_folder(target) as folder:
        assert not target.exists()
        assert folder.parent == target.parent
        assert list(folder.iterdir()) == []
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("1")
    assert listing(target) == {"sub/x": "1"}
    assert list(target.parent.iterdir()) == [target]


def test_empty_folder_is_taken(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    with staged_folder(target) as folder:
        (folder / "x").write_text("1")
    assert listing(target) == {"x": "1"}
    assert list(tmp_path.iterdir()) == [target]


def test_overwrite_replaces_everything(old):
    with staged_folder(old, overwrite=True) as folder:
        assert listing(old)["config.json"] == "old config"
        (folder / "config.json").write_text("new config")
    assert listing(old) == {"config.json": "new config"}
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_leaves_all_as_it_was(old, tmp_path, error, existing):
    before = listing(old)
    target = old if existing else tmp_path / "new"
    with pytest.raises(error):
        with staged_folder(target, overwrite=existing) as folder:
            (folder / "half").write_text("half")
            raise error("stop")
    assert listing(old) == before
    assert list(tmp_path.iterdir()) == [old]


def test_not_empty_is_refused_before_any_work(old):
    message = r"output folder is '.*old': it is not empty.*overwrite=True \(--overwrite on the command line\)\."
    with pytest.raises(OutputError, match=message):
        check_output(old)
    with pytest.raises(OutputError, match=message):
        with staged_folder(old):
            pytest.fail("the block must not run")
    assert len(listing(old)) == 2
    assert check_output(old, overwrite=True) == old


def test_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(OutputError, match="it is a file. Choose a new folder"):
        check_output(file, overwrite=True)
    with pytest.raises(OutputError, match=r"its parent .*file is a file"):
        check_output(file / "sub")


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_current_folder_and_above_are_refused(tmp_path, monkeypatch, name):
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    with pytest.raises(OutputError, match=r"(it is|it holds) the current folder.*Name a new folder inside it"):
        check_output(name, overwrite=True)


def test_home_is_refused(tmp_path, monkeypatch):
    home = tmp_path / "users" / "me"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises(OutputError, match="it is the home folder, which is never replaced"):
        check_output(home, overwrite=True)
    with pytest.raises(OutputError, match="it holds the home folder, and is never replaced"):
        check_output(home.parent, overwrite=True)
    assert check_output(home / "model") == home / "model"


def test_git_repository_is_refused(old):
    (old / ".git").mkdir()
    with pytest.raises(OutputError, match="it is a git repository, whose history would be lost"):
        check_output(old, overwrite=True)


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A mount point with a former result."""
    folder = tmp_path / "disk"
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(folder))
    (folder / "onnx").mkdir(parents=True)
    (folder / "lost+found").mkdir()
    (folder / "config.json").write_text("old")
    (folder / "onnx" / "old.onnx").write_text("old")
    return folder


def test_a_mount_point_is_written_into(disk):
    with pytest.raises(OutputError, match="it is not empty"):
        check_output(disk)
    with staged_folder(disk, overwrite=True) as folder:
        assert folder.parent == disk and listing(disk)["config.json"] == "old"
        (folder / "config.json").write_text("new")
    assert {p.name for p in disk.iterdir()} == {"lost+found", "config.json"} and listing(disk) == {
        "config.json": "new"
    }
    (disk / "config.json").unlink()
    with staged_folder(disk) as folder:
        (folder / "x").write_text("1")
    assert listing(disk) == {"x": "1"}


@pytest.mark.parametrize("mounted", [True, False])
@pytest.mark.parametrize("fails", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("killed", [True, False])
def test_a_replacement_that_stops_anywhere_is_finished_or_undone(disk, monkeypatch, mounted, fails, killed):
    if not mounted:
        monkeypatch.setattr(os.path, "ismount", lambda path: False)
    before, after, rename, calls = listing(disk), {"config.json": "new", "onnx/new.onnx": "new"}, Path.rename, []

    class Killed(BaseException):
        """After it nothing is done."""

    def failing(path, target):
        calls.append(path)
        if len(calls) == fails:
            raise Killed if killed else OSError("planted")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        if killed:
            patch.setattr(Placing, "put_back", lambda *_: None)
            patch.setattr(MountedPlacing, "put_back", lambda *_: None)
        with suppress(Killed, OutputError), staged_folder(disk, overwrite=True) as folder:
            (folder / "onnx").mkdir()
            (folder / "config.json").write_text("new")
            (folder / "onnx" / "new.onnx").write_text("new")
    for folder in list(disk.parent.rglob("*.finished")):
        assert listing(folder) == after
        shutil.rmtree(folder)
    with claimed_output(disk, overwrite=True):
        pass
    assert listing(disk) in (before, after)
    assert not [p for p in (*disk.iterdir(), *disk.parent.iterdir()) if p.name[0] == "."]


def test_former_content_that_may_not_be_written_to_goes(old):
    (old / "onnx").chmod(0o500)
    with staged_folder(old, overwrite=True) as folder:
        (folder / "x").write_text("1")
    assert list(old.parent.iterdir()) == [old]


def test_what_killed_runs_have_left_is_put_in_order(old):
    for name in (".old.0123abcd.tmp", ".old.0123abcd.old", ".old.fedcba98.tmp", ".old.finished"):
        (old.parent / name).mkdir()
    with claimed_output(old, overwrite=True):
        assert {p.name for p in old.parent.iterdir()} == {"old", ".old.lock", ".old.finished"}


def test_a_folder_that_another_process_writes_is_refused(tmp_path):
    lock = tmp_path / ".out.lock"
    code = (
        f"import fcntl, os, time\nf = open({str(lock)!r}, 'w')\nfcntl.flock(f, fcntl.LOCK_EX)\n"
        'f.write(\'{"pid": %d, "host": "elsewhere", "since": "noon"}\' % os.getpid()); f.flush()\n'
        "print(flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    other.stdout.readline()
    message = rf"output folder is .*out': process {other.pid} on elsewhere \(since noon\) is writing to it. Wait until"
    with pytest.raises(OutputError, match=message), claimed_output(tmp_path / "out"):
        pytest.fail("the block must not run")
    other.kill()
    other.communicate()
    with claimed_output(tmp_path / "out"), staged_folder(tmp_path / "out"):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_parents_that_were_made_for_nothing_go(tmp_path):
    with pytest.raises(RuntimeError), claimed_output(tmp_path / "a" / "b" / "c"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_without_a_home_or_a_current_folder(tmp_path, monkeypatch):
    def missing():
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", missing)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert check_output(tmp_path / "out") == tmp_path / "out"
    with pytest.raises(
        OutputError, match="it leads nowhere .*: the current folder may be gone. Give an absolute path"
    ):
        check_output("out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_parent_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="may not be written to"):
            check_output(tmp_path / "a" / "b")
    finally:
        tmp_path.chmod(0o700)


def test_symbolic_link_is_followed(old, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(old)
    with staged_folder(link, overwrite=True) as folder:
        (folder / "x").write_text("1")
    assert link.is_symlink()
    assert listing(old) == {"x": "1"}


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask, file_mode, folder_mode):
    previous = os.umask(umask)
    try:
        with staged_folder(tmp_path / "out") as folder:
            for name in ("model.safetensors", "onnx/model.onnx"):
                (folder / name).parent.mkdir(mode=0o700, exist_ok=True)
                os.close(os.open(folder / name, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == folder_mode
    assert stat.S_IMODE((tmp_path / "out" / "onnx").stat().st_mode) == folder_mode
    for name in ("model.safetensors", "onnx/model.onnx"):
        assert stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) == file_mode


def test_failed_swap_puts_the_old_folder_back_and_keeps_the_new(old, monkeypatch):
    before = listing(old)
    rename = Path.rename

    def failing(self, target):
        if self.suffix == ".tmp":
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match=r"could not be replaced \(Permission denied\).*Nothing is lost") as caught:
        with staged_folder(old, overwrite=True) as folder:
            (folder / "x").write_text("result of hours")
    assert listing(old) == before
    kept = Path(re.search(r"the finished folder is (\S+)\. Move", str(caught.value)).group(1))
    assert listing(kept) == {"x": "result of hours"}


def test_target_that_was_taken_meanwhile_is_not_touched(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(OutputError, match=r"could not be replaced \(it is not empty\).*Nothing is lost"):
        with staged_folder(target) as folder:
            (folder / "x").write_text("mine")
            target.mkdir()
            (target / "x").write_text("theirs")
    assert listing(target) == {"x": "theirs"}
    (kept,) = [p for p in tmp_path.iterdir() if p != target]
    assert listing(kept) == {"x": "mine"}


def test_nested_folders(tmp_path):
    with staged_folder(tmp_path / "out") as outer:
        with staged_folder(outer / "quanto-int8") as inner:
            (inner / "x").write_text("1")
        (outer / "y").write_text("2")
    assert listing(tmp_path / "out") == {"quanto-int8/x": "1", "y": "2"}
