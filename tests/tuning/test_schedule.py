"""Stages of a tuning: hidden states first, then the loss that judges the weights of both."""

import math

import pytest
import torch
from tiny_models import random_tokens, tiny_model

from optimum_clp.configuration.stages import TuningConfig
from optimum_clp.errors import ConfigurationError, TuningError
from optimum_clp.forward.dense_outputs import DenseOutputs
from optimum_clp.forward.losses import kl_divergence
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model, own_storage
from optimum_clp.tuning.endpoints import tune_layers
from optimum_clp.tuning.loop import TrainingLoop
from optimum_clp.tuning.schedule import default_learning_rate, measured_learning_rate, stages_of

DENSE = tiny_model()
SETTINGS = {"init": "none", "epochs": 2, "hidden_epochs": 3, "batch_size": 4, "learning_rate": 1e-3, "patience": 99}
TRAIN, VALIDATION = random_tokens(16, 20, seed=1), random_tokens(4, 20, seed=2)


def tuned(folder=None, **settings):
    cut = cut_model(DENSE, [LayerSegment(2, 4)])
    config = TuningConfig(**{**SETTINGS, "hidden_learning_rate": 3e-3, **settings})
    result = tune_layers(cut, DENSE, (1, 2), TRAIN, VALIDATION, config, kept=[0, 1, 4, 5], folder=folder, quiet=True)
    return cut, result


def divergence(model):
    """From the dense model, on the validation rows, as the loss `kd` is defined."""
    outputs = DenseOutputs(DENSE, VALIDATION, quiet=True)
    with torch.no_grad():
        return kl_divergence(outputs.logits(slice(None)), model(VALIDATION).logits).mean().item()


@pytest.fixture(scope="module")
def whole():
    return tuned(checkpoint_seconds=0)


def test_both_stages_are_run_and_judged_by_the_loss_of_the_last(whole):
    cut, result = whole
    assert [(dict(s.loss), s.steps, s.learning_rate) for s in result.stages] == [
        ({"hidden": 1.0}, 24, 3e-3),
        ({"kd": 1.0}, 8, 1e-3),
    ]
    assert [s.num_tokens for s in result.stages] == [24 * 2 * 20, 8 * 4 * 20]
    assert (result.steps, result.num_tokens, result.loss) == (32, 20 * 4 * 20, {"kd": 1.0})
    steps = [entry.step for entry in result.history]
    assert steps == [0, 24, 26, 28, 30, 32]
    # the train loss of hidden states is in another unit, and is left out
    assert [entry.train_loss is not None for entry in result.history] == [s > 24 for s in steps]
    assert result.initial_validation_loss == pytest.approx(
        divergence(cut_model(DENSE, [LayerSegment(2, 4)])), rel=1e-4
    )
    assert result.best_validation_loss == pytest.approx(divergence(cut), rel=1e-4)


def test_the_rate_of_each_stage_rises_and_falls(whole):
    rates = {entry.step: entry.learning_rate for entry in whole[1].history}
    assert rates[26] > rates[28] > rates[30] > rates[32] > 0
    assert rates[24] == pytest.approx(3e-3 * 0.5 * (1 + math.cos(math.pi * 22 / 23)))
    assert rates[24] < rates[26]


def test_in_the_first_stage_nothing_above_the_cut_runs(monkeypatch):
    heads = []
    forward = type(DENSE.lm_head).forward
    step = TrainingLoop._train_step

    def counting(module, x):
        if module.weight.shape[0] == DENSE.config.vocab_size:
            heads.append(x.shape)
        return forward(module, x)

    def watched(loop):
        before, stage = len(heads), loop.state.stage
        done = step(loop)
        seen[stage].append(len(heads) - before)
        return done

    seen = {0: [], 1: []}
    monkeypatch.setattr(type(DENSE.lm_head), "forward", counting)
    monkeypatch.setattr(TrainingLoop, "_train_step", watched)
    tuned()
    assert set(seen[0]) == {0} and min(seen[1]) >= 1


@pytest.mark.parametrize(("stop_at", "rate"), [(5, 3e-3), (23, 3e-3), (24, 3e-3), (25, 3e-3), (31, 3e-3), (5, None)])
def test_a_run_that_fails_in_any_stage_goes_on_to_the_same_weights(tmp_path, stop_at, rate, monkeypatch, whole):
    whole = whole if rate else tuned(checkpoint_seconds=0, hidden_learning_rate=None)
    step = TrainingLoop._train_step

    def failing(loop):
        if loop.state.step == stop_at:
            raise RuntimeError("planted")
        return step(loop)

    monkeypatch.setattr(TrainingLoop, "_train_step", failing)
    with pytest.raises(RuntimeError, match="planted"):
        tuned(tmp_path, checkpoint_seconds=0, hidden_learning_rate=rate)
    monkeypatch.undo()
    resumed, again = tuned(tmp_path, checkpoint_seconds=0, hidden_learning_rate=rate)
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), resumed.parameters(), strict=True))
    assert again == whole[1]


def test_a_stage_that_no_longer_helps_gives_way_to_the_next():
    # a rate at which every step harms: the stage of hidden states ends early, and the other one is run
    _, result = tuned(hidden_epochs=64, hidden_learning_rate=0.3, patience=2, learning_rate=1e-12)
    first, second = result.stages
    assert (first.steps, second.steps) == (256, 4)
    assert (result.stopped, result.best_step) == ("patience", 0)
    assert not result.improved


@pytest.mark.parametrize(("setting", "stages"), [("hidden_learning_rate", 1), ("learning_rate", 2)])
def test_a_loss_that_is_not_finite_names_the_rate_of_its_stage(setting, stages):
    with pytest.raises(TuningError, match=rf"Lower tuning.{setting} \(now 1e\+30\), or check") as error:
        tuned(**{setting: 1e30})
    assert len(error.value.result.stages) == stages and error.value.result.stopped == "nan"


def test_without_hidden_epochs_there_is_one_stage():
    config = TuningConfig(hidden_epochs=0, epochs=3, evaluations_per_epoch=2)
    (stage,) = stages_of(config, 4096, 1024)
    assert (stage.loss, stage.epochs, stage.evaluations) == ({"kd": 1.0}, 3, 6)
    assert stage.learning_rate == default_learning_rate(4096)


def test_a_step_of_hidden_states_has_half_of_the_rows_where_they_can_be_dealt_out():
    def rows(processes=1, **settings):
        return stages_of(TuningConfig(**settings), 64, 1024, processes)[0].batch_size

    assert rows() == 4
    assert rows(4) == 4
    assert rows(8) == 8
    assert rows(2, gradient_accumulation_steps=4) == 8
    assert rows(batch_size=1) == 1
    assert rows(8, hidden_batch_size=16) == 16


def test_a_batch_that_cannot_be_dealt_out_names_its_setting():
    settings = {"gradient_accumulation_steps": 2, "batch_size": 4}
    rule = "a step of 3 rows must be dealt out evenly to 1 processes times 2 accumulation steps"
    with pytest.raises(ConfigurationError, match=f"tuning.hidden_batch_size is 3: {rule}"):
        tuned(hidden_batch_size=3, **settings)
    with pytest.raises(ConfigurationError, match="tuning.batch_size is 5: a step of 5 rows"):
        tuned(**{**settings, "batch_size": 5, "hidden_batch_size": 4})


def test_the_rate_of_hidden_states_is_measured_on_the_first_steps():
    cut, result = tuned(hidden_learning_rate=None)
    # by plain autograd, on what the steps of the first epoch see: 16 rows in batches of 2, of which four count
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    fresh, norm = cut_model(DENSE, [LayerSegment(2, 4)]), DENSE.model.layers[5].input_layernorm
    own_storage(fresh)

    def distance(ours, theirs):
        return ((ours - theirs).square().sum(-1) / theirs.square().sum(-1)).mean()

    losses, slopes = [], []
    for rows in order.split(2)[:4]:
        ours, theirs = (
            model(TRAIN[rows], output_hidden_states=True).hidden_states[index]
            for model, index in ((fresh, 3), (DENSE, 5))
        )
        loss = (distance(ours, theirs.detach()) + distance(norm(ours), norm(theirs).detach())) / 2
        trained = [p for i in (1, 2) for p in fresh.model.layers[i].parameters()]
        slopes.append(sum(g.abs().sum().item() for g in torch.autograd.grad(loss, trained)))
        losses.append(loss.item())
    # three passes are 24 steps of the 300 that take the whole rate
    expected = 3 * sum(losses) / sum(slopes) * math.sqrt(24 / 300)
    assert result.stages[0].learning_rate == pytest.approx(expected, rel=1e-3)
    again, _ = tuned(hidden_learning_rate=None)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), cut.parameters(), strict=True))


def test_few_steps_take_a_lower_rate():
    assert measured_learning_rate(0.5, 100, 300) == measured_learning_rate(0.5, 100, 9999) == pytest.approx(0.015)
    assert measured_learning_rate(0.5, 100, 75) == pytest.approx(0.0075)
    assert measured_learning_rate(0.0, 0.0, 300) == 0


def test_where_there_is_nothing_to_measure_the_rate_is_that_of_the_last_stage():
    whole = DENSE.__class__(DENSE.config)
    whole.load_state_dict(DENSE.state_dict())
    config = TuningConfig(**{**SETTINGS, "learning_rate": 1e-4})
    result = tune_layers(whole.eval(), DENSE, (1, 2), TRAIN, VALIDATION, config, kept=range(6), quiet=True)
    assert [stage.learning_rate for stage in result.stages] == [1e-4, 1e-4]
    assert result.stopped in ("finished", "patience")
