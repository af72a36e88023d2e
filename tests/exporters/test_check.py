"""What files are checked on, in which process, and that the check finds what is wrong only at the end of the context."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from tiny_models import tiny_model
from tiny_onnx import traced_qwen3
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig

from optimum_clp.errors import ExportError
from optimum_clp.exporters import check as onnx_check
from optimum_clp.exporters.check import (
    FileCheck,
    check_tolerance,
    checked_context,
    reference_steps,
    relative_error_apart,
)
from optimum_clp.exporters.export import export_onnx
from optimum_clp.exporters.float32_copy import float32_copy
from optimum_clp.exporters.graph.file import save_graph
from optimum_clp.exporters.graph.float_graph import export_float_graph, fold_weight_transposes
from optimum_clp.runtime.comparison import relative_error

ROOT = Path(__file__).parents[2]
POSITIONS = 128
SMALL = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "initializer_range": 0.15}
CONFIGS = {
    "gpt2": lambda: GPT2Config(**SMALL, n_layer=2, n_positions=POSITIONS),
    "bloom": lambda: BloomConfig(**SMALL, n_layer=2, seq_length=POSITIONS),
    "llama": lambda: LlamaConfig(
        **SMALL, num_hidden_layers=2, intermediate_size=56, max_position_embeddings=POSITIONS
    ),
}


@pytest.fixture(scope="module")
def qwen3():
    return traced_qwen3()


@pytest.fixture
def qwen3_file(qwen3, tmp_path):
    graph = qwen3.graph.clone()
    fold_weight_transposes(graph)
    return save_graph(graph, tmp_path / "model.onnx")[0]


@pytest.fixture
def no_whole_context(monkeypatch):
    monkeypatch.setattr(onnx_check, "WHOLE_CONTEXT_OPERATIONS", 0)


def test_reference_has_padding_a_sliding_window_and_cached_steps(qwen3):
    prompt, *cached = reference_steps(qwen3.model, seed=3)[:-2]
    padding = (prompt.attention_mask == 0).sum(axis=1)
    assert len(set(padding.tolist())) == 3 and padding.min() == 0
    assert prompt.begins_text and not any(step.begins_text for step in cached)
    assert prompt.input_ids.shape[1] > qwen3.model.config.sliding_window
    assert {step.input_ids.shape[1] for step in cached} == {1, 3}
    assert cached[-1].attention_mask.shape[1] == sum(step.input_ids.shape[1] for step in (prompt, *cached))


def test_reference_ends_with_the_whole_context_where_that_is_cheap(qwen3):
    assert checked_context(qwen3.model) == {"length": 128, "checked": "whole"}
    prompt, last = reference_steps(qwen3.model)[-2:]
    assert prompt.begins_text and prompt.attention_mask.all() and last.attention_mask.all()
    np.testing.assert_array_equal(prompt.position_ids, np.arange(127)[None])
    assert last.position_ids.tolist() == [[127]] and last.attention_mask.shape == (1, 128)


@pytest.mark.parametrize("limit", ["WHOLE_CONTEXT_OPERATIONS", "WHOLE_CONTEXT_BYTES"])
def test_reference_ends_with_the_last_positions_where_it_is_not(qwen3, monkeypatch, limit):
    monkeypatch.setattr(onnx_check, limit, 1000)
    assert checked_context(qwen3.model) == {"length": 128, "checked": "last positions"}
    prompt, last = reference_steps(qwen3.model)[-2:]
    assert prompt.begins_text and prompt.attention_mask.all() and last.attention_mask.all()
    np.testing.assert_array_equal(prompt.position_ids, np.arange(111, 127)[None])
    assert last.position_ids.tolist() == [[127]] and last.attention_mask.shape == (1, 17)


def test_without_positions_or_a_declared_length_there_is_no_end_to_look_at(no_whole_context):
    config = CONFIGS["bloom"]()
    model = AutoModelForCausalLM.from_config(config).eval()
    assert checked_context(model) == {"length": POSITIONS, "checked": "none"}
    del config.seq_length
    assert checked_context(AutoModelForCausalLM.from_config(config)) == {"length": None, "checked": "none"}
    assert len(reference_steps(model)) == 6


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_short_row_at_the_last_positions_is_the_row_on_its_own(model_type, no_whole_context):
    """Positions that do not start at 0 are not taken for packed texts: the row sees all its tokens, and itself only."""
    if model_type == "gpt2":
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS["gpt2"]()).eval()
    else:
        model = tiny_model(model_type, 3, max_position_embeddings=POSITIONS)
    prompt, last = reference_steps(model)[-2:]
    ids = torch.from_numpy(np.concatenate([prompt.input_ids, last.input_ids], axis=1))
    positions = torch.arange(111, 128)[None]
    # a mask of numbers, which transformers takes as it is
    mask = torch.full((17, 17), torch.finfo(torch.float32).min).triu(1)
    window = getattr(model.config, "sliding_window", None)
    if window is not None:
        return check_window(model, ids, positions, prompt, last)
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, attention_mask=mask[None, None], use_cache=False).logits
    np.testing.assert_allclose(last.logits[0], logits[0, -1:], atol=1e-4)
    np.testing.assert_allclose(prompt.logits[0], logits[0, :-1], atol=1e-4)


def check_window(model, ids, positions, prompt, last):
    """With rotary positions only distances count: the same row from position 0 on."""
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    np.testing.assert_allclose(last.logits[0], logits[0, -1:], atol=1e-3)
    np.testing.assert_allclose(prompt.logits[0], logits[0, :-1], atol=1e-3)


def cut_short(graph, model_type, limit):
    """A graph that treats all positions from `limit` on alike, as one does whose tables are frozen at that length."""
    if model_type == "gpt2":
        table = graph.graph.initializers["transformer.wpe.weight"]
        rows = table.const_value.numpy().copy()
        rows[limit:] = rows[limit - 1]
        table.const_value = ir.tensor(rows, name=table.name)
        return
    if model_type == "llama":
        positions = next(value for value in graph.graph.inputs if value.name == "position_ids")
        users = [(use.node, use.idx) for use in positions.uses()]
    else:
        node = next(node for node in graph.graph if node.op_type == "CumSum")
        positions = node.outputs[0]
        users = [(use.node, use.idx) for use in positions.uses()]
    bound = ir.Value(name="bound", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    bound.const_value = ir.tensor(np.array(limit - 1, np.int64), name="bound")
    graph.graph.register_initializer(bound)
    least = ir.node("Min", [positions, bound], name="least")
    least.outputs[0].name = "least"
    graph.graph.insert_before(users[0][0], least)
    for user, index in users:
        user.replace_input_with(index, least.outputs[0])


@pytest.mark.parametrize("model_type", CONFIGS)
def test_positions_that_end_too_soon_are_found(model_type, tmp_path, monkeypatch):
    torch.manual_seed(0)
    copied = float32_copy(AutoModelForCausalLM.from_config(CONFIGS[model_type]()).eval())
    graph = export_float_graph(copied, opset=21)
    right = save_graph(graph, tmp_path / "right.onnx")[0]
    cut_short(graph, model_type, 64)
    wrong = save_graph(graph, tmp_path / "wrong.onnx")[0]
    whole = reference_steps(copied)
    # what the check looked at before it looked at the longest context
    assert relative_error(wrong, whole[:-2]) < 1e-5
    assert relative_error(right, whole) < 1e-5 and relative_error(wrong, whole) > 0.01
    monkeypatch.setattr(onnx_check, "WHOLE_CONTEXT_OPERATIONS", 0)
    last_positions = reference_steps(copied)
    assert relative_error(right, last_positions) < 1e-5
    # the distances between tokens that all stand at one position are gone; without positions there is nothing to look at
    assert (relative_error(wrong, last_positions) > 0.01) == (model_type != "bloom")


def test_a_process_of_its_own_says_the_same(qwen3, qwen3_file, monkeypatch, tmp_path):
    here = FileCheck(qwen3.model, tmp_path)
    assert here.reference is None and not list(tmp_path.glob("*.npz"))
    monkeypatch.setattr(onnx_check, "IN_PROCESS_BYTES", 1000)
    there = FileCheck(qwen3.model, tmp_path)
    assert there.reference is not None and not there.steps
    for in_float in (False, True):
        assert here.error(qwen3_file) == pytest.approx(there.error(qwen3_file, in_float=in_float), rel=0.5)
    # a failure has the same words, whichever process meets it
    qwen3_file.write_bytes(b"no model")
    errors = []
    for check in (here, there):
        with pytest.raises(ExportError, match="cannot run it") as error:
            check.error(qwen3_file)
        errors.append(error.value.problems)
    assert errors[0] == errors[1]


def test_an_export_with_checks_in_processes_leaves_the_files_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_check, "IN_PROCESS_BYTES", 1000)
    # a name that the other process imports, in a folder that it is started from
    (tmp_path / "numpy.py").write_text("raise ImportError")
    monkeypatch.chdir(tmp_path)
    result = export_onnx(tiny_model("llama", 1), tmp_path / "out", quiet=True)
    names = ["model.onnx", "model_q4.onnx", "model_quantized.onnx"]
    assert sorted(path.name for path in (tmp_path / "out/onnx").iterdir()) == names
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["onnx"]
    assert result.files[0].max_relative_error < 1e-5 < result.files[1].max_relative_error
    assert result.to_dict()["context"] == {"length": 128, "checked": "whole"}


def test_a_process_that_dies_is_an_export_error(tmp_path):
    rule = r"the process that runs it in ONNX Runtime ended without a result \(FileNotFoundError.*\)\. Free memory"
    with pytest.raises(ExportError, match=rf"model\.onnx is 'exit status 1': {rule}"):
        relative_error_apart(tmp_path / "model.onnx", tmp_path / "reference.npz")


def test_logits_that_are_not_finite_fail(tmp_path):
    with pytest.raises(ExportError, match=r"model_q4\.onnx is inf: its logits are not all finite"):
        check_tolerance(tmp_path / "model_q4.onnx", float("inf"), 1e30)


def test_steps_of_long_rows_keep_the_last_logits_only(qwen3, qwen3_file):
    steps = reference_steps(qwen3.model)
    assert steps[-2].logits.shape[:2] == (1, 16) and steps[-1].logits.shape[:2] == (1, 1)
    damaged = dataclasses.replace(steps[-1], logits=steps[-1].logits + 1)
    assert relative_error(qwen3_file, steps) < 1e-5 < relative_error(qwen3_file, [*steps[:-1], damaged])
