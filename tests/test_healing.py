"""Healing within a time budget, with a tuning whose pace and outcome are known."""

import copy
import dataclasses
import json

import pytest
import torch
from notices import notice
from tiny_models import random_tokens, tiny_model

from optimum_clp import healing
from optimum_clp.calibration.rows import CalibrationData
from optimum_clp.configuration.clp_config import CLPConfig
from optimum_clp.healing import Healing, Pace
from optimum_clp.pruner import CLPPruner
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model
from optimum_clp.tuning.recipe import tune_by_recipe

LENGTH = 20


class Clock:
    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class Workshop:
    """Writes a row in a second and tunes on it in two; the loss is a known power of the tokens.

    Args:
        once: Seconds that every tuning takes beside.
        writing: Seconds for a row after the first 200.
    """

    def __init__(self, monkeypatch, folder=None, once=0.0, writing=1.0):
        self.clock, self.calls, self.folder = Clock(), [], folder
        self.once, self.writing = once, writing
        monkeypatch.setattr(healing, "time", self.clock)
        self.dense = tiny_model()
        self.cut = cut_model(self.dense, [LayerSegment(2, 4)])
        config = CLPConfig(tuning={"epochs": 1, "init": "none", "batch_size": 4}, calibration={"sequence_length": 8})
        self.data = CalibrationData(random_tokens(8, LENGTH, seed=1), random_tokens(2, LENGTH, seed=2),
                                    random_tokens(2, LENGTH, seed=3), "text")  # fmt: skip
        self.some = tune_by_recipe(
            copy.deepcopy(self.cut), self.dense, [LayerSegment(2, 4)], self.data, config, quiet=True
        )
        self.written = 0

    def text(self, rows):
        self.clock.now += sum(1.0 if row < 200 else self.writing for row in range(self.written, rows))
        self.written = max(self.written, rows)
        return dataclasses.replace(self.data, train=random_tokens(rows, LENGTH, seed=1))

    def tune(self, data, folder):
        rows = len(data.train)
        self.calls.append((rows, [p.detach().clone() for p in self.cut.model.layers[1].parameters()], folder))
        self.clock.now += self.once + 2.0 * rows
        with torch.no_grad():
            for parameter in self.cut.model.layers[1].parameters():
                parameter.add_(1.0)
        return dataclasses.replace(self.some, best_validation_loss=loss_of(rows * LENGTH), cache_seconds=0.0)

    def heal(self, seconds):
        made = Healing(self.cut, [1, 2], self.text, self.tune, batch_size=8, folder=self.folder)
        return made.run(lambda: seconds - self.clock.now)


def loss_of(tokens):
    return 0.1 + 0.4 * (tokens / 320) ** -0.3


def test_the_rest_of_the_time_buys_text(monkeypatch):
    workshop = Workshop(monkeypatch)
    result = workshop.heal(3000)
    rows = [rows for rows, *_ in workshop.calls]
    assert rows[:-1] == [16, 32, 64, 128]
    assert rows[-1] % 8 == 0
    # all that was planned fits, and most of the time is used
    assert 0.9 * 3000 < workshop.clock.now <= 3000
    assert [pilot.num_tokens for pilot in result.forecast.pilots] == [320, 640, 1280, 2560]
    planned, more = result.forecast.predictions
    assert (planned.num_tokens, more.num_tokens) == (LENGTH * rows[-1], 10 * LENGTH * rows[-1])
    assert planned.loss == pytest.approx(loss_of(planned.num_tokens), rel=0.1)
    assert planned.low <= loss_of(planned.num_tokens) <= planned.high


@pytest.mark.parametrize(("once", "writing"), [(40.0, 1.0), (0.0, 4.0), (40.0, 0.0), (20.0, 3.0)])
def test_what_a_tuning_takes_once_and_text_at_another_pace(monkeypatch, once, writing):
    workshop = Workshop(monkeypatch, once=once, writing=writing)
    workshop.heal(3000)
    assert 0.85 * 3000 < workshop.clock.now <= 3000


def test_a_text_that_comes_to_its_end(monkeypatch):
    workshop, asked = Workshop(monkeypatch), []
    text = workshop.text

    def short(rows):
        asked.append(rows)
        return text(min(rows, 300))

    workshop.text = short
    workshop.heal(3000)
    assert workshop.calls[-1][0] == 296  # whole batches
    assert sum(rows > 300 for rows in asked) == 1


def test_pace():
    found = [{"rows": rows, "seconds": 7 + 0.25 * rows} for rows in (16, 32, 64)]
    pace = Pace.of(found)
    assert (pace.once, pace.each_row) == pytest.approx((7, 0.25))
    assert pace.rows(pace.seconds(100)) == pytest.approx(100)
    assert Pace.of(found[:1]).seconds(32) == pytest.approx(2 * 11)
    # the first one warms up: no line through these has a slope
    assert Pace.of([{"rows": 16, "seconds": 9.0}, {"rows": 32, "seconds": 8.0}]).seconds(64) == pytest.approx(16)


def test_every_pilot_and_the_healing_start_from_the_same_weights(monkeypatch):
    workshop = Workshop(monkeypatch)
    before = [p.detach().clone() for p in workshop.cut.model.layers[1].parameters()]
    versions = [p._version for p in workshop.dense.parameters()]
    workshop.heal(3000)
    # this tuning writes in place, and nothing of the dense model is written, not even what it has
    assert [p._version for p in workshop.dense.parameters()] == versions
    for _, weights, _ in workshop.calls:
        assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_pilots_take_a_small_part_of_the_time(monkeypatch):
    workshop = Workshop(monkeypatch)
    result = workshop.heal(700)
    rows = [rows for rows, *_ in workshop.calls]
    assert rows[:-1] == [16, 32] and result.forecast is None
    assert workshop.clock.now <= 700


def test_a_budget_that_is_too_short_keeps_what_a_pilot_reached(monkeypatch):
    workshop = Workshop(monkeypatch)
    with notice(r"budget: \d+ s of it are left, too little for more text: what a first try on"):
        workshop.heal(10)
    assert [rows for rows, *_ in workshop.calls] == [16, 16]


def test_a_budget_that_the_search_has_used_up_is_said_before_a_last_try(monkeypatch):
    workshop = Workshop(monkeypatch)
    with notice("budget: the search has used it up"), notice("budget: 0 s of it are left"):
        workshop.heal(-5)
    assert [rows for rows, *_ in workshop.calls] == [16, 16]


def test_an_interrupted_healing_goes_on_with_its_plan(monkeypatch, tmp_path):
    whole = Workshop(monkeypatch, tmp_path / "whole")
    whole.heal(3000)
    workshop = Workshop(monkeypatch, tmp_path / "part")
    tune = workshop.tune

    def failing(data, folder):
        if len(data.train) == 64:
            raise KeyboardInterrupt
        return tune(data, folder)

    workshop.tune = failing
    with pytest.raises(KeyboardInterrupt):
        workshop.heal(3000)
    again = Workshop(monkeypatch, tmp_path / "part")
    again.written = 32
    again.clock.now = 1e6  # the clock of another day: what was planned on holds
    again.heal(3000)
    assert [rows for rows, *_ in again.calls] == [64, 128, whole.calls[-1][0]]


def test_every_process_of_a_group_plans_as_the_first_one(monkeypatch):
    first, said = Workshop(monkeypatch), []
    monkeypatch.setattr(healing, "gathered", lambda value: [said.append(value) or value])
    first.heal(3000)
    # another one, which has hardly any time left and works at another pace
    other, answers = Workshop(monkeypatch), iter(said)
    monkeypatch.setattr(healing, "gathered", lambda value: [next(answers), value])
    other.clock.now = 2900
    other.heal(3000)
    assert [rows for rows, *_ in other.calls] == [rows for rows, *_ in first.calls]


def test_the_text_before_there_is_a_plan_and_without_tuning(tmp_path):
    def rows(**changes):
        text = {"sequence_length": 16, "train_sequences": 40, "validation_sequences": 2, "test_sequences": 2,
                "cache_dir": str(tmp_path)}  # fmt: skip
        recipe = {"quantization": {"calibration_sequences": 12}, "search": {"num_sequences": 9}, **changes}
        config = CLPConfig(pruning_ratio=0.34, calibration=text, **recipe)
        return len(CLPPruner(tiny_model(), config=config, quiet=True)._session.calibration().train)

    # what search and rounding look at
    assert rows(budget="1h") == 12
    assert rows(budget="1h", search={"num_sequences": 14}) == 14
    assert rows() == rows(budget="1h", tuning={"enabled": False}) == 40


def test_prune_keeps_to_a_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(healing, "PILOT_ROWS", (4, 8, 16))
    monkeypatch.setattr(healing, "_PILOTS_SHARE", 0.9)
    dense = tiny_model()
    config = CLPConfig(
        pruning_ratio=0.34,
        budget="20s",
        calibration={"sequence_length": 16, "validation_sequences": 4, "test_sequences": 4, "cache_dir": str(tmp_path),
                     "generation_batch_size": 16},
        search={"num_sequences": 4},
        tuning={"batch_size": 4, "epochs": 1, "hidden_epochs": 1, "init": "none"},
        export={"enabled": False},
    )  # fmt: skip
    pruner = CLPPruner(dense, config=config, quiet=True)
    pruner.prune()
    tuning = json.loads(json.dumps(pruner.report.to_dict()))["tuning"]
    assert [pilot["num_tokens"] for pilot in tuning["forecast"]["pilots"]] == [64, 128, 256]
    assert len(pruner.report.tuning["stages"]) == 2
    assert pruner.report.calibration["train_sequences"] >= 16
    assert not list((tmp_path / "optimum_clp").glob("tuning-*"))
    assert pruner._session._deadline is None


def test_tokens_instead_of_rows(tmp_path):
    config = CLPConfig(
        pruning_ratio=0.34,
        calibration={
            "sequence_length": 16,
            "validation_sequences": 4,
            "test_sequences": 4,
            "cache_dir": str(tmp_path),
        },
        tuning={"tokens": 160},
    )
    pruner = CLPPruner(tiny_model(), config=config, quiet=True)
    assert pruner._session.calibration().train.shape == (10, 16)
