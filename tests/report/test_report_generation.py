import copy
import math

import jsonschema
import pytest
from report_example import example_report

from optimum_clp.commands.running import exit_status
from optimum_clp.configuration.clp_config import CLPConfig
from optimum_clp.report.generation import answers_markdown, asked, generation_text, requirement_line, verdict_line
from optimum_clp.report.model_card import write_model_card
from optimum_clp.report.report import CLPReport
from optimum_clp.report_schema import report_schema


def _row(name, loops, ended, loss, kl):
    return {
        "name": name,
        "loops": loops,
        "loops_error": 0.05 if loops else 0.0,
        "ended": ended,
        "ended_error": 0.09,
        "length": 81.25,
        "length_error": 4.5,
        "sampled_loops": 0.0,
        "sampled_ended": ended,
        "sampled_length": 70.0,
        "dense_loss": loss,
        "dense_loss_error": 0.061,
        "kl": kl,
        "kl_error": 0.01 if kl else 0.0,
        "agreement": 1.0 if not kl else 0.4,
        "agreement_error": None,
        "json_parses": None,
        "json_parses_error": None,
        "arithmetic_right": 0.5,
        "arithmetic_right_error": 0.25,
    }


GENERATION = {
    "asked": "chat",
    "note": None,
    "num_prompts": 32,
    "num_left_out": 0,
    "kinds": {"facts": 28, "arithmetic": 4},
    "max_new_tokens": 128,
    "temperature": 0.8,
    "seed": 0,
    "rows": [
        _row("dense", 0.0, 0.63, 1.3, 0.0),
        _row("cut", 0.38, 0.28, 2.76, 0.83),
        _row("tuned", 0.09, 0.56, 2.26, 0.5),
    ],
    "examples": [
        {
            "prompt": "What is\n2 | 2?",
            "answers": {"dense": "It is *4*.", "cut": "<b>2</b> 2 " * 40, "tuned": "", "onnx": "4"},
        }
    ],
}
KEPT = {"share": 0.383, "loops": 0.91, "ended": 0.889, "likelihood": 0.383}
VERDICT = {
    "name": "tuned",
    "level": "usable",
    "text": "usable with losses: 9% of its answers loop (dense: 0%)",
    "losses": ["9% of its answers loop (dense: 0%)"],
    "generation_kept": KEPT,
    "retention": 0.76,
}
SHORT = {"name": "generation", "required": 0.8, "reached": 0.383, "row": "tuned", "met": False}
MET = {"name": "retention", "required": 0.7, "reached": 0.76, "row": "tuned", "met": True}
TASK_ROW = {"name": "tuned", "accuracy": 0.61, "accuracy_stderr": 0.03, "plain_accuracy": 0.6, "retention": 0.93}
TEXT_ROW = {"name": "tuned", "perplexity": 31.5, "kl": 0.4, "retention": 0.72}


def full_report():
    report = example_report()
    report.evaluation |= copy.deepcopy(
        {
            "texts": [{"text": "c4", "num_rows": 24, "rows": [TEXT_ROW]}],
            "tasks": [{"task": "piqa", "num_examples": 300, "chance": 0.5, "rows": [TASK_ROW]}],
            "generation": GENERATION,
            "verdicts": [VERDICT],
            "requirements": [MET, SHORT],
        }
    )
    return report


def test_the_schema_holds_it_all():
    validator = jsonschema.Draft202012Validator(report_schema())
    validator.validate(full_report().to_dict())
    broken = full_report().to_dict()
    broken["evaluation"]["verdicts"][0]["level"] = "fine"
    assert not validator.is_valid(broken)


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


def test_a_task_of_lm_eval_says_how_it_was_measured():
    report = full_report()
    row = {**TASK_ROW, "metrics": {"acc,none": 0.6, "acc_norm,none": 0.61, "acc_stderr,none": None}}
    harness = {**HARNESS, "dataset": None, "split": None}
    report.evaluation["tasks"].append(
        {**report.evaluation["tasks"][0], "task": "arc", "rows": [row], "lm_eval": harness}
    )
    jsonschema.Draft202012Validator(report_schema()).validate(report.to_dict())
    assert (
        "task  model    metric  shots  accuracy  std. error   plain  retention\n"
        "----  -----  --------  -----  --------  ----------  ------  ---------\n"
        "piqa  tuned         -      -    0.6100      0.0300  0.6000      0.930\n"
        "arc   tuned  acc_norm      5    0.6100      0.0300  0.6000      0.930\n"
    ) in report.to_table()


def test_the_terminal_says_recognition_generation_and_verdict():
    table = full_report().to_table()
    assert table.startswith(example_report().to_table())
    assert table[len(example_report().to_table()) :] == (
        "\n\n"
        "text  model  perplexity  KL to dense  retention\n"
        "----  -----  ----------  -----------  ---------\n"
        "c4    tuned      31.500       0.4000      0.720\n\n"
        "task  model  accuracy  std. error   plain  retention\n"
        "----  -----  --------  ----------  ------  ---------\n"
        "piqa  tuned    0.6100      0.0300  0.6000      0.930\n\n"
        "  retention: what is left of the dense model's perplexity or accuracy, 1 is all of it\n"
        "  accuracy: share of right answers; of a choice, likelihood per character decides\n"
        "  plain: the same, where the likelihood itself decides\n\n"
        "generation     loops  end by themselves  tokens  dense loss on samples  KL on dense answers  first 32 as dense  arithmetic right\n"
        "----------  --------  -----------------  ------  ---------------------  -------------------  -----------------  ----------------\n"
        "dense             0%           63% ± 9%  81 ± 4            1.30 ± 0.06                0.000               100%         50% ± 25%\n"
        "cut         38% ± 5%           28% ± 9%  81 ± 4            2.76 ± 0.06        0.830 ± 0.010                40%         50% ± 25%\n"
        "tuned        9% ± 5%           56% ± 9%  81 ± 4            2.26 ± 0.06        0.500 ± 0.010                40%         50% ± 25%\n"
        "  loops: answers of which 64 tokens or more repeat at most 10 of them; shorter loops do not count\n"
        "  end by themselves: answers that stop before the limit\n"
        "  tokens: mean length of an answer\n"
        "  dense loss on samples: how unlikely the dense model finds what it says; the dense row has what to expect\n"
        "  KL on dense answers: KL along the dense model's own answers\n"
        "  first 32 as dense: of the first 32 tokens those that the dense model writes in the same place\n"
        "  arithmetic right: right results of sums\n"
        "Generation: 32 questions through the chat template, answers of at most 128 tokens; greedy, but for the loss and the "
        "KL, which are in nats per token on answers sampled at temperature 0.8; ± is a standard error.\n"
        "tuned: usable with losses: 9% of its answers loop (dense: 0%) (generation kept: 0.38).\n\n"
        "Met: retention 0.760 (tuned), at least 0.7 was required.\n"
        "Falls short: generation 0.383 (tuned), at least 0.8 was required."
    )


def card(report, folder):
    return write_model_card(report, CLPConfig(), folder).read_text(encoding="utf-8")


def test_the_card_has_both_kinds_of_figures_verdicts_and_answers(tmp_path):
    text = card(full_report(), tmp_path).split("## In use\n\n")[1].split("\n\n## ")[0]
    assert "| c4 | tuned | 31.500 | 0.4000 | 0.720 |" in text and "| piqa | tuned | 0.6100 |" in text
    assert "| cut | 38% ± 5% | 28% ± 9% |" in text
    assert "- tuned: usable with losses: 9% of its answers loop (dense: 0%) (generation kept: 0.38)." in text
    assert "Falls short: generation 0.383 (tuned), at least 0.8 was required." in text
    assert "| What is 2 \\| 2? | It is \\*4\\*. | &lt;b&gt;2&lt;/b&gt; 2" in text
    assert "was not measured" not in text


def test_a_card_without_generation_says_so(tmp_path):
    report = full_report()
    del report.evaluation["generation"], report.evaluation["verdicts"]
    text = card(report, tmp_path)
    assert "## In use\n\nWhat the model says when it writes was not measured" in text
    assert "How some greedy answers begin" not in text
    assert "## In use" not in card(example_report(), tmp_path)


def test_limitations_name_what_was_not_measured(tmp_path):
    assert "Longer contexts and safety behaviour were not measured." in card(full_report(), tmp_path)
    assert (
        "Everything that was measured is in the table above, on that text alone. Other text, benchmark tasks, longer "
        "contexts and safety behaviour were not measured." in card(example_report(), tmp_path)
    )


def test_answers_stand_side_by_side_on_one_line_each():
    head, _, line = answers_markdown(GENERATION).splitlines()
    assert head == "| prompt | dense | cut | tuned |" and line.endswith("… |  |")
    assert len(line.split(" | ")[2].replace("&lt;", "<").replace("&gt;", ">")) == 160
    assert answers_markdown({**GENERATION, "examples": []}) == answers_markdown(None) == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"asked": "text", "note": "no template"}, "Generation: 32 beginnings of held-out text, answers"),
        ({"asked": "prompts", "note": "no template"}, "32 prompts, as they are, answers"),
        ({"num_left_out": 3}, "chat template (3 more are longer than the model takes), answers"),
        ({"note": "x y"}, "standard error. Note: x y."),
    ],
)
def test_how_it_was_asked_is_said(changes, words):
    assert words in asked({**GENERATION, **changes})


def test_lines():
    assert generation_text(None, []) == ""
    assert verdict_line(VERDICT).endswith("(generation kept: 0.38).")
    unknown = {**SHORT, "reached": None, "row": None}
    assert requirement_line(unknown) == (
        "Falls short: generation of at least 0.8 was required, and could not be measured."
    )
    assert requirement_line({**unknown, "reached": math.nan}) == requirement_line(unknown)


def test_the_exit_status_is_4_where_something_falls_short():
    report = full_report()
    assert exit_status(report) == 4
    report.evaluation["requirements"] = [MET]
    assert exit_status(report) == exit_status(example_report()) == exit_status(CLPReport()) == 0
