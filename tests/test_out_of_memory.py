"""What is done where a device has no memory for a batch: a forward that raises what PyTorch raises, above some number of rows."""

import math

import pytest
import torch
from notices import notice
from tiny_models import random_tokens, tiny_model

from optimum_clp import CLPPruner
from optimum_clp.configuration.stages import SearchConfig, TuningConfig
from optimum_clp.errors import DeviceMemoryError
from optimum_clp.evaluation.tokens import evaluate_tokens
from optimum_clp.forward.dense_outputs import DenseOutputs
from optimum_clp.forward.layer_major import Residence
from optimum_clp.out_of_memory import Halving, halves, is_out_of_memory
from optimum_clp.search.segment_search import search_segments
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model
from optimum_clp.tuning.endpoints import tune_layers

SAID = "CUDA out of memory. Tried to allocate 20.00 GiB."


class Small:
    """A device that has memory for so many rows in a layer; with `gradients`, only of passes that keep them."""

    def __init__(self, model, most, gradients=False):
        self.failures, self.largest = 0, 0

        def enter(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            if len(hidden) > most and (hidden.requires_grad or not gradients):
                self.failures += 1
                raise torch.OutOfMemoryError(SAID)
            self.largest = max(self.largest, len(hidden))

        layer = model.model.layers[-1]
        self.handle = layer.register_forward_pre_hook(enter, with_kwargs=True)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError(SAID), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of cheese"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_what_says_that_there_is_no_memory(error, expected):
    assert is_out_of_memory(error) == expected


def test_halves_are_all_rows_in_order():
    assert halves([1, 2, 3, 4, 5]) == [[1, 2, 3], [4, 5]] and halves([1]) == [[1]] and halves([]) == [[]]
    assert [part.tolist() for part in halves(torch.arange(4))] == [[0, 1], [2, 3]]


def test_a_batch_is_halved_once_and_stays_so():
    asked, halving = [], Halving("search", "search.batch_size")

    def run(rows):
        asked.append(len(rows))
        if len(rows) > 4:
            raise torch.OutOfMemoryError(SAID)
        return sum(rows)

    with notice(r"search: no memory for 8 rows at once, so that half of them run from now on \(CUDA out of memory"):
        assert halving.over(range(8), run) == [6, 22]
    assert halving.over(range(8), run) == [6, 22] and asked == [8, 4, 4, 4, 4]
    message = r"device memory is 'search': there is too little for half of 10 rows \(CUDA out of memory.*\)\. Lower search.batch_size, "
    with pytest.raises(DeviceMemoryError, match=message + r"shorter rows \(calibration.sequence_length\), or a bound"):
        halving.over(range(10), run)


def test_what_cannot_be_halved_is_an_error_at_once():
    def run(rows):
        raise torch.OutOfMemoryError(SAID)

    with pytest.raises(DeviceMemoryError, match="there is too little for one row"):
        Halving("search", "search.batch_size").over([3], run)
    with pytest.raises(DeviceMemoryError, match="in a group of processes no batch is halved by one of them"):
        Halving("tuning", "tuning.batch_size", allowed=False).over(range(8), run)


def test_other_errors_are_left_alone():
    def run(rows):
        raise ValueError("not of memory")

    with pytest.raises(ValueError, match="not of memory"):
        Halving("search", "search.batch_size").over(range(8), run)


@pytest.mark.parametrize("residence", [None, Residence()], ids=["plain", "layer by layer"])
def test_states_of_half_a_batch_are_the_same(residence):
    model, tokens = tiny_model(), random_tokens(10, 12)
    options = {"batch_size": 4, "inputs_of": range(6), "residence": residence, "quiet": True}
    expected = DenseOutputs(model, tokens, **options).hidden
    small = Small(model, 2)
    with notice("no memory for 4 rows at once"):
        found = DenseOutputs(model, tokens, **options).hidden
    assert small.failures == 1 and small.largest == 2 and found.keys() == expected.keys()
    for index, states in expected.items():
        torch.testing.assert_close(found[index], states)


@pytest.mark.parametrize("residence", [None, Residence()], ids=["plain", "layer by layer"])
def test_a_search_of_half_batches_finds_the_same(residence):
    model, tokens = tiny_model(), random_tokens(8, 12)
    settings = SearchConfig(strategy="exhaustive", num_sequences=8, batch_size=8)
    # what memory is reckoned to hold would be fewer rows than the batch
    options = {"residence": residence, "quiet": True}
    expected = search_segments(model, tokens, 2, settings, **options)
    rows = max(2, _largest_batch(model, tokens, settings, options))
    small = Small(model, rows // 2)
    with notice(f"no memory for {rows} rows at once"):
        found = search_segments(model, tokens, 2, settings, **options)
    assert small.failures == 1 and found.segments == expected.segments
    for ours, theirs in zip(found.scored, expected.scored, strict=True):
        assert ours.segments == theirs.segments and ours.kl == pytest.approx(theirs.kl, rel=1e-5)


def _largest_batch(model, tokens, settings, options):
    watched = Small(model, math.inf)
    search_segments(model, tokens, 2, settings, **options)
    watched.handle.remove()
    return watched.largest


def test_figures_of_half_a_batch_are_the_same():
    model, tokens = tiny_model(), random_tokens(6, 12)
    cut = cut_model(model, [LayerSegment(2, 4)])
    reference = DenseOutputs(model, tokens, quiet=True)
    expected = evaluate_tokens(cut, tokens, reference=reference, batch_size=6, quiet=True)
    Small(cut, 3)
    with notice("evaluation: no memory for 6 rows at once"):
        found = evaluate_tokens(cut, tokens, reference=reference, batch_size=6, quiet=True)
    assert found.to_dict() == pytest.approx(expected.to_dict(), rel=1e-5)


def tuned(most=math.inf, residence=None, **settings):
    model = tiny_model()
    cut = cut_model(model, [LayerSegment(1, 2)])
    config = TuningConfig(**{"epochs": 2, "hidden_epochs": 1, "init": "none", "learning_rate": 3e-3} | settings)
    rows = random_tokens(18, 16, seed=1), random_tokens(6, 16, seed=2)
    small = Small(cut, most, gradients=True)
    options = {"kept": [0, 2, 3, 4, 5], "residence": residence, "quiet": True}
    return cut, small, tune_layers(cut, model, (0, 1), *rows, config, **options)


@pytest.mark.parametrize(
    ("settings", "most", "told"),
    [
        ({"batch_size": 6}, 3, 6),
        ({"batch_size": 6, "gradient_accumulation_steps": 2}, 2, 3),  # halves of two rows and of one
    ],
    ids=["halves", "odd halves"],
)
def test_steps_of_half_passes_are_the_same_steps(settings, most, told):
    """The rows of a step, the number of steps and, up to the order of additions, the weights after them are the same."""
    expected, _, plain = tuned(**settings)
    with notice(
        rf"tuning: no memory for {told} rows at once.*; a lower tuning.batch_size, or raise tuning.gradient_acc"
    ):
        found, small, halved = tuned(most, **settings)
    assert small.failures == 1 and small.largest >= most
    assert (halved.steps, halved.num_tokens) == (plain.steps, plain.num_tokens)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    losses = [step.validation_loss for step in plain.history]
    assert [step.validation_loss for step in halved.history] == pytest.approx(losses, rel=1e-5)


def test_steps_layer_by_layer_are_parted_further():
    expected, _, plain = tuned(residence=Residence(), batch_size=6, hidden_epochs=0, loss="kd")
    with notice("tuning: no memory for 6 rows at once"):
        found, small, halved = tuned(3, Residence(), batch_size=6, hidden_epochs=0, loss="kd")
    assert small.failures == 1
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_second_time_ends_the_tuning_with_the_weights_that_were_good():
    model = tiny_model()
    before = cut_model(model, [LayerSegment(1, 2)]).state_dict()
    with (
        notice("no memory for 6 rows"),
        pytest.raises(DeviceMemoryError, match="too little for half of 6 rows") as told,
    ):
        tuned(1, batch_size=6)
    assert "raise tuning.gradient_accumulation_steps" in str(told.value) and isinstance(told.value, MemoryError)
    assert before.keys()


def test_an_optimizer_without_memory_is_another_error(monkeypatch):
    from optimum_clp.tuning.master_adamw import MasterAdamW

    def step(self, closure=None):
        raise torch.OutOfMemoryError(SAID)

    monkeypatch.setattr(MasterAdamW, "step", step)
    with pytest.raises(
        DeviceMemoryError, match="there is too little for the optimizer's numbers.*Lower tuning.endpoint_width"
    ):
        tuned(batch_size=6)


def test_whatever_else_has_no_memory_is_the_same_error_in_every_verb(monkeypatch):
    pruner = CLPPruner(tiny_model(), quiet=True)

    def failing(*args):
        raise torch.OutOfMemoryError(SAID)

    monkeypatch.setattr("optimum_clp.pruner.cut_model", failing)
    with pytest.raises(
        DeviceMemoryError, match=r"device memory is 'cut': there is too little for what it computes \(CUDA"
    ):
        pruner.cut([LayerSegment(1, 2)])
