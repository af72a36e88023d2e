import os
import re
import stat
from pathlib import Path

import pytest

from optimum_clp.checkpoint.output import check_output, staged_folder
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


def test_mount_point_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "disk"))
    (tmp_path / "disk").mkdir()
    with pytest.raises(OutputError, match="it is a mount point"):
        check_output(tmp_path / "disk")


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
