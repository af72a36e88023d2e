import threading

import pytest
import torch

from optimum_clp.chat.answering import Answering, AnswerSettings, answer_in_turn

PROMPT = (3, 7, 8, 4)


def greedy(model, ids, number, ends=(2,)):
    """Token by token, without a cache."""
    text = list(ids)
    while len(text) < len(ids) + number and text[-1] not in ends:
        tokens = torch.tensor([text])
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
        text.append(int(logits[0, -1].argmax()))
    return text[len(ids) :]


def begun(speakers, number=12, **settings):
    rules = AnswerSettings(number, **settings)
    return [Answering(speakers, speaker, PROMPT, rules) for speaker in speakers.all]


def test_all_answers_are_the_models_own_and_grow_in_turn(speakers):
    answers = begun(speakers)
    order, texts = [], dict.fromkeys((answer.name for answer in answers), "")
    for answer, added in answer_in_turn(answers):
        order.append(answer.name)
        texts[answer.name] += added
    names = [speaker.name for speaker in speakers.all]
    assert order[: 2 * len(names)] == names * 2
    for answer, speaker in zip(answers, speakers.all, strict=True):
        with torch.no_grad():
            assert answer.tokens == greedy(speaker.model, PROMPT, 12)
        assert answer.text == texts[answer.name] == " ".join(f"w{t}" for t in answer.tokens if t > 2)
        assert answer.done and answer.error is None and answer.ended == (answer.tokens[-1] == 2)
        assert answer.tokens_per_second is None or answer.tokens_per_second > 0
        assert 0 < answer.first_seconds <= answer.seconds


def test_an_answer_can_be_stopped_by_itself(speakers):
    answers = begun(speakers, 60)
    for answer, _ in answer_in_turn(answers):
        if answer is answers[0] and len(answer.tokens) == 3:
            answer.stop()
    assert len(answers[0].tokens) <= 4 and answers[0].done
    others = {len(answer.tokens) for answer in answers[1:] if not answer.ended}
    assert others <= {60}


def test_whoever_goes_away_leaves_no_thread(speakers):
    before = threading.active_count()
    answers = begun(speakers, 60)
    turns = answer_in_turn(answers)
    for _ in range(4):
        next(turns)
    turns.close()
    assert all(answer.done and len(answer.tokens) < 5 for answer in answers)
    assert threading.active_count() == before
    # one that has not begun
    fresh = begun(speakers)[0]
    fresh.finish()
    assert fresh.tokens == [] and fresh.figures()["tokens_per_second"] is None


def test_a_model_that_fails_says_so_and_the_others_go_on(speakers, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("no")

    monkeypatch.setattr(speakers.all[1].model, "generate", fail)
    answers = begun(speakers, 3)
    for _ in answer_in_turn(answers):
        pass
    assert str(answers[1].error) == "no" and answers[1].tokens == []
    assert answers[0].error is None and len(answers[0].tokens) >= 1


def test_loops_are_seen(speakers, monkeypatch):
    answer = begun(speakers, 100)[0]
    # a model that says one word for ever
    monkeypatch.setattr("optimum_clp.chat.answering.loop_begin", lambda tokens: 5 if len(tokens) > 20 else None)
    for _ in answer_in_turn([answer]):
        pass
    assert answer.figures()["loops"] == (len(answer.tokens) > 20)


def test_a_temperature_samples(speakers):
    torch.manual_seed(0)
    said = set()
    for _ in range(3):
        (answer, *others) = begun(speakers, 8, temperature=5.0)
        for other in others:
            other.finish()
        for _ in answer_in_turn([answer]):
            pass
        said.add(tuple(answer.tokens))
    assert len(said) == 3


@pytest.mark.parametrize("whole", [False, True])
def test_half_a_character_waits(speakers, monkeypatch, whole):
    (answer, *others) = begun(speakers, 3)
    for other in others:
        other.finish()
    said = iter(["a", "a\ufffd", "a\u00e9" if whole else "a\ufffd"])
    monkeypatch.setattr("optimum_clp.chat.answering.decoded", lambda tokenizer, ids: next(said, "a\ufffd"))
    assert [answer.advance() for _ in range(3)] == ["a", "", "\u00e9" if whole else ""]
    monkeypatch.undo()
    answer.finish()
