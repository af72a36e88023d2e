import errno
import json
import os
import resource
import subprocess
from types import SimpleNamespace

import pytest
import torch
from notices import notice
from safetensors.torch import save_file
from tiny_models import tiny_model, tiny_tokenizer

from optimum_clp import CLPConfig, CLPPruner, QuantizationConfig
from optimum_clp.calibration.sample_cache import save_sample
from optimum_clp.calibration.writing import Sample
from optimum_clp.checkpoint.files import write_json
from optimum_clp.checkpoint.output import staged_folder
from optimum_clp.checkpoint.saving import save_checkpoint
from optimum_clp.disk_room import nothing_half_written, room_for, write_whole
from optimum_clp.errors import ExportError, OutputError, QuantizationError
from optimum_clp.exporters.export import export_onnx
from optimum_clp.quantization import save_quantized
from optimum_clp.spill import Spill

KB = 1024


@pytest.fixture(scope="module", params=["full disk", "file limit"])
def small(request, tmp_path_factory):
    """A folder on a disk of 400 KB, which takes root; or, for everybody, a limit of that size on each file that is written."""
    folder = tmp_path_factory.mktemp("small")
    if request.param == "full disk":
        command = ["mount", "-t", "tmpfs", "-o", f"size={400 * KB}", "none", str(folder)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs a file system of its own, which root may mount")
        yield SimpleNamespace(folder=folder, is_disk=True)
        subprocess.run(["umount", "-l", str(folder)], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400 * KB, limits[1]))
    yield SimpleNamespace(folder=folder, is_disk=False)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(params=["told before", "met while writing"])
def full(small, request, monkeypatch):
    """The same, where the disk says what is free, and where another program takes that in the meantime."""
    if request.param == "met while writing":
        monkeypatch.setattr("optimum_clp.disk_room.free_bytes", lambda folder: 10**12)
    elif not small.is_disk:
        pytest.skip("a limit on files is told by no disk")
    yield small.folder
    assert not list(small.folder.iterdir()), "something was left"


@pytest.fixture(scope="module")
def large():
    """Above 400 KB, and an int8 file of it, too."""
    return tiny_model(num_layers=1, hidden_size=160, intermediate_size=640, vocab_size=512)


def test_a_checkpoint_without_room_is_one_error_and_leaves_nothing(full, large):
    said = r"disk is '.*': it has no room for the checkpoint.*: 2\.\d\d MB are needed, .* free.*give the same command again"
    with pytest.raises(OutputError, match=said), staged_folder(full / "out") as staged:
        save_checkpoint(large, None, staged)
    assert all(parameter.isfinite().all() for parameter in large.parameters())


def test_an_onnx_file_without_room_is_one_error_and_leaves_nothing(full, large, monkeypatch):
    with pytest.raises(ExportError, match=r"it has no room for onnx/model\.onnx.*: 2\.\d\d MB are needed, .* free"):
        export_onnx(large, full / "out", quantization=QuantizationConfig(weights=[]), quiet=True)
    assert not list((full / "out").iterdir())
    (full / "out").rmdir()


def test_a_quanto_checkpoint_without_room_is_one_error_and_leaves_nothing(full, large):
    said = r"it has no room for the quanto checkpoint.*: \d\.\d\d MB are needed, .* free"
    with pytest.raises(QuantizationError, match=said):
        save_quantized(large, None, full / "out", "int8", quiet=True)


def test_states_without_room_are_one_error_and_leave_nothing(small):
    spill = Spill(small.folder / "states", 0)
    with pytest.raises(OSError) as error:
        spill.allocate((10**6,), torch.float32)
    assert error.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert not list((small.folder / "states").iterdir())
    (small.folder / "states").rmdir()


def test_written_text_that_a_disk_does_not_take_is_told_and_leaves_nothing(small):
    sample = Sample(torch.zeros(1000, 128, dtype=torch.int64), torch.zeros(1000, dtype=torch.float64), None)
    with notice("cannot be written .*: the calibration text is not kept"):
        assert save_sample(small.folder / "cache/written.safetensors", sample) is None
    assert not list((small.folder / "cache").iterdir())
    (small.folder / "cache").rmdir()


def test_a_record_without_room_is_what_it_was(small):
    file = small.folder / "clp_report.json"
    write_json(file, {"old": True})
    with pytest.raises(OSError) as error:
        write_whole(file, "x" * 500 * KB)
    assert error.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert json.loads(file.read_text()) == {"old": True} and len(list(small.folder.iterdir())) == 1
    with pytest.raises(OutputError, match=r"no room for the report \((it is full|it takes no file of this size)\)"):
        with nothing_half_written(small.folder), room_for("the report", small.folder, None):
            (small.folder / "half").write_text("x" * 500 * KB)
    assert [path.name for path in small.folder.iterdir()] == [file.name]
    file.unlink()


def test_what_libraries_say_of_a_full_disk_is_understood(small):
    with pytest.raises(OutputError, match=r"no room for it \((No space left|File too large).*\): .* were free"):
        with nothing_half_written(small.folder), room_for("it", small.folder, None, OutputError):
            try:
                save_file({"it": torch.zeros(250_000)}, small.folder / "it.safetensors")
            except Exception as error:
                raise RuntimeError("a library's own") from error


def test_the_same_command_goes_on_once_there_is_room(tmp_path, monkeypatch, caplog):
    tiny_model(num_layers=4).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    text = {"sequence_length": 24, "train_sequences": 8, "validation_sequences": 4, "test_sequences": 4}
    config = CLPConfig(
        0.25,
        calibration={**text, "cache_dir": str(tmp_path / "cache")},
        search={"num_sequences": 4},
        tuning={"epochs": 1, "batch_size": 4, "checkpoint_seconds": 0},
        evaluation={"generation": False},
        export={"enabled": False},
    )

    def prune():
        caplog.clear()
        with caplog.at_level("INFO", "optimum_clp"):
            CLPPruner.from_pretrained(tmp_path / "dense", quiet=True).prune(config, save_directory=tmp_path / "out")
        return caplog.text

    with monkeypatch.context() as patch:
        # the trial before the search writes to another disk
        patch.setattr("optimum_clp.disk_room.free_bytes", lambda folder: 1000 if folder.parent == tmp_path else 10**9)
        with pytest.raises(
            OutputError, match=r"no room for the checkpoint: \d\.\d\d MB are needed, 0\.00 MB are free"
        ):
            prune()
        assert not [path for path in tmp_path.iterdir() if path.name not in ("dense", "cache")]
    told = prune()
    assert "measurements that an earlier run has made are taken from" in told
    assert "tuning: goes on from" in told and "where an earlier one ended" in told
    assert (tmp_path / "out/model.safetensors").is_file() and not list((tmp_path / "cache").rglob("search-*.jsonl"))
