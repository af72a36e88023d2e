"""What a plan says of readings against a run in which every reading of a layer is counted."""

import contextlib
from unittest import mock

import pytest
import torch
from tiny_models import make_identity, random_tokens, tiny_model, tiny_tokenizer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from optimum_clp import CLPConfig, CLPPruner
from optimum_clp import output_folder as output
from optimum_clp.forward.layer_major import Residence
from optimum_clp.mapped_weights import MappedWeights
from optimum_clp.planning import streaming
from optimum_clp.segments import LayerSegment

DEPTH = 16


class Readings:
    """Bytes of weights that come into memory, if it holds one layer: a layer that runs and is not there, or weights that are let go
    and were not there since they were last let go, as when they are compared one by one."""

    def __init__(self):
        self.stages, self.there, self.read = ["before"], set(), {}

    def add(self, size):
        self.read[self.stages[-1]] = self.read.get(self.stages[-1], 0) + size

    def runs(self, layer):
        weights = {parameter.data_ptr(): parameter.nbytes for parameter in layer.parameters()}
        if not weights.keys() <= self.there:
            self.add(sum(weights.values()))
        self.there = set(weights)

    def goes(self, mapped, tensor):
        if tensor.data_ptr() in self.there:
            self.there.discard(tensor.data_ptr())
        elif mapped.holds(tensor):
            self.add(tensor.nbytes)

    @contextlib.contextmanager
    def counted(self):
        forward, let_go = LlamaDecoderLayer.forward, MappedWeights.let_go

        def ran(layer, *args, **kwargs):
            self.runs(layer)
            return forward(layer, *args, **kwargs)

        def went(mapped, tensors):
            tensors = list(tensors)
            for tensor in tensors:
                self.goes(mapped, tensor)
            return let_go(mapped, tensors)

        with mock.patch.object(LlamaDecoderLayer, "forward", ran), mock.patch.object(MappedWeights, "let_go", went):
            yield self

    def within(self, stage, work):
        def call(*args, **kwargs):
            self.stages.append(stage)
            self.there = set()
            try:
                return work(*args, **kwargs)
            finally:
                self.stages.pop()

        return call


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The layers that can go stand behind the first one, so that steps go through all that is left."""
    place = tmp_path_factory.mktemp("dense")
    shape = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": True, "dtype": torch.bfloat16}
    make_identity(tiny_model(num_layers=DEPTH, **shape), [1, 2, 3, 4]).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    rows = random_tokens(400, 40).tolist()
    (place / "text.txt").write_text("\n\n".join(" ".join(f"w{i}" for i in row) for row in rows))
    return place


def recipe(dense, cache, **changes):
    calibration = {"sequence_length": 24, "train_sequences": 16, "validation_sequences": 4, "test_sequences": 8}
    calibration |= {"dataset": str(dense / "text.txt"), "self_written_share": 0.0, "cache_dir": str(cache)}
    return CLPConfig(
        0.25,
        calibration=calibration,
        search={"num_sequences": 8, "batch_size": 4, "strategy": changes.get("strategy", "exhaustive")},
        tuning={
            "batch_size": 4,
            "learning_rate": 1e-5,
            "init": "none",
            "hidden_epochs": 0,
            **changes.get("tuning", {}),
        },
        evaluation={"generation": False},
        export={"enabled": False},
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tuning": {"init": "least_squares", "hidden_epochs": 1, "epochs": 2}},
        {"strategy": "block_influence", "tuning": {"enabled": False}},
        {"strategy": "taylor", "tuning": {"enabled": False}},
    ],
    ids=["kd", "all of the tuning", "hidden states", "gradients"],
)
def test_every_stage_reads_what_was_planned_within_a_tenth(dense, changes, tmp_path, monkeypatch):
    bound = Residence(1, state_memory=0, work_memory=1e6, folder=tmp_path / "states")
    monkeypatch.setattr("optimum_clp.session.residence_under", lambda limit, model, *_, **__: (None, bound))
    config, readings = recipe(dense, tmp_path / "cache", **changes), Readings()
    with readings.counted(), contextlib.ExitStack() as stages:
        pruner = readings.within("loading", CLPPruner.from_pretrained)(dense, quiet=True)
        names = {"search": "search", "cut": "cut", "tune": "tuning", "save_pretrained": "saving"}
        for name, stage in names.items():
            stages.enter_context(mock.patch.object(pruner, name, readings.within(stage, getattr(pruner, name))))
        measure = readings.within("evaluation", output.measure_outcome)
        stages.enter_context(mock.patch.object(output, "measure_outcome", measure))
        pruner.prune(config, tmp_path / "out")
    if config.tuning.enabled:
        assert pruner.segments == (LayerSegment(1, 5),)
    model = pruner._session.source()
    size = sum(parameter.nbytes for parameter in model.parameters())
    planned = dict(streaming._readings(model, config, 4))
    planned["tuning"] = planned.get("tuning", 0) + planned.pop("tuning steps", 0)
    assert readings.read.keys() <= {*planned}
    found = {stage: readings.read.get(stage, 0) / size for stage in planned}
    assert found == {stage: pytest.approx(count, rel=0.1) for stage, count in planned.items()}
