"""What is measured before a run: choices by times that are made up, lines through them, and real files of a small model."""

import pytest
import torch
from tiny_models import tiny_config

from optimum_clp import CLPConfig
from optimum_clp.architecture.lookup import num_layers
from optimum_clp.configuration.recipe_files import read_recipe
from optimum_clp.exporters.probe import WeightForm
from optimum_clp.planning import speed
from optimum_clp.planning.speed import LayerTimes, Times, choose_for_speed, layer_times, shallow_config
from optimum_clp.planning.speed_target import with_choice

PLAIN = WeightForm(32, 4)


@pytest.fixture
def made_up(monkeypatch):
    """Times by the form of a file, which nothing is written for."""

    def use(seconds):
        def write(model, forms, folder, export, **options):
            return list(forms)

        monkeypatch.setattr(speed, "write_probes", write)
        monkeypatch.setattr(speed, "opened_file", lambda form, config: form)
        monkeypatch.setattr(speed, "drawn_model", lambda config: type("Model", (), {"config": config}))
        monkeypatch.setattr(
            speed,
            "interleaved_times",
            # a machine that gets slower, by the same for all
            lambda files, quiet: [
                [Times(drift * seconds(f), drift * seconds(f)) for drift in (1, 2, 9)] for f in files
            ],
        )

    return use


def chosen(made_up, gains, method="rtn"):
    def seconds(form):
        found = 1.0
        for name, value in vars(form).items():
            found /= gains.get((name, value), 1.0)
        return found

    made_up(seconds)
    return choose_for_speed(tiny_config(num_layers=6), CLPConfig(quantization={"method": method}), quiet=True)


@pytest.mark.parametrize(
    ("gains", "form", "ratio"),
    [
        ({}, PLAIN, 1.0),
        ({("group_size", 64): 1.015}, PLAIN, 1.0),
        ({("group_size", 64): 1.1, ("group_size", 128): 1.05}, WeightForm(64, 4), 1.1),
        ({("accuracy_level", 1): 1.5}, WeightForm(32, 1), 1.5),
        ({("head_bits", 8): 1.2, ("group_size", 128): 1.3}, WeightForm(128, 4, 8), 1.56),
        ({("head_bits", 8): 0.5, ("group_size", 128): 0.9}, PLAIN, 1.0),
    ],
)
def test_the_fastest_form_is_chosen_if_it_gains_more_than_times_scatter(gains, form, ratio, made_up):
    found = chosen(made_up, gains)
    assert WeightForm(found.group_size, found.accuracy_level, found.head_bits) == form
    assert (found.speed, found.prompt_speed, found.decode_speed) == pytest.approx((ratio, ratio, ratio))
    assert found.measured[0].speed == 1 and found.threads == torch.get_num_threads()
    tried = {(f.group_size, f.accuracy_level, f.head_bits) for f in found.measured}
    assert tried >= {(32, 4, 4), (64, 4, 4), (128, 4, 4), (32, 1, 4), (32, 4, 8)}


def test_bits_of_the_head_are_tried_only_where_they_can_be_mixed(made_up):
    assert all(form.head_bits == 4 for form in chosen(made_up, {}, method="hqq").measured)


def test_the_recipe_then_measures_nothing(made_up, tmp_path):
    recipe = CLPConfig(quantization={"tune_for": "speed"})
    found = with_choice(recipe, chosen(made_up, {("group_size", 64): 2, ("head_bits", 8): 2}))
    kept = (found.quantization.tune_for, found.quantization.group_size, found.quantization.head_bits)
    assert kept == ("size", 64, 8) and recipe.quantization.tune_for == "speed"
    found.save_pretrained(tmp_path)
    assert CLPConfig.from_dict(read_recipe(tmp_path)) == found


def test_layers_are_a_line_through_two_files(made_up, monkeypatch):
    made_up(lambda form: 0.0)
    depths = []
    monkeypatch.setattr(speed, "opened_file", lambda form, config: depths.append(num_layers(config)))
    monkeypatch.setattr(
        speed,
        "interleaved_times",
        lambda files, quiet: [[Times(9.0, drift * (0.5 + depth * 0.25)) for drift in (2, 1, 1)] for depth in depths],
    )
    found = layer_times(tiny_config(num_layers=7), CLPConfig(0.2), quiet=True)
    assert depths == [7, 4]
    assert (found.rest, found.layer) == (pytest.approx(0.5), pytest.approx(0.25))
    assert found.tokens_per_second(2) == pytest.approx(1.0)
    assert [found.most_layers(s) for s in (1.0, 1.01, 1 / 0.74, 1.9, 2.1)] == [2, 1, 0, 0, -1]
    assert LayerTimes(0.5, 0.0, 7, 1).most_layers(1.9) == 7


def test_a_shallow_model_has_layers_that_may_be_left():
    assert [num_layers(shallow_config(tiny_config(num_layers=6), n)) for n in (1, 4, 6, 9)] == [1, 4, 6, 6]


def test_times_of_real_files_are_taken_in_turn(monkeypatch):
    """Of a small model, all that is measured is written, opened and run."""
    monkeypatch.setattr(speed, "_SECONDS", 0.0)
    order, plain = [], speed._times
    monkeypatch.setattr(speed, "_times", lambda model, tokens: order.append(id(model)) or plain(model, tokens))
    config, recipe = tiny_config(num_layers=2), CLPConfig(0.5, quantization={"method": "rtn"})
    found = choose_for_speed(config, recipe, quiet=True)
    assert all(form.speed > 0 and form.prompt_speed > 0 and form.decode_speed > 0 for form in found.measured)
    first = order[:5]
    assert len(set(first)) == 5 and order[:30] == first * 6, "one round after the other"
    order.clear()
    times = layer_times(config, recipe, quiet=True)
    assert times.num_layers == 2 and times.rest + 2 * times.layer > 0
    assert len(set(order)) == 2 and order == order[:2] * 6
