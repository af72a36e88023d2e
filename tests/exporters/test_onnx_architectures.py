"""ONNX files of every architecture; the slow tier of the zoo (about 10 seconds for each type)."""

import copy

import onnx
import pytest
import torch
import transformers
from tiny_models import random_tokens
from tiny_onnx import short_reason, small_zoo_model, state_of
from torch import nn
from transformers.pytorch_utils import Conv1D
from zoo import ZOO, zoo_model

from optimum_clp.errors import ExportError
from optimum_clp.exporters.export import export_onnx
from optimum_clp.exporters.obstacle import onnx_obstacle
from optimum_clp.runtime.causal_lm import OnnxCausalLM
from optimum_clp.runtime.names import LOGITS_TO_KEEP

# transformers 4 leaves a mask of ones out, and this class is then not even causal: one row is not what it is in a batch
WRONG_IN_TRANSFORMERS_4 = ("doge",)


def members():
    return [pytest.param(tiny, id=tiny.name) for tiny in ZOO]


def check_against_each_row_alone(folder, model):
    """A left-padded batch, then cached steps, against PyTorch on each row alone, unpadded and without a cache."""
    # all of it in float32 (xIELU of transformers 4 computes in bfloat16), with an attention that leaves nothing out
    model = copy.deepcopy(model).float()
    left_out = ("attn_logit_softcapping", "scale_attn_by_inverse_layer_idx")
    if any(getattr(model.config, name, None) for name in left_out):
        model.set_attn_implementation("eager")
    session = OnnxCausalLM.from_pretrained(folder, num_threads=1)
    lengths, steps = (19, 8, 1), (1, 3, 1)
    rows = [random_tokens(1, length + sum(steps), seed=length)[0] for length in lengths]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, length in enumerate(lengths):
        ids[i, max(lengths) - length :] = rows[i][:length]
        mask[i, max(lengths) - length :] = 1
    cache, parts, done = None, [], 0
    for step in (None, *steps):
        if step is not None:
            ids = torch.stack([row[length + done :][:step] for row, length in zip(rows, lengths, strict=True)])
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            done += step
        output = session(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    logits = torch.cat(parts, dim=1)
    for i, row in enumerate(rows):
        with torch.no_grad():
            expected = model(input_ids=row[None], use_cache=False).logits[0]
        error = (logits[i, -len(row) :] - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, (i, error.item())


def check_files(tiny, model, folder, record_property):
    before = state_of(model)
    result = export_onnx(model, folder, quiet=True)
    assert state_of(model) == before
    assert [file.weights for file in result.files] == ["float32", "int8", "int4"]
    for file in result.files:
        record_property(f"onnx_{file.weights}", file.max_relative_error)
        graph = onnx.load(folder / file.file).graph
        operators = [node.op_type for node in graph.node]
        # the head of every architecture can be asked for the last positions alone
        assert LOGITS_TO_KEEP in [value.name for value in graph.input]
        # queries, keys and values may be one product, whose integers have the names of all three
        products = [node.input[1] for node in graph.node if node.op_type == "MatMulNBits"]
        assert sum(len(name.split("+")) for name in products) == file.num_quantized_matmuls
        assert operators.count("GatherBlockQuantized") == file.num_quantized_embeddings
        left = {tensor.name for tensor in graph.initializer if len(tensor.dims) >= 2 and tensor.data_type == 1}
        if file.weights != "float32":
            # no matrix in float that is multiplied by
            assert not [
                node.name for node in graph.node if node.op_type in ("MatMul", "Gemm") and left & {*node.input}
            ]
    float_file, *quantized = result.files
    assert float_file.max_relative_error < 1e-4
    assert all(file.num_quantized_matmuls == matrices_of(model) for file in quantized)
    assert all(file.num_quantized_embeddings == 1 for file in quantized)
    model.config.save_pretrained(folder)
    return result


def matrices_of(model):
    """Matrices of the text model, counted by class and shape alone."""
    count = 0
    for name, module in model.named_modules():
        if "vision" in name or "projector" in name:
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            count += 1
        elif type(module).__name__ == "DbrxExpertGLU":
            count += 3 * module.moe_num_experts
        else:
            for key, weight in module.named_parameters(recurse=False):
                if weight.ndim == 3 and ("proj" in key or "ParallelExperts" in type(module).__name__):
                    count += min(len(weight), getattr(module, "num_routed_experts", len(weight)))
                elif key == "weight" and weight.ndim == 2 and "Router" in type(module).__name__:
                    count += 1
    return count


@pytest.mark.slow
@pytest.mark.parametrize("tiny", members())
def test_files_of_every_architecture_or_an_obstacle(tiny, tmp_path, architecture_result, record_property):
    model = zoo_model(tiny)
    obstacle = onnx_obstacle(model)
    if obstacle is not None:
        with pytest.raises(ExportError) as caught:
            export_onnx(model, tmp_path, quiet=True)
        assert caught.value.problems == (obstacle,)
        assert list(tmp_path.iterdir()) == []
        for column in ("onnx_float", "onnx_int8", "onnx_int4"):
            architecture_result(tiny.name, column, f"refused: {short_reason(obstacle)}")
        return
    model = small_zoo_model(tiny)
    if tiny.name in WRONG_IN_TRANSFORMERS_4 and transformers.__version__.startswith("4."):
        with pytest.raises(ExportError, match="its logits differ from PyTorch's"):
            export_onnx(model, tmp_path, quiet=True)
        for column in ("onnx_float", "onnx_int8", "onnx_int4"):
            architecture_result(tiny.name, column, "refused: a file differs from the model")
        return
    check_files(tiny, model, tmp_path, record_property)
    check_against_each_row_alone(tmp_path, model)
    for column in ("onnx_float", "onnx_int8", "onnx_int4"):
        architecture_result(tiny.name, column, "works")


def test_conv1d_is_quantized(tmp_path, record_property):
    (tiny,) = [tiny for tiny in ZOO if tiny.name == "gpt2"]
    model = small_zoo_model(tiny, num_layers=1)
    result = check_files(tiny, model, tmp_path, record_property)
    check_against_each_row_alone(tmp_path, model)
    # c_attn, c_proj, c_fc, c_proj and the head; learned positions stay in float
    assert [file.num_quantized_matmuls for file in result.files] == [0, 5, 5]


def test_experts_are_quantized(tmp_path, record_property):
    (tiny,) = [tiny for tiny in ZOO if tiny.name == "gpt_oss"]
    model = small_zoo_model(tiny, num_layers=1)
    result = check_files(tiny, model, tmp_path, record_property)
    check_against_each_row_alone(tmp_path, model)
    # 4 projections, a router, 2 matrices in each of 4 experts, and the head
    assert [file.num_quantized_matmuls for file in result.files] == [0, 14, 14]
    nodes = onnx.load(tmp_path / "onnx/model_q4.onnx").graph.node
    routers = [node for node in nodes if node.op_type == "MatMulNBits" and "router" in node.input[1]]
    assert [a.i for node in routers for a in node.attribute if a.name == "bits"] == [8]
