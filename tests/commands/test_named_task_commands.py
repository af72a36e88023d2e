"""`evaluate` and `prune` with tasks of lm-eval, really through it; skipped where it is not installed (`make test-tasks`)."""

import json

import pytest
from tiny_models import random_tokens, tiny_model, tiny_tokenizer

pytest.importorskip("lm_eval")
from optimum_clp.commands.clp import main

DEFINITION = r"""
task: mine
dataset_path: json
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{query}}\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A current folder with a dense model, a definition of a task in `own`, and its rows as a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("optimum_clp.evaluation.outcome.NEW_TOKENS", 3)
    tiny_model(tie_word_embeddings=True).save_pretrained("dense")
    tiny_tokenizer().save_pretrained("dense")
    texts = [" ".join(f"w{i}" for i in row) for row in random_tokens(30, 4).tolist()]
    rows = [
        {"query": f"Question: {text}", "choices": texts[i : i + 2], "gold": i % 2} for i, text in enumerate(texts[:20])
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own").mkdir()
    data = f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}, cache_dir: {tmp_path / 'data'}}}"
    (tmp_path / "own" / "mine.yaml").write_text(f"{DEFINITION}{data}\n")
    return tmp_path


def call(line, capsys):
    status = main(line.split())
    out, err = capsys.readouterr()
    return status, out, err


def test_evaluate_measures_a_task_by_its_name(workplace, capsys):
    line = "evaluate -m dense --tasks mine --tasks-dir own --num-fewshot 2 --limit 12 --batch-size 4 --quiet"
    status, out, err = call(f"{line} --json", capsys)
    assert (status, err) == (0, "")
    found = json.loads(out)["tasks"]["mine"]
    assert found["num_examples"] == 12 and found["lm_eval"]["num_fewshot"] == 2
    assert found["accuracy"] == found["metrics"]["acc_norm,none"]
    status, out, err = call(line, capsys)
    head, row, *words = out.splitlines()
    assert words and all(line.startswith("  ") for line in words)
    assert head.split()[:5] == ["task", "metric", "shots", "examples", "accuracy"]
    assert row.split()[:4] == ["mine", "acc_norm", "2", "12"] and row.split()[4] == f"{found['accuracy']:.4f}"


def test_prune_measures_models_and_files_and_the_card_says_it(workplace, capsys):
    fast = (
        "--pruning-ratio 0.33 --sequence-length 24 --train-sequences 8 --validation-sequences 2 --test-sequences 2 "
        "--search-sequences 4 --no-tune --group-size 16 --no-generation --quiet"
    )
    line = f"prune -m dense {fast} --text-cache-dir {workplace / 'cache'} --tasks-dir own --tasks mine file=rows.jsonl --limit 9 out"
    status, out, err = call(f"{line} --json", capsys)
    assert (status, err) == (0, "")
    mine, file = json.loads(out)["evaluation"]["tasks"]
    names = ["dense", "cut", "onnx", "onnx int8", "onnx int4"]
    assert [row["name"] for row in mine["rows"]] == names
    for by_name, from_file in zip(mine["rows"], file["rows"], strict=True):
        assert by_name["plain_accuracy"] == pytest.approx(from_file["plain_accuracy"])
    card = (workplace / "out" / "README.md").read_text()
    assert "name: Accuracy (acc_norm), 0-shot" in card and "| mine | onnx int4 | acc_norm | 0 |" in card
    status, out, err = call(
        "evaluate -m out --file onnx/model_q4.onnx --tasks mine --tasks-dir own --limit 9 --quiet --json", capsys
    )
    assert status == 0
    assert json.loads(out)["tasks"]["mine"]["metrics"] == pytest.approx(mine["rows"][-1]["metrics"], rel=1e-4)


@pytest.mark.parametrize("command", ["evaluate --tasks hub", "prune --tasks hub out", "tune --tasks hub out"])
def test_what_is_not_to_be_had_is_said_before_the_model_is_loaded(command, workplace, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    definition = DEFINITION.replace("task: mine", "task: hub").replace("path: json", "path: nobody/nothing")
    (workplace / "own" / "hub.yaml").write_text(definition)
    # were the model looked for, there would be another error
    status, out, err = call(f"{command} --tasks-dir own -m no/such/model", capsys)
    (line,) = [line for line in err.splitlines() if line.startswith("optimum-clp: error: ")]
    assert (status, out) == (1, "")
    assert (
        "error: task is 'hub': its data is not in the cache, and HF_HUB_OFFLINE is set (Couldn't reach 'nobody/n"
        in line
    )
    assert not (workplace / "out").exists()
