import copy
import math

import pytest
import torch
from tiny_models import random_tokens, tiny_model

from optimum_clp.architecture.lookup import decoder_layers
from optimum_clp.configuration.stages import TuningConfig
from optimum_clp.errors import ConfigurationError, ModelError, TuningError
from optimum_clp.evaluation.live_memory import LiveTensorBytes
from optimum_clp.evaluation.tokens import evaluate_tokens
from optimum_clp.forward.dense_outputs import DenseOutputs
from optimum_clp.forward.losses import kl_divergence
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model
from optimum_clp.tuning import starts
from optimum_clp.tuning.endpoints import tune_layers
from optimum_clp.tuning.schedule import default_learning_rate
from optimum_clp.tuning.student import EndpointStudent

SEGMENTS = [LayerSegment(2, 4)]


def settings(**overrides):
    return TuningConfig(
        **{"init": "none", "hidden_epochs": 0, "epochs": 3, "batch_size": 4, "learning_rate": 3e-3, **overrides}
    )


def tuned(model, config, *, layers=(1, 2), seed=0, dense=None):
    result = tune_layers(
        model,
        dense or tiny_model(dtype=model.dtype),
        layers,
        random_tokens(16, 20, seed=1),
        random_tokens(4, 20, seed=2),
        config,
        seed=seed,
        quiet=True,
    )
    return result


@pytest.fixture
def dense():
    return tiny_model()


@pytest.mark.parametrize("loss", ["kd", "ce", {"kd": 0.7, "ce": 0.3}], ids=str)
def test_only_the_endpoints_change(dense, loss):
    cut = cut_model(dense, SEGMENTS)
    before, dense_before = copy.deepcopy(cut.state_dict()), copy.deepcopy(dense.state_dict())
    result = tuned(cut, settings(loss=loss), dense=dense)
    assert result.improved and result.best_validation_loss < result.initial_validation_loss
    for name, tensor in cut.state_dict().items():
        inside = name.startswith(("model.layers.1.", "model.layers.2."))
        assert torch.equal(tensor, before[name]) != inside, name
    assert all(torch.equal(t, dense_before[n]) for n, t in dense.state_dict().items())
    assert result.num_trainable == 2 * sum(p.numel() for p in dense.model.layers[0].parameters())


def test_recovery_brings_the_model_closer_to_the_dense_one(dense):
    cut, test = cut_model(dense, SEGMENTS), random_tokens(8, 20, seed=5)
    reference = DenseOutputs(dense, test)
    before = evaluate_tokens(cut, test, reference=reference).kl
    tuned(cut, settings(epochs=8), dense=dense)
    assert evaluate_tokens(cut, test, reference=reference).kl < 0.9 * before


def test_the_reported_losses_are_those_of_the_model(dense):
    cut, rows = cut_model(dense, SEGMENTS), random_tokens(4, 20, seed=2)

    def loss():
        with torch.no_grad():
            return kl_divergence(dense(rows).logits, cut(rows).logits).mean().item()

    before = loss()
    result = tuned(cut, settings(), dense=dense)
    assert result.initial_validation_loss == pytest.approx(before, rel=1e-4)
    assert result.best_validation_loss == pytest.approx(loss(), rel=1e-4)
    assert result.best_validation_loss == min(h.validation_loss for h in result.history)
    assert result.history[0].step == 0 and result.num_tokens == result.steps * 4 * 20


def test_a_step_equals_plain_adamw_over_the_whole_model(dense):
    """One step through the cached hidden states against one step of ordinary training."""
    config = settings(epochs=1, batch_size=16, warmup_ratio=0.0, evaluations_per_epoch=1, loss="ce")
    cut = cut_model(dense, SEGMENTS)
    plain = copy.deepcopy(cut)
    tuned(cut, config, dense=dense)
    plain.requires_grad_(False)
    parameters = [p for i in (1, 2) for p in plain.model.layers[i].parameters()]
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0)
    rows = random_tokens(16, 20, seed=1)
    plain(rows, labels=rows).loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    for a, b in zip(cut.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_flags_mode_and_dtype_are_restored(dense):
    cut = cut_model(dense, SEGMENTS).train()
    cut.model.embed_tokens.requires_grad_(False)
    flags = [p.requires_grad for p in cut.parameters()]
    tuned(cut, settings(epochs=1), dense=dense)
    assert [p.requires_grad for p in cut.parameters()] == flags
    assert all(m.training for m in cut.modules())
    assert all(p.grad is None for p in cut.parameters()) and cut.dtype == torch.float32


def test_untuned_weights_stay_if_validation_does_not_improve(dense):
    cut = cut_model(dense, SEGMENTS)
    before = copy.deepcopy(cut.state_dict())
    result = tuned(cut, settings(learning_rate=5.0, max_grad_norm=1e6, patience=2), dense=dense)
    assert not result.improved and result.best_step == 0 and result.stopped == "patience"
    assert result.best_validation_loss == result.initial_validation_loss
    assert all(torch.equal(t, before[n]) for n, t in cut.state_dict().items())


def test_master_weights_keep_steps_that_bfloat16_would_lose():
    dense = tiny_model().to(torch.bfloat16)
    cut = cut_model(dense, SEGMENTS)
    before = cut.model.layers[1].mlp.up_proj.weight.float().clone()
    # steps of 2e-5 vanish against bfloat16 weights of 0.15; over 48 of them the float32 masters move enough to show
    result = tuned(cut, settings(epochs=12, learning_rate=2e-5, patience=99), dense=dense)
    assert cut.dtype == torch.bfloat16
    assert result.steps == 48 and result.improved
    assert (cut.model.layers[1].mlp.up_proj.weight.float() != before).float().mean() > 0.02


def test_the_same_seed_gives_the_same_weights(dense):
    first, second = cut_model(dense, SEGMENTS), cut_model(dense, SEGMENTS)
    assert tuned(first, settings(), dense=dense, seed=4) == tuned(second, settings(), dense=dense, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_loss_that_is_not_finite_keeps_the_last_good_weights(dense, monkeypatch):
    cut = cut_model(dense, SEGMENTS)
    calls = []

    def planted(teacher, student, *args):
        calls.append(1)
        return kl_divergence(teacher, student) * (math.nan if len(calls) == 8 else 1.0)

    monkeypatch.setattr("optimum_clp.tuning.losses.kl_divergence", planted)
    with pytest.raises(TuningError) as error:
        tuned(cut, settings(), dense=dense)
    text = str(error.value)
    assert "tuning loss is nan: it must stay finite, and at step " in text
    assert "were kept. Lower tuning.learning_rate (now 0.003)" in text
    result = error.value.result
    assert result.stopped == "nan"
    assert all(p.isfinite().all() for p in cut.parameters())
    monkeypatch.undo()
    rows = random_tokens(4, 20, seed=2)
    with torch.no_grad():
        loss = kl_divergence(dense(rows).logits, cut(rows).logits).mean().item()
    assert loss == pytest.approx(result.best_validation_loss, rel=1e-4)


def test_a_second_tuning_starts_from_the_models_own_lower_layers(dense):
    cut, rows = cut_model(dense, SEGMENTS), random_tokens(4, 20, seed=2)
    tuned(cut, settings(), dense=dense, layers=(0, 1, 2, 3))
    with torch.no_grad():
        expected = kl_divergence(dense(rows).logits, cut(rows).logits).mean().item()
    again = tuned(cut, settings(epochs=1), dense=dense, layers=(1, 2))
    assert again.initial_validation_loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("segment", "layers"), [((0, 2), (0,)), ((4, 6), (3,))])
def test_segments_at_the_ends_have_one_endpoint(dense, segment, layers):
    cut = cut_model(dense, [LayerSegment(*segment)])
    assert tuned(cut, settings(), dense=dense, layers=layers).improved
    assert len(decoder_layers(cut)) == 4


def test_layers_outside_the_model_are_refused(dense):
    with pytest.raises(ModelError, match="the model has layers 0 to 3"):
        tuned(cut_model(dense, SEGMENTS), settings(), dense=dense, layers=(3, 4))


def test_wider_models_take_smaller_steps():
    assert default_learning_rate(128) == pytest.approx(7.8e-4, rel=0.01)
    assert default_learning_rate(4096) == pytest.approx(2.4e-5, rel=0.02)


@pytest.mark.parametrize("loss", ["hidden", {"kd": 0.5, "hidden": 0.5}], ids=str)
def test_hidden_states_are_matched_behind_the_trained_layers(dense, loss):
    weight = dense.model.layers[5].input_layernorm.weight
    weight.data.copy_(torch.linspace(0.1, 3, len(weight)))
    cut = cut_model(dense, SEGMENTS)
    rows = random_tokens(4, 20, seed=2)

    def entering(model, index):
        """The states that enter the dense layer 5, whole models; and what its norm makes of them."""
        with torch.no_grad():
            states = model(rows, output_hidden_states=True).hidden_states[index].double()
        return states, weight.detach() * states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def error():
        """Of each: its squared distance over the square of its length; the mean of both."""
        pairs = zip(entering(cut, 3), entering(dense, 5), strict=True)
        return sum(((o - t).norm(dim=-1) / t.norm(dim=-1)).square().mean().item() for o, t in pairs) / 2

    before = error()
    result = tune_layers(
        cut,
        dense,
        (1, 2),
        random_tokens(16, 20, seed=1),
        rows,
        settings(loss=loss, epochs=8),
        kept=[0, 1, 4, 5],
        quiet=True,
    )
    assert error() < 0.9 * before
    if loss == "hidden":
        assert result.initial_validation_loss == pytest.approx(before, rel=1e-3)
        assert result.best_validation_loss == pytest.approx(error(), rel=1e-3)


def test_hidden_states_alone_need_no_pass_beyond_the_last_trained_layer(dense):
    cut, calls = cut_model(dense, SEGMENTS), []
    handle = cut.model.layers[3].mlp.register_forward_hook(lambda *args: calls.append(1))
    rows = random_tokens(8, 20, seed=1), random_tokens(4, 20, seed=2)
    # what LayerStack looks at once is a pass of one token
    tune_layers(cut, dense, (1, 2), *rows, settings(loss="hidden", epochs=1), kept=[0, 1, 4, 5], quiet=True)
    handle.remove()
    assert len(calls) <= 2


def test_what_compares_layers_needs_their_numbers(dense):
    with pytest.raises(ConfigurationError) as error:
        tuned(cut_model(dense, SEGMENTS), settings(loss="hidden"), dense=dense)
    assert str(error.value) == (
        "kept is None: 'hidden' compares with the dense model's layers, and which they are is not given. "
        "Give the dense model's index of each layer of the model."
    )


@pytest.mark.parametrize("extra", [{"train_final_norm": True}, {"train_head": True}], ids=str)
def test_final_norm_and_head_are_trained_if_asked(dense, extra):
    cut = cut_model(dense, SEGMENTS)
    before, dense_before = copy.deepcopy(cut.state_dict()), copy.deepcopy(dense.state_dict())
    result = tuned(cut, settings(**extra), dense=dense)
    name = "model.norm" if "train_final_norm" in extra else "lm_head"
    assert result.modules == (name,)
    changed = {n.rsplit(".", 1)[0] for n, t in cut.state_dict().items() if not torch.equal(t, before[n])}
    assert {n for n in changed if ".layers." not in n} == {name}
    assert all(torch.equal(t, dense_before[n]) for n, t in dense.state_dict().items())


def test_a_tied_head_is_not_trained():
    dense = tiny_model(tie_word_embeddings=True)
    with pytest.raises(ConfigurationError) as error:
        tuned(cut_model(dense, SEGMENTS), settings(train_head=True), dense=dense)
    assert str(error.value) == (
        "tuning.train_head is True: the head is tied to the embedding, which is below the layers that are trained. "
        "Leave it out, or untie the model."
    )


def test_states_on_disk_train_the_same_weights(dense, tmp_path):
    first, second = cut_model(dense, SEGMENTS), cut_model(dense, SEGMENTS)
    tuned(first, settings(), dense=dense)
    tuned(second, settings(cache_memory_gib=0), dense=dense)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("init", ["fold", "least_squares"])
def test_a_closed_form_start_comes_before_the_first_step(dense, init):
    cut = cut_model(dense, SEGMENTS)
    rows = random_tokens(64, 20, seed=1), random_tokens(16, 20, seed=2)
    result = tune_layers(cut, dense, (1, 2), *rows, settings(init=init), kept=[0, 1, 4, 5], quiet=True)
    assert result.init["method"] == init
    first = result.history[0].validation_loss
    assert result.initial_validation_loss == result.init["loss_before"]
    assert first == pytest.approx(result.init["loss_after"] if result.init["kept"] else result.init["loss_before"])
    assert result.init["kept"] == (result.init["loss_after"] < result.init["loss_before"])


def test_a_closed_form_start_that_does_not_help_is_dropped(dense, monkeypatch):
    cut = cut_model(dense, SEGMENTS)
    solve = starts.solve_endpoints

    def harmful(model, *arguments, **options):
        result = solve(model, *arguments, **options)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(-3)
        return result

    monkeypatch.setattr(starts, "solve_endpoints", harmful)
    rows = random_tokens(16, 20, seed=1), random_tokens(4, 20, seed=2)
    result = tune_layers(
        cut,
        dense,
        (1, 2),
        *rows,
        settings(init="least_squares", learning_rate=5.0, patience=1),
        kept=[0, 1, 4, 5],
        quiet=True,
    )
    assert not result.init["kept"] and not result.improved
    assert all(
        torch.equal(a, b) for a, b in zip(cut.parameters(), cut_model(dense, SEGMENTS).parameters(), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["none", "least_squares"])
def test_memory_is_four_copies_of_the_endpoints_and_one_step_above_a_dense_pass(dtype, init):
    """Dense pass, four float32 copies of the endpoints, caches, and what a step from the first endpoint on holds."""
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_layers": 8, "max_position_embeddings": 64}
    dense = tiny_model(dtype=dtype, **shape)
    cut = cut_model(dense, [LayerSegment(4, 6)])
    train, validation = random_tokens(16, 24, seed=1), random_tokens(4, 24, seed=2)
    with LiveTensorBytes(dense) as plain, torch.no_grad():
        dense(train[:4], use_cache=False)
    endpoints = sum(p.numel() for i in (3, 4) for p in cut.model.layers[i].parameters())
    largest = 64 * 256
    states = 4 if init != "none" else 2
    caches = 20 * 24 * (states * 64 * dtype.itemsize + 8)
    # a forward pass of the step alone: student's and teacher's logits, and the activations that it keeps
    copied = copy.deepcopy(cut).requires_grad_(False)
    for i in (3, 4):
        copied.model.layers[i].requires_grad_(True)
    hidden = torch.randn(4, 24, 64, dtype=dtype)
    with torch.no_grad():
        logits = dense(train[:4], use_cache=False).logits
    student = EndpointStudent(copied, [copied.model.layers[i] for i in (3, 4)], 3, {"kd": 1.0})
    with LiveTensorBytes() as step:
        loss = student(train[:4], hidden, logits, {}).mean()
    above = step.peak + logits.nbytes + hidden.nbytes
    del loss
    with LiveTensorBytes(dense) as tuning:
        tune_layers(
            cut, dense, (3, 4), train, validation, settings(init=init, epochs=2), kept=[0, 1, 2, 3, 6, 7], quiet=True
        )
    allowed = plain.peak + 4 * 4 * endpoints + caches + above + 4 * largest
    assert tuning.peak <= allowed
    assert tuning.peak > plain.peak + 3 * 4 * endpoints  # and the counter sees the optimizer
