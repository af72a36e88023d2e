"""The whole of `CLPPruner` on architectures unlike LLaMA, and what is refused before any work."""

import json
import subprocess
import sys

import pytest
from test_pruner import recipe
from tiny_models import random_tokens, tiny_tokenizer
from transformers import AutoModelForCausalLM
from zoo import ZOO, zoo_model

from optimum_clp import CLPPruner, LayerSegment
from optimum_clp.architecture.lookup import allowed_segments
from optimum_clp.errors import ExportError, ModelError, QuantizationError

# tuples from layers, Conv1D, ALiBi, windows, experts, a pattern that few cuts keep, no attention, shared keys and values
TYPES = ("bloom", "falcon", "gpt2", "gemma3_text", "gemma4_unified_text-shared_kv", "jamba", "mamba2", "qwen3_moe")


def member(name):
    found = [tiny for tiny in ZOO if tiny.name == name]
    return found[0] if found else pytest.skip("not in this transformers")


@pytest.mark.parametrize("name", TYPES)
def test_one_call_from_a_folder_to_a_folder(name, tmp_path):
    model = zoo_model(member(name))
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    pruner = CLPPruner.from_pretrained(tmp_path / "dense", quiet=True)
    smaller = pruner.prune(recipe(tmp_path, pruning_ratio=0.25), save_directory=tmp_path / "out")
    assert pruner.segments[0] in allowed_segments(model.config, 2)
    assert {(s["start"], s["stop"]) for s in pruner.report.search["scored"]} <= {
        (s.start, s.stop) for s in allowed_segments(model.config, 2)
    }
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = random_tokens(2, 12)
    ours, theirs = smaller(input_ids=ids).logits, stock.eval()(input_ids=ids).logits
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
    assert CLPPruner.from_pretrained(tmp_path / "out", quiet=True).segments == pruner.segments


def test_a_cut_mixture_of_experts_is_read_by_another_process(tmp_path):
    model = zoo_model(member("qwen3_moe"))
    pruner = CLPPruner.from_pretrained(model, tokenizer=tiny_tokenizer(), quiet=True)
    pruner.config = recipe(tmp_path, tuning={"enabled": False}, pruning_ratio=0.25)
    smaller = pruner.cut([(2, 5)])
    pruner.save_pretrained(tmp_path / "out")
    ids = random_tokens(1, 8)
    code = (
        "import json, sys, torch; from transformers import AutoModelForCausalLM; "
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval(); "
        "print(json.dumps(m(input_ids=torch.tensor(json.loads(sys.argv[2]))).logits[0, -1].tolist()))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "out"), json.dumps(ids.tolist())]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    last = smaller(input_ids=ids).logits[0, -1].tolist()
    assert json.loads(printed.splitlines()[-1]) == pytest.approx(last, rel=1e-4, abs=1e-5)


def no_work(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("work was begun")

    monkeypatch.setattr("optimum_clp.session.load_calibration", fail)


def test_onnx_is_refused_before_any_work(tmp_path, monkeypatch):
    no_work(monkeypatch)
    pruner = CLPPruner.from_pretrained(zoo_model(member("mamba2")), quiet=True)
    with pytest.raises(ExportError, match="model is .*Mamba2ForCausalLM.*it gives no key-value cache"):
        pruner.prune(recipe(tmp_path, export={"enabled": True}), save_directory=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quanto_is_refused_before_any_work(tmp_path, monkeypatch):
    no_work(monkeypatch)
    pruner = CLPPruner.from_pretrained(zoo_model(member("gpt2")), quiet=True)
    with pytest.raises(QuantizationError, match="model is 'GPT2LMHeadModel': .*Conv1D"):
        pruner.prune(recipe(tmp_path, quantization={"quanto": True}), save_directory=tmp_path / "out")


def test_a_number_of_layers_that_cannot_go_is_refused_before_any_work(tmp_path, monkeypatch):
    no_work(monkeypatch)
    pruner = CLPPruner.from_pretrained(zoo_model(member("minicpm3")), quiet=True)
    with pytest.raises(
        ModelError, match="no run of 3 of the model's 8 layers .*Remove another number of layers: 2, 4"
    ):
        pruner.search(recipe(tmp_path, pruning_ratio=3 / 8))


def test_a_cut_that_is_not_exact_leaves_the_pruner_as_it_was(tmp_path):
    model = zoo_model(member("jamba"))
    pruner = CLPPruner.from_pretrained(model, quiet=True)
    with pytest.raises(
        Exception, match="removed layers is \\[3, 4\\]: config.attn_layer_period and config.attn_layer_offset"
    ):
        pruner.cut([LayerSegment(3, 5)])
    assert pruner.pruned_model is None and pruner.segments is None
