"""A whole run under a bound on memory: what comes out is what comes out without one."""

import json

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from optimum_clp import CLPConfig, CLPPruner
from optimum_clp.forward.layer_major import Residence


def prune(place, out, **overrides):
    text = {"sequence_length": 24, "train_sequences": 12, "validation_sequences": 4, "test_sequences": 4}
    config = CLPConfig(
        0.33,
        calibration={**text, "cache_dir": str(place / f"cache-{out}")},
        search={"num_sequences": 8},
        tuning={"epochs": 1, "batch_size": 4, "learning_rate": 3e-3},
        evaluation={"max_new_tokens": 4},
        # GPTQ carries a last digit of a weight through all that it rounds after it; that a bound changes no byte of what it
        # makes of one model is tests/exporters/test_room.py's
        quantization={"method": "rtn", "group_size": 16},
        **overrides,
    )
    CLPPruner.from_pretrained(place / "dense", quiet=True).prune(config, save_directory=place / out)
    return json.loads((place / out / "clp_report.json").read_text())


def test_a_run_layer_by_layer_gives_the_same_files(tmp_path, monkeypatch):
    tiny_model(tie_word_embeddings=True, dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    monkeypatch.setattr("optimum_clp.evaluation.outcome.NEW_TOKENS", 3)
    free = prune(tmp_path, "free")
    # no model of a test is larger than memory: the bound is met, and everything goes as if it were not
    bound = Residence(1, state_memory=0, work_memory=0, folder=tmp_path / "states")
    decide = "optimum_clp.session.residence_under"
    monkeypatch.setattr(decide, lambda limit, model, *_, **__: (None, bound))
    monkeypatch.setattr("optimum_clp.exporters.room.free_memory", lambda: 0)
    found = prune(tmp_path, "bound")
    assert found["search"]["segments"] == free["search"]["segments"]
    assert found["tuning"]["best_validation_loss"] == pytest.approx(free["tuning"]["best_validation_loss"], rel=2e-2)
    rows = {row["name"]: row for row in free["evaluation"]["rows"]}
    for row in found["evaluation"]["rows"]:
        # additions in another order, a last digit of bfloat16 in the tuned weights, and rounding on top of that
        assert row["perplexity"] == pytest.approx(rows[row["name"]]["perplexity"], rel=5e-3), row["name"]
        # models and float weights are as fast as their disk; a file that this process has no room for answers from another one
        assert row["decode_tokens_per_second"] is None, row["name"]
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / out).state_dict() for out in ("free", "bound")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=2e-2, rtol=2e-2)
    assert sorted(p.name for p in (tmp_path / "bound" / "onnx").iterdir()) == [
        "model.onnx",
        "model_q4.onnx",
        "model_quantized.onnx",
    ]
