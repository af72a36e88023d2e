import pytest
from big_shapes import BIG_SHAPES
from tiny_models import random_tokens, tiny_model

from optimum_clp import CLPConfig, plan_pruning
from optimum_clp.commands.prune import planned
from optimum_clp.errors import ConfigurationError
from optimum_clp.forward.layer_major import LayerMajorPasses, Residence
from optimum_clp.planning.streaming import DISK_SPEED, search_rounds
from optimum_clp.search.segment_search import search_segments

GIB = 2**30


@pytest.mark.parametrize(
    ("strategy", "exact"), [("exhaustive", True), ("auto", False), ("halving", False), ("gate", False), ("tail", True)]
)
def test_a_search_passes_through_the_model_as_often_as_planned(monkeypatch, strategy, exact):
    model, tokens, runs, run = tiny_model(num_layers=12), random_tokens(16, 16), [], LayerMajorPasses.run
    monkeypatch.setattr(
        LayerMajorPasses, "run", lambda self, *args, **options: runs.append(1) or run(self, *args, **options)
    )
    recipe = CLPConfig(0.25, search={"strategy": strategy, "num_sequences": 16, "batch_size": 4})
    search_segments(model, tokens, 3, recipe.search, residence=Residence(), quiet=True)
    planned_rounds = search_rounds(model, recipe, 3)
    assert len(runs) == planned_rounds if exact else 1 < len(runs) <= planned_rounds


def test_the_plan_of_a_model_that_a_machine_does_not_hold():
    config = BIG_SHAPES["LLaMA-3 70B"].config()
    memory = plan_pruning(config, CLPConfig(0.2, max_memory="96GiB")).memory
    assert memory.max_memory == 96 * GIB
    assert memory.resident > 140e9
    # a layer is 1.7 GB, embedding and head together 4.2 GB
    assert 1 <= memory.layers_at_once < 40
    assert memory.bytes_read == pytest.approx(sum(memory.readings.values()) * 141.1e9, rel=0.01)
    assert memory.to_dict()["seconds_read"] == memory.bytes_read / DISK_SPEED
    # the fingerprint, the work that a layer is, and a race of 65, 33, 17, 9, 5, 3 and 2 candidates; and the trial cut: a guard's pass, and
    # two looks at each of two models of 64 layers and what is around them
    assert memory.readings["search"] == pytest.approx(2 + 7 + 1 + 4 * 0.806, abs=0.01)
    # text that is there or that is written, and answers, cost a reading for each token
    assert memory.readings["generation"] == pytest.approx(2 * 128 * (1 + 2 * 0.806), rel=1e-3)
    assert memory.readings["self-written text"] == 256 * (17 + 1)


def test_what_reads_weights_for_each_token_can_be_left_out():
    config = BIG_SHAPES["LLaMA-3 70B"].config()
    without = {"calibration": {"dataset": "text.txt", "self_written_share": 0.0}, "evaluation": {"generation": False}}
    memory = plan_pruning(config, CLPConfig(0.2, max_memory="96GiB", **without)).memory
    assert "generation" not in memory.readings and "self-written text" not in memory.readings
    half = CLPConfig(0.2, max_memory="96GiB", **{**without, "calibration": {"dataset": "text.txt"}})
    assert plan_pruning(config, half).memory.readings["self-written text"] == 256 * 9


def test_a_bound_above_the_model_reads_it_once():
    memory = plan_pruning(BIG_SHAPES["LLaMA-3 8B"].config(), CLPConfig(0.2, max_memory="64GiB")).memory
    assert (memory.layers_at_once, memory.readings) == (32, {"loading": 1})


def test_the_smallest_bound_that_will_do_is_told_and_does():
    config = BIG_SHAPES["LLaMA-3 8B"].config()
    with pytest.raises(
        ConfigurationError,
        match=r"max_memory is '1GiB': the weights of one layer, .* take [\d.]+ GiB\. Give at least \d+MiB\.",
    ) as error:
        plan_pruning(config, CLPConfig(0.2, max_memory="1GiB"))
    proposed = error.value.problems[0].remedy.split()[3]
    assert plan_pruning(config, CLPConfig(0.2, max_memory=proposed)).memory.layers_at_once < 32
    untuned = plan_pruning(config, CLPConfig(0.2, max_memory=proposed, tuning={"enabled": False})).memory
    # steps go layer by layer: of more rows than by default only what leaves the layers is held
    steps = CLPConfig(0.2, max_memory="64GiB", tuning={"batch_size": 32})
    assert plan_pruning(config, steps).memory.smallest < int(proposed[:-3]) * 2**20 * 1.25
    assert untuned.smallest < int(proposed[:-3]) * 2**20  # tuning takes more than a pass


def test_people_are_told_how_often_and_how_long():
    config = BIG_SHAPES["LLaMA-3 70B"].config()
    shown = planned(plan_pruning(config, CLPConfig(0.2, max_memory="96GiB")).to_dict())
    assert "Within 103.08 GB the weights are read layer by layer, " in shown and " hours at 3 GB/s. " in shown
    assert "bound" not in planned(plan_pruning(config, CLPConfig(0.2)).to_dict())


def test_a_bound_for_an_accelerator_is_planned_too():
    """What is around the layers, two layers, a row on its way and what tuning trains must fit; what main memory holds is less so."""
    config = BIG_SHAPES["LLaMA-3 8B"].config()
    with pytest.raises(
        ConfigurationError, match=r"max_memory is '0=2.00 GiB': there are 1.96 GiB around the layers.*"
    ):
        plan_pruning(config, CLPConfig(0.2, max_memory={0: "2GiB", "cpu": "64GiB"}))
    without_files = {"export": {"enabled": False}}
    memory = plan_pruning(config, CLPConfig(0.2, max_memory={0: "20GiB", "cpu": "64GiB"}, **without_files)).memory
    assert memory.max_memory == 64 * GIB
    assert memory.smallest < plan_pruning(config, CLPConfig(0.2, max_memory="64GiB", **without_files)).memory.smallest
    assert plan_pruning(config, CLPConfig(0.2, max_memory="0=20GiB")).memory.max_memory is None
