import copy
import json
import re

import pytest
import torch
from tiny_models import make_identity, random_tokens, tiny_model
from transformers import AutoModelForCausalLM
from zoo import ZOO, zoo_model

from optimum_clp.architecture.lookup import decoder_layers
from optimum_clp.closed_form.ridge import RIDGES
from optimum_clp.closed_form.solver import solve_endpoints
from optimum_clp.errors import ConfigurationError, ModelError
from optimum_clp.forward.dense_outputs import DenseOutputs, StateStore
from optimum_clp.forward.hooks import layer_hidden, layer_input
from optimum_clp.segments import LayerSegment, endpoint_layers, kept_layers, target_state
from optimum_clp.surgery.cut import cut_model, own_storage

SEGMENTS = [LayerSegment(2, 4)]
METHODS = ["least_squares", "fold"]
TRAIN, VALIDATION = random_tokens(24, 20, seed=1), random_tokens(6, 20, seed=2)


def zoo(name, **overrides):
    return zoo_model(next(tiny for tiny in ZOO if tiny.name == name), **overrides)


def own_layers(cut, layers):
    for index in layers:
        own_storage(decoder_layers(cut)[index])


def solve(dense, cut, layers, segments=SEGMENTS, train=TRAIN, **options):
    depth = len(decoder_layers(dense))
    kept = kept_layers(segments, depth)
    own_layers(cut, layers)
    targets = [target_state(kept, i, depth) for i in layers]
    outputs = [DenseOutputs(dense, rows, inputs_of=targets) for rows in (train, VALIDATION)]
    inputs = [DenseOutputs(cut, rows, inputs_of=[min(layers)]).hidden[min(layers)] for rows in (train, VALIDATION)]
    return solve_endpoints(cut, layers, kept, *outputs, tuple(inputs), quiet=True, **options)


def changed(before, model):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def states(model, layer, module, rows):
    """What enters and leaves a layer, and what enters and leaves a module in it: float64 `[tokens, features]`."""
    found = []

    def hook(module, args, kwargs, output):
        found.append((layer_input(args, kwargs).clone(), layer_hidden(output).clone()))

    inner = decoder_layers(model)[layer].get_submodule(module)
    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in (inner, decoder_layers(model)[layer])]
    with torch.no_grad():
        model(rows)
    for handle in handles:
        handle.remove()
    (z, p), (x, h) = found
    return [t.double().flatten(0, -2) for t in (x, h, z, p)]


def dense_state(model, index, rows):
    return DenseOutputs(model, rows, inputs_of=[index]).hidden[index].double().flatten(0, -2)


@pytest.fixture
def dense():
    return tiny_model()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "module", "scale"),
    [
        ("llama", "mlp.down_proj", 1.0),
        ("gpt2", "mlp.c_proj", 1.0),
        ("opt", "fc2", 1.0),
        ("gpt_neox", "mlp.dense_4h_to_h", 1.0),
        ("falcon", "mlp.dense_4h_to_h", 1.0),
        ("granite", "mlp.down_proj", 0.3),
    ],
)
def test_the_solution_is_that_of_stacked_least_squares(name, module, scale, method):
    """Conv1D, a bias, parallel attention, a sum in place and a residual multiplier among them."""
    dense = zoo(name, **({"residual_multiplier": scale} if scale != 1 else {}))
    cut, ridge = cut_model(dense, SEGMENTS), 1e-2
    _, h, z, p = states(cut, 1, module, TRAIN)
    projection = decoder_layers(cut)[1].get_submodule(module)
    old = projection.weight.double().clone()
    old = old.T if type(projection).__name__ == "Conv1D" else old
    bias = None if projection.bias is None else projection.bias.detach().double().clone()
    features = z if method == "least_squares" else p - (0 if bias is None else bias)
    missing = (dense_state(dense, 4, TRAIN) - h) / scale
    shift = torch.zeros(1, dtype=torch.float64)
    if bias is not None:
        shift = missing.mean(0), features.mean(0)
        missing, features = missing - shift[0], features - shift[1]
    width = features.shape[1]
    penalty = (ridge * features.square().sum() / width).sqrt() * torch.eye(width, dtype=torch.float64)
    stacked = torch.cat([features, penalty]), torch.cat([missing, torch.zeros(width, missing.shape[1])])
    change = torch.linalg.lstsq(*stacked).solution.T

    result = solve(dense, cut, [1], method=method, ridges=[ridge], attention=False)
    (step,) = result.steps
    assert (step.module, step.ridge, step.dtype, step.skipped) == (module, ridge, "float64", None)
    new = projection.weight.double()
    new = new.T if type(projection).__name__ == "Conv1D" else new
    expected = old + (change if method == "least_squares" else change @ old)
    torch.testing.assert_close(new, expected, atol=2e-5, rtol=2e-5)
    if bias is not None:
        torch.testing.assert_close(projection.bias.double(), bias + shift[0] - change @ shift[1], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_reported_errors_are_those_of_the_model(dense, method):
    cut = cut_model(dense, SEGMENTS)

    def error(layer, target):
        x, h, _, _ = states(cut, layer, "mlp.down_proj", VALIDATION)
        goal = dense_state(dense, target, VALIDATION)
        return ((goal - h).square().sum() / (goal - x).square().sum()).item()

    before = error(1, 4)
    result = solve(dense, cut, [1, 2], method=method)
    steps = [s for s in result.steps if s.layer == 1 and s.skipped is None]
    assert steps[0].error_before == pytest.approx(before, rel=1e-5)
    assert steps[-1].error_after == pytest.approx(error(1, 4), rel=1e-5)
    last = [s for s in result.steps if s.layer == 2 and s.skipped is None][-1]
    assert last.error_after == pytest.approx(error(2, 5), rel=1e-5)
    assert result.solved == (1, 2) and last.error_after < 0.95 and steps[-1].error_after < 0.9 * before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("module", ["mlp.down_proj", "self_attn.o_proj"])
def test_what_can_be_represented_is_recovered(dense, method, module):
    make_identity(dense, [2, 3])
    cut = cut_model(dense, SEGMENTS)
    own_layers(cut, [1])
    right = decoder_layers(dense)[1].get_submodule(module).weight
    projection = decoder_layers(cut)[1].get_submodule(module)
    noise = torch.randn(32, 32, generator=torch.Generator().manual_seed(3)) / 6
    with torch.no_grad():
        if method == "fold":
            projection.weight.copy_(torch.linalg.solve(torch.eye(32) + 0.2 * noise, right))
        else:
            projection.weight.add_(noise @ right.roll(1, 1))
    result = solve(dense, cut, [1], method=method, ridges=[1e-9], attention=module != "mlp.down_proj")
    assert 0.001 < result.steps[0].error_before
    if module == "mlp.down_proj":
        assert result.steps[0].error_after < 1e-9
        torch.testing.assert_close(projection.weight, right, atol=1e-4, rtol=1e-3)
    else:
        # only to first order, as the layer's own MLP sees the change
        assert result.steps[-1].error_after < result.steps[0].error_after < result.steps[0].error_before


def test_only_the_projections_change(dense):
    cut = cut_model(dense, SEGMENTS)
    before, dense_before = copy.deepcopy(cut.state_dict()), copy.deepcopy(dense.state_dict())
    solve(dense, cut, [1, 2], attention=False)
    assert changed(before, cut) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)}
    solve(dense, cut, [1, 2])
    both = ("mlp.down_proj", "self_attn.o_proj")
    assert changed(before, cut) == {f"model.layers.{i}.{name}.weight" for i in (1, 2) for name in both}
    assert not changed(dense_before, dense)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in cut.modules())


def test_a_fold_multiplies_the_projection_from_the_left(dense):
    cut = cut_model(dense, SEGMENTS)
    old = cut.model.layers[1].mlp.down_proj.weight.detach().double().clone()
    solve(dense, cut, [1], method="fold", attention=False)
    new = cut.model.layers[1].mlp.down_proj.weight.detach().double()
    # hidden size 32 of 56 features: the rows of what is folded lie in the span of the old ones
    residual = torch.linalg.lstsq(old.T, new.T).solution.T @ old - new
    assert residual.norm() < 1e-5 * new.norm() < (new - old).norm()
    solve(dense, cut, [1], method="least_squares", attention=False)
    refitted = cut.model.layers[1].mlp.down_proj.weight.detach().double()
    assert (torch.linalg.lstsq(old.T, refitted.T).solution.T @ old - refitted).norm() > 1e-2 * refitted.norm()


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_reload_is_exact(dense, method, tmp_path):
    cut = cut_model(dense, SEGMENTS)
    assert solve(dense, cut, [1, 2], method=method).solved
    cut.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(VALIDATION).logits, cut(VALIDATION).logits)


@pytest.mark.parametrize(
    ("segments", "targets"),
    [
        (((0, 2),), {0: 3}),
        (((4, 6),), {3: 6}),
        (((1, 2), (3, 4)), {0: 2, 1: 4, 2: 5}),
        (((1, 2), (4, 5)), {0: 2, 1: 3, 2: 5, 3: 6}),
    ],
    ids=str,
)
def test_segments_at_the_ends_and_several(dense, segments, targets):
    segments = [LayerSegment(*s) for s in segments]
    kept, cut = kept_layers(segments, 6), cut_model(dense, segments)
    layers = endpoint_layers(segments, 6)
    assert {i: target_state(kept, i, 6) for i in layers} == targets
    with torch.no_grad():
        before = (dense(VALIDATION).logits - cut(VALIDATION).logits).square().mean()
        result = solve(dense, cut, layers, segments)
        assert (dense(VALIDATION).logits - cut(VALIDATION).logits).square().mean() < before
    assert {s.layer for s in result.steps} == set(layers) == set(result.solved)


def test_layers_are_solved_on_top_of_the_ones_below(dense):
    together, apart = cut_model(dense, SEGMENTS), cut_model(dense, SEGMENTS)
    result = solve(dense, together, [2, 1])
    assert [s.layer for s in result.steps] == sorted(s.layer for s in result.steps)
    solve(dense, apart, [1])
    solve(dense, apart, [2])
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_batch_size_does_not_matter(dense):
    one, other = cut_model(dense, SEGMENTS), cut_model(dense, SEGMENTS)
    solve(dense, one, [1, 2], batch_size=5)
    solve(dense, other, [1, 2], batch_size=24)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma3_text", "the output of mlp.down_proj is not simply added to the layer's"),
        ("olmo2", "the output of mlp.down_proj is not simply added to the layer's"),
        ("mixtral", "is not simply added to the layer's|is not called once for all tokens"),
        ("phimoe", "is not simply added to the layer's|is not called once for all tokens"),
        ("openai-gpt", "the output of mlp.c_proj is not simply added to the layer's"),
    ],
)
def test_layers_without_a_closed_form_are_left_alone(name, reason):
    dense = zoo(name)
    cut = cut_model(dense, SEGMENTS)
    before = copy.deepcopy(cut.state_dict())
    result = solve(dense, cut, [1, 2])
    assert len(result.steps) == 2 and not result.solved and not changed(before, cut)
    for step in result.steps:
        assert step.module is None and step.error_before is None
        assert re.search(reason, step.skipped)


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("qwen2", {"mlp.down_proj", "self_attn.o_proj"}),
        ("qwen3", {"mlp.down_proj", "self_attn.o_proj"}),
        ("mistral", {"mlp.down_proj", "self_attn.o_proj"}),
        ("phi", {"mlp.fc2", "self_attn.dense"}),
        ("gpt_neox", {"mlp.dense_4h_to_h", "attention.dense"}),
        ("granite", {"mlp.down_proj", "self_attn.o_proj"}),
        ("gpt2", {"mlp.c_proj", "attn.c_proj"}),
        ("opt", {"fc2", "self_attn.out_proj"}),
    ],
)
def test_the_projections_are_found_by_what_they_do(name, modules):
    dense = zoo(name)
    result = solve(dense, cut_model(dense, SEGMENTS), [1])
    assert {s.module for s in result.steps} == modules
    assert result.steps[-1].error_after < result.steps[0].error_before


def test_weights_that_other_layers_use_are_left_alone(dense):
    cut = cut_model(dense, SEGMENTS)
    cut.model.layers[3].mlp.down_proj.weight = cut.model.layers[1].mlp.down_proj.weight
    (step,) = solve(dense, cut, [1]).steps
    assert step.skipped == "mlp.down_proj is shared with other layers"


def test_a_layer_that_is_right_already_is_left_alone(dense):
    make_identity(dense, [2, 3])
    cut = cut_model(dense, SEGMENTS)
    before = copy.deepcopy(cut.state_dict())
    result = solve(dense, cut, [1])
    assert [s.skipped for s in result.steps] == ["the layer's output is the target already"]
    assert not changed(before, cut)


def test_a_projection_that_nothing_enters_is_left_alone(dense):
    cut = cut_model(dense, SEGMENTS)
    own_layers(cut, [1])
    with torch.no_grad():
        cut.model.layers[1].mlp.up_proj.weight.zero_()
    steps = solve(dense, cut, [1]).steps
    assert steps[0].skipped == "what enters the projection is zero or constant"
    assert steps[1].module == "self_attn.o_proj" and steps[1].skipped is None


def test_a_solution_that_does_not_carry_over_is_not_kept(dense):
    cut = cut_model(dense, SEGMENTS)
    before = copy.deepcopy(cut.state_dict())
    # 20 tokens for 56 features, without a penalty to speak of
    result = solve(dense, cut, [1], train=TRAIN[:1], ridges=[1e-8])
    assert {s.skipped for s in result.steps} == {"the error on the validation rows would not go down"}
    assert all(s.error_after > s.error_before for s in result.steps) and not changed(before, cut)


def test_little_text_takes_a_larger_penalty(dense):
    little, much = cut_model(dense, SEGMENTS), cut_model(dense, SEGMENTS)
    small = solve(dense, little, [1], train=TRAIN[:3], attention=False).steps[0]
    large = solve(dense, much, [1], attention=False).steps[0]
    assert small.ridge > large.ridge and small.skipped is None
    assert large.error_after < small.error_after < small.error_before


def test_bfloat16():
    dense = tiny_model().to(torch.bfloat16)
    cut = cut_model(dense, SEGMENTS)
    result = solve(dense, cut, [1, 2])
    assert cut.dtype == torch.bfloat16 and result.solved == (1, 2)
    assert result.steps[0].module == "mlp.down_proj" and result.steps[0].dtype == "float64"
    assert result.steps[0].error_after < 0.92 * result.steps[0].error_before


def test_wide_projections_are_solved_in_float32_under_a_condition_bound(dense, monkeypatch):
    exact, cut = cut_model(dense, SEGMENTS), cut_model(dense, SEGMENTS)
    expected = solve(dense, exact, [1], attention=False).steps[0]
    monkeypatch.setattr("optimum_clp.closed_form.ridge.MAX_FLOAT64_WIDTH", 8)
    step = solve(dense, cut, [1], attention=False).steps[0]
    assert step.dtype == "float32" and step.error_after == pytest.approx(expected.error_after, rel=1e-3)
    step = solve(dense, cut_model(dense, SEGMENTS), [1], attention=False, ridges=[1e-9]).steps[0]
    assert step.ridge == pytest.approx(56 / 1e6, rel=1e-3) and step.condition_bound == pytest.approx(1e6)


def test_the_condition_number_is_within_its_bound(dense):
    cut = cut_model(dense, SEGMENTS)
    z = states(cut, 1, "mlp.down_proj", TRAIN)[2]
    step = solve(dense, cut, [1], attention=False, ridges=[1e-3]).steps[0]
    gram = z.T @ z
    penalised = gram + 1e-3 * gram.trace() / len(gram) * torch.eye(len(gram))
    assert torch.linalg.cond(penalised) <= step.condition_bound == 1 + 56 / 1e-3


def test_flags_and_mode_are_restored(dense):
    cut = cut_model(dense, SEGMENTS).train()
    cut.model.layers[1].requires_grad_(False)
    flags = [p.requires_grad for p in cut.parameters()]
    solve(dense, cut, [1, 2])
    assert [p.requires_grad for p in cut.parameters()] == flags
    assert all(m.training for m in cut.modules()) and all(p.grad_fn is None for p in cut.parameters())


def test_the_result_is_ready_for_json(dense):
    result = solve(dense, cut_model(dense, SEGMENTS), [1])
    read = json.loads(json.dumps(result.to_dict()))
    assert read["method"] == "least_squares" and read["steps"][0]["module"] == "mlp.down_proj"


def test_mistakes_are_explained(dense):
    cut = cut_model(dense, SEGMENTS)
    with pytest.raises(
        ConfigurationError, match="method is 'lstsq': a closed-form start is one of fold, least_squares"
    ):
        solve(dense, cut, [1], method="lstsq")
    kept, outputs = [0, 1, 4, 5], DenseOutputs(dense, VALIDATION)
    with pytest.raises(ModelError, match="layers is \\[4\\]: the model has layers 0 to 3"):
        solve_endpoints(cut, [4], kept, outputs, outputs, (outputs.hidden[6], outputs.hidden[6]))
    with pytest.raises(
        ModelError, match=r"train.hidden is \[6\].* are \[4\]. Give DenseOutputs\(..., inputs_of=\[4\]\)"
    ):
        solve_endpoints(cut, [1], kept, outputs, outputs, (outputs.hidden[6], outputs.hidden[6]))


def test_hidden_states_that_are_not_finite_are_refused(dense):
    cut = cut_model(dense, SEGMENTS)
    with torch.no_grad():
        dense.model.layers[3].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(ModelError, match="hidden states is (nan|inf): what enters and leaves layer 1 must be finite"):
        solve(dense, cut, [1])


@pytest.mark.parametrize("rows", [2, 24])
def test_the_penalty_is_the_one_that_does_best_alone(dense, rows):
    alone = {}
    for ridge in RIDGES:
        cut = cut_model(dense, SEGMENTS)
        (step,) = solve(dense, cut, [1], train=TRAIN[:rows], ridges=[ridge], attention=False).steps
        alone[step.error_after] = step.ridge
    (step,) = solve(dense, cut_model(dense, SEGMENTS), [1], train=TRAIN[:rows], attention=False).steps
    assert len(alone) == len(RIDGES)
    assert step.ridge == alone[min(alone)] and step.error_after == min(alone)


def test_states_on_disk_and_two_segments_give_the_same(dense, tmp_path):
    segments = [LayerSegment(1, 2), LayerSegment(4, 5)]
    layers = endpoint_layers(segments, 6)
    assert layers == [0, 1, 2, 3]
    together, one_by_one = (cut_model(dense, segments) for _ in range(2))
    solve(dense, together, layers, segments, store=StateStore(tmp_path, 0))
    for index in layers:
        # what enters it is computed anew from the tokens
        solve(dense, one_by_one, [index], segments)
    assert all(torch.equal(a, b) for a, b in zip(together.parameters(), one_by_one.parameters(), strict=True))


def test_what_enters_the_first_layer_is_left_as_it_was(dense):
    cut, layers, kept = cut_model(dense, SEGMENTS), [1, 2], kept_layers(SEGMENTS, 6)
    own_layers(cut, layers)
    wanted = [1, *(target_state(kept, i, 6) for i in layers)]
    outputs = [DenseOutputs(dense, rows, inputs_of=wanted) for rows in (TRAIN, VALIDATION)]
    inputs = tuple(o.hidden[1] for o in outputs)
    before = [states.clone() for states in inputs]
    assert solve_endpoints(cut, layers, kept, *outputs, inputs, quiet=True).solved == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
