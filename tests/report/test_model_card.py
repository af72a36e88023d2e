import json
import re

import pytest
from huggingface_hub import ModelCard, ModelCardData
from report_example import example_report, older_report

from optimum_clp.configuration.clp_config import CLPConfig
from optimum_clp.doors import STRATEGIES
from optimum_clp.report import origin
from optimum_clp.report.model_card import write_model_card
from optimum_clp.report.origin import hub_id
from optimum_clp.report.plots import write_plots
from optimum_clp.report.report import CLPReport
from optimum_clp.report.section import to_section

GENERATION = {
    "note": None, "num_prompts": 2, "num_left_out": 0, "kinds": {}, "max_new_tokens": 8, "temperature": 0.8, "seed": 0,
    "rows": [{"name": "dense", "loops": 0.0, "loops_error": None}], "examples": [],
}  # fmt: skip


class FakeHub:
    """`snapshot_download` of a repository with a card, or of one that cannot be reached."""

    def __init__(self, folder):
        self.folder, self.asked, self.card = folder, [], None

    def __call__(self, repository, **options):
        self.asked.append(repository)
        if self.card is None:
            raise ConnectionError("no network")
        (self.folder / "README.md").write_text(f"---\n{self.card}\n---\n")
        return str(self.folder)


@pytest.fixture(autouse=True)
def hub(monkeypatch, tmp_path_factory):
    hub = FakeHub(tmp_path_factory.mktemp("hub"))
    monkeypatch.setattr(origin, "snapshot_download", hub)
    return hub


def write(report, folder, **options):
    path = write_model_card(report, CLPConfig(), folder, **options)
    assert path == folder / "README.md"
    return path.read_text(encoding="utf-8")


def headings(text):
    return re.findall(r"^## (.+)$", text, re.MULTILINE)


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_full_card_has_every_section(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 2_500_000)
    text = write(example_report(), tmp_path, model_name="me/stories-13l")
    assert headings(text) == [
        "What was removed",
        "Recovery",
        "Measurements",
        "Files",
        "Use",
        "Limitations",
        "Framework versions",
    ]
    assert "# me/stories-13l\n" in text
    assert "with 3 of its 16 decoder layers removed" in text
    assert "Layers 7 to 9 of 16 (counted from 0) went: 3.73 M parameters became 3.18 M (-14.7%)" in text
    assert (
        "They were chosen by gradient descent on the position of a concave gate over the layers, with all weights "
        "frozen (strategy `auto` took `gate`). Removing them costs a KL divergence from the dense model of 0.4100 nats "
        "per token (standard error 0.0200), over 8,192 tokens of text that the dense model wrote itself. 14 cuts were "
        "scored, 4 of them on fewer rows of text. 2 others are within two standard errors of this one.\n"
    ) in text
    assert "(6, 7 in the new numbering, 366.00 k parameters)" in text
    assert "went from 0.4100 to 0.1006 nats per token (step 96)" in text
    assert example_report().to_table(markdown=True) in text
    assert (
        "| `model.safetensors` |  | 2.50 MB |  |" in text
        and "| `onnx/model_q4.onnx` | int4 | 2.10 MB | +2.2% | 0.09 (usual: 0.1 to 0.5) |" in text
    )
    assert "reimplemented from the paper's abstract ([arXiv 2510.23652]" in text
    assert "- transformers 5.23.0" in text


def test_metadata_is_what_the_hub_reads(tmp_path, hub):
    hub.card = "license: mit"
    write(example_report(), tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    (figures,) = data.pop("model-index")
    assert figures["name"] == "stories-16l-clp"
    assert data == {
        "base_model": "example/stories-16l",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "tags": ["optimum", "optimum-clp", "pruning", "layer-pruning", "clp", "onnx"],
        "pruning": {
            "method": "clp",
            "num_hidden_layers_before": 16,
            "num_hidden_layers_after": 13,
            "removed_layers": [7, 8, 9],
        },
    }
    assert set(hub.asked) == {"example/stories-16l"}


CARD_OF_THE_DENSE_MODEL = """license: other
license_name: acme-terms
license_link: https://acme.example/terms
language: [en, de, 5, "x y"]
datasets:
- acme/chats
tags: [safetensors, onnx, chat, transformers.js, "license:mit", "<b>", math, clp]"""


def test_what_the_dense_models_card_says_is_inherited_and_kept_in_the_report(tmp_path, hub):
    hub.card = CARD_OF_THE_DENSE_MODEL
    report = example_report()
    report.calibration["dataset"] = "allenai/c4"
    report.base_model["origin"] = to_section(origin.find_origin("example/stories-16l"))
    hub.card = None  # no network any more
    report = CLPReport.from_dict(report.to_dict())
    (tmp_path / "LICENSE").write_text("terms")
    text = write(report, tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert (data["language"], data["datasets"]) == (["en", "de"], ["acme/chats", "allenai/c4"])
    assert data["tags"] == ["optimum", "optimum-clp", "pruning", "layer-pruning", "clp", "onnx", "chat", "math"]
    assert (data["license"], data["license_name"]) == ("other", "acme-terms")
    assert (
        "## License\n\nThe dense model's card says: `acme-terms`, see [its terms](https://acme.example/terms). "
        "Its file [LICENSE](LICENSE) lies beside this card."
    ) in text


def test_the_figures_are_those_of_what_is_delivered_and_survive_a_round_trip(tmp_path):
    report = example_report()
    report.evaluation["texts"] = [
        {"text": "plain text (test.jsonl)", "num_rows": 2, "rows": [
            {"name": name, "perplexity": value, "kl": None, "retention": None} for name, value in (("cut", 99.0), ("tuned", 31.5))
        ]}
    ]  # fmt: skip
    row = {"name": "tuned", "accuracy": 0.61, "accuracy_stderr": 0.03, "plain_accuracy": 0.6, "retention": 0.93}
    report.evaluation["tasks"] = [{"task": "piqa", "num_examples": 300, "chance": 0.5, "rows": [row]}]
    report.evaluation["rows"][2]["kl"] = float("nan")
    write(report, tmp_path, model_name="me/stories-13l")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.model_name == "stories-13l"
    found = [(r.dataset_name, r.metric_type, r.metric_value) for r in data.eval_results]
    assert found == [
        ("self-written text (seed 1, temperature 1.0)", "perplexity", 8.9),
        ("plain text (test.jsonl)", "perplexity", 31.5),
        ("piqa", "accuracy", 0.61),
    ]
    assert {r.task_type for r in data.eval_results} == {"text-generation"}
    again = ModelCardData(**data.to_dict())
    assert again.to_dict() == data.to_dict() and again.eval_results == data.eval_results
    assert str(ModelCard(f"---\n{again.to_yaml()}\n---\n")).startswith("---\n")


HARNESS = {
    "version": "0.4.13",
    "task_version": "1.0",
    "metric": "acc_norm",
    "num_fewshot": 5,
    "chat_template": False,
    "dataset": "allenai/ai2_arc",
    "dataset_config": "ARC-Easy",
    "split": "test",
}


def test_figures_of_lm_eval_are_filed_under_their_dataset(tmp_path):
    report = example_report()
    row = {"name": "tuned", "accuracy": 0.5, "accuracy_stderr": 0.1, "plain_accuracy": 0.4, "retention": None}
    chat = {**HARNESS, "metric": "exact_match,strict-match", "chat_template": True, "dataset_config": "main"}
    written = {**HARNESS, "metric": "bleu", "num_fewshot": 0, "dataset": None, "dataset_config": None, "split": None}
    report.evaluation["tasks"] = [
        {"task": name, "num_examples": 9, "chance": 0.0, "lm_eval": harness, "rows": [{**row, "accuracy": accuracy, "metrics": metrics}]}
        for name, harness, accuracy, metrics in (
            ("arc_easy", HARNESS, 0.5, {"acc,none": 0.4, "acc_norm,none": 0.5}),
            ("gsm8k", {**chat, "dataset": "openai/gsm8k"}, 0.25, {"exact_match,strict-match": 0.25}),
            ("mine", written, None, {"bleu,none": 31.25, "bleu_stderr,none": None}),
            ("lost", written, None, {"bleu,none": None}),
        )
    ]  # fmt: skip
    text = write(report, tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    found = [
        (
            r.dataset_type,
            r.dataset_name,
            r.dataset_config,
            r.dataset_split,
            r.metric_type,
            r.metric_name,
            r.metric_value,
        )
        for r in data.eval_results[2:]
    ]
    assert found == [
        ("allenai/ai2_arc", "arc_easy", "ARC-Easy", "test", "accuracy", "Accuracy (acc_norm), 5-shot", 0.5),
        ("openai/gsm8k", "gsm8k", "main", "test", "accuracy", "Accuracy (exact_match,strict-match), 5-shot, chat template", 0.25),
        ("mine", "mine", None, None, "bleu", "bleu, 0-shot", 31.25),
    ]  # fmt: skip
    assert ModelCardData(**data.to_dict()).eval_results == data.eval_results
    assert "| arc_easy | tuned | acc_norm | 5 | 0.5000 | 0.1000 | 0.4000 | - |" in text
    assert "| mine | tuned | bleu | 0 | - | 0.1000 | 0.4000 | 31.2500 |" in text


@pytest.mark.hub
def test_the_hub_takes_the_card(tmp_path, hub):
    hub.card = CARD_OF_THE_DENSE_MODEL.replace("chat,", "").replace("acme/chats", "HuggingFaceTB/smoltalk")
    write(example_report(), tmp_path)
    ModelCard.load(tmp_path / "README.md").validate()


def test_the_title_is_the_dense_models_name_or_the_repository(tmp_path):
    assert "# stories-16l-clp\n" in write(example_report(), tmp_path, model_name="out")
    assert "# me/small\n" in write(example_report(), tmp_path, model_name="me/small")


@pytest.mark.parametrize("how", ["template file", "tokenizer config", "measured"])
def test_a_chat_model_is_asked_through_its_template(how, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    report = example_report()
    report.export["runtimes"] = {"genai": None, "transformers_js": None}
    if how == "template file":
        (tmp_path / "chat_template.jinja").write_text("x")
    elif how == "tokenizer config":
        (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    else:
        report.evaluation["generation"] = {"asked": "chat", **GENERATION}
    text = write(report, tmp_path, model_name="me/small")
    assert "Once upon a time" not in text and text.count("What is the capital of Japan?") == 4
    assert text.count("apply_chat_template(") == 3 and "generated_text.at(-1).content" in text
    for block in python_blocks(text):
        compile(block, "card", "exec")
    assert 'dtype: "q4"' in text and "llama-cli -m model.gguf\n" in text and "optimum-clp chat me/small" in text


def test_a_base_model_goes_on_with_a_text(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    report = example_report()
    report.export["runtimes"] = {"genai": None, "transformers_js": "it has no config of its own"}
    text = write(report, tmp_path, model_name="out")
    assert text.count("Once upon a time") == 4 and "apply_chat_template" not in text
    assert "transformers.js:" not in text and "onnxruntime_genai" in text


def test_runtimes_that_nothing_was_written_for_are_not_promised(tmp_path):
    report = example_report()
    report.export["runtimes"] = {"genai": "keys and values differ", "transformers_js": "no"}
    text = write(report, tmp_path, model_name="me/small")
    assert "onnxruntime_genai" not in text and "transformers.js" not in text and "llama.cpp" not in text


def test_grammar_of_one(tmp_path):
    report = example_report()
    report.cut.update(segments=[[7, 8]], removed_layers=[7], num_layers_after=1)
    report.search["segments"] = [[7, 8]]
    report.tuning.update(layers=[6], steps=1, num_tokens=1)
    report.tuning["init"] = {
        "method": "least_squares", "steps": [], "seconds": 1.0, "kept": True, "loss_before": 0.41, "loss_after": 0.17,
    }  # fmt: skip
    text = write(report, tmp_path)
    for words in (
        "and the layer next to the cut tuned to make up for it.",
        "Layer 7 of 16 (counted from 0) went",
        "an ordinary checkpoint of 1 layer.",
        "It was chosen by gradient descent",
        "Removing it costs",
        "The layer next to the cut (6 in the new numbering, 366.00 k parameters) was trained in full with the loss `kd` for 1 step, on 1 token (",
        "It started from a closed-form solution for its output projections",
    ):
        assert words in text, words
    assert not re.search(r"\b1 (layers|steps|tokens)\b", text)


def test_nothing_is_claimed_that_was_not_measured(tmp_path):
    text = write(example_report(), tmp_path)
    for claim in ("is fast", "repairs none", "adds an error"):
        assert claim not in text
    assert "(accuracy level 4); the figures of these files have been taken so." in text


def test_the_page_is_linked_where_there_is_one(tmp_path):
    assert "report.html" not in write(example_report(), tmp_path)
    (tmp_path / "report.html").write_text("x")
    assert "[report.html](report.html)" in write(example_report(), tmp_path)


def test_a_license_of_a_stranger_is_no_markup(tmp_path, hub):
    hub.card = "license: other\nlicense_name: 'a`<b>'\nlicense_link: 'javascript:alert(1)'"
    (tmp_path / "LICENSE](javascript:x)").write_text("x")
    body = ModelCard.load(_written(tmp_path)).text
    assert "(javascript" not in body
    assert "The dense model's card says: `a<b>`, see [its terms](https://huggingface.co/example/" in body


def _written(folder):
    write(example_report(), folder)
    return folder / "README.md"


def test_unknown_license_is_not_written(tmp_path, hub):
    assert "license" not in write(example_report(), tmp_path)
    hub.card = "language: en"
    assert "license" not in write(example_report(), tmp_path)


@pytest.mark.parametrize("trailing", ["", "/"])
def test_local_dense_model_is_neither_a_hub_id_nor_a_path_in_the_card(tmp_path, hub, trailing):
    base, out = tmp_path / "private" / "my-model", tmp_path / "out"
    base.mkdir(parents=True)
    out.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# mine\n")
    report = example_report()
    report.base_model["name_or_path"] = f"{base}{trailing}"
    report.calibration.update(source=str(tmp_path / "corpus.txt"), statistics=None)
    report.evaluation["text"] = str(tmp_path / "corpus.txt")
    text = write(report, out)
    data = ModelCard.load(out / "README.md").data.to_dict()
    assert "base_model" not in data and "base_model_relation" not in data
    assert data["license"] == "apache-2.0"
    assert hub.asked == []
    assert "# my-model-clp\n\n`my-model` (llama) with 3 of" in text
    assert "private" not in text and str(tmp_path) not in text
    assert "tokens of corpus.txt" in text and "Measured on corpus.txt" in text


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Qwen/Qwen3-0.6B", True),
        ("gpt2", True),
        ("", False),
        (None, False),
        ("/abs/model", False),
        ("./model", False),
        ("../a/b", False),
        ("~/model", False),
        ("a/b/c", False),
        ("C:\\model", False),
        ("here", False),
    ],
)
def test_hub_ids_are_told_from_folders(name, found, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub_id(name) == (name if found else None)


def test_stages_that_did_not_run_are_not_mentioned(tmp_path):
    report = CLPReport(base_model=example_report().base_model, cut=example_report().cut)
    text = write(report, tmp_path)
    assert headings(text) == ["What was removed", "Limitations", "Framework versions"]
    for word in ("KL", "gate", "tuned", "int8", "onnx", "quanto", "Measured", "!["):
        assert word not in text.replace("reimplemented", ""), word
    assert "Nothing was measured on held-out text." in text


def test_empty_report_still_gives_a_valid_card(tmp_path):
    text = write(CLPReport(), tmp_path)
    assert headings(text) == ["Limitations", "Framework versions"]
    assert "pruning" not in ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert "None" not in text


def test_a_closed_form_start_is_told(tmp_path):
    report = example_report()
    report.calibration["source"] = "corpus.txt and self-written"
    report.tuning["init"] = {
        "method": "least_squares", "steps": [], "seconds": 1.0, "kept": True, "loss_before": 0.41, "loss_after": 0.17,
    }  # fmt: skip
    text = write(report, tmp_path)
    assert "output projections (least squares), which took the validation loss from 0.4100 to 0.1700." in text
    assert "They started from a closed-form solution for their output projections" in text
    assert "tokens of corpus.txt and text that the dense model wrote itself." in text
    report.tuning["init"]["method"] = "of_another_package"
    assert "They started from the start `of_another_package`, which took" in write(report, tmp_path)
    report.tuning["init"]["kept"] = False
    assert "started from" not in write(report, tmp_path)


def test_stages_and_forecast_are_told(tmp_path):
    report = example_report()
    report.tuning["stages"] = [
        {"loss": {"hidden": 1.0}, "steps": 60, "learning_rate": 7e-3, "num_tokens": 122880},
        {"loss": {"kd": 1.0}, "steps": 36, "learning_rate": 1e-4, "num_tokens": 73728},
    ]
    report.tuning["forecast"] = {
        "pilots": [{"num_tokens": 4096, "loss": 0.4, "seconds": 9.0}],
        "predictions": [
            {"num_tokens": 65536, "loss": 0.2512, "low": 0.24, "high": 0.26},
            {"num_tokens": 655360, "loss": 0.2, "low": 0.15, "high": 0.25},
        ],
    }
    text = write(report, tmp_path)
    assert (
        "trained in full with the loss `hidden` for 60 steps, then with the loss `kd` for 36 steps, on 196,608" in text
    )
    assert (
        "Short pilots had foretold 0.251 (0.240 to 0.260) for 65,536 fresh tokens; they foretell 0.200 (0.150 to 0.250) for "
        "655,360."
    ) in text


def test_tuning_that_did_not_help_is_told(tmp_path):
    report = example_report()
    report.tuning.update(improved=False, best_step=0, best_validation_loss=0.41)
    text = write(report, tmp_path)
    assert "did not improve, and the weights were kept as they were" in text
    assert "tuned to make up" not in text


def test_figures_that_are_not_numbers_are_left_out(tmp_path):
    report = example_report()
    report.search["score"] = float("nan")
    report.search["scored"][7]["standard_error"] = report.search["scored"][6]["behind_error"] = float("nan")
    report.tuning["initial_validation_loss"] = float("inf")
    report.export["files"][0]["max_relative_error"] = None
    text = write(report, tmp_path)
    assert not re.search(r"\b(nan|inf|None)\b", text)


def test_plots_are_shown_if_they_are_there(tmp_path):
    assert "![" not in write(example_report(), tmp_path)
    write_plots(example_report(), tmp_path)
    shown = re.findall(r"!\[.+\]\((.+)\)", write(example_report(), tmp_path))
    assert shown == ["plots/search.png", "plots/tuning.png"]
    assert all((tmp_path / name).is_file() for name in shown)


@pytest.mark.parametrize("name", [None, "folder", "me/stories-13l"])
def test_examples_are_valid_python(name, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    blocks = python_blocks(write(example_report(), tmp_path, model_name=name))
    assert len(blocks) == 3
    for block in blocks:
        compile(block, "card", "exec")
    assert all(("snapshot_download" in block) == (name == "me/stories-13l") for block in blocks[1:])
    assert f'AutoModelForCausalLM.from_pretrained("{name or "path/to/this/folder"}")' in blocks[0]
    assert '"onnx/model_q4.onnx"' in blocks[1] and 'load_quantized(f"{folder}/quanto-int8")' in blocks[2]


@pytest.mark.parametrize("kind", ["sliding_attention", "linear_attention"])
def test_a_card_says_where_kinds_of_layers_break_the_rule_of_other_runtimes(kind, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    (tmp_path / "config.json").write_text(json.dumps({"layer_types": [kind, "full_attention"]}))
    report = example_report()
    report.cut.update(type_rule="followed", layer_period=6)
    plain = write(report, tmp_path, model_name="folder")
    assert "no longer alternate" not in plain and "llama-cli -m model.gguf" in plain and "told.gguf" not in plain
    report.cut.update(type_rule="broken", layer_period=6)
    text = write(report, tmp_path, model_name="folder")
    assert (
        "no longer alternate by the rule of this model type" in text and "A cut of 6 layers, or of a multiple," in text
    )
    assert "as llama.cpp and mlx-lm do for many types, are wrong without a word" in report.to_table()
    # windows can be told to llama.cpp, other kinds cannot
    assert (
        ("llama-cli -m told.gguf" in text) == ("add_sliding_window_pattern" in text) == (kind == "sliding_attention")
    )
    assert "llama-cli -m model.gguf" not in text
    for block in python_blocks(text):
        compile(block, "card", "exec")


def test_several_segments_and_single_layers_read_well(tmp_path):
    report = example_report()
    report.cut.update(segments=[[2, 3], [7, 9]], removed_layers=[2, 7, 8])
    assert "Layers 2 and 7 to 8 of 16" in write(report, tmp_path)
    report.cut.update(segments=[[2, 3]], removed_layers=[2], num_layers_after=15)
    assert "Layer 2 of 16 (counted from 0) went" in write(report, tmp_path)


def test_segment_that_the_search_did_not_choose_is_not_ascribed_to_it(tmp_path):
    report = example_report()
    assert "They were chosen" in write(report, tmp_path)
    report.cut["segments"] = [[6, 9]]
    assert "They were chosen" not in write(report, tmp_path)


PHRASED = ("gate exhaustive halving block_influence angular cosine_block taylor perplexity_greedy tail random").split()


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "auto"])
def test_every_strategy_has_its_phrase(strategy, tmp_path):
    report = example_report()
    report.search.update(strategy=strategy, used_strategy=strategy, layer_scores=[])
    text = write(report, tmp_path)
    # a strategy that has no phrase in the card is told by its row in the registry
    says = STRATEGIES.says(strategy)
    phrase = rf"by strategy `{strategy}` \({re.escape(says)}\)" if strategy not in PHRASED else r"(by|as|at) [^`]+"
    assert re.search(rf"They were chosen {phrase}\. Removing them costs", text)


def test_strategy_that_is_not_known_is_named(tmp_path):
    report = example_report()
    report.search.update(strategy="oracle", used_strategy="oracle")
    assert "They were chosen by strategy `oracle`. Removing" in write(report, tmp_path)


def test_uncertainty_is_told_as_it_was_measured(tmp_path):
    report = example_report()
    scored = report.search["scored"]
    for entry in scored:
        entry.update(num_rows=32, behind_error=0.001 * (entry["start"] != 7))
    scored[3].update(behind=-0.5)
    scored[6].update(behind=0.002)
    text = write(report, tmp_path)
    assert "14 cuts were scored. 1 other is within two standard errors of this one. 1 other is better by more" in text
    report.search["scored"] = scored[7:8]
    text = write(report, tmp_path)
    assert "1 cut was scored.\n" in text and "other is" not in text


def test_a_choice_by_repaired_cuts_is_told(tmp_path):
    report = example_report()
    assert "cheap repair" not in write(report, tmp_path)
    scored = report.search["scored"]
    for entry, kl in zip(scored[6:9], (0.31, 0.2512, 0.3), strict=True):
        entry["repaired_kl"] = kl
    text = write(report, tmp_path)
    assert (
        "The best 3 of them were compared after a cheap repair, after which this one's divergence was the lowest, 0.2512."
        in text
    )


def test_chosen_cut_that_was_not_measured_on_all_rows_does_not_claim_all_tokens(tmp_path):
    report = example_report()
    for entry in report.search["scored"]:
        entry["num_rows"] = 5
    text = write(report, tmp_path)
    assert "over 5 rows of text that the dense model" in text and "8,192 tokens" not in text
    assert "14 cuts were scored. " in text


def test_numbers_of_layers_that_were_tried_for_a_quality_budget_are_told(tmp_path):
    report = example_report()
    report.search["lengths"] = [
        {"num_removed": 3, "segments": [[7, 10]], "perplexity_increase": 0.081, "fits": True},
        {"num_removed": 5, "segments": [[6, 11]], "perplexity_increase": 0.4, "fits": False},
        {"num_removed": 8, "segments": [[4, 12]], "perplexity_increase": float("inf"), "fits": False},
    ]
    text = write(report, tmp_path)
    assert "Removing 3 was the most of those tried that kept within the limit" in text
    assert "before tuning: 3 (+8.1%), 5 (+40.0%).\n" in text
    assert "Removing 3 was" not in write(example_report(), tmp_path)


def test_older_report_says_no_more_than_it_has(tmp_path):
    text = write(older_report(), tmp_path)
    assert "with all weights frozen. Removing them costs a KL divergence from the dense model of 0.4100 nats" in text
    assert "(standard error 0.0200), over 8,192 tokens of" in text
    assert "14 cuts were scored.\n" in text and "other" not in text.split("14 cuts were scored.")[1].split("##")[0]
