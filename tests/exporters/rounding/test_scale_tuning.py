import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from notices import notice
from quantized_files import dequantized_model
from tiny_models import random_tokens, tiny_model
from tiny_onnx import small_zoo_model
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D
from zoo import ZOO

from optimum_clp import LayerSegment, QuantizationConfig
from optimum_clp.exporters.experts import unrolled_experts
from optimum_clp.exporters.export import export_onnx
from optimum_clp.exporters.obstacle import onnx_obstacle
from optimum_clp.exporters.room import ExportRoom
from optimum_clp.exporters.rounding import products, scale_tuning, weights
from optimum_clp.exporters.rounding.gptq import Gptq
from optimum_clp.exporters.rounding.matrices import GraphMatrix
from optimum_clp.exporters.rounding.method import RoundingProblem
from optimum_clp.exporters.rounding.scale_tuning import (
    complete,
    judging_rows,
    tune_scales,
    tuning_bytes,
)
from optimum_clp.exporters.rounding.weights import round_weights
from optimum_clp.surgery.cut import cut_model

ROWS = random_tokens(48, 24)


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.15}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def flipped(model):
    """Names of the weights that a module holds the other way round."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}


def stored_matrices(model):
    """What a graph of the model stores in integers: linear modules, and the embedding."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) or module is model.get_input_embeddings():
            found.setdefault(id(module.weight), (f"{name}.weight", module.weight.shape))
    return {name: GraphMatrix(*(shape[::-1] if name in flipped(model) else shape)) for name, shape in found.values()}


def rounded_by_name(model, bits=4, block_size=16):
    return complete(RoundingProblem(model, bits, stored_matrices(model), block_size), {})


def with_weights(model, matrices):
    """A copy of the model that holds the matrices as they are stored, by other code."""
    student = copy.deepcopy(model)
    for name, matrix in matrices.items():
        values = torch.from_numpy(matrix.dequantize())
        student.get_parameter(name).data.copy_(values.T if name in flipped(model) else values)
    return student


@torch.no_grad()
def divergence(teacher, student, rows):
    logs = [model(input_ids=rows).logits.double().log_softmax(-1) for model in (teacher, student)]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


def state_of(model):
    """All that tuning could leave behind."""
    modules = [
        (name, type(module), [own for own, _ in module.named_parameters(recurse=False)])
        for name, module in model.named_modules()
    ]
    tensors = [(name, id(tensor), tensor.requires_grad, tensor.clone()) for name, tensor in model.named_parameters()]
    return modules, [entry[:3] for entry in tensors], {name: tensor for name, _, _, tensor in tensors}


MODELS = {
    "llama": lambda: tiny_model(num_layers=3),
    "tied": lambda: tiny_model(num_layers=3, tie_word_embeddings=True),
    "biases": lambda: tiny_model("qwen2", num_layers=2),
    "other way round": gpt2,
}


@pytest.mark.parametrize("name", MODELS)
def test_scales_come_nearer_and_integers_stay(name):
    model = MODELS[name]()
    model.requires_grad_(True)
    before, rounded = state_of(model), rounded_by_name(model)
    # these are near to begin with, so that steps are small
    tuned, result = tune_scales(model, rounded, ROWS, epochs=8, quiet=True)
    after = state_of(model)
    assert [pair for pair in zip(before[0] + before[1], after[0] + after[1], strict=True) if pair[0] != pair[1]] == []
    assert all(torch.equal(before[2][key], after[2][key]) for key in before[2])

    assert result.kept and result.tokens == 8 * 40 * 24  # 42 rows that are trained on are ten times four
    for key, matrix in tuned.items():
        np.testing.assert_array_equal(matrix.integers, rounded[key].integers)
        np.testing.assert_array_equal(matrix.scales, matrix.scales.astype(np.float16))
        assert matrix.scales.dtype == np.float32 and (matrix.scales != rounded[key].scales).any(), key
    judges = ROWS[-6:]
    measured = [divergence(model, with_weights(model, found), judges) for found in (rounded, tuned)]
    # products were in bfloat16 there, if the processor has them
    np.testing.assert_allclose((result.kl_before, result.kl_after), measured, rtol=0.1)
    assert measured[1] < 0.97 * measured[0]


def test_a_cut_model_is_taught_by_the_dense_one():
    dense = tiny_model(num_layers=4)
    model = cut_model(dense, [LayerSegment(1, 2)])
    rounded = rounded_by_name(model)
    tuned, result = tune_scales(model, rounded, ROWS, teacher=dense, epochs=4, quiet=True)
    measured = [divergence(dense, with_weights(model, found), ROWS[-6:]) for found in (rounded, tuned)]
    np.testing.assert_allclose((result.kl_before, result.kl_after), measured, rtol=0.1)
    # nearer to the dense model, and no nearer to the cut one
    assert measured[1] < 0.97 * measured[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_are_those_of_the_plain_expression(bits, monkeypatch):
    monkeypatch.setattr(products, "_has_bfloat16", lambda: False)
    # no row is filled up
    sizes = {"num_layers": 2, "intermediate_size": 64}
    model = tiny_model(**sizes)
    rounded = rounded_by_name(model, bits)
    with scale_tuning._as_stored(model, rounded) as stored:
        student = scale_tuning._Student(model, stored, tiny_model(**sizes, seed=1), ROWS)
        found = []
        for lean in (True, False):
            with student.weights_made_again() if lean else nullcontext():
                student.loss(ROWS[:2]).mean().backward()
            found.append({name: part.change.grad.clone() for name, part in stored.items()})
            for part in student.parts:
                part.change.grad = None
    plain, changes = tiny_model(**sizes), {}
    weights = {}
    for name, matrix in rounded.items():
        changes[name] = torch.zeros(matrix.scales.shape, requires_grad=True)
        scales = torch.from_numpy(matrix.scales) * (1 + changes[name])
        blocks = matrix.codes().reshape(*matrix.scales.shape, -1).astype(np.float32) - 2 ** (bits - 1)
        weights[name] = (torch.from_numpy(blocks) * scales[..., None]).flatten(1)
    student = torch.func.functional_call(plain, weights, kwargs={"input_ids": ROWS[:2]}).logits.log_softmax(-1)
    with torch.no_grad():
        teacher = tiny_model(**sizes, seed=1)(input_ids=ROWS[:2]).logits.log_softmax(-1)
    F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean().backward()
    for name, change in changes.items():
        assert torch.equal(found[0][name], found[1][name]), name
        torch.testing.assert_close(found[0][name], change.grad, rtol=1e-3, atol=1e-6)


def test_what_autograd_keeps_has_no_weights(monkeypatch):
    monkeypatch.setattr(products, "_has_bfloat16", lambda: False)
    model = tiny_model(num_layers=2, hidden_size=64, intermediate_size=512)
    with scale_tuning._as_stored(model, rounded_by_name(model)) as stored:
        student, kept = scale_tuning._Student(model, stored, None, ROWS), []
        own = student.weights_made_again()
        pack = own.pack_hook
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(pack(t)) or kept[-1], own.unpack_hook):
            student.loss(ROWS[:1]).mean().backward()
    # 24 tokens of 512 numbers are fewer than any weight of the MLP
    assert max(tensor.numel() for tensor in kept if isinstance(tensor, torch.Tensor)) < 512 * 64
    assert sum(not isinstance(entry, torch.Tensor) for entry in kept) >= len(stored) - 1


def test_what_is_no_better_is_not_kept(monkeypatch):
    monkeypatch.setattr(scale_tuning, "_RATE", 1.0)
    model = tiny_model(num_layers=2)
    rounded = rounded_by_name(model)
    tuned, result = tune_scales(model, rounded, ROWS, quiet=True)
    assert not result.kept and result.kl_after > result.kl_before
    assert all(tuned[name] is rounded[name] for name in rounded)


def test_a_divergence_that_is_no_number_is_in_no_report(monkeypatch):
    monkeypatch.setattr(scale_tuning, "_RATE", float("inf"))
    model = tiny_model(num_layers=2)
    rounded = rounded_by_name(model)
    assert tune_scales(model, rounded, ROWS, quiet=True) == (rounded, None)


def test_a_text_of_few_rows_trains_nothing():
    model = tiny_model(num_layers=2)
    rounded = rounded_by_name(model)
    assert tune_scales(model, rounded, ROWS[:7], quiet=True) == (rounded, None)
    assert [judging_rows(rows) for rows in (1, 7, 8, 31, 128, 4096)] == [0, 0, 1, 3, 16, 16]


def by_method(model, teacher=None, **settings):
    with unrolled_experts(model):
        matrices = stored_matrices(model)
    return round_weights(model, 4, matrices, QuantizationConfig(**settings), ROWS, teacher=teacher, quiet=True)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_tuned_one_by_one(name):
    model = small_zoo_model(next(tiny for tiny in ZOO if tiny.name == name))
    rounded = by_method(model)
    # random experts have next to nothing to learn from ten steps
    assert rounded.scale_tuning.tokens == 40 * 24
    assert any("experts" in matrix for matrix in rounded.matrices)


@pytest.mark.slow
@pytest.mark.parametrize("tiny", ZOO, ids=lambda tiny: tiny.name)
def test_every_architecture_that_is_exported_is_tuned(tiny):
    model = small_zoo_model(tiny)
    if onnx_obstacle(model) is not None:
        pytest.skip("it is not exported")
    with unrolled_experts(model):
        matrices = stored_matrices(model)
    rounded = complete(RoundingProblem(model, 4, matrices, 16), {})
    assert tune_scales(model, rounded, ROWS[:16, :12], quiet=True)[1].tokens == 12 * 12


def test_it_follows_methods_that_look_at_text():
    model = tiny_model(num_layers=2)
    # from another model there is much to learn
    teacher = tiny_model(num_layers=2, seed=1)
    tuned, plain = (by_method(model, teacher, scale_epochs=epochs) for epochs in (1, 0))
    assert tuned.scale_tuning.tokens == 40 * 24 and tuned.scale_tuning.kept and plain.scale_tuning is None
    # an embedding that is not the head is left to the graph where nothing is tuned
    assert tuned.matrices.keys() - plain.matrices.keys() == {"model.embed_tokens.weight"}
    assert by_method(model, method="rtn").scale_tuning is None
    assert by_method(model, method="hqq").scale_tuning is None


def test_rounding_itself_looks_at_some_of_the_rows(monkeypatch):
    model, rows = tiny_model(num_layers=2), random_tokens(128, 12, seed=3)
    with unrolled_experts(model):
        matrices = stored_matrices(model)
    seen, whole = [], Gptq.round
    monkeypatch.setattr(Gptq, "round", lambda self, problem: seen.append(problem.calibration) or whole(self, problem))

    def rounded_by(**options):
        return round_weights(model, 4, matrices, QuantizationConfig(), rows, quiet=True, **options)

    assert rounded_by().scale_tuning.tokens == 112 * 12
    # a quarter, of the 112 that no judge is one of, from the first to the last
    places = [next(i for i, row in enumerate(rows) if torch.equal(row, taken)) for taken in seen.pop()]
    assert places == [int(3.5 * i) for i in range(32)]
    assert [
        len(weights._with_some_rows(RoundingProblem(model, 4, {}, 16, rows[:n])).calibration) for n in (8, 40, 100)
    ] == [7, 32, 32]
    many = random_tokens(400, 2, seed=4)
    assert len(weights._with_some_rows(RoundingProblem(model, 4, {}, 16, many)).calibration) == 100
    with notice("quantization.scale_epochs: "):
        assert rounded_by(room=ExportRoom(left=0.0)).scale_tuning is None
    assert torch.equal(seen.pop(), rows)


def test_where_memory_does_not_hold_it_scales_stay(monkeypatch):
    monkeypatch.setattr(weights, "tuning_bytes", lambda *args: 2**60)
    monkeypatch.setattr(weights, "ExportRoom", lambda: ExportRoom(left=2**30))
    with notice(
        "quantization.scale_epochs: 1073741824.00 GiB would be held beside the export, 1.00 may be: the scales"
    ):
        assert by_method(tiny_model(num_layers=2)).scale_tuning is None


def test_a_file_says_what_came_of_it(tmp_path):
    model, settings = tiny_model(num_layers=2), QuantizationConfig(weights=["int4"])
    *_, made = export_onnx(model, tmp_path, quantization=settings, calibration=ROWS, quiet=True).files
    tuned = by_method(model, group_size=settings.group_size)
    assert made.scale_tuning == tuned.scale_tuning
    # an independent reader of the file finds the same numbers
    stored = dequantized_model(model, tmp_path / made.file)
    for name, matrix in tuned.matrices.items():
        torch.testing.assert_close(stored.get_parameter(name).data, torch.from_numpy(matrix.dequantize()))


def test_memory_is_counted_by_scales_and_by_what_autograd_keeps():
    model = tiny_model(num_layers=2, hidden_size=64)
    fine, coarse = (tuning_bytes(model, 24, size) for size in (16, 32))
    numbers = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    assert fine - coarse == 24 * (numbers // 16 - numbers // 32)
    assert tuning_bytes(model, 48, 32) > 1.5 * coarse


def test_steps_are_smaller_where_it_is_near_already(monkeypatch):
    """1e-3 from a divergence of 0.16 on, a hundredth of which is a tenth of it."""
    model, rates = tiny_model(num_layers=2), []
    adam = torch.optim.Adam

    def watched(parameters, lr, **options):
        rates.append(lr)
        return adam(parameters, lr=lr, **options)

    monkeypatch.setattr(scale_tuning.torch.optim, "Adam", watched)
    for before in (0.0016, 0.16, 5.0):
        monkeypatch.setattr(scale_tuning._Student, "divergence", lambda self, rows, before=before: before)
        tune_scales(model, rounded_by_name(model), ROWS, quiet=True)
    assert rates == pytest.approx([1e-4, 1e-3, 1e-3])
