"""Text of a cut model's own, to learn from."""

import pytest
import torch
from chat_templates import FAMILIES, chat_tokenizer
from test_conversations import chat_model

from optimum_clp.calibration.conversations import ASSISTANT, model_template, sample_conversations
from optimum_clp.calibration.practice import OWN, first_questions, practice_rows

LENGTH = 160


def conversations(model, tokenizer, folder):
    options = {"sequence_length": LENGTH, "seed": 5, "batch_size": 4, "cache_dir": folder, "quiet": True}
    return sample_conversations(model, tokenizer, num_sequences=4, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_questions_are_those_of_the_first_turns(family, tmp_path):
    tokenizer = chat_tokenizer(FAMILIES[family][0])
    model = chat_model(tokenizer)
    written = conversations(model, tokenizer, tmp_path)
    template = model_template(model, tokenizer)
    plain = torch.full((1, LENGTH), 70)
    found = first_questions(torch.cat([plain, written.tokens]), template)
    expected = []
    for tokens, roles in zip(written.tokens.tolist(), written.roles.tolist(), strict=True):
        first = next((i for i, role in enumerate(roles) if role == ASSISTANT), LENGTH)
        if first <= 3 * LENGTH // 4:
            expected.append(tuple(tokens[:first]))
    assert found == expected and found


def test_a_chat_model_answers_the_questions_and_what_it_says_counts(tmp_path):
    tokenizer = chat_tokenizer()
    model = chat_model(tokenizer)
    template = model_template(model, tokenizer)
    rows = conversations(model, tokenizer, tmp_path).tokens
    questions = first_questions(rows, template)
    found = practice_rows(
        model, tokenizer, rows, num_sequences=3, seed=1, batch_size=2, cache_dir=tmp_path, quiet=True
    )
    assert found.tokens.shape == (3, LENGTH) and found.kinds == (OWN,) * 3
    for tokens, mask in zip(found.tokens.tolist(), found.mask.tolist(), strict=True):
        question = next(each for each in questions if tuple(tokens[: len(each)]) == each)
        assert not any(mask[: len(question)]) and mask[len(question)]
    again = practice_rows(
        model, tokenizer, rows, num_sequences=3, seed=2, batch_size=2, cache_dir=tmp_path, quiet=True
    )
    assert not torch.equal(again.tokens, found.tokens)


@pytest.mark.parametrize("rows", ["plain", "no template"])
def test_where_there_are_no_questions_it_writes_plain_text(rows, tmp_path):
    tokenizer = chat_tokenizer()
    model = chat_model(tokenizer)
    given = torch.full((2, LENGTH), 70)
    if rows == "no template":
        given = conversations(model, tokenizer, tmp_path).tokens
        tokenizer.chat_template = None
    found = practice_rows(
        model, tokenizer, given, num_sequences=3, seed=1, batch_size=2, cache_dir=tmp_path, quiet=True
    )
    assert found.tokens.shape == (3, LENGTH) and found.mask is None and found.kinds == (OWN,) * 3
