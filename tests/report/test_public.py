"""What goes up to the Hub of a recipe and a report: no local folder, nothing of the user's own text."""

import copy

import pytest
from report_example import example_report

from optimum_clp.configuration.clp_config import CLPConfig
from optimum_clp.report.page import report_page
from optimum_clp.report.public import public_config, public_evaluation

GENERATION = {
    "asked": "chat", "note": None, "num_prompts": 1, "num_left_out": 0, "kinds": {}, "max_new_tokens": 8, "temperature": 0.8,
    "seed": 0, "rows": [{"name": "dense", "loops": 0.0, "loops_error": None, "ended": 1.0, "ended_error": None}],
    "examples": [{"prompt": "my secret prompt", "answers": {"dense": "my secret answer"}}],
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    for name in ("corpus.txt", "prompts.jsonl", "task.jsonl"):
        (tmp_path / name).write_text("x")
    config = CLPConfig(calibration_dataset=str(tmp_path / "corpus.txt"))
    config.calibration.cache_dir = config.tuning.logging_dir = str(tmp_path)
    config.evaluation.prompts = str(tmp_path / "prompts.jsonl")
    config.evaluation.texts = [str(tmp_path / "corpus.txt"), "c4"]
    config.evaluation.tasks = ["arc_easy", f"mine={tmp_path / 'task.jsonl'}"]
    config.evaluation.tasks_dir = str(tmp_path / "definitions")
    return config


def test_a_recipe_keeps_names_and_loses_folders(config, tmp_path):
    before = copy.deepcopy(config.to_dict())
    public = public_config(config)
    assert config.to_dict() == before and str(tmp_path) in str(before)
    assert str(tmp_path) not in str(public.to_dict())
    assert (public.calibration.dataset, public.evaluation.prompts) == ("corpus.txt", "prompts.jsonl")
    assert (public.evaluation.texts, public.evaluation.tasks) == (
        ["corpus.txt", "c4"],
        ["arc_easy", "mine=task.jsonl"],
    )
    assert public.evaluation.tasks_dir == "definitions"
    own = public_config(CLPConfig(calibration_dataset=["my secret text", "b"]))
    assert own.calibration.dataset == ["(2 strings, not published)"]


@pytest.mark.parametrize(
    ("asked", "prompts", "dataset", "kept"),
    [
        ("chat", None, "mine.txt", True),  # our own prompts
        ("chat", "prompts.jsonl", None, False),
        ("text", None, "mine.txt", False),  # goes on with the user's text
        ("text", None, None, True),  # with what the dense model wrote
    ],
)
def test_examples_go_where_they_would_show_the_users_own_words(asked, prompts, dataset, kept):
    config = CLPConfig(calibration_dataset=dataset)
    config.evaluation.prompts = prompts
    evaluation = {"text": "t", "rows": [], "generation": {**GENERATION, "asked": asked}}
    public = public_evaluation(evaluation, config)
    assert (public["generation"]["examples"] == GENERATION["examples"]) == kept
    assert evaluation["generation"]["examples"] == GENERATION["examples"]
    report = example_report()
    report.evaluation = public
    assert ("my secret" in report_page(report, public_config(config))) == kept
    assert public_evaluation(None, config) is None and public_evaluation({"rows": []}, config) == {"rows": []}
