import json
import math
import random
import re
import statistics
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny_models import VOCABULARY, make_identity, tiny_model, tiny_tokenizer
from tiny_onnx import exported_llama

from optimum_clp import CLPPruner, LayerSegment
from optimum_clp.errors import CalibrationError, ConfigurationError, ModelError
from optimum_clp.evaluation.scores import TaskScore, task_retention
from optimum_clp.evaluation.tasks import Example, Task, evaluate_task, evaluate_tasks, load_task, load_tasks
from optimum_clp.runtime.causal_lm import OnnxCausalLM

CHARACTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789\n.,:?!'é"


def character_tokenizer(bos=False):
    """One token a character, so that no white space gets lost; `bos` puts `<s>` before every text."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{c: i for i, c in enumerate(CHARACTERS, 3)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def words(rng, count):
    return " ".join(f"w{rng.randrange(3, VOCABULARY)}" for _ in range(count))


def last_word_rows(model, count=24, seed=0):
    """Every other word is the model's own, so that about half are found."""
    rng, tokenizer, rows = random.Random(seed), tiny_tokenizer(), []
    for index in range(count):
        context = words(rng, rng.randrange(1, 30))
        with torch.no_grad():
            best = model(torch.tensor([tokenizer(context)["input_ids"]])).logits[0, -1, 3:].argmax().item() + 3
        rows.append({"context": context, "continuation": f"w{best}" if index % 2 else words(rng, 1)})
    return rows


def choice_rows(count=40, seed=1):
    rng, rows = random.Random(seed), []
    for _ in range(count):
        choices = [words(rng, rng.randrange(1, 6)) + rng.choice(["", "é", "ééé"]) for _ in range(rng.choice([2, 4]))]
        query = "Question: " + words(rng, rng.randrange(1, 12)) + rng.choice(["", "\n"])
        rows.append({"query": query, "choices": choices, "gold": rng.randrange(len(choices))})
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def figures(score):
    return {key: value for key, value in score.to_dict().items() if isinstance(value, float)}


def naive(model, context, continuation, tokenizer):
    """Log-likelihood of ` continuation`, and whether it is the greedy one, in float64 and without padding."""
    ids = tokenizer(f"{context} {continuation}")["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    scored = range(start, len(ids))
    return sum(logs[i - 1, ids[i]].item() for i in scored), all(logs[i - 1].argmax() == ids[i] for i in scored)


class Recorder:
    """A model that gives zero logits and keeps what it was called with."""

    def __init__(self, length=128, **config):
        config = {"vocab_size": VOCABULARY, "max_position_embeddings": length, **config}
        self.config = SimpleNamespace(**{key: value for key, value in config.items() if value is not None})
        self.config.get_text_config = lambda decoder: self.config
        self.inputs = []

    def __call__(self, input_ids, attention_mask, use_cache):
        assert use_cache is False
        self.inputs += [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCABULARY))


def scored(context, continuation, tokenizer, **model):
    """The input ids of one example, and how many tokens were scored."""
    recorder = Recorder(**model)
    score = evaluate_task(recorder, tokenizer, Task("t", (Example(context, (continuation,)),)), quiet=True)
    return recorder.inputs[0], round(math.log(score.perplexity) / math.log(VOCABULARY))


def characters(text):
    return [CHARACTERS.index(c) + 3 for c in text]


def test_last_words_match_a_naive_computation():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    rows = last_word_rows(model)
    score = evaluate_task(model, tokenizer, load_task("lambada", rows), quiet=True)
    expected = [naive(model, row["context"], row["continuation"], tokenizer) for row in rows]
    right = [float(greedy) for _, greedy in expected]
    assert 0.4 < statistics.fmean(right) < 0.7
    assert score.accuracy == score.plain_accuracy == statistics.fmean(right)
    assert score.perplexity == pytest.approx(math.exp(-statistics.fmean(logs for logs, _ in expected)), rel=1e-5)
    assert (score.name, score.chance, score.num_examples) == ("lambada", 0.0, len(rows))


def test_choices_match_a_naive_computation():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    rows = choice_rows()
    score = evaluate_task(model, tokenizer, load_task("any name", rows), quiet=True)
    plain, by_character, by_byte = [], [], []
    for row in rows:
        prompt = row["query"].strip() + "\nAnswer:"
        logs = torch.tensor([naive(model, prompt, c, tokenizer)[0] for c in row["choices"]], dtype=torch.float64)
        characters = torch.tensor([float(len(c)) for c in row["choices"]])
        size = torch.tensor([float(len(c.encode())) for c in row["choices"]])
        plain.append(int(logs.argmax()) == row["gold"])
        by_character.append(int((logs / characters).argmax()) == row["gold"])
        by_byte.append(int((logs / size).argmax()) == row["gold"])
    assert score.accuracy == pytest.approx(statistics.fmean(by_character))
    assert score.plain_accuracy == pytest.approx(statistics.fmean(plain))
    assert len({sum(plain), sum(by_character), sum(by_byte)}) == 3, "the rows tell the three measures apart"
    assert score.chance == pytest.approx(statistics.fmean(1 / len(row["choices"]) for row in rows))
    assert score.perplexity is None


def test_the_standard_error_is_that_of_a_sample():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    task = load_task("t", choice_rows())
    score = evaluate_task(model, tokenizer, task, quiet=True)
    n, p = score.num_examples, score.accuracy
    right = torch.tensor([1.0] * round(n * p) + [0.0] * (n - round(n * p)), dtype=torch.float64)
    assert score.accuracy_stderr == pytest.approx(right.std(correction=1).item() / math.sqrt(n), rel=1e-12)
    assert evaluate_task(model, tokenizer, task, limit=1, quiet=True).accuracy_stderr is None


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_the_batch_size_does_not_matter(model_type):
    model, tokenizer = tiny_model(model_type), tiny_tokenizer()
    for rows in (last_word_rows(model), choice_rows()):
        task = load_task("t", rows)
        one, some, all_ = (evaluate_task(model, tokenizer, task, batch_size=b, quiet=True) for b in (1, 7, 1000))
        for other in (some, all_):
            assert figures(other) == pytest.approx(figures(one), rel=1e-5)


def test_choices_of_one_token_are_one_row():
    recorder, tokenizer = Recorder(), tiny_tokenizer()
    rows = [
        {"query": "w3 w4", "choices": ["w5", "w6", "w7 w8"], "gold": 0},
        {"query": "w3", "choices": ["w5", "w6"], "gold": 1},
    ]
    score = evaluate_task(recorder, tokenizer, load_task("t", rows), quiet=True)
    assert sorted(recorder.inputs) == [[3], [3, 4], [3, 4, 7]]
    assert (score.plain_accuracy, score.num_examples) == (0.5, 2), "of equal likelihoods the first counts"


def test_an_onnx_file_scores_as_the_pytorch_model():
    exported = exported_llama()
    onnx = OnnxCausalLM.from_pretrained(exported.folder)
    for rows in (last_word_rows(exported.model), choice_rows()):
        task = load_task("t", rows)
        ours, expected = (evaluate_task(m, tiny_tokenizer(), task, quiet=True) for m in (onnx, exported.model))
        assert figures(ours) == pytest.approx(figures(expected), rel=1e-4)


def test_limit_takes_the_first_examples():
    model, tokenizer, rows = tiny_model(), tiny_tokenizer(), choice_rows()
    limited = evaluate_task(model, tokenizer, load_task("t", rows), limit=9, quiet=True)
    assert limited == evaluate_task(model, tokenizer, load_task("t", rows[:9]), quiet=True)
    assert limited.num_examples == 9
    assert evaluate_task(model, tokenizer, load_task("t", rows), limit=999, quiet=True).num_examples == len(rows)


@pytest.mark.parametrize(
    ("query", "prompt"),
    [
        ("Question: why?", "Question: why?\nAnswer:"),
        ("Question: why?\n", "Question: why?\nAnswer:"),
        ("Question: why? \n", "Question: why? \nAnswer:"),
        ("Question: why?\nAnswer:", "Question: why?\nAnswer:"),
        ("She went to", "She went to"),
    ],
)
def test_questions_are_asked_as_lm_eval_asks_them(query, prompt):
    (example,) = load_task("t", [{"query": query, "choices": ["a", "b"], "gold": 1, "id": 7}]).examples
    assert example == Example(prompt, ("a", "b"), 1)


@pytest.mark.parametrize(
    ("context", "continuation", "length"),
    [
        ("ab", "cd", 3),
        ("ab", " cd", 3),
        ("ab ", "cd", 3),
        ("ab\n", "cd", 4),
        ("ab", "\ncd", 4),
    ],
)
def test_white_space_between_is_scored_with_the_continuation(context, continuation, length):
    space = "" if context.endswith(" ") or continuation.startswith(" ") else " "
    ids, count = scored(context, continuation, character_tokenizer())
    assert ids == characters(context + space + continuation)[:-1] and count == length


def test_special_tokens_are_those_that_the_tokenizer_adds():
    assert scored("ab", "c", character_tokenizer()) == (characters("ab "), 2)
    assert scored("ab", "c", character_tokenizer(bos=True)) == ([1, *characters("ab ")], 2)
    ids, count = scored("<s>ab", "c", character_tokenizer(bos=True))
    assert ids == [1, *characters("ab ")] and count == 2, "the text brings its own"


@pytest.mark.parametrize("bos", [False, True])
def test_an_empty_context_is_the_bos_token(bos):
    assert scored("", "cd", character_tokenizer(bos)) == ([1, *characters(" c")], 3)
    assert scored("\n", "c", character_tokenizer(bos)) == ([1, *characters("\n ")], 3)
    tokenizer = character_tokenizer(bos)
    tokenizer.bos_token = None
    assert scored("", "cd", tokenizer)[0] == [2, *characters(" c")]


def test_a_context_that_is_too_long_loses_its_beginning():
    text, tokenizer = "abcdefghijklmnop", character_tokenizer(bos=True)
    for length in (3, 5, 17):
        # the last token is only predicted, so the model sees one token less than is kept
        assert scored(text, "yz", tokenizer, length=length) == (([1, *characters(text + " y")])[-length:], 3)
    assert scored(text, "yz", tokenizer, length=99)[0] == [1, *characters(text + " y")]


def test_the_length_is_looked_for_as_lm_eval_does():
    text, tokenizer = "abcdefgh" * 400, character_tokenizer()

    def seen(**config):
        return len(scored(text, "z", tokenizer, **config)[0])

    assert seen(length=30, n_positions=20, n_ctx=10) == 20
    assert seen(length=None, n_ctx=10) == 10
    assert seen(length=None) == 2048
    tokenizer.model_max_length = 40
    assert seen(length=None) == 40 and seen(length=50) == 50


def test_a_file_may_have_blank_lines_and_a_byte_order_mark(tmp_path):
    rows = choice_rows(2)
    path = tmp_path / "t.jsonl"
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    assert load_task("t", path) == load_task("t", str(path)) == load_task("t", rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "task t is '.*t.jsonl': it cannot be read (No such file or directory). Give a JSON lines file."),
        (b"\xff\xfe", "task t is '.*t.jsonl': it is not UTF-8 text (invalid start byte). Convert it to UTF-8"),
        (b"", "task t is '.*t.jsonl': it is empty: there are no examples in it. Give rows that are"),
        (
            b"\n{",
            "task t is '.*t.jsonl': line 2 is not valid JSON (Expecting property name enclosed in double quotes).",
        ),
    ],
)
def test_a_file_that_cannot_be_read(content, message, tmp_path):
    if content is not None:
        (tmp_path / "t.jsonl").write_bytes(content)
    with pytest.raises(CalibrationError, match=re.escape(message).replace(r"\.\*", ".*")):
        load_task("t", tmp_path / "t.jsonl")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(CalibrationError, match=r"it cannot be read \(Is a directory\)"):
        load_task("t", tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q", "choices": ["a", "b"]}, "has the keys ['choices', 'query']"),
        ({"text": "a b"}, "has the keys ['text']"),
        ({}, "has the keys []"),
        (["a", "b"], "is not an object"),
        ({"query": None, "choices": ["a", "b"], "gold": 0}, "has a query that is not a string"),
        ({"query": "q", "choices": "ab", "gold": 0}, "has choices that are not two or more strings with text in them"),
        ({"query": "q", "choices": ["a"], "gold": 0}, "has choices that are not two or more strings"),
        ({"query": "q", "choices": ["a", ""], "gold": 0}, "has choices that are not two or more strings"),
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, "has 2 as gold, which is no index of its 2 choices (0 is"),
        ({"query": "q", "choices": ["a", "b"], "gold": -1}, "has -1 as gold"),
        ({"query": "q", "choices": ["a", "b"], "gold": "1"}, "has '1' as gold"),
        ({"query": "q", "choices": ["a", "b"], "gold": True}, "has True as gold"),
        ({"context": 3, "continuation": "a"}, "has a context or continuation that is not a string"),
        ({"context": "a", "continuation": " "}, "has an empty continuation"),
    ],
)
def test_a_row_that_is_no_example_is_named(row, message, tmp_path):
    good = {"query": "q", "choices": ["a", "b"], "gold": 1}
    ending = 'Give rows that are {"context", "continuation"} or {"query", "choices", "gold"}.'
    with pytest.raises(CalibrationError, match=re.escape(f": line 2 {message}")) as raised:
        load_task("t", write(tmp_path / "t.jsonl", [good, row]))
    assert str(raised.value).endswith(ending)
    with pytest.raises(CalibrationError, match=re.escape(f"task t is 'list of 2 rows': row 2 {message}")):
        load_task("t", [good, row])


def test_two_shapes_in_one_file_are_refused():
    rows = [{"context": "a", "continuation": "b"}, {"query": "q", "choices": ["a", "b"], "gold": 1}]
    with pytest.raises(
        CalibrationError, match="row 2 is of another shape than those before it. Give each shape a task"
    ):
        load_task("t", rows)


def test_what_cannot_be_measured_is_refused():
    task, tokenizer = load_task("t", last_word_rows(tiny_model(), 3)), tiny_tokenizer()
    with pytest.raises(
        CalibrationError, match="task t is None: it needs a tokenizer, and the model has none. Give tok"
    ):
        evaluate_task(Recorder(), None, task)
    with pytest.raises(
        ConfigurationError, match="task_limit is 0: it must be at least 1. Leave it out to measure all"
    ):
        evaluate_task(Recorder(), tokenizer, task, limit=0)
    with pytest.raises(
        CalibrationError, match="token is .*: a task has this token, and the model's vocabulary ends at 2"
    ):
        evaluate_task(Recorder(vocab_size=3), tokenizer, task)
    with pytest.raises(
        CalibrationError, match="task t is 'w5 w6 w7': it has 3 tokens, and the model takes 2. Shorten"
    ):
        scored("w3 w4", "w5 w6 w7", tokenizer, length=2)


def test_a_continuation_without_tokens_is_refused():
    from tokenizers import normalizers

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("gone", "")
    for context in ("w5", ""):
        with pytest.raises(CalibrationError, match="task t is 'gone': the tokenizer makes no token of it beside"):
            scored(context, "gone", tokenizer)
    assert scored("gone", "w5", tokenizer)[0] == [1], "a context without tokens is an empty one"


def test_an_empty_context_needs_a_token_to_begin_with():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(
        CalibrationError, match="task t is '': an example has an empty context, and the tokenizer has no"
    ):
        scored("", "w5", tokenizer)
    assert scored("w4", "w5", tokenizer)[0] == [4]


def test_a_model_that_gives_nan_has_no_accuracy():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(
        ModelError, match="model is 'LlamaForCausalLM': it gives NaN for an example of the task t. Load"
    ):
        evaluate_task(model, tiny_tokenizer(), load_task("t", choice_rows(2)), quiet=True)


def test_an_infinite_perplexity_is_none_in_json():
    score = TaskScore("t", 0.0, 0.0, 0.0, 0.0, math.inf, 3)
    assert score.to_dict()["perplexity"] is None
    assert TaskScore("t", 0.5, 0.1, 0.5, 0.0, 3.5, 3).to_dict()["perplexity"] == 3.5


@pytest.mark.parametrize(
    ("accuracy", "stderr", "chance", "retention"),
    [
        (0.8, 0.1, 0.5, 0.5),
        (0.79, 0.1, 0.5, None),
        (0.4, 0.01, 0.5, None),
        (0.1, 0.01, 0.0, 4.0),
        (0.0, 0.0, 0.0, None),
        (1.0, 0.0, 0.5, 0.4),
        (0.5, 0.0, 0.5, None),
        (1.0, None, 0.5, None),
    ],
)
def test_retention_needs_a_dense_model_that_is_above_chance(accuracy, stderr, chance, retention):
    dense, cut = TaskScore("t", accuracy, stderr, 0.9, chance, None, 9), TaskScore("t", 0.4, 0.1, 0.1, chance, None, 9)
    assert task_retention(dense, cut) == (None if retention is None else pytest.approx(retention))


def test_the_figures_are_those_of_the_first_version():
    """What the code before lm-eval's tasks came measured of the same rows, with weights that come with the repository."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(__file__).parent / "tasks"
    stories = Path(__file__).parents[2] / "benchmarks" / "models" / "stories-llama-16l"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    for name, stored in json.loads((folder / "figures.json").read_text()).items():
        score = evaluate_task(model, tokenizer, load_task(name, folder / f"{name}.jsonl"), quiet=True).to_dict()
        assert list(score) == list(stored)
        perplexity = stored.pop("perplexity")
        assert score.pop("perplexity") == (None if perplexity is None else pytest.approx(perplexity, rel=1e-5))
        assert score == stored


def test_a_name_needs_lm_eval(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = (
        "task is 'arc_easy': without =FILE it is a task of lm-eval, which is not installed. "
        "pip install 'optimum-clp[tasks]', or give its examples as a file: arc_easy=arc_easy.jsonl."
    )
    for refused in (lambda: load_tasks(["arc_easy"]), lambda: CLPPruner(tiny_model()).evaluate(tasks=["arc_easy"])):
        with pytest.raises(ConfigurationError, match=re.escape(message)):
            refused()


def test_an_lm_eval_that_cannot_be_used_is_told(monkeypatch):
    older = ModuleType("lm_eval")
    older.__spec__ = ModuleSpec("lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "optimum_clp.evaluation.named_tasks", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", older)
    rule = (
        "task is 'arc_easy': without =FILE it is a task of lm-eval, which is installed and cannot be loaded (No module"
    )
    with pytest.raises(
        ConfigurationError, match=re.escape(rule) + r".*lm_eval.*\)\. pip install 'optimum-clp\[tasks\]'\."
    ):
        load_tasks(["arc_easy"])


def test_tasks_are_listed_or_named_by_a_mapping(tmp_path):
    file = write(tmp_path / "t.jsonl", choice_rows(3))
    task = load_task("b", file)
    assert (
        load_tasks([f"a={file}", task]) == load_tasks({"a": file, "b": choice_rows(3)}) == [load_task("a", file), task]
    )
    with pytest.raises(
        ConfigurationError, match="tasks is 'b': it is measured twice. Name each task once, alone or by"
    ):
        load_tasks([task, f"b={file}"])
    rule = (
        "tasks is 3: it is of the type int, and must be NAME=FILE or the name of a task of lm-eval. Give for example"
    )
    with pytest.raises(ConfigurationError, match=rule):
        load_tasks([3])


def test_the_dense_model_is_measured_beside_the_cut_one():
    dense, tokenizer = tiny_model(), tiny_tokenizer()
    tasks = [load_task("words", last_word_rows(dense)), load_task("choices", choice_rows())]
    other = tiny_model(seed=3)
    alone = evaluate_tasks(other, None, tokenizer, tasks, quiet=True)
    assert alone["words"] == evaluate_task(other, tokenizer, tasks[0], quiet=True).to_dict()
    beside = evaluate_tasks(other, dense, tokenizer, tasks, quiet=True)
    accuracy = evaluate_task(dense, tokenizer, tasks[0], quiet=True).accuracy
    assert beside["words"] == {
        **alone["words"],
        "dense_accuracy": accuracy,
        "retention": alone["words"]["accuracy"] / accuracy,
    }
    assert beside["choices"]["retention"] is None, "a random model is at chance"
    assert evaluate_tasks(dense, dense, tokenizer, tasks, quiet=True)["words"]["retention"] == 1


def test_the_pruner_measures_tasks_with_a_text_or_without(tmp_path):
    dense = make_identity(tiny_model(), [2, 3])
    file = write(tmp_path / "words.jsonl", last_word_rows(dense))
    pruner = CLPPruner(dense, tiny_tokenizer(), quiet=True)
    pruner.cut([LayerSegment(2, 4)])
    only = pruner.evaluate(tasks={"words": file, "choices": choice_rows()}, task_limit=20)
    assert list(only) == ["tasks"] and list(only["tasks"]) == ["words", "choices"]
    assert only["tasks"]["words"]["num_examples"] == 20 and only["tasks"]["words"]["retention"] == 1
    json.dumps(only, allow_nan=False)
    text = [words(random.Random(2), 600)]
    both = pruner.evaluate(text, tasks={"words": file})
    assert {key: value for key, value in both.items() if key != "tasks"} == pruner.evaluate(text)
    assert both["tasks"]["words"]["num_examples"] == 24
    alone = CLPPruner(None, tiny_tokenizer(), pruned_model=pruner.pruned_model, quiet=True)
    assert "retention" not in alone.evaluate(tasks={"words": file})["tasks"]["words"]
    assert alone.evaluate(tasks={"words": file}, reference=dense)["tasks"]["words"]["retention"] == 1
    with pytest.raises(CalibrationError, match="task gone is '.*': it cannot be read"):
        pruner.evaluate(text, tasks={"gone": tmp_path / "gone.jsonl"})


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["characters", "characters after BOS", "words"])
def test_lm_eval_gives_the_same_figures(tokens, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    model, tokenizer = tiny_model(initializer_range=0.3), character_tokenizer(bos=tokens.endswith("BOS"))
    rng = random.Random(5)
    answers = [words(rng, 30)[: rng.randrange(2, 100)].strip() + rng.choice(["", "é"]) for _ in range(200)]
    choices = [
        {"query": f"Question: {words(rng, 9)}", "choices": answers[i : i + 2 + i % 3], "gold": i % 2}
        for i in range(120)
    ]
    # some contexts are longer than the 128 tokens that the model takes
    last_words = [
        {"context": words(rng, rng.randrange(60)) + rng.choice(["", "\n"]), "continuation": rng.choice("abcdw")}
        for _ in range(120)
    ]
    last_words[0]["context"] = ""
    if tokens == "words":
        tokenizer, last_words, choices = tiny_tokenizer(), last_word_rows(model), choice_rows()
    templates = {
        "choices": r"""
output_type: multiple_choice
doc_to_text: "{{query}}\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
        "words": """
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{' ' + continuation}}"
metric_list: [{metric: acc}, {metric: perplexity}]
""",
    }
    files = {"choices": write(tmp_path / "c.jsonl", choices), "words": write(tmp_path / "w.jsonl", last_words)}
    for name, template in templates.items():
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {files[name]}}}, cache_dir: {tmp_path / 'cache'}}}\n{template}"
        )
    answer = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=list(files),
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=10,
        log_samples=True,
    )
    theirs = answer["results"]
    for name, file in files.items():
        samples = sorted(answer["samples"][name], key=lambda sample: sample["doc_id"])
        for example, sample in zip(load_task(name, file).examples, samples, strict=True):
            one = evaluate_task(model, tokenizer, Task(name, (example,)), quiet=True)
            assert one.plain_accuracy == sample["acc"] and one.accuracy == sample.get("acc_norm", sample["acc"])
    ours = {n: evaluate_task(model, tokenizer, load_task(n, file), quiet=True) for n, file in files.items()}
    expected = theirs["choices"]
    assert ours["choices"].accuracy == pytest.approx(expected["acc_norm,none"], abs=1e-12)
    assert ours["choices"].accuracy_stderr == pytest.approx(expected["acc_norm_stderr,none"], abs=1e-12)
    assert ours["choices"].plain_accuracy == pytest.approx(expected["acc,none"], abs=1e-12)
    assert ours["choices"].accuracy != ours["choices"].plain_accuracy
    expected = theirs["words"]
    assert (ours["words"].accuracy > 0.4) == (tokens == "words"), "a random model does not find two tokens"
    assert ours["words"].accuracy == pytest.approx(expected["acc,none"], abs=1e-12)
    assert ours["words"].accuracy_stderr == pytest.approx(expected["acc_stderr,none"], abs=1e-12)
    assert ours["words"].perplexity == pytest.approx(expected["perplexity,none"], rel=1e-5)
