import sys

import pytest

from optimum_clp import CLPConfig, progress
from optimum_clp.configuration.run_stages import stages_of_run
from optimum_clp.progress import Stages, in_words, progress_bar


@pytest.fixture
def clock(monkeypatch):
    """A time that stands still until it is moved."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def on_terminal(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)


def drawn(capsys, seconds, **options):
    with progress_bar(2, "Working", **options) as bar:
        bar.update(1)
        progress.time.sleep(seconds)
        bar.update(1)
    return capsys.readouterr()


def test_work_of_more_than_two_seconds_shows_a_bar_on_standard_error(capsys, monkeypatch):
    on_terminal(monkeypatch)
    seen = drawn(capsys, 2.1)
    assert "Working: 100%" in seen.err and "\r" in seen.err and seen.out == ""


def test_short_work_and_quiet_work_show_nothing(capsys, monkeypatch):
    assert drawn(capsys, 0.0).err == ""
    on_terminal(monkeypatch)
    assert drawn(capsys, 0.0).err.strip() == ""
    assert drawn(capsys, 2.1, quiet=True).err == ""


def test_a_log_gets_lines_that_become_rarer(capsys, clock):
    with progress_bar(2000, "Working") as bar:
        for _ in range(1000):
            clock[0] += 1
            bar.update(2)
    seen = capsys.readouterr()
    assert seen.out == "" and seen.err.splitlines() == [
        "Working: 120 of 2,000 (60 s)",
        "Working: 240 of 2,000 (120 s)",
        "Working: 480 of 2,000 (240 s)",
        "Working: 960 of 2,000 (480 s)",
        "Working: 1,920 of 2,000 (960 s)",
        "Working: done (1000 s)",
    ]


def test_a_log_says_that_work_was_interrupted(capsys, clock):
    with pytest.raises(KeyboardInterrupt), progress_bar(3, "Working") as bar:
        clock[0] = 3
        bar.update()
        raise KeyboardInterrupt
    assert capsys.readouterr().err.splitlines() == ["Working: interrupted (3 s)"]


def test_a_log_gets_one_line_of_work_that_takes_less_than_a_minute(capsys, clock):
    with progress_bar(2, "Working") as bar:
        for seconds in (30, 59):
            clock[0] = seconds
            bar.update()
    assert capsys.readouterr().err.splitlines() == ["Working: done (59 s)"]


def test_a_notebook_has_bars(monkeypatch):
    class tqdm_notebook:
        pass

    monkeypatch.setattr(progress, "tqdm", type("tqdm", (tqdm_notebook,), {}))
    assert not sys.stderr.isatty() and progress.draws_bars()


STAGES = {"search": "which layers can go", "figures": "what is left"}


def test_each_stage_says_its_place_and_the_run_how_long_it_took(capsys, clock):
    stages = Stages()
    stages.begin("search")  # called alone
    with stages.run(STAGES):
        stages.begin("search")
        clock[0] += 125
        stages.begin("figures")
        stages.begin("another")
        clock[0] += 7300
    stages.begin("figures")
    seen = capsys.readouterr()
    assert seen.out == "" and seen.err.splitlines() == [
        "[1 of 2] search: which layers can go",
        "[2 of 2] figures: what is left (after 2 min 5 s)",
        "All 2 stages: 2 h 3 min.",
    ]


def test_a_run_that_fails_or_is_quiet_claims_nothing(capsys, clock):
    stages = Stages()
    with stages.run(STAGES, quiet=True):
        stages.begin("search")
    with pytest.raises(ValueError), stages.run(STAGES):
        raise ValueError
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (12000, "3 h 20 min")]
)
def test_a_time_in_words(seconds, words):
    assert in_words(seconds) == words


def test_a_run_has_the_stages_that_its_recipe_asks_for():
    assert list(stages_of_run(CLPConfig(), True)) == [
        "search",
        "tuning",
        "checkpoint",
        "ONNX files",
        "figures",
        "records",
    ]
    short = CLPConfig(tuning={"enabled": False}, export={"enabled": False}, quantization={"quanto": True})
    assert list(stages_of_run(short, True)) == ["search", "checkpoint", "quanto", "figures", "records"]
    assert list(stages_of_run(CLPConfig(), False)) == ["search", "tuning"]
