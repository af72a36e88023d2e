import math
import os
from types import SimpleNamespace

import pytest
import torch
from resident_pages import resident_pages
from tiny_models import random_tokens, tiny_model

from optimum_clp import ExportConfig, QuantizationConfig
from optimum_clp.errors import ExportError
from optimum_clp.exporters.export import export_onnx
from optimum_clp.exporters.float32_copy import float32_copy
from optimum_clp.exporters.room import ExportRoom, export_room, export_work, float32_bytes
from optimum_clp.exporters.rounding import weights
from optimum_clp.forward.memory_bound import private_memory
from optimum_clp.mapped_weights import MappedWeights

ROWS = random_tokens(16, 24)


def wide_model(dtype=torch.bfloat16):
    """Its matrices are larger than what stays in memory in any case, its norms are not."""
    return tiny_model(num_layers=2, dtype=dtype, hidden_size=160, intermediate_size=320, vocab_size=512)


@pytest.mark.parametrize("format", ["contrib", "qdq"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_files_are_the_same_whatever_memory_holds(tmp_path, format, method, capsys, monkeypatch):
    # what holds no whole layer has no room for the tuning of scales either, which needs more
    monkeypatch.setattr(weights, "tuning_bytes", lambda *args: -math.inf)
    model, settings = wide_model(), QuantizationConfig(weights=["int8", "int4"], method=method)
    files = {}
    for name, limit in (("free", None), ("bound", 1)):
        export_onnx(model, tmp_path / name, ExportConfig(format=format), settings, calibration=ROWS, max_memory=limit)
        files[name] = {file.name: file.read_bytes() for file in (tmp_path / name / "onnx").iterdir()}
        assert os.listdir(tmp_path / name) == ["onnx"]
        assert ("lie in files of" in capsys.readouterr().err) == (name == "bound")
    assert files["free"] == files["bound"] and len(files["free"]) == 3


def test_a_float32_copy_lies_in_files_and_its_pages_are_let_go(tmp_path):
    model = wide_model()
    copied = float32_copy(model, ExportRoom(tmp_path))
    mapped = MappedWeights()
    for name, parameter in copied.named_parameters():
        assert mapped.holds(parameter) == (parameter.nbytes >= 2**16), name
        if parameter.nbytes > 2**17:
            assert resident_pages(parameter) <= 2, name  # those that it shares with nobody were given back
        assert torch.equal(parameter, model.get_parameter(name).float()), name
    assert copied.lm_head.weight.data_ptr() == copied.get_input_embeddings().weight.data_ptr() or (
        not model.config.tie_word_embeddings
    )
    assert not os.listdir(tmp_path)


def test_what_is_float32_already_is_shared_and_takes_nothing(tmp_path):
    model = wide_model(torch.float32)
    copied = float32_copy(model, ExportRoom(tmp_path))
    assert [p.data_ptr() for p in copied.parameters()] == [p.data_ptr() for p in model.parameters()]
    assert float32_bytes(model) == 0
    assert float32_bytes(model.bfloat16()) == 4 * sum(p.numel() for p in model.parameters()) + 4 * sum(
        b.numel() for b in model.buffers() if b.dtype == torch.bfloat16
    )


def test_memory_is_taken_where_there_is_enough(tmp_path):
    model = wide_model()
    held = private_memory() + float32_bytes(model) + export_work(model, ROWS.shape[1])
    assert not export_room(model, 8, ROWS, held + 10**9, tmp_path).on_disk
    assert export_room(model, 8, ROWS, held - 10**6, tmp_path, quiet=True).on_disk
    assert not export_room(model, 8, ROWS, None, tmp_path).on_disk


def test_work_counts_the_sums_of_the_widest_inputs():
    shapes = {"num_layers": 1, "hidden_size": 64}
    wide, narrow = (tiny_model(**shapes, intermediate_size=width) for width in (2048, 1024))
    of_text = [export_work(model, 10) - export_work(model, None) for model in (wide, narrow)]
    # four float32 matrices and one float64 of the width, and what autograd keeps of 80 tokens: three tensors of it
    assert of_text[0] - of_text[1] == 1.25 * ((4 * 4 + 8) * (2048**2 - 1024**2) + 80 * 4 * 3 * 1024)


def test_a_disk_without_room_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_clp.spill.shutil.disk_usage", lambda folder: SimpleNamespace(free=1.5e9))
    with pytest.raises(ExportError) as error:
        ExportRoom(tmp_path / "room").allocate((10**6, 1000), torch.float32)
    assert str(error.value) == (
        f"output folder is {str(tmp_path)!r}: memory does not hold the model in float32, and its disk has no room: 4.0 GB are needed "
        "next, 1.5 GB are free. Free some space, or write to a larger disk."
    )
