"""Rounds in which the cut model learns from what it writes itself."""

import dataclasses
import itertools
import json

import pytest
import torch
from chat_templates import chat_tokenizer
from tiny_models import tiny_model

from optimum_clp import on_policy
from optimum_clp.calibration.practice import OWN
from optimum_clp.calibration.splits import TextRows
from optimum_clp.configuration.clp_config import CLPConfig
from optimum_clp.on_policy import without_loops
from optimum_clp.pruner import CLPPruner
from optimum_clp.segments import LayerSegment

TEXT = {"sequence_length": 160, "train_sequences": 24, "validation_sequences": 4, "test_sequences": 4,
        "generation_batch_size": 8}  # fmt: skip


def pruner_of(tmp_path, rounds=2, **tuning):
    torch.manual_seed(1)
    tokenizer = chat_tokenizer()
    dense = tiny_model(vocab_size=len(tokenizer))
    tuning = {"init": "none", "epochs": 1, "hidden_epochs": 2, "batch_size": 4, "learning_rate": 1e-3,
              "on_policy_rounds": rounds, "on_policy_sequences": 16, **tuning}  # fmt: skip
    config = CLPConfig(
        calibration={**TEXT, "cache_dir": str(tmp_path)}, tuning=tuning, seed=3, export={"enabled": False}
    )
    pruner = CLPPruner(dense, tokenizer, config=config, quiet=True)
    pruner.cut([LayerSegment(2, 4)])
    return pruner


@pytest.fixture
def learnt(monkeypatch):
    """What each round is given: train rows, validation rows and the recipe."""
    calls, tune = [], on_policy.tune_layers

    def watched(model, dense, layers, train, validation, config, **options):
        before = [p.detach().clone() for p in model.parameters()]
        result = tune(model, dense, layers, train, validation, config, **options)
        calls.append((train, validation, config, options, before, result))
        return result

    monkeypatch.setattr(on_policy, "tune_layers", watched)
    return calls


def test_half_of_a_rounds_rows_are_the_models_own(tmp_path, learnt):
    pruner = pruner_of(tmp_path, rounds=1)
    pruner.tune()
    data = pruner._session.calibration()
    (train, validation, config, options, _, result) = learnt[0]
    assert (len(train), len(validation)) == (32, 2 + 4)
    assert torch.equal(train[16:], data.train[:16]) and torch.equal(validation[2:], data.validation)
    assert options["validation_kinds"] == (OWN,) * 2 + data.validation_kinds
    masks = options["masks"]
    assert masks[0][16:].all() and masks[1][2:].all()
    # questions do not count, answers do
    assert 0 < masks[0][:16].sum() < masks[0][:16].numel()
    assert (config.loss, config.epochs, config.hidden_epochs, config.init) == ("jsd", 1, 0, "none")
    report = json.loads(json.dumps(pruner.report.to_dict()))["tuning"]["on_policy"]
    kept = next(step for step in result.history if step.step == result.best_step)
    assert report[0]["num_tokens"] == int(masks[0][:16].sum())
    assert report[0]["own_loss_before"] == result.history[0].by_kind[OWN]
    assert report[0]["own_loss"] == kept.by_kind[OWN] and report[0]["improved"] is result.improved


def test_every_round_writes_with_the_weights_that_the_one_before_left(tmp_path, learnt):
    pruner = pruner_of(tmp_path)
    pruner.tune()
    assert len(learnt) == 2 and learnt[0][5].improved
    own = [train[:16] for train, *_ in learnt]
    assert not torch.equal(*own)
    # the second one begins from what the first one kept, and learns from other given rows
    assert any(not torch.equal(a, b) for a, b in zip(learnt[0][4], learnt[1][4], strict=True))
    data = pruner._session.calibration()
    assert torch.equal(learnt[1][0][16:], torch.cat([data.train[16:], data.train[:8]]))


def test_a_round_that_does_not_help_is_the_last_and_leaves_no_trace(tmp_path, learnt):
    pruner = pruner_of(tmp_path, rounds=5, learning_rate=1e-12)
    pruner.tune()
    assert len(learnt) == len(pruner.report.tuning["on_policy"])
    improved = [call[5].improved for call in learnt]
    assert all(improved[:-1]) and (len(learnt) == 5 or not improved[-1])
    if not improved[-1]:
        now = list(pruner.pruned_model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(learnt[-1][4], now, strict=True))


def test_a_base_model_is_judged_on_other_text_than_it_learns_from(tmp_path, learnt):
    pruner = pruner_of(tmp_path)
    pruner.tokenizer.chat_template = None
    pruner.tune()
    assert learnt
    for train, validation, *_ in learnt:
        rows = {tuple(row) for row in train[:16].tolist()}
        assert len(rows) == 16 and not rows & {tuple(row) for row in validation[:2].tolist()}


def test_without_rounds_nothing_is_written(tmp_path, learnt):
    pruner = pruner_of(tmp_path, rounds=0)
    pruner.tune()
    assert not learnt and "on_policy" not in pruner.report.tuning


def test_under_a_budget_no_round_begins_that_would_not_end_in_time(tmp_path, learnt, monkeypatch):
    pruner = pruner_of(tmp_path, rounds=5)
    session, left = pruner._session, itertools.repeat(1e-9)
    rounds = on_policy.practise(session, session.calibration(), None, lambda: next(left))
    # the first one is always run; the second would need as long as it
    assert len(rounds) == len(learnt) == 1


def test_a_run_that_was_interrupted_in_a_round_ends_with_the_same_weights(tmp_path, monkeypatch):
    whole = pruner_of(tmp_path / "whole")
    whole.tune()
    tune, calls = on_policy.tune_layers, []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return tune(*args, **options)

    monkeypatch.setattr(on_policy, "tune_layers", failing)
    with pytest.raises(KeyboardInterrupt):
        pruner_of(tmp_path / "part").tune()
    again = pruner_of(tmp_path / "part")
    again.tune()
    pairs = zip(whole.pruned_model.parameters(), again.pruned_model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert again.report.tuning["on_policy"][0]["own_loss"] == whole.report.tuning["on_policy"][0]["own_loss"]


def test_what_goes_round_in_a_loop_does_not_count():
    words = list(range(100, 140))
    looping = [*words, *[7, 8] * 40, *words]
    rows = torch.tensor([looping, list(range(160))])
    mask = torch.ones_like(rows, dtype=torch.bool)
    mask[0, :5] = mask[0, -20:] = False
    found = without_loops(TextRows(rows, (OWN,) * 2, mask)).mask
    assert found[1].all() and not found[0, :5].any()
    # a tenth of the first 64 tokens of a loop may be something else
    assert found[0, 5:44].all() and not found[0, 52:].any()
    # two answers are looked at apart: neither is long enough for a loop
    mask = torch.ones(1, 160, dtype=torch.bool)
    mask[0, 80] = False
    parted = torch.tensor([[*words, *[7, 8] * 40, *words]])
    assert without_loops(TextRows(parted, (OWN,), mask)).mask.sum() == 159
    assert without_loops(dataclasses.replace(TextRows(parted, (OWN,)), mask=None)).mask.sum() < 159
