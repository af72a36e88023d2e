import math

import pytest

from optimum_clp.evaluation.generation import GenerationRow
from optimum_clp.evaluation.verdict import generation_kept, verdict

DENSE = {
    "name": "dense",
    "loops": 0.0,
    "loops_error": 0.0,
    "ended": 0.63,
    "ended_error": 0.09,
    "length": 80.0,
    "length_error": 9.0,
    "sampled_loops": 0.0,
    "sampled_ended": 0.7,
    "sampled_length": 70.0,
    "dense_loss": 1.30,
    "dense_loss_error": 0.05,
}


def row(**figures):
    return GenerationRow(**{**DENSE, "name": "tuned", **figures})


def judged(retention=0.99, chat=True, dense=None, **figures):
    return verdict(row(**figures), row(**(dense or {})), retention, chat=chat)


def test_the_dense_model_is_like_itself():
    found = judged()
    assert (found.level, found.text, found.losses) == ("like dense", "talks like the dense model", ())
    assert found.generation_kept.share == 1 and found.retention == found.quality == 0.99
    assert judged(chat=False).text == "writes like the dense model"


def test_the_issue_s_cut_and_tuned_models():
    """The figures of SmolLM2-135M-Instruct at 20 %."""
    cut = judged(loops=0.38, loops_error=0.09, ended=0.28, ended_error=0.08, dense_loss=2.76, retention=0.53)
    assert cut.level == "do not deploy"
    assert cut.text == (
        "do not deploy as a chat model, about 23% of the dense model's quality is left: 38% of its answers loop (dense: 0%); "
        "28% of its answers end by themselves (dense: 63%); the dense model finds its words 4.3 times as unlikely as words of its own"
    )
    assert cut.losses[-1] == "it foresees held-out text less well (retention 0.53)" and cut.losses[-1] not in cut.text
    tuned = judged(loops=0.09, loops_error=0.05, ended=0.56, ended_error=0.09, dense_loss=1.9, retention=0.76)
    assert tuned.level == "usable"
    assert tuned.text.startswith(
        "usable with large losses, about 55% of the dense model's quality is left: 9% of its answers loop (dense: 0%); the dense"
    )
    assert cut.generation_kept.share == pytest.approx(math.exp(-1.46))


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        (
            {"loops": 0.09, "loops_error": 0.03},
            "usable with small losses, about 91% of the dense model's quality is left: ",
        ),
        ({"ended": 0.4347, "ended_error": 0.01}, "usable with large losses, about 69% of the dense model's"),
        ({"ended": 0.4473, "ended_error": 0.01}, "usable with clear losses, about 71% of the dense model's"),
        ({"dense_loss": 1.30 + 0.5}, "usable with large losses, about 61% of the dense model's"),
        ({"retention": 0.92}, "usable with small losses, about 92% of the dense model's"),
        (
            {"loops": 0.09, "loops_error": 0.03, "retention": 0.8},
            "usable with clear losses, about 80% of the dense model's",
        ),
    ],
)
def test_words_say_how_much_is_lost(figures, said):
    """The least of what is kept decides, as a share of nine tenths and of seven are not the same thing to who reads it."""
    found = judged(**figures)
    assert found.text.startswith(said) and f"about {found.quality:.0%}" in said


@pytest.mark.parametrize(
    ("figures", "level"),
    [
        ({"loops": 0.031, "loops_error": 0.031}, "like dense"),  # one answer of 32
        ({"loops": 0.06, "loops_error": 0.03}, "usable"),
        ({"loops": 0.16, "loops_error": 0.06}, "usable"),  # may be a tenth
        ({"loops": 0.18, "loops_error": 0.06}, "do not deploy"),
        ({"ended": 0.50, "ended_error": 0.09}, "usable"),
        ({"ended": 0.28, "ended_error": 0.08}, "do not deploy"),
        ({"dense_loss": 1.45, "dense_loss_error": 0.05}, "like dense"),
        ({"dense_loss": 1.55, "dense_loss_error": 0.05}, "usable"),
        ({"dense_loss": 2.5, "dense_loss_error": 0.05}, "do not deploy"),
        ({"dense_loss": math.nan}, "do not deploy"),
        ({"retention": 0.9}, "usable"),
        ({"retention": 0.49}, "do not deploy"),
        ({"retention": None}, "like dense"),
    ],
)
def test_bounds(figures, level):
    assert judged(**figures).level == level


def test_a_dense_model_that_never_ends_has_no_share_to_keep():
    dense = {"ended": 0.1, "ended_error": 0.05}
    found = judged(ended=0.0, ended_error=0.0, dense=dense, chat=False)
    assert found.level == "like dense" and found.generation_kept.ended is None


def test_loops_of_the_dense_model_are_not_held_against_it():
    assert judged(loops=0.5, loops_error=0.01, dense={"loops": 0.5}).level == "like dense"


def test_what_is_kept_is_the_least_of_its_parts():
    dense = row()
    parts = generation_kept(row(loops=0.2, ended=0.315, dense_loss=1.5), dense)
    assert (parts.loops, parts.ended) == (pytest.approx(0.8), pytest.approx(0.5))
    assert parts.likelihood == pytest.approx(math.exp(-0.2)) and parts.share == parts.ended
    better = generation_kept(row(ended=0.9, dense_loss=0.9), dense)
    assert (better.share, better.ended, better.likelihood) == (1, 1, 1)
    assert generation_kept(row(dense_loss=math.inf), dense).share == 0
