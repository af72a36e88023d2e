import gc
import json
import os
import sysconfig
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from tiny_models import random_tokens, tiny_model
from tiny_onnx import exported_llama, onnx_test_model, state_of, traced_qwen3

from optimum_clp import ExportConfig, QuantizationConfig
from optimum_clp.errors import ExportError, QuantizationError
from optimum_clp.exporters import export as exporters
from optimum_clp.exporters import weight_files, writer
from optimum_clp.exporters.export import export_onnx
from optimum_clp.exporters.float32_copy import float32_copy
from optimum_clp.exporters.graph.file import save_graph
from optimum_clp.exporters.graph.float_graph import export_float_graph, fold_weight_transposes
from optimum_clp.runtime.names import FUSED_ATTENTION


@pytest.fixture(scope="module")
def llama():
    return exported_llama()


@pytest.fixture(scope="module")
def qwen3():
    return traced_qwen3()


@pytest.fixture
def no_tracing(monkeypatch, qwen3):
    """`export_onnx(qwen3.model, ...)` takes the graph that was traced already."""
    monkeypatch.setattr(exporters, "export_float_graph", lambda model, opset, fuse: qwen3.graph.clone())


def float_file(graph, folder):
    graph = graph.clone()
    fold_weight_transposes(graph)
    return save_graph(graph, folder / "model.onnx")[0]


def run_cached(file, chunks, masks):
    """Logits of a plain session over consecutive chunks of tokens, `[batch, length, vocabulary]` each."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    past_inputs = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    outputs = [value.name for value in session.get_outputs()]
    past = {
        value.name: np.zeros((len(chunks[0]), value.shape[1], 0, value.shape[3]), np.float32) for value in past_inputs
    }
    logits = []
    if FUSED_ATTENTION in session.get_modelmeta().custom_metadata_map:
        chunks, masks = one_token_each(chunks, masks)
    for ids, mask in zip(chunks, masks, strict=True):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy(), **past}
        values = dict(zip(outputs, session.run(None, feeds), strict=True))
        logits.append(torch.from_numpy(values["logits"]))
        past = {name: values[name.replace("past_key_values", "present")] for name in past}
    return logits


def one_token_each(chunks, masks):
    """The same tokens, those after the prompt one by one: GroupQueryAttention asks for that in batches."""
    tokens, total = [chunks[0], *(c for chunk in chunks[1:] for c in chunk.split(1, dim=1))], masks[-1]
    ends = torch.tensor([ids.shape[1] for ids in tokens]).cumsum(0).tolist()
    return tokens, [total[:, :end] for end in ends]


def check_padded_and_cached(file, model, tolerance=1e-5):
    """A left-padded batch, then cached steps, against PyTorch on each row alone, unpadded and uncached."""
    rows = [random_tokens(1, length + 5, seed=length)[0] for length in (22, 9, 1)]
    width = 22
    prompts = torch.zeros(3, width, dtype=torch.long)
    mask = torch.zeros(3, width, dtype=torch.long)
    for i, row in enumerate(rows):
        prompts[i, width - (len(row) - 5) :] = row[:-5]
        mask[i, width - (len(row) - 5) :] = 1
    chunks, masks = [prompts], [mask]
    for first, last in ((0, 1), (1, 4), (4, 5)):
        tail = torch.stack([row[len(row) - 5 :][first:last] for row in rows])
        chunks.append(tail)
        masks.append(torch.cat([masks[-1], torch.ones_like(tail)], dim=1))
    logits = torch.cat(run_cached(file, chunks, masks), dim=1)
    assert torch.isfinite(logits).all()
    for i, row in enumerate(rows):
        with torch.no_grad():
            expected = model(input_ids=row[None]).logits[0]
        error = (logits[i, -len(row) :] - expected).abs().max() / expected.abs().max()
        assert error < tolerance, (i, error)


def test_padded_cached_logits_are_those_of_each_row_alone(llama, qwen3, tmp_path):
    check_padded_and_cached(llama.folder / "onnx/model.onnx", llama.model)
    check_padded_and_cached(float_file(qwen3.graph, tmp_path), qwen3.model)


def test_names_and_axes_are_optimums(qwen3, tmp_path):
    session = onnxruntime.InferenceSession(str(float_file(qwen3.graph, tmp_path)))
    shapes = {value.name: value.shape for value in [*session.get_inputs(), *session.get_outputs()]}
    config = qwen3.model.config
    past = [f"past_key_values.{i}.{kind}" for i in range(config.num_hidden_layers) for kind in ("key", "value")]
    assert [value.name for value in session.get_inputs()] == ["input_ids", "attention_mask", "position_ids", *past]
    assert [value.name for value in session.get_outputs()] == [
        "logits",
        *[name.replace("past_key_values", "present") for name in past],
    ]
    assert shapes["input_ids"] == ["batch_size", "sequence_length"]
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shapes["logits"] == ["batch_size", "sequence_length", config.vocab_size]
    assert config.head_dim != config.hidden_size // config.num_attention_heads
    assert shapes[past[0]] == ["batch_size", config.num_key_value_heads, "past_sequence_length", config.head_dim]


def test_report_says_what_is_on_disk(llama):
    section = json.loads(json.dumps(llama.result.to_dict()))
    assert section["opset"] == 21
    assert [(file["file"], file["weights"]) for file in section["files"]] == [
        ("onnx/model.onnx", "float32"),
        ("onnx/model_quantized.onnx", "int8"),
        ("onnx/model_q4.onnx", "int4"),
    ]
    assert [file["bytes"] for file in section["files"]] == [
        (llama.folder / file["file"]).stat().st_size for file in section["files"]
    ]
    # 7 projections in each of 2 layers, and the head
    assert [file["num_quantized_matmuls"] for file in section["files"]] == [0, 15, 15]
    assert [file["num_quantized_embeddings"] for file in section["files"]] == [0, 1, 1]
    errors = [file["max_relative_error"] for file in section["files"]]
    assert errors[0] < 1e-5 < errors[1] < errors[2] < 2
    assert sorted(path.name for path in llama.folder.iterdir()) == ["config.json", "onnx"]


def test_files_hold_no_path_of_this_machine(llama):
    needles = [os.getcwd(), sysconfig.get_paths()["purelib"], str(Path(exporters.__file__).parent), "site-packages"]
    for file in (llama.folder / "onnx").iterdir():
        content = file.read_bytes()
        assert not [needle for needle in needles if needle.encode() in content]
        proto = onnx.load(file)
        assert {entry.key for entry in proto.metadata_props} == {FUSED_ATTENTION}
        assert not proto.doc_string and not proto.graph.doc_string
        for item in [*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.value_info]:
            assert not item.metadata_props and not item.doc_string


def test_opset_is_the_one_asked_for(llama):
    for file in (llama.folder / "onnx").iterdir():
        versions = {item.domain: item.version for item in onnx.load(file).opset_import}
        assert versions[""] == 21
        assert "com.microsoft" in versions


def test_tied_weight_is_stored_once(llama):
    size = llama.model.config.vocab_size * llama.model.config.hidden_size
    for name, bytes_of_table in (("model", 4 * size), ("model_quantized", size), ("model_q4", size // 2)):
        graph = onnx.load(llama.folder / f"onnx/{name}.onnx").graph
        tables = [t for t in graph.initializer if len(t.raw_data) == bytes_of_table and "layers" not in t.name]
        assert len(tables) == 1, name
        users = [node.op_type for node in graph.node if tables[0].name in node.input]
        assert len(users) == 2 and set(users) <= {"Gather", "Transpose", "GatherBlockQuantized", "Reshape"}


def test_float_weights_are_matmul_initializers_under_their_checkpoint_names(qwen3, tmp_path):
    graph = onnx.load(float_file(qwen3.graph, tmp_path)).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = dict(qwen3.model.named_parameters())
    multiplied = {node.input[1] for node in graph.node if node.op_type == "MatMul"} & set(stored)
    assert multiplied == {name for name in weights if "proj" in name or "lm_head" in name}
    for name in multiplied:
        np.testing.assert_array_equal(stored[name], weights[name].detach().numpy().T)


def test_model_is_as_before(llama):
    assert state_of(llama.model) == llama.before


def test_float32_model_on_the_cpu_is_not_copied(llama):
    copied = float32_copy(llama.model)
    assert [p.data_ptr() for p in copied.parameters()] == [p.data_ptr() for p in llama.model.parameters()]
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert not any(p.requires_grad for p in copied.parameters())
    assert all(p.requires_grad for p in llama.model.parameters())


def test_bfloat16_model_gets_a_float32_copy_with_exact_rotary_frequencies():
    model = onnx_test_model("llama", tied=True, num_layers=2)
    exact = model.model.rotary_emb.inv_freq.clone()
    model = model.to(torch.bfloat16).train()
    before = state_of(model)
    copied = float32_copy(model)
    assert state_of(model) == before
    assert not copied.training and {p.dtype for p in copied.parameters()} == {torch.float32}
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    for ours, theirs in zip(copied.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.float())
    assert torch.equal(copied.model.rotary_emb.inv_freq, exact)
    assert not torch.equal(model.model.rotary_emb.inv_freq.float(), exact)


def test_single_file_is_what_the_stock_writer_writes(qwen3, tmp_path):
    graph = qwen3.graph.clone()
    fold_weight_transposes(graph)
    (ours,) = save_graph(graph, tmp_path / "ours.onnx")
    ir.save(graph, tmp_path / "stock.onnx")
    onnx.checker.check_model(ours, full_check=True)
    ours, stock = (onnx.load(path) for path in (ours, tmp_path / "stock.onnx"))
    for tensors in (ours.graph.initializer, stock.graph.initializer):
        tensors.sort(key=lambda tensor: tensor.name)
    assert ours.graph.initializer == stock.graph.initializer
    assert ours.graph.node == stock.graph.node and ours.graph.output == stock.graph.output


def test_large_graph_keeps_its_weights_beside_it(qwen3, tmp_path):
    graph = qwen3.graph.clone()
    fold_weight_transposes(graph)
    files = save_graph(graph, tmp_path / "model.onnx", max_single_file_bytes=10_000)
    assert [file.name for file in files] == ["model.onnx", "model.onnx_data"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx_data"]
    check_padded_and_cached(files[0], qwen3.model)


def test_large_files_are_published_with_their_data(qwen3, no_tracing, monkeypatch, tmp_path):
    monkeypatch.setattr(
        writer, "save_graph", lambda graph, file: save_graph(graph, file, max_single_file_bytes=10_000)
    )
    result = export_onnx(qwen3.model, tmp_path, quantization=QuantizationConfig(weights=["int4"]), quiet=True)
    names = ["model.onnx", "model.onnx_data", "model_q4.onnx", "model_q4.onnx_data"]
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == names
    assert sum(file.bytes for file in result.files) == sum(p.stat().st_size for p in (tmp_path / "onnx").iterdir())


def test_a_wrong_weight_fails_the_export_and_leaves_nothing(qwen3, monkeypatch, tmp_path):
    wrong = qwen3.graph.clone()
    name = "model.layers.1.self_attn.k_proj.weight"
    damaged = qwen3.graph.graph.initializers[name].const_value.numpy().copy()
    damaged[0] *= 1.05
    wrong.graph.initializers[name].const_value = ir.tensor(damaged, name=name)
    monkeypatch.setattr(exporters, "export_float_graph", lambda model, opset, fuse: wrong.clone())
    with pytest.raises(ExportError, match=r"model\.onnx is 0\.\d+: its logits differ from PyTorch's.*<= 0\.0001"):
        export_onnx(qwen3.model, tmp_path, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_failed_export_keeps_the_files_of_an_earlier_one(qwen3, no_tracing, tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/model.onnx").write_bytes(b"earlier")
    with pytest.raises(ExportError, match="differ from PyTorch's"):
        export_onnx(qwen3.model, tmp_path, ExportConfig(tolerance=1e-12), quiet=True)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["onnx", "onnx/model.onnx"]
    assert (tmp_path / "onnx/model.onnx").read_bytes() == b"earlier"


def test_weights_left_in_float_fail_the_export(qwen3, no_tracing, monkeypatch, tmp_path):
    quantize = weight_files.quantize_graph

    def without_embedding(graph, bits, **options):
        return quantize(graph, bits, **{**options, "quantize_embeddings": False})

    monkeypatch.setattr(weight_files, "quantize_graph", without_embedding)
    with pytest.raises(QuantizationError, match=r"Gather .*embed_tokens\.weight.*15 linear layers and 0 embeddings"):
        export_onnx(qwen3.model, tmp_path, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_rope_that_depends_on_the_length_is_refused(tmp_path):
    model = tiny_model("llama", 1)
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ExportError, match="rope_type is 'dynamic': its rotary frequencies change with the length"):
        export_onnx(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_offloaded_weights_are_refused():
    model = tiny_model("llama", 1)
    model.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(ExportError, match=r"model is 'model\.layers\.0\.mlp\.up_proj\.weight': 1 of its weights"):
        float32_copy(model)


def test_weights_of_another_shape_than_the_configuration_are_refused():
    model = tiny_model("llama", 2)
    model.config.num_hidden_layers = 1
    with pytest.raises(ExportError, match="its weights are not those that its configuration describes"):
        float32_copy(model)


def test_what_torch_cannot_trace_is_reported(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("unsupported operator\nlong trace")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ExportError, match=r"LlamaForCausalLM.*cannot trace it \(unsupported operator\)"):
        export_float_graph(float32_copy(tiny_model("llama", 1)), 21)
    assert gc.isenabled()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_architecture(model_type, tied, tmp_path):
    model = onnx_test_model(model_type, tied, num_layers=4)
    result = export_onnx(model, tmp_path, quiet=True)
    check_padded_and_cached(tmp_path / "onnx/model.onnx", model)
    assert [file.num_quantized_matmuls for file in result.files] == [0, 29, 29]


@pytest.mark.slow
@pytest.mark.parametrize("opset", [22, 23])
def test_other_opsets(opset, tmp_path):
    model = onnx_test_model("llama", True, num_layers=2)
    export_onnx(model, tmp_path, ExportConfig(opset=opset), quiet=True)
    assert {item.version for item in onnx.load(tmp_path / "onnx/model.onnx").opset_import} == {opset}
    check_padded_and_cached(tmp_path / "onnx/model.onnx", model)


@pytest.mark.slow
def test_training_bfloat16_model_is_exported_in_float32(tmp_path):
    model = onnx_test_model("llama", True, num_layers=2).to(torch.bfloat16).train()
    before = state_of(model)
    result = export_onnx(model, tmp_path, quiet=True)
    assert state_of(model) == before
    assert result.files[0].max_relative_error < 1e-5
    check_padded_and_cached(tmp_path / "onnx/model.onnx", float32_copy(model))
