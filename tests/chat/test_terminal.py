import io

import pytest

from optimum_clp.chat.answering import AnswerSettings
from optimum_clp.chat.terminal import AS_TEXT, HELP, converse


def typed(*lines, end=EOFError):
    """What a user types; then the end."""
    left = list(lines)

    def read():
        if not left:
            raise end
        return f"{left.pop(0)}\n"

    return read


def conversation(speakers, *lines, **options):
    screen = io.StringIO()
    said = converse(speakers, AnswerSettings(4), typed(*lines, **options), screen)
    return said, screen.getvalue()


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_each_model_answers_below_the_other(speakers, end):
    said, shown = conversation(speakers, "w7", "", "  ", "w8", end=end)
    assert [turn["prompt"] for turn in said] == ["w7", "w8"]
    assert list(said[0]["answers"]) == ["dense", "tuned", "onnx int4"]
    for name, answer in said[0]["answers"].items():
        assert f"\n{name}: {answer['text']}\n  [{answer['tokens']} token" in shown
    assert shown.startswith(HELP)


def test_what_was_said_before_is_kept_until_a_new_conversation(speakers):
    again = conversation(speakers, "w7", "w7")[0]
    fresh = conversation(speakers, "w7", "/new", "w7", "/quit", "w9")[0]
    assert fresh[0]["answers"]["dense"]["text"] == fresh[1]["answers"]["dense"]["text"] and len(fresh) == 2
    assert any(again[0]["answers"][name]["text"] != again[1]["answers"][name]["text"] for name in again[0]["answers"])


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/help", f"{HELP} {AS_TEXT}\n"),
        ("/h", f"There is no command /h. {HELP} {AS_TEXT}\n"),
        ("/reset now", f"There is no command /reset. {HELP} {AS_TEXT}\n"),
        ("/?", f"There is no command /?. {HELP} {AS_TEXT}\n"),
        ("/", f"There is no command /. {HELP} {AS_TEXT}\n"),
        ("/new", "A new conversation.\n"),
    ],
)
def test_commands_are_answered_by_the_program(speakers, line, told):
    said, shown = conversation(speakers, line)
    assert said == [] and shown == f"{HELP}\n{told}"


@pytest.mark.parametrize("line", [" /help w7", "w7 /new", "/w7/w8 w9", "/w7.w8"])
def test_what_only_looks_like_a_command_is_asked(speakers, line):
    said, _ = conversation(speakers, line)
    assert [turn["prompt"] for turn in said] == [line.strip()]


def test_a_base_model_goes_on_with_each_text_alone(base_speakers):
    first, second = conversation(base_speakers, "w7", "w7")[0]
    assert {n: a["text"] for n, a in first["answers"].items()} == {n: a["text"] for n, a in second["answers"].items()}


def test_ctrl_c_ends_one_answer_alone(speakers, monkeypatch):
    from optimum_clp.chat.answering import Answering

    plain, calls = Answering.advance, []

    def interrupted(self):
        calls.append(self.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self)

    monkeypatch.setattr(Answering, "advance", interrupted)
    said, shown = conversation(speakers, "w7")
    answers = said[0]["answers"]
    assert answers["dense"]["done"] and answers["dense"]["tokens"] < 4 and "cut short" in shown
    assert answers["onnx int4"]["tokens"] >= 1


def test_words_that_are_too_long_are_told_and_it_goes_on(speakers):
    said, shown = conversation(speakers, "w5 " * 300, "w7")
    assert "tokens long" in said[0]["answers"]["dense"]["error"] and "[none of the 1 prompts" in shown
    assert said[1]["answers"]["dense"]["tokens"] >= 1
