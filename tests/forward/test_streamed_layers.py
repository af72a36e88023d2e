"""Layers that run elsewhere than where they lie: with a CPU that stands in for an accelerator, and with devices that are pretended.

On the first each layer is really copied; the others show that nothing is computed over tensors of two places. No test here has run
on an accelerator: `tests/test_accelerator.py` does.
"""

import copy
import gc
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
from pretended_devices import ACCELERATOR, PretendedDevices
from tiny_models import random_tokens, tiny_model
from zoo import ZOO, zoo_model

from optimum_clp.architecture.lookup import decoder_layers
from optimum_clp.checkpoint.offloaded import bare_copy
from optimum_clp.configuration.stages import SearchConfig, TuningConfig
from optimum_clp.forward.dense_outputs import DenseOutputs
from optimum_clp.forward.layer_major import Residence
from optimum_clp.forward.streamed_layers import LayerCopies, copies_of, run_on, settle, streamed_forward
from optimum_clp.search.segment_search import search_segments
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model
from optimum_clp.tuning.endpoints import tune_layers
from optimum_clp.tuning.student import EndpointStudent

CPU = torch.device("cpu")


# one of each kind of layer; the others are slow tests
KINDS = {
    "llama",
    "gpt2",
    "falcon",
    "bloom",
    "opt",
    "gpt_bigcode",
    "phi3",
    "gemma2",
    "gemma3n_text",
    "mixtral",
    "gpt_oss",
}
KINDS |= {"mamba", "jamba", "falcon_mamba", "qwen3_next", "deepseek_v3", "zamba2", "nemotron_h", "rwkv", "apertus"}


def _row(tiny):
    marks = () if tiny.model_type in KINDS else pytest.mark.slow
    return pytest.param(tiny, id=f"{tiny.model_type}{tiny.variant}", marks=marks)


class CountedCopies(LayerCopies):
    """Notes what is copied and what is asked for, and how many layers are there at most."""

    def __init__(self, model, device=CPU, **options):
        super().__init__(device, **options)
        self.numbers = {layer.input_layernorm.weight.data_ptr(): i for i, layer in enumerate(decoder_layers(model))}
        self.told, self.most = [], 0

    def number(self, tensors):
        return next(self.numbers[t.data_ptr()] for t in tensors if t.data_ptr() in self.numbers)

    def of(self, tensors):
        self.told.append(("run", self.number(tensors)))
        return super().of(tensors)

    def _begun(self, tensors, old):
        self.told.append(("copy", self.number(tensors)))
        self.most = max(self.most, len(self) + 1)
        return super()._begun(tensors, old)

    def copies(self):
        return [number for what, number in self.told if what == "copy"]


def streamed(model, device=CPU, **options):
    twin = bare_copy(model)
    copies = CountedCopies(model, device, **options)
    run_on(twin, copies)
    return twin, copies


@pytest.mark.parametrize("tiny", [_row(tiny) for tiny in ZOO])
def test_every_architecture_computes_the_same_on_copies(tiny):
    """Nothing that lies elsewhere is touched by a layer that runs on the device, and the numbers are the same, bit for bit."""
    model, tokens = zoo_model(tiny), random_tokens(2, 12)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        standing_in = bare_copy(model)
        run_on(standing_in, LayerCopies(CPU))
        assert torch.equal(standing_in(tokens, use_cache=False).logits, expected)
    with PretendedDevices() as devices, torch.no_grad():
        twin = bare_copy(model)
        run_on(twin, LayerCopies(ACCELERATOR))
        found = twin(tokens.to(ACCELERATOR), use_cache=False).logits
        assert found.device == ACCELERATOR and twin.device == ACCELERATOR and model.device == CPU
        # gpt_oss of transformers 4 adds up its experts in another order on the CPU alone
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-5 if tiny.model_type == "gpt_oss" else 0)
        assert all(device == ACCELERATOR for device, _ in devices.moved)
        assert {p.device for layer in decoder_layers(twin) for p in layer.parameters()} == {CPU}
    for name, tensor in model.state_dict().items():
        address, value = before[name]
        assert tensor.data_ptr() == address and torch.equal(tensor, value), name
    layers = zip(decoder_layers(twin), decoder_layers(model), strict=True)
    assert all(
        a.data_ptr() == b.data_ptr() for x, y in layers for a, b in zip(x.parameters(), y.parameters(), strict=True)
    )


def test_a_reading_copies_each_layer_once_and_the_next_before_it_is_asked_for():
    model, tokens = tiny_model(), random_tokens(7, 12)
    twin, copies = streamed(model)
    expected = DenseOutputs(model, tokens, batch_size=2, inputs_of=range(6), quiet=True)
    found = DenseOutputs(twin, tokens, batch_size=2, inputs_of=range(6), quiet=True, residence=Residence())
    assert found.hidden.keys() == expected.hidden.keys()
    assert all(torch.equal(states, found.hidden[index]) for index, states in expected.hidden.items())
    assert copies.copies() == [0, 1, 2, 3, 4, 5] and copies.most == 2
    for index in range(1, 6):
        assert copies.told.index(("copy", index)) < copies.told.index(("run", index))
        # fetched while the one before it runs, not earlier
        assert copies.told.index(("copy", index)) > copies.told.index(("run", index - 1))


@pytest.mark.parametrize("staying, second", [(0, 6), (2, 4), (3, 3), (4, 0), (6, 0)])
def test_layers_that_stay_are_copied_for_the_first_reading_alone(staying, second):
    model, tokens = tiny_model(), random_tokens(2, 8)
    twin, copies = streamed(model, staying=staying)
    with torch.no_grad():
        for _ in range(2):
            twin(tokens)
    assert len(copies.copies()) == 6 + second and copies.most <= min(6, staying + 2)
    assert copies.copied == 6 + second


def test_a_search_copies_each_layer_once_for_a_round_and_finds_the_same():
    model, tokens = tiny_model(), random_tokens(6, 16)
    twin, copies = streamed(model)
    settings = SearchConfig(strategy="exhaustive", num_sequences=6, batch_size=2)
    expected = search_segments(model, tokens, 2, settings, residence=Residence(), quiet=True)
    found = search_segments(twin, tokens, 2, settings, residence=Residence(), quiet=True)
    assert found == expected
    # what one row costs is measured first, and then one reading serves all five candidates
    assert copies.copies() == 2 * [0, 1, 2, 3, 4, 5] and copies.most == 2


@pytest.mark.parametrize(
    ("device", "residence"),
    [(ACCELERATOR, None), (ACCELERATOR, Residence(1, work_memory=0)), (CPU, Residence(1, work_memory=0))],
    ids=["plain", "layer by layer", "layer by layer, really copied"],
)
def test_tuning_above_layers_that_lie_elsewhere_gives_the_same_weights(device, residence):
    settings = TuningConfig(epochs=1, hidden_epochs=1, batch_size=4, learning_rate=3e-3)
    rows = random_tokens(12, 16, seed=1), random_tokens(4, 16, seed=2)

    def tuned(model):
        cut = cut_model(model, [LayerSegment(1, 2)])
        options = {"kept": [0, 2, 3, 4, 5], "residence": residence, "quiet": True}
        result = tune_layers(cut, model, (0, 1), *rows, settings, **options)
        return cut, result.best_validation_loss

    expected, loss = tuned(tiny_model())
    with PretendedDevices():
        twin, copies = streamed(tiny_model(), device)
        cut, found = tuned(twin)
        assert found == loss and copies.most == 2
        assert [layer.mlp.up_proj.weight.device for layer in cut.model.layers] == [device, device, CPU, CPU, CPU]
        assert [streamed_forward(layer) is None for layer in cut.model.layers] == [True, True, False, False, False]
    for name, tensor in expected.state_dict().items():
        assert torch.equal(cut.state_dict()[name].cpu(), tensor), name
    for name, tensor in tiny_model().state_dict().items():
        assert torch.equal(twin.state_dict()[name].cpu(), tensor), name


def test_a_step_of_the_tuning_asks_for_the_layers_below_on_its_way_back():
    model = tiny_model()
    twin, copies = streamed(model)
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    hidden, layers = torch.randn(1, 8, 32, requires_grad=True), decoder_layers(twin)
    around = twin.model.rotary_emb(hidden, torch.arange(8)[None])

    def through(layer, entering):
        left = layer(entering, position_embeddings=around)
        return left if isinstance(left, torch.Tensor) else left[0]

    value = hidden
    for layer in layers:
        value = torch.utils.checkpoint.checkpoint(through, layer, value, use_reentrant=False)
    up = len(copies.told)
    value.sum().backward()
    assert copies.copies() == [0, 1, 2, 3, 4, 5, 3, 2, 1, 0]
    back = copies.told[up:]
    assert [number for what, number in back if what == "run"] == [5, 4, 3, 2, 1, 0]
    for index in (2, 1, 0):  # the turn is seen at the second layer
        assert back.index(("copy", index)) < back.index(("run", index))
    expected = torch.autograd.grad(_summed(model, hidden, around), hidden)[0]
    assert torch.equal(hidden.grad, expected)


def _summed(model, hidden, around):
    for layer in decoder_layers(model):
        left = layer(hidden, position_embeddings=around)
        hidden = left if isinstance(left, torch.Tensor) else left[0]
    return hidden.sum()


def test_autograd_keeps_no_copies_in_a_plain_pass():
    """It would keep those of all layers until its way back; what it needs of a layer is computed again instead."""
    hidden, tokens, there = torch.randn(2, 8, 32), random_tokens(2, 8), []

    class Watched(LayerCopies):
        def of(self, tensors):
            there.append([weakref.ref(copy) for copy in super().of(tensors)])
            return super().of(tensors)

    gradients = []
    for device in (None, CPU):
        twin = bare_copy(tiny_model())
        if device is not None:
            run_on(twin, Watched(device))
        for parameter in twin.parameters():
            parameter.requires_grad_(False)
        student = EndpointStudent(twin, [twin.model.norm.requires_grad_(True)], 1, {"ce": 1.0})
        entering = hidden.clone().requires_grad_(True)
        loss = student(tokens, entering, None, {}).mean()
        gc.collect()
        # the head's pass is the last one: two layers are held, and no more
        assert sum(any(ref() is not None for ref in refs) for refs in there) <= 2
        loss.backward()
        gradients.append(entering.grad)
    assert torch.equal(*gradients)


def test_gradients_of_weights_arrive_where_they_lie():
    model, tokens = tiny_model(), random_tokens(2, 8)
    twin, _ = streamed(tiny_model())
    for each in (model, twin):
        each(tokens, labels=tokens).loss.backward()
    own, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name].grad, theirs[name].grad) for name in own)


def test_weights_that_were_written_to_are_copied_again():
    model, tokens = tiny_model(), random_tokens(1, 8)
    twin, _ = streamed(model, staying=6)
    with torch.no_grad():
        before = twin(tokens).logits
        model.model.layers[2].mlp.up_proj.weight.mul_(2)
        after = twin(tokens).logits
        assert not torch.equal(before, after) and torch.equal(after, model(tokens).logits)


def test_a_model_that_was_moved_runs_where_it_is():
    model, tokens = tiny_model(), random_tokens(1, 8)
    with PretendedDevices() as devices, torch.no_grad():
        twin = bare_copy(model)
        run_on(twin, LayerCopies(ACCELERATOR))
        expected = twin(tokens.to(ACCELERATOR)).logits.cpu()
        twin.to(ACCELERATOR)
        before = len(devices.moved)
        assert torch.equal(twin(tokens.to(ACCELERATOR)).logits.cpu(), expected)
        assert len(devices.moved) == before + 1  # the tokens
        twin.to(CPU)
        assert torch.equal(twin(tokens).logits, expected)


def test_copies_of_a_model_are_models_of_their_own():
    twin, copies = bare_copy(tiny_model()), LayerCopies(CPU)
    run_on(twin, copies)
    other, tokens = copy.deepcopy(twin), random_tokens(1, 8)
    assert copies_of(other) is copies
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.zero_()
        assert not torch.equal(other(tokens).logits, twin(tokens).logits)
        assert torch.equal(twin(tokens).logits, tiny_model()(tokens).logits)


def test_settled_layers_are_plain_ones():
    twin, copies = streamed(tiny_model())
    settle(twin.model.layers[3])
    assert "forward" not in vars(twin.model.layers[3]) and streamed_forward(twin.model.layers[2]) is not None
    settle(twin)
    assert copies_of(twin) is None and not any("forward" in vars(module) for module in twin.modules())
    with torch.no_grad():
        assert torch.equal(twin(random_tokens(1, 8)).logits, tiny_model()(random_tokens(1, 8)).logits)


def test_a_copy_that_fails_is_tried_again():
    twin, copies = streamed(tiny_model())
    begun, failing = copies._begun, iter([False, True])

    def once(tensors, old):
        future = begun(tensors, old)
        if next(failing, False):
            future = type(future)()
            future.set_exception(torch.OutOfMemoryError("CUDA out of memory."))
        return future

    copies._begun = once
    with torch.no_grad():
        with pytest.raises(torch.OutOfMemoryError):
            twin(random_tokens(1, 8))
        assert torch.equal(twin(random_tokens(1, 8)).logits, tiny_model()(random_tokens(1, 8)).logits)


class Events:
    """Events and streams of a device that computes at once: what waits for what is noted."""

    def __init__(self, *_):
        self.told = TOLD

    def record(self, stream=None):
        self.told.append(("record", id(self)))

    def synchronize(self):
        assert ("record", id(self)) in self.told
        self.told.append(("synchronize", threading.current_thread().name))

    def wait_event(self, event):
        assert ("record", id(event)) in self.told
        self.told.append(("wait", threading.current_thread().name))


TOLD = []


def test_a_thread_of_its_own_copies_once_what_it_replaces_is_done_with(monkeypatch):
    """The way of CUDA, with a CPU, streams and events that only note: no GPU was to be had."""
    TOLD.clear()
    for name in ("Event", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Events)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: TOLD.append(("held by a graph", None)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model, tokens = tiny_model(), random_tokens(5, 12)
    copies = LayerCopies(torch.device("cuda"))
    copies.device = CPU
    twin = bare_copy(model)
    run_on(twin, copies)
    found = DenseOutputs(twin, tokens, batch_size=2, quiet=True, residence=Residence())
    expected = DenseOutputs(model, tokens, batch_size=2, quiet=True)
    assert torch.equal(found.hidden[6], expected.hidden[6]) and copies.copied == 6 and len(copies) == 2
    waits = [thread for what, thread in TOLD if what == "synchronize"]
    # four of six copies take the place of another one
    assert len(waits) == 4 and all(thread.startswith("layer-copies") for thread in waits)
    assert {thread for what, thread in TOLD if what == "wait"} == {threading.current_thread().name}
    assert not any(what == "held by a graph" for what, _ in TOLD)
