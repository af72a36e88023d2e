"""What every start of the registry has to do: the built-in ones, and those of other packages that are installed."""

import copy
import dataclasses
import json

import pytest
import torch
from tiny_models import make_identity, random_tokens, tiny_model
from zoo import ZOO, zoo_model

from optimum_clp.architecture.lookup import decoder_layers
from optimum_clp.closed_form.solver import ClosedFormStep
from optimum_clp.configuration.stages import TuningConfig
from optimum_clp.doors import LOSSES, STARTS
from optimum_clp.errors import ConfigurationError
from optimum_clp.forward.dense_outputs import StateStore
from optimum_clp.forward.hooks import evaluation_mode
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model, own_storage
from optimum_clp.tuning.endpoints import tune_layers
from optimum_clp.tuning.losses import Distillation
from optimum_clp.tuning.rows import cached_rows
from optimum_clp.tuning.starts import StartProblem

LAYERS, KEPT = (1, 2), (0, 1, 4, 5)
TRAIN, VALIDATION = random_tokens(24, 16, seed=1), random_tokens(6, 16, seed=2)
MODELS = ["untied", "tied", "gpt2", "olmo2", "bfloat16"]


def dense_model(kind):
    """An MLP with a bias and transposed weights (GPT-2) and a layer without a closed form (OLMo 2) among them."""
    if kind in ("gpt2", "olmo2"):
        return zoo_model(next(tiny for tiny in ZOO if tiny.name == kind), num_hidden_layers=6)
    model = tiny_model(tie_word_embeddings=kind == "tied")
    return model.bfloat16() if kind == "bfloat16" else model


def problem_of(start, dense, layers=LAYERS):
    """What `tune_layers` gives a start."""
    cut, depth = cut_model(dense, [LayerSegment(2, 4)]), len(decoder_layers(dense))
    kept = (*KEPT, *range(6, depth))
    for index in layers:
        own_storage(decoder_layers(cut)[index])
    store, targets = StateStore(), start.targets(kept, layers, depth)
    train, validation = (
        cached_rows(cut, dense, rows, min(layers), targets.values(), batch_size=8, store=store, quiet=True)
        for rows in (TRAIN, VALIDATION)
    )
    rows = train.with_targets(targets), validation.with_targets(targets)
    return StartProblem(cut, layers, kept, *rows, batch_size=8, store=store, quiet=True)


def applied(start, problem):
    with torch.no_grad(), evaluation_mode(problem.model):
        return start.apply(problem)


def changed(before, model):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("layers", [(0,), (3,), (1, 2), (0, 1, 2, 3)], ids=str)
def test_targets_are_states_of_the_dense_model(name, layers):
    targets = STARTS.get(name)().targets(KEPT, layers, 6)
    assert set(targets) <= set(range(len(KEPT)))
    assert all(type(state) is int and 0 <= state <= 6 for state in targets.values())
    assert targets == STARTS.get(name)().targets(list(KEPT), list(layers), 6)


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("kind", MODELS)
def test_only_the_given_layers_change(name, kind):
    start, dense = STARTS.get(name)(), dense_model(kind)
    problem = problem_of(start, dense)
    before, dense_before = copy.deepcopy(problem.model.state_dict()), copy.deepcopy(dense.state_dict())
    states = [t for rows in (problem.train, problem.validation) for t in (rows.inputs, *rows.targets.values())]
    states_before = [t.clone() for t in states]
    flags = [(p.requires_grad, p.dtype, p.shape) for p in problem.model.parameters()]
    result = applied(start, problem)
    layers = [decoder_layers(problem.model)[i] for i in LAYERS]
    inside = {
        name
        for name, tensor in problem.model.state_dict().items()
        if any(tensor.data_ptr() == p.data_ptr() for layer in layers for p in layer.parameters())
    }
    found = changed(before, problem.model)
    assert found <= inside and not changed(dense_before, dense)
    assert result is not None or not found
    assert [(p.requires_grad, p.dtype, p.shape) for p in problem.model.parameters()] == flags
    assert all(p.isfinite().all() and p.grad is None for p in problem.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(states, states_before, strict=True))
    modules = [*problem.model.modules(), *dense.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in modules)


@pytest.mark.parametrize("name", STARTS)
def test_what_it_did_fits_into_the_report(name):
    start = STARTS.get(name)()
    result = applied(start, problem_of(start, dense_model("untied")))
    if result is None:
        return
    section = result.to_dict()
    assert list(section) == ["method", "steps", "seconds"] and json.loads(json.dumps(section)) == section
    assert section["method"] == name and section["seconds"] >= 0 and section["steps"]
    fields = [field.name for field in dataclasses.fields(ClosedFormStep)]
    assert all(list(step) == fields and step["layer"] in LAYERS for step in section["steps"])


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("kind", ["untied", "tied", "bfloat16"])
def test_the_same_problem_has_the_same_outcome(name, kind):
    start, dense = STARTS.get(name)(), dense_model(kind)
    first, second = (problem_of(start, dense) for _ in range(2))
    results = [applied(STARTS.get(name)(), problem) for problem in (first, second)]
    assert results[0] == results[1]
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


@pytest.mark.parametrize("name", STARTS)
def test_memory_is_told_from_shapes_alone(name):
    start = STARTS.get(name)()
    layers = dense_model("untied").to("meta").model.layers
    one, two = (start.held_bytes(layers[:count], 32) for count in (1, 2))
    assert type(one) is int and 0 <= one <= two


def tuned(dense, cut, init, **options):
    config = TuningConfig(init=init, hidden_epochs=0, epochs=1, batch_size=4, learning_rate=1e-6)
    return tune_layers(cut, dense, LAYERS, TRAIN, VALIDATION, config, quiet=True, **{"kept": KEPT, **options})


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_start_is_kept_only_if_it_helps(name, tied):
    dense = tiny_model(tie_word_embeddings=tied)
    cut = cut_model(dense, [LayerSegment(2, 4)])
    result = tuned(dense, cut, name)
    if result.init is None:
        assert result.history[0].validation_loss == result.initial_validation_loss
        return
    assert list(result.init) == ["method", "steps", "seconds", "kept", "loss_before", "loss_after"]
    assert result.init["kept"] == (result.init["loss_after"] < result.init["loss_before"])
    first = result.init["loss_after"] if result.init["kept"] else result.init["loss_before"]
    assert result.history[0].validation_loss == pytest.approx(first)
    assert result.initial_validation_loss == result.init["loss_before"]


class Multiplied:
    """A start of another package: the MLP's last weights of each layer times a number; it compares nothing."""

    factor: float

    def targets(self, kept, layers, depth):
        return {}

    def held_bytes(self, layers, width):
        return 0

    def apply(self, problem):
        assert not problem.train.targets
        for index in problem.layers:
            problem.model.model.layers[index].mlp.down_proj.weight.data.mul_(self.factor)
        return Told(problem.layers)


@dataclasses.dataclass
class Told:
    layers: tuple

    def to_dict(self):
        steps = [dataclasses.asdict(ClosedFormStep(i, "mlp.down_proj")) for i in self.layers]
        return {"method": "multiplied", "steps": steps, "seconds": 0.0}


@pytest.fixture
def multiplied(monkeypatch):
    """Registers a start that multiplies by a number."""
    monkeypatch.setattr(STARTS, "_rows", dict(STARTS._rows))
    return lambda factor: STARTS.register("multiplied", type("By", (Multiplied,), {"factor": factor}))


def shrunk(dense):
    """A cut that is the dense model, but for weights that are a quarter of what they should be."""
    cut = cut_model(dense, [LayerSegment(2, 4)])
    for index in LAYERS:
        own_storage(cut.model.layers[index])
        cut.model.layers[index].mlp.down_proj.weight.data.mul_(0.25)
    return cut


@pytest.mark.parametrize("kept", [KEPT, None])
def test_a_start_of_another_package_that_helps_is_kept(multiplied, kept):
    """It compares nothing, so it needs to know no dense layer."""
    multiplied(4.0)
    dense = make_identity(tiny_model(), [2, 3])
    result = tuned(dense, shrunk(dense), "multiplied", kept=kept)
    assert result.init["kept"] and result.init["steps"][0]["module"] == "mlp.down_proj"
    assert result.init["loss_before"] > 0.01 and result.init["loss_after"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_a_start_that_harms_is_taken_back(multiplied, shared):
    """Also where the layers hold a module together."""
    multiplied(-3.0)
    dense = tiny_model()
    cut = cut_model(dense, [LayerSegment(2, 4)])
    if shared:
        cut.model.layers[2].mlp = cut.model.layers[1].mlp
    before = copy.deepcopy(cut.state_dict())
    result = tuned(dense, cut, "multiplied")
    assert not result.init["kept"] and result.init["loss_after"] > result.init["loss_before"]
    assert result.history[0].validation_loss == pytest.approx(result.init["loss_before"])
    for name, tensor in cut.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-4, msg=name)


class Contrary(Distillation):
    """Rows that begin with the token 3 are the better the further they are from the dense model."""

    def __call__(self, batch):
        losses = super().__call__(batch)
        return torch.where(batch.tokens[:, 0] == 3, 1 - losses, losses)


def test_a_start_that_helps_one_kind_of_text_and_harms_another_is_taken_back(multiplied, monkeypatch):
    multiplied(4.0)
    monkeypatch.setattr(LOSSES, "_rows", dict(LOSSES._rows))
    LOSSES.register("contrary", Contrary)
    dense, validation = make_identity(tiny_model(), [2, 3]), VALIDATION.clone()
    validation[:, 0] = torch.tensor([3, 4, 4, 4, 4, 4])
    config = TuningConfig(
        init="multiplied", loss="contrary", hidden_epochs=0, epochs=1, batch_size=4, learning_rate=1e-6
    )
    for kinds, kept in (((), True), (["poem", *["story"] * 5], False)):
        cut = shrunk(dense)
        result = tune_layers(cut, dense, LAYERS, TRAIN, validation, config, validation_kinds=kinds, quiet=True)
        assert result.init["loss_after"] < result.init["loss_before"] and result.init["kept"] == kept


def test_what_compares_needs_the_layers_numbers():
    for name in ("fold", "least_squares"):
        dense = tiny_model()
        with pytest.raises(ConfigurationError, match=f"kept is None: '{name}' compares with the dense model's layers"):
            tuned(dense, cut_model(dense, [LayerSegment(2, 4)]), name, kept=None)
