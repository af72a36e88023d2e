"""Tasks of lm-eval, asked through it; skipped where it is not installed (`make test-tasks` installs it)."""

import importlib.util
import json
import logging
import math
import os
import random

import datasets
import pytest
import torch
from tiny_models import VOCABULARY, tiny_model, tiny_tokenizer
from tiny_onnx import exported_llama

pytest.importorskip("lm_eval")
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from optimum_clp import CLPPruner
from optimum_clp.configuration.clp_config import CLPConfig
from optimum_clp.configuration.stages import EvaluationConfig
from optimum_clp.errors import CalibrationError, ConfigurationError, ModelError
from optimum_clp.evaluation import named_tasks
from optimum_clp.evaluation.deployment import DeploymentChecks
from optimum_clp.evaluation.harness_model import HarnessModel
from optimum_clp.evaluation.outcome import measure_outcome
from optimum_clp.evaluation.tasks import evaluate_task, evaluate_tasks, load_task, load_tasks
from optimum_clp.runtime.causal_lm import OnnxCausalLM
from optimum_clp.segments import LayerSegment

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ 'w3 ' if m['role'] == 'user' else 'w4 ' }}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w4 {% endif %}"
)
DEFINITIONS = {
    "choices": r"""
output_type: multiple_choice
doc_to_text: "{{query}}\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
tag: [both]
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "words": """
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{' ' + continuation}}"
tag: [both]
metric_list: [{metric: acc}, {metric: perplexity}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
    "written": r"""
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{continuation}}"
num_fewshot: 2
generation_kwargs: {until: [w9], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - {name: first, filter: [{function: regex, regex_pattern: "(w[0-9]+)"}, {function: take_first}]}
  - {name: whole, filter: [{function: take_first}]}
""",
    "zero": """
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{' ' + continuation}}"
num_fewshot: 0
metric_list: [{metric: acc}]
""",
}
GROUP = """
group: all_of_them
task: [choices, words]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 2.0}
"""


def some_words(rng, count):
    return " ".join(f"w{rng.randrange(3, VOCABULARY)}" for _ in range(count))


def choice_rows(count=24, seed=1):
    rng, rows = random.Random(seed), []
    for _ in range(count):
        choices = [
            some_words(rng, rng.randrange(1, 6)) + rng.choice(["", "é", "ééé"]) for _ in range(rng.choice([2, 4]))
        ]
        rows.append(
            {"query": f"Question: {some_words(rng, 5)}", "choices": choices, "gold": rng.randrange(len(choices))}
        )
    return rows


def word_rows(model, count=24, seed=0):
    """Every other word is the model's own; the longest contexts are longer than the model takes."""
    rng, tokenizer, rows = random.Random(seed), tiny_tokenizer(), []
    for index in range(count):
        context = some_words(rng, rng.randrange(1, 160 if index % 5 == 4 else 30))
        with torch.no_grad():
            ids = torch.tensor([tokenizer(context)["input_ids"][-128:]])
            best = model(ids).logits[0, -1, 3:].argmax().item() + 3
        rows.append({"context": context, "continuation": f"w{best}" if index % 2 else some_words(rng, 1)})
    return rows


def write_definitions(folder, definitions=DEFINITIONS):
    files = {"choices": choice_rows(), "words": word_rows(tiny_model())}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, definition in definitions.items():
        file = folder / f"{'choices' if name == 'choices' else 'words'}.jsonl"
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\nfewshot_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {folder / 'cache'}}}\n{definition}"
        )
    (folder / "group.yaml").write_text(GROUP)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_definitions(tmp_path_factory.mktemp("definitions"))


def loaded(folder, *names, **settings):
    return load_tasks(list(names), EvaluationConfig(tasks_dir=str(folder), **settings))


def by_lm_eval(folder, model, tokenizer, names, monkeypatch, **settings):
    """lm-eval's own adapter and its own front: what a user of lm-eval would be told."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    return simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=list(names),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=100,
        log_samples=False,
        **settings,
    )["results"]


def chat_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.mark.parametrize("settings", [{}, {"num_fewshot": 3}, {"apply_chat_template": True, "num_fewshot": 2}])
def test_figures_are_those_of_lm_eval(settings, folder, monkeypatch):
    model, tokenizer = tiny_model(), chat_tokenizer()
    names = list(DEFINITIONS) if not settings else ["choices", "words", "written", "zero"]
    theirs = by_lm_eval(folder, model, chat_tokenizer(), names, monkeypatch, **settings)
    for task in loaded(folder, *names, **settings):
        score = evaluate_task(model, tokenizer, task, batch_size=5, quiet=True)
        expected = {key: value for key, value in theirs[task.name].items() if "," in key and value != "N/A"}
        assert known(score) == pytest.approx(expected, rel=1e-5)
        assert score.num_examples == 24 and score.lm_eval.version == named_tasks.lm_eval.__version__
        shots = {"zero": 0, "written": 2}.get(task.name, 0)
        expected_shots = settings.get("num_fewshot", shots) if task.name != "zero" else 0
        assert score.lm_eval.num_fewshot == expected_shots
    assert settings or 0.2 < theirs["words"]["acc,none"] < 0.8, "the figures are neither 0 nor 1"
    assert not settings or theirs["words"]["perplexity,none"] != pytest.approx(zero_shot(folder, model), rel=1e-3)


def known(score):
    return {key: value for key, value in score.metrics.items() if value is not None}


def zero_shot(folder, model):
    return evaluate_task(model, tiny_tokenizer(), loaded(folder, "words")[0], quiet=True).perplexity


def test_the_headline_of_a_task_is_its_accuracy(folder):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    scores = {task.name: evaluate_task(model, tokenizer, task, quiet=True) for task in loaded(folder, *DEFINITIONS)}
    choices, words, rolling = scores["choices"], scores["words"], scores["rolling"]
    assert (choices.lm_eval.metric, choices.accuracy) == ("acc_norm", choices.metrics["acc_norm,none"])
    assert choices.plain_accuracy == choices.metrics["acc,none"] != choices.accuracy
    assert choices.accuracy_stderr == choices.metrics["acc_norm_stderr,none"]
    sizes = [len(row["choices"]) for row in choice_rows()]
    assert choices.chance == pytest.approx(sum(1 / size for size in sizes) / len(sizes))
    assert (words.lm_eval.metric, words.chance, words.perplexity) == ("acc", 0.0, words.metrics["perplexity,none"])
    assert scores["written"].lm_eval.metric == "exact_match,first"
    assert scores["written"].accuracy == scores["written"].metrics["exact_match,first"]
    assert (rolling.accuracy, rolling.accuracy_stderr, rolling.plain_accuracy) == (None, None, None)
    assert rolling.perplexity == rolling.metrics["word_perplexity,none"] > 10
    json.dumps([score.to_dict() for score in scores.values()], allow_nan=False)


def test_a_file_and_lm_evals_definition_of_it_have_the_same_figures(folder):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    for task in loaded(folder, "choices", "words"):
        by_name = evaluate_task(model, tokenizer, task, quiet=True)
        from_file = evaluate_task(model, tokenizer, load_task("t", folder / f"{task.name}.jsonl"), quiet=True)
        for figure in ("accuracy", "plain_accuracy", "chance", "num_examples"):
            assert getattr(by_name, figure) == pytest.approx(getattr(from_file, figure), abs=1e-12)
        assert by_name.accuracy_stderr == pytest.approx(from_file.accuracy_stderr, rel=1e-9)
        assert by_name.perplexity == from_file.perplexity or by_name.perplexity == pytest.approx(from_file.perplexity)


def test_an_onnx_file_is_asked_like_the_pytorch_model(folder):
    exported = exported_llama()
    onnx, tokenizer = OnnxCausalLM.from_pretrained(exported.folder), tiny_tokenizer()
    for task in loaded(folder, *DEFINITIONS):
        ours, expected = (evaluate_task(m, tokenizer, task, quiet=True) for m in (onnx, exported.model))
        assert known(ours) == pytest.approx(known(expected), rel=1e-4)
        assert ours.lm_eval == expected.lm_eval


def test_limit_takes_the_first_examples_and_the_batch_size_does_not_matter(folder):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    (task,) = loaded(folder, "written")
    few = evaluate_task(model, tokenizer, task, limit=5, quiet=True)
    assert few.num_examples == 5
    one, many = (evaluate_task(model, tokenizer, task, batch_size=size, quiet=True) for size in (1, 24))
    assert one.metrics == pytest.approx(many.metrics)


def test_every_model_is_asked_the_same(folder, monkeypatch):
    asked = []

    def generate_until(self, requests, disable_tqdm=False):
        asked.append([request.args[0] for request in requests])
        return ["w5"] * len(requests)

    monkeypatch.setattr(HarnessModel, "generate_until", generate_until)
    (task,) = loaded(folder, "written", num_fewshot=3)
    for model in (tiny_model(), tiny_model(seed=2), tiny_model()):
        evaluate_task(model, tiny_tokenizer(), task, quiet=True)
    assert asked[0] == asked[1] == asked[2]
    assert len(asked[0]) == 24 and all(prompt.count("\n\n") == 3 for prompt in asked[0])


def test_nothing_of_the_process_is_left_changed(folder, monkeypatch, capsys):
    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    model, tokenizer = tiny_model().train(), tiny_tokenizer()
    tokenizer.pad_token = None
    random.seed(7), torch.manual_seed(7)
    before = random.getstate(), torch.get_rng_state(), logging.getLogger("lm_eval").level
    weights = {name: (weight, weight.clone()) for name, weight in model.named_parameters()}
    for task in loaded(folder, "written", "words"):
        evaluate_task(model, tokenizer, task, quiet=True)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert logging.getLogger("lm_eval").level == before[2] and "DISABLE_MULTIPROC" not in os.environ
    assert model.training and all(module.training for module in model.modules())
    assert all(w is weights[n][0] and torch.equal(w, weights[n][1]) for n, w in model.named_parameters())
    assert tokenizer.pad_token is None and len(tokenizer) == len(tiny_tokenizer())
    captured = capsys.readouterr()
    assert captured.out == "" and "contexts" not in captured.err and "bootstrapping" not in captured.err


def test_progress_is_told_while_lm_evals_own_is_dropped(folder, monkeypatch, capsys):
    monkeypatch.setattr("optimum_clp.progress._DELAY", -1.0)
    for task in loaded(folder, "choices", "written", "rolling"):
        evaluate_task(tiny_model(), tiny_tokenizer(), task, limit=2)
    said = capsys.readouterr().err
    assert "Task choices: done" in said and "Task written: done" in said
    assert "Task rolling: done" in said and "it/s" not in said


def test_a_tag_stands_for_its_tasks_and_a_group_for_itself(folder):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    assert sorted(task.name for task in loaded(folder, "both")) == ["choices", "words"]
    (group,) = loaded(folder, "all_of_them")
    score = evaluate_task(model, tokenizer, group, quiet=True)
    each = [evaluate_task(model, tokenizer, task, quiet=True) for task in loaded(folder, "choices", "words")]
    assert (score.name, score.num_examples) == ("all_of_them", 48)
    assert score.accuracy == pytest.approx(sum(part.metrics["acc,none"] for part in each) / 2)
    assert score.chance == pytest.approx(sum(part.chance for part in each) / 2)
    assert score.lm_eval.task_version == "2.0"
    with pytest.raises(ConfigurationError, match="tasks is 'choices': it is measured twice. Name each task once"):
        loaded(folder, "both", "choices")


def test_tasks_by_name_and_in_files_stand_beside_each_other(folder):
    dense, other, tokenizer = tiny_model(), tiny_model(seed=3), tiny_tokenizer()
    tasks = loaded(folder, f"mine={folder / 'words.jsonl'}", "words", "rolling")
    found = evaluate_tasks(other, dense, tokenizer, tasks, quiet=True)
    assert list(found) == ["mine", "words", "rolling"]
    assert found["mine"]["dense_accuracy"] == pytest.approx(found["words"]["dense_accuracy"])
    assert found["words"]["retention"] == pytest.approx(found["words"]["accuracy"] / found["words"]["dense_accuracy"])
    assert found["words"]["dense_metrics"]["acc,none"] == found["words"]["dense_accuracy"]
    assert found["rolling"]["retention"] is None and "dense_metrics" not in found["mine"]
    pruner = CLPPruner(dense, tokenizer, CLPConfig(evaluation={"tasks_dir": str(folder)}), quiet=True)
    alone = pruner.evaluate(tasks=["words"], task_limit=20)
    assert alone["tasks"]["words"]["num_examples"] == 20 and alone["tasks"]["words"]["retention"] == 1


def test_the_report_has_every_row(folder, tmp_path):
    dense = tiny_model()
    evaluation = {"tasks": ["choices", "rolling"], "tasks_dir": str(folder), "task_limit": 6, "generation": False}
    config = CLPConfig(evaluation=evaluation)
    exported = exported_llama()
    export = {"files": [{"weights": "float32", "file": "onnx/model.onnx", "bytes": 1}]}
    from optimum_clp.calibration.rows import CalibrationData

    rows = torch.arange(3, 3 + 16).repeat(2, 1)
    found = measure_outcome(
        CalibrationData(rows, rows, rows, "text"),
        "text",
        checks=DeploymentChecks(config, tiny_tokenizer(), dense.config, quiet=True),
        dense=dense,
        pruned=exported.model,
        segments=(LayerSegment(2, 4),),
        tuned=False,
        folder=exported.folder,
        export=export,
        quiet=True,
    )
    choices, rolling = found["tasks"]
    assert [row["name"] for row in choices["rows"]] == ["dense", "cut", "onnx"]
    assert choices["lm_eval"]["metric"] == "acc_norm" and choices["num_examples"] == 6
    assert choices["rows"][1]["accuracy"] == pytest.approx(choices["rows"][2]["accuracy"])
    assert rolling["rows"][1]["metrics"]["word_perplexity,none"] == pytest.approx(
        rolling["rows"][2]["metrics"]["word_perplexity,none"], rel=1e-4
    )
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "wordz",
            ConfigurationError,
            r"task is 'wordz': lm-eval [\d.]+ has no task, group or tag of this name. It has .*words",
        ),
        (
            "hub",
            CalibrationError,
            r"task is 'hub': its data is not in the cache, and HF_HUB_OFFLINE is set \(.*nobody/nothing.*\). Let it be fetched",
        ),
        (
            "needy",
            CalibrationError,
            "task is 'needy': it needs the package no_such_package, which is not installed. pip install no_such",
        ),
        ("gone", CalibrationError, r"task is 'gone': lm-eval [\d.]+ cannot measure it \(FileNotFoundError: "),
    ],
)
def test_what_cannot_be_had_is_said_when_it_is_read(name, error, message, tmp_path, monkeypatch):
    monkeypatch.setattr(named_tasks.constants, "HF_HUB_OFFLINE", True)
    write_definitions(tmp_path, {"words": DEFINITIONS["words"]})
    for task, data in (
        ("hub", "nobody/nothing"),
        ("needy", "json"),
        ("gone", "json\ndataset_kwargs: {data_files: {test: gone.jsonl}}"),
    ):
        process = "process_docs: !function helpers.process\n" if task == "needy" else ""
        text = f"task: {task}\ndataset_path: {data}\ntest_split: test\n{process}{DEFINITIONS['zero']}"
        (tmp_path / f"{task}.yaml").write_text(text)
    (tmp_path / "helpers.py").write_text("import no_such_package\n\n\ndef process(docs):\n    return docs\n")
    if name == "wordz":
        # the definitions that lm-eval brings take seconds to read
        only_own = TaskManager(include_path=str(tmp_path), include_defaults=False)
        monkeypatch.setattr(named_tasks, "TaskManager", lambda **_: only_own)
    with pytest.raises(error, match=message):
        loaded(tmp_path, name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"task: mine\nx: [1, 2\n", r"of this name, and mine.yaml in your folder cannot be read \("),
        (b"task: mine\n# \xe9\n", r"of this name, and mine.yaml in your folder cannot be read \("),
        (b"- task: mine\n", "of this name, and mine.yaml in your folder holds no settings"),
    ],
)
def test_a_definition_that_lm_eval_passes_over_is_named(content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(named_tasks.constants, "HF_HUB_OFFLINE", True)
    write_definitions(tmp_path, {"needy": "x: !function helpers.process\n"})
    (tmp_path / "mine.yaml").write_bytes(content)
    only_own = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(named_tasks, "TaskManager", lambda **_: only_own)
    with pytest.raises(ConfigurationError, match=message):
        loaded(tmp_path, "mine")


def test_a_hub_that_cannot_be_reached_is_an_error_at_once(tmp_path, monkeypatch):
    class Session:
        def head(self, address, timeout):
            assert timeout <= 10
            raise OSError("Name or service not known")

    monkeypatch.setattr(named_tasks.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(named_tasks, "get_session", Session)
    (tmp_path / "hub.yaml").write_text(
        f"task: hub\ndataset_path: nobody/nothing\ntest_split: t\n{DEFINITIONS['zero']}"
    )
    rule = r"task is 'hub': its data is on the Hugging Face Hub, which could not be reached \(Name or service not known\). "
    with pytest.raises(
        CalibrationError, match=f"{rule}With HF_HUB_OFFLINE=1 a copy in the cache is read; for data of"
    ):
        loaded(tmp_path, "hub")
    (tmp_path / "group.yaml").write_text("group: some\ntask: [hub]\n")
    with pytest.raises(CalibrationError, match="task is 'some': its data is on the Hugging Face Hub"):
        loaded(tmp_path, "some")


def test_data_in_files_needs_no_hub(folder, monkeypatch):
    monkeypatch.setattr(named_tasks.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(named_tasks, "get_session", lambda: pytest.fail("the Hub was asked"))
    assert [task.name for task in loaded(folder, "words", "all_of_them")] == ["words", "all_of_them"]
    assert [task.name for task in loaded(folder, "both")] == ["choices", "words"]


def test_a_folder_of_definitions_must_be_there():
    with pytest.raises(
        ConfigurationError, match="evaluation.tasks_dir is 'gone': there is no such folder. Give a fol"
    ):
        loaded("gone", "words")


def test_a_chat_template_must_be_there(folder):
    tasks = loaded(folder, "words", apply_chat_template=True)
    rule = "evaluation.apply_chat_template is True: the questions of words are to be put through the tokenizer's chat"
    with pytest.raises(ConfigurationError, match=rule):
        evaluate_task(tiny_model(), tiny_tokenizer(), tasks[0], quiet=True)
    evaluation = {"tasks": ["words"], "tasks_dir": str(folder), "apply_chat_template": True}
    with pytest.raises(ConfigurationError, match=rule):
        DeploymentChecks(CLPConfig(evaluation=evaluation), tiny_tokenizer(), tiny_model().config, quiet=True)


def test_a_model_that_gives_nan_has_no_accuracy(folder):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(ModelError, match="it gives NaN for an example of the task choices"):
        evaluate_task(model, tiny_tokenizer(), loaded(folder, "choices")[0], quiet=True)


def test_what_lm_eval_refuses_names_the_task(tmp_path):
    long = DEFINITIONS["written"].replace("max_gen_toks: 12", "max_gen_toks: 500")
    unsafe = DEFINITIONS["zero"] + "unsafe_code: true\n"
    write_definitions(tmp_path, {"words": DEFINITIONS["words"], "unsafe": unsafe, "long": long})
    for name, message in (
        ("unsafe", r"\(ValueError: .*unsafe"),
        ("long", r"\(AssertionError: .*tokens to generate \(500\) must be less than .* \(128\)"),
    ):
        with pytest.raises(CalibrationError, match=rf"task is '{name}': lm-eval [\d.]+ cannot measure it {message}"):
            evaluate_task(tiny_model(), tiny_tokenizer(), loaded(tmp_path, name)[0], quiet=True)


def data_of(path, name=None, **_):
    """A few rows in the shape of a dataset of the Hub, instead of it."""
    rng = random.Random(4)

    def text():
        return some_words(rng, 4)

    rows = {
        "baber/piqa": lambda: {"goal": text(), "sol1": text(), "sol2": text(), "label": rng.randrange(2)},
        "allenai/ai2_arc": lambda: {
            "question": text(),
            "choices": {"text": [text() for _ in range(4)], "label": list("ABCD")},
            "answerKey": rng.choice("ABCD"),
        },
        "Rowan/hellaswag": lambda: {
            "ctx_a": text(),
            "ctx_b": text(),
            "activity_label": text(),
            "endings": [text() for _ in range(4)],
            "label": str(rng.randrange(4)),
        },
        "openai/gsm8k": lambda: {"question": text(), "answer": f"{text()} #### {rng.randrange(9)}"},
        "google/IFEval": lambda: {
            "key": 1,
            "prompt": text(),
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
        },
    }[path]
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list([rows() for _ in range(8)]) for split in ("train", "validation", "test")}
    )


def test_the_tasks_that_lm_eval_brings_are_asked_as_it_asks_them(monkeypatch):
    """Its own definitions by its names; their data, which the Hub has, is put in place."""
    monkeypatch.setattr(named_tasks.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", data_of)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    names = ["piqa", "arc_easy", "hellaswag", "gsm8k"] + ["ifeval"] * (
        importlib.util.find_spec("langdetect") is not None
    )
    model, tokenizer = tiny_model(max_position_embeddings=2048), tiny_tokenizer()
    # one manager for both: it takes seconds to make
    manager = TaskManager()
    monkeypatch.setattr(named_tasks, "TaskManager", lambda **_: manager)
    theirs = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2),
        tasks=names,
        task_manager=manager,
        limit=2,
        bootstrap_iters=100,
        log_samples=False,
    )
    scores = [evaluate_task(model, tokenizer, task, limit=2, quiet=True) for task in load_tasks(names)]
    for score in scores:
        expected = {k: v for k, v in theirs["results"][score.name].items() if "," in k and v != "N/A"}
        assert known(score) == pytest.approx(expected, rel=1e-5)
        assert score.lm_eval.num_fewshot == theirs["n-shot"][score.name]
    assert [(score.lm_eval.metric, score.lm_eval.num_fewshot, score.chance) for score in scores][: len(names)] == [
        ("acc_norm", 0, 0.5),
        ("acc_norm", 0, 0.25),
        ("acc_norm", 0, 0.25),
        ("exact_match,strict-match", 5, 0.0),
        ("prompt_level_strict_acc", 0, 0.0),
    ][: len(names)]
    arc = scores[1].lm_eval
    assert (arc.dataset, arc.dataset_config, arc.split) == ("allenai/ai2_arc", "ARC-Easy", "test")
    with pytest.raises(ConfigurationError, match="task is 'pika': .* of this name. It has .*piqa"):
        load_tasks(["pika"])
