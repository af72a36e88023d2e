"""Models over several devices: spread by accelerate's `device_map`, and dealt out by transformers' tensor parallelism.

The devices are pretended (`pretended_devices.py`): what is computed over tensors of two of them fails, as it does on real ones. A
model so spread was not run on real ones.
"""

import os
import subprocess
import sys

import pytest
import torch
from accelerate import dispatch_model
from pretended_devices import PretendedDevices
from tiny_models import random_tokens, tiny_model, tiny_tokenizer

from optimum_clp import CLPConfig, CLPPruner
from optimum_clp.configuration.stages import SearchConfig
from optimum_clp.evaluation.tokens import evaluate_tokens
from optimum_clp.forward.dense_outputs import DenseOutputs
from optimum_clp.search.segment_search import search_segments
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model

FIRST, SECOND = torch.device("mtia", 0), torch.device("mtia", 1)
PLACES = [FIRST, FIRST, FIRST, SECOND, SECOND, SECOND]


def spread(model):
    """The first half of the layers on one device, the other half and what follows on another one."""
    ends = {"model.embed_tokens": FIRST, "model.rotary_emb": FIRST, "model.norm": SECOND, "lm_head": SECOND}
    return dispatch_model(model, ends | {f"model.layers.{i}": place for i, place in enumerate(PLACES)})


def places(model):
    return [layer.mlp.up_proj.weight.device for layer in model.model.layers]


def test_the_pretended_devices_are_told_apart():
    """What the other tests lean on: without accelerate's hooks such a model does not run."""
    with PretendedDevices(), torch.no_grad():
        model = tiny_model()
        model.model.layers[3].to(SECOND)
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            model(random_tokens(1, 8))


def test_a_cut_is_spread_as_the_dense_model_is():
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        expected = cut_model(tiny_model(), [LayerSegment(1, 2), LayerSegment(3, 4)])(tokens).logits
    with PretendedDevices(), torch.no_grad():
        dense = spread(tiny_model())
        cut = cut_model(dense, [LayerSegment(1, 2), LayerSegment(3, 4)])
        assert places(cut) == [FIRST, FIRST, SECOND, SECOND] and places(dense) == PLACES
        assert cut.hf_device_map["model.layers.2"] == SECOND and cut.lm_head.weight.device == SECOND
        assert torch.equal(cut(tokens.to(FIRST)).logits.cpu(), expected)


@pytest.mark.parametrize("strategy", ["exhaustive", "gate", "block_influence", "taylor", "perplexity_greedy"])
def test_searches_find_the_same(strategy):
    tokens, settings = random_tokens(4, 12), SearchConfig(strategy=strategy, num_sequences=4)
    expected = search_segments(tiny_model(), tokens, 2, settings, quiet=True)
    with PretendedDevices():
        found = search_segments(spread(tiny_model()), tokens, 2, settings, quiet=True)
    assert found.segments == expected.segments and found.score == pytest.approx(expected.score, rel=1e-6)


def test_figures_are_the_same():
    tokens = random_tokens(4, 12)
    figures = []
    for place in (lambda model: model, spread):
        with PretendedDevices():
            dense = place(tiny_model())
            cut = cut_model(dense, [LayerSegment(2, 4)])
            figures.append(evaluate_tokens(cut, tokens, reference=DenseOutputs(dense, tokens, quiet=True), quiet=True))
    assert figures[0] == figures[1]


def test_search_cut_tuning_and_saving_give_what_one_device_gives(tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_clp.output_folder.environment_info", lambda device: {})
    monkeypatch.setattr("optimum_clp.evaluation.outcome.NEW_TOKENS", 3)
    text = [" ".join(f"w{i}" for i in row) for row in random_tokens(60, 30).tolist()]
    calibration = {"dataset": text, "self_written_share": 0.25, "cache_dir": str(tmp_path / "cache")}
    calibration |= {"sequence_length": 16, "train_sequences": 8, "test_sequences": 4, "validation_sequences": 4}
    recipe = CLPConfig(
        0.33,
        calibration=calibration,
        search={"num_sequences": 6},
        tuning={"epochs": 1, "hidden_epochs": 1, "batch_size": 4, "learning_rate": 3e-3},
        evaluation={"max_new_tokens": 4},
        export={"enabled": False},
    )
    made = {}
    for name, place in (("one", lambda model: model), ("two", spread)):
        with PretendedDevices():
            pruner = CLPPruner(place(tiny_model()), tiny_tokenizer(), quiet=True)
            model = pruner.prune(recipe, tmp_path / name)
            assert len(set(places(model))) == (1 if name == "one" else 2)
            made[name] = {key: tensor.cpu() for key, tensor in model.state_dict().items()}, pruner.segments
            assert not pruner.report.failures
    assert made["one"][1] == made["two"][1]
    for key, tensor in made["one"][0].items():
        torch.testing.assert_close(made["two"][0][key], tensor, rtol=1e-5, atol=1e-6)


TENSOR_PARALLEL = """
import sys
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from optimum_clp import CLPPruner
from optimum_clp.errors import ModelError

torch.set_num_threads(1)
rank, store, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
ids = torch.arange(3, 11)[None]
with torch.no_grad():
    model(ids)
try:
    CLPPruner.from_pretrained(model, quiet=True)
except ModelError as error:
    print(error)
dist.barrier()
dist.destroy_process_group()
"""


def test_a_model_under_tensor_parallelism_is_refused_before_any_work(tmp_path):
    """As transformers loads it with `tp_plan="auto"` in two processes, over gloo."""
    tiny_model().save_pretrained(tmp_path / "dense")
    command = [sys.executable, "-W", "ignore", "-c", TENSOR_PARALLEL]
    environment = {"RANK": None, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    started = []
    for rank in (0, 1):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": "29577"}
        arguments = [*command, str(rank), str(tmp_path / "store"), str(tmp_path / "dense")]
        started.append(
            subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_with(own))
        )
    for process in started:
        printed, told = process.communicate(timeout=120)
        assert process.returncode == 0, told[-2000:]
        assert printed.startswith(
            "model is 'LlamaForCausalLM': its weights are dealt out to several processes (tensor parallelism, tp_plan, or FSDP)"
        ), printed + told[-2000:]
        assert "Load it without tp_plan" in printed


def _with(own):
    return {**os.environ, **own, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
