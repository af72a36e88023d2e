import dataclasses
import json
import math

import pytest
import torch
from tiny_models import random_tokens, tiny_model, tiny_tokenizer

from optimum_clp.calibration.rows import CalibrationData
from optimum_clp.configuration.clp_config import CLPConfig
from optimum_clp.errors import CalibrationError, ConfigurationError
from optimum_clp.evaluation.deployment import DeploymentChecks, requirements, verdicts
from optimum_clp.evaluation.outcome import measure_outcome
from optimum_clp.evaluation.tokens import evaluate_tokens
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model

SEGMENTS = (LayerSegment(2, 4),)
ROWS = random_tokens(4, 24)


def data(kinds=()):
    return CalibrationData(ROWS, ROWS, ROWS, "text", test_kinds=kinds)


def checks(tokenizer=None, **evaluation):
    evaluation = {"max_new_tokens": 3, **evaluation}
    calibration = {"test_sequences": 2, "sequence_length": 16}
    config = CLPConfig(calibration=calibration, evaluation=evaluation)
    return DeploymentChecks(config, tokenizer or tiny_tokenizer(), tiny_model().config, quiet=True)


def outcome(checks, kinds=(), tmp_path=None):
    dense = tiny_model()
    options = {"segments": SEGMENTS, "tuned": False, "folder": tmp_path, "export": None, "quiet": True}
    return measure_outcome(
        data(kinds), "text", checks=checks, dense=dense, pruned=cut_model(dense, SEGMENTS), **options
    )


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr("optimum_clp.evaluation.outcome.NEW_TOKENS", 3)


def words(tokens):
    return " ".join(f"w{i}" for i in tokens.flatten().tolist())


def test_texts_tasks_and_kinds_are_measured_apart(tmp_path):
    other = random_tokens(2, 16, seed=5)
    (tmp_path / "other.txt").write_text(words(other))
    task = [{"context": "w3 w4", "continuation": "w5"}, {"context": "w9", "continuation": "w8"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, task)))
    found = outcome(
        checks(texts=[str(tmp_path / "other.txt")], tasks=[f"last={tmp_path / 't.jsonl'}"], task_limit=1),
        kinds=("plain", "conversations", "plain", "plain"),
    )
    assert [(t["text"], t["num_rows"]) for t in found["texts"]] == [
        ("test rows: conversations", 1),
        ("test rows: plain", 3),
        ("plain text (other.txt)", 2),
    ]
    cut = cut_model(tiny_model(), SEGMENTS)
    plain = evaluate_tokens(cut, ROWS[[0, 2, 3]], quiet=True)
    assert found["texts"][1]["rows"][1]["perplexity"] == pytest.approx(plain.perplexity)
    dense_row, cut_row = found["texts"][2]["rows"]
    assert (dense_row["name"], dense_row["kl"]) == ("dense", pytest.approx(0, abs=1e-6))
    assert cut_row["retention"] == pytest.approx(dense_row["perplexity"] / cut_row["perplexity"])
    (tasks,) = found["tasks"]
    assert (tasks["task"], tasks["num_examples"]) == ("last", 1)
    assert [row["name"] for row in tasks["rows"]] == ["dense", "cut"]
    assert [row["name"] for row in found["generation"]["rows"]] == ["dense", "cut"]
    assert [entry["name"] for entry in found["verdicts"]] == ["cut"]
    assert "requirements" not in found


def test_what_is_not_asked_for_is_not_measured():
    assert set(outcome(checks(generation=False))) == {"text", "rows"}


@pytest.mark.parametrize(
    ("evaluation", "error", "rule"),
    [
        ({"texts": ["gone.txt"]}, CalibrationError, "evaluation.texts is 'gone.txt'"),
        ({"tasks": ["a=gone.jsonl"]}, CalibrationError, "task a is 'gone.jsonl': it cannot be read"),
        ({"prompts": "gone.jsonl"}, ConfigurationError, "prompts is 'gone.jsonl': it cannot be read"),
    ],
)
def test_what_cannot_be_read_is_said_at_once(evaluation, error, rule):
    with pytest.raises(error, match=rule):
        checks(**evaluation)


def test_prompts_are_tried_at_once(tmp_path):
    file = tmp_path / "p.jsonl"
    turns = [{"role": role, "content": "w3"} for role in ("user", "assistant", "user")]
    file.write_text(json.dumps({"messages": turns}))
    with pytest.raises(ConfigurationError, match="it has several turns, and the tokenizer has no chat template"):
        checks(prompts=str(file))


def required(retention, kept, **evaluation):
    found = outcome(checks())
    generation = _generation(found, kept)
    return requirements(CLPConfig(evaluation=evaluation), verdicts(generation, retention), retention)


def _generation(found, kept):
    from optimum_clp.evaluation.generation import GenerationOutcome, GenerationRow

    dense = GenerationRow(**{**found["generation"]["rows"][0], "ended": 0.0, "loops": 0.0, "dense_loss": 1.0})
    rows = [dataclasses.replace(dense, name=name, dense_loss=1 - math.log(share)) for name, share in kept.items()]
    return GenerationOutcome(**{**found["generation"], "rows": (dense, *rows)})


def test_requirements_hold_for_everything_that_is_delivered():
    retention = {"dense": 1.0, "cut": 0.2, "tuned": 0.92, "onnx int4": 0.89}
    kept = {"cut": 0.1, "tuned": 0.85, "onnx int4": 0.84}
    short, met = required(retention, kept, require_retention=0.9, require_generation=0.8)
    assert (short.name, short.required, short.reached, short.row, short.met) == (
        "retention",
        0.9,
        0.89,
        "onnx int4",
        False,
    )
    assert (met.name, met.row, met.met) == ("generation", "onnx int4", True)
    assert met.reached == pytest.approx(0.84)
    assert required(retention, kept) == ()


def test_an_untuned_cut_is_what_is_delivered():
    (found,) = required({"dense": 1.0, "cut": 0.95}, {"cut": 0.5}, require_retention=0.9)
    assert (found.row, found.met) == ("cut", True)


def test_what_could_not_be_measured_is_not_met():
    (found,) = requirements(CLPConfig(evaluation={"require_retention": 0.1}), (), {"tuned": None})
    assert (found.reached, found.row, found.met) == (None, None, False)


def test_a_model_without_a_perplexity_keeps_nothing():
    broken = tiny_model()
    with torch.no_grad():
        broken.lm_head.weight.mul_(1e6)
    dense = tiny_model()
    options = {"segments": SEGMENTS, "tuned": False, "folder": None, "export": None, "quiet": True}
    found = measure_outcome(
        data(), "text", checks=checks(require_retention=0.1), dense=dense, pruned=broken, **options
    )
    (requirement,) = found["requirements"]
    assert requirement["reached"] == 0 and not requirement["met"]
