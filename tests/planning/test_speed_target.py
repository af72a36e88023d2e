"""What is chosen for a speed target, against a line written out; and a run whose times are made up."""

import json

import pytest
import torch
from tiny_models import tiny_config, tiny_model

from optimum_clp import CLPConfig, CLPPruner, output_folder, plan_pruning
from optimum_clp.commands.clp import main
from optimum_clp.errors import ConfigurationError, ModelError
from optimum_clp.exporters.result import MeasuredForm, SpeedChoice
from optimum_clp.planning import plan as plan_module
from optimum_clp.planning import speed_target as module
from optimum_clp.planning.plan import build_on_meta
from optimum_clp.planning.speed import LayerTimes, Times
from optimum_clp.planning.speed_target import aim, speed_target

# a token takes 4 ms and 1 for each of 6 layers: 100 tokens per second of the dense model
TIMES = LayerTimes(0.004, 0.001, 6, 2)
PLAIN, WIDE = MeasuredForm(32, 4, 4, 1.0, 1.0, 1.0), MeasuredForm(64, 4, 4, 1.1, 1.2, 1.05)
CHOICE = SpeedChoice(**vars(WIDE), threads=2, measured=(PLAIN, WIDE))


def target_of(speed, **settings):
    return speed_target(tiny_config(num_layers=6), CLPConfig(target_tokens_per_second=speed, **settings), TIMES)


@pytest.mark.parametrize(("speed", "removed"), [(101, 1), (111, 1), (112, 2), (140, 3), (166, 4), (199, 5), (200, 5)])
def test_the_fewest_layers_go_that_make_it_fast_enough(speed, removed):
    found = target_of(speed)
    assert found.num_removed == removed
    assert found.tokens_per_second == pytest.approx(1000 / (10 - removed)) and found.tokens_per_second >= speed - 1e-6
    assert removed == 1 or 1000 / (10 - removed + 1) < speed
    assert (found.dense_tokens_per_second, found.threads) == (pytest.approx(100), 2)


def test_a_target_that_is_too_high_or_too_low_names_the_nearest():
    rule = "without 5 of 6 layers, the most that can go, the int4 file is slower on this machine"
    with pytest.raises(ConfigurationError, match=f"target_tokens_per_second is 201: {rule}. The most .* is 199.9"):
        target_of(201)
    rule = "the int4 file of the whole model decodes 100 tokens per second on this machine. Without 1 of 6 layers"
    with pytest.raises(
        ConfigurationError, match=f"target_tokens_per_second is 90: {rule}.*is 111.1: give more than 100"
    ):
        target_of(90)


def test_only_layers_that_can_go_are_counted_on(monkeypatch):
    plain = module.allowed_segments

    def allowed(config, length):
        if length % 2:
            raise ModelError.of("num_removed", length, "they come in pairs", "Remove 2")
        return plain(config, length)

    monkeypatch.setattr(module, "allowed_segments", allowed)
    assert target_of(101).num_removed == 2 and target_of(130).num_removed == 4
    assert target_of(101, num_segments=2).num_removed == 1


def test_of_a_size_and_a_speed_the_tighter_one_decides():
    dense = build_on_meta(tiny_config(num_layers=6), torch.float32)
    sizes = [aim(dense, CLPConfig(target_size_mb=mb), None).size.num_removed for mb in (0.06, 0.08)]
    assert sizes[0] > sizes[1] >= 1
    for speed, mb, name in ((199, 0.08, "speed"), (101, 0.06, "size"), (101, 5.0, "speed"), (50, 0.06, "size")):
        found = aim(dense, CLPConfig(target_size_mb=mb, target_tokens_per_second=speed), TIMES)
        removed = round(found.recipe.pruning_ratio * 6)
        assert removed == getattr(found, name).num_removed == max(found.size.num_removed, found.speed.num_removed)
        assert found.size.bits_per_weight is None, "more bits would be slower"
        assert (found.recipe.target_size_mb, found.recipe.target_tokens_per_second) == (None, None)
    assert aim(dense, CLPConfig(0.5), None).recipe == CLPConfig(0.5)


@pytest.fixture
def measured(monkeypatch):
    """Times and a choice that are made up, and how often they were asked for."""
    asked = []
    for place in (module, plan_module):
        monkeypatch.setattr(place, "layer_times", lambda *args, **options: asked.append("layers") or TIMES)
        monkeypatch.setattr(place, "choose_for_speed", lambda *args, **options: asked.append("form") or CHOICE)
    return asked


def test_a_plan_says_what_is_chosen(measured, tmp_path, capsys):
    recipe = CLPConfig(target_tokens_per_second=140, quantization={"tune_for": "speed"})
    plan = plan_pruning(tiny_config(num_layers=6), recipe)
    assert (plan.num_removed, plan.speed_target, plan.size_target) == (3, target_of(140), None)
    written = json.loads(json.dumps(plan.to_dict()))
    assert written["speed_choice"]["group_size"] == 64 and len(written["speed_choice"]["measured"]) == 2
    wide = CLPConfig(0.5, quantization={"group_size": 64})
    assert plan.cuts[0].onnx == plan_pruning(tiny_config(num_layers=6), wide).cuts[0].onnx
    tiny_config(num_layers=6).save_pretrained(tmp_path / "m")
    assert main(["prune", "--dry-run", "-m", str(tmp_path / "m"), "--target-tokens-per-second", "140"]) == 0
    said = capsys.readouterr().out
    assert "3 of 6 layers would go" in said and "For 140 tokens per second 3 layers go" in said
    assert plan_pruning(tiny_config(num_layers=6), CLPConfig(0.5)).to_dict()["speed_target"] is None


@pytest.mark.notices  # the file of so small a model is faster than that, or slower
def test_a_run_reaches_a_speed_and_its_recipe_measures_nothing(measured, monkeypatch, tmp_path):
    reached = [[Times(1.0, 0.008)]]
    monkeypatch.setattr(output_folder, "interleaved_times", lambda files, quiet: reached)
    monkeypatch.setattr(output_folder, "measured_threads", lambda: 1)
    recipe = CLPConfig(
        target_tokens_per_second=140,
        quantization={"tune_for": "speed", "weights": ["int4"], "method": "rtn"},
        tuning={"enabled": False},
        evaluation={"generation": False},
        search={"num_sequences": 2},
        calibration={
            "train_sequences": 2,
            "validation_sequences": 2,
            "test_sequences": 2,
            "sequence_length": 16,
            "cache_dir": str(tmp_path / "cache"),
        },
    )
    pruner = CLPPruner(tiny_model(num_layers=6), quiet=True)
    pruner.prune(recipe, tmp_path / "out")
    assert measured == ["form", "layers"], "each once"
    assert recipe.quantization.tune_for == "speed", "the caller's recipe is left alone"
    export = json.loads((tmp_path / "out/clp_report.json").read_text())["export"]
    assert export["speed_choice"]["speed"] == 1.1 and export["speed_choice"]["measured"][0]["group_size"] == 32
    assert export["speed_target"] == {
        "target_tokens_per_second": 140,
        "tokens_per_second": 125,
        "threads": 1,
        "met": False,
    }
    kept = CLPConfig.from_file(tmp_path / "out")
    assert (kept.pruning_ratio, kept.target_tokens_per_second) == (0.5, None)
    assert (kept.quantization.tune_for, kept.quantization.group_size) == ("size", 64)
    card = " ".join((tmp_path / "out/README.md").read_text().split())
    assert "The int4 file was to decode 140 tokens per second, and decodes 125 with 1 thread: missed." in card
    assert "groups of 64, accuracy level 4, a head of 4 bits, 1.10 times as fast as groups of 32" in card
    assert "decodes 125" in pruner.report.to_table()


def test_a_speed_that_cannot_be_reached_is_told_before_any_text(measured):
    pruner = CLPPruner(tiny_model(num_layers=6), quiet=True)
    with pytest.raises(ConfigurationError, match="target_tokens_per_second is 500: without 5 of 6 layers"):
        pruner.search(CLPConfig(target_tokens_per_second=500))
    assert pruner.report.calibration is None
