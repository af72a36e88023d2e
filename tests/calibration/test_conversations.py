import itertools

import pytest
import torch
from chat_templates import CHATML, FAMILIES, chat_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_clp.calibration import conversations, writing
from optimum_clp.calibration.conversations import (
    ASSISTANT,
    TEMPLATE,
    USER,
    conversation_statistics,
    model_template,
    sample_answers,
    sample_conversations,
)
from optimum_clp.calibration.sample_cache import Sample

LENGTH = 160
A, B = 65, 66  # two letters as tokens


def chat_model(tokenizer, likely=None, **changes):
    """A small model that writes letters, and ends its turns about every sixth token; or `likely` alone."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **changes,
    )
    model = LlamaForCausalLM(config).eval()
    ends = model_template(model, tokenizer)
    wanted = [ends.closing[0], *ends.question_end] if likely is None else likely
    with torch.no_grad():
        # the last hidden state is the same everywhere, so every token has the probabilities of this table
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.fill_(-4.0)
        model.lm_head.weight[32:90] = 0.0
        for token in wanted:
            model.lm_head.weight[token] = 0.09 if likely is None else 9.0
    return model


def write(model, tokenizer, tmp_path, rows=6, seed=0, **changes):
    changes = {"sequence_length": LENGTH, "batch_size": 4, "cache_dir": tmp_path, "quiet": True, **changes}
    return sample_conversations(model, tokenizer, num_sequences=rows, seed=seed, **changes)


def parsed(tokens, template):
    """A row read again by the template alone: the roles that its tokens must have, turn by turn."""
    tokens, roles, turns = list(tokens), [], []

    def skip(piece):
        part = tokens[len(roles) : len(roles) + len(piece)]
        assert part == list(piece)[: len(part)]
        roles.extend([TEMPLATE] * len(part))

    while len(roles) < len(tokens):
        skip(template.opening)
        turns.append(0)
        while len(roles) < len(tokens):
            begin = len(roles)
            stops = {*template.question_end, *template.ends}
            while len(roles) < len(tokens) and not {*tokens[begin : len(roles)][-1:]} & stops:
                roles.append(USER)
            if tokens[len(roles) - 1] not in template.question_end:
                break  # the model has ended the text as a whole
            skip(template.answer_rest)
            turns[-1] += 1
            begin = len(roles)
            while len(roles) < len(tokens) and not {*tokens[begin : len(roles)][-1:]} & {*template.answer_ends}:
                roles.append(ASSISTANT)
            ended = tokens[len(roles) - 1]
            if ended != template.closing[0]:
                break
            following = tokens[len(roles) : len(roles) + len(template.question) - 1]
            if following == list(template.question[1:])[: len(following)]:
                skip(template.question[1:])
                continue
            skip(template.closing[1:])
            break
    return roles, turns


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "phi", "deepseek"])
def test_rows_are_what_the_template_makes_of_turns_that_the_model_writes(family, tmp_path):
    tokenizer = chat_tokenizer(FAMILIES[family][0])
    model = chat_model(tokenizer)
    template = model_template(model, tokenizer)
    sample = write(model, tokenizer, tmp_path, 12, sequence_length=400)
    assert sample.tokens.shape == sample.roles.shape == (12, 400) and sample.roles.dtype == torch.uint8
    turns = []
    for tokens, roles in zip(sample.tokens.tolist(), sample.roles.tolist(), strict=True):
        expected, found = parsed(tokens, template)
        assert roles == expected
        turns += found[:-1]
    # where the opening is what leads to a question, a new conversation cannot be told from another turn
    assert set(turns) - {0} == {1, 2, 3} or family == "phi"
    assert sample.tokens[:, 0].unique().tolist() == [template.opening[0]]


def test_losses_are_those_of_one_pass(tmp_path):
    tokenizer = chat_tokenizer()
    model = chat_model(tokenizer)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=1.0)
    sample = write(model, tokenizer, tmp_path)
    with torch.no_grad():
        logits = model(sample.tokens).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), sample.tokens[:, 1:], reduction="none")
    torch.testing.assert_close(sample.losses.float(), expected.mean(1), rtol=1e-4, atol=1e-4)


def test_a_row_depends_on_its_seed_and_index_alone(tmp_path):
    tokenizer = chat_tokenizer()
    model = chat_model(tokenizer).double()
    whole = write(model, tokenizer, tmp_path / "a", 6)
    other = write(model, tokenizer, tmp_path / "b", 4, batch_size=3)
    assert torch.equal(other.tokens, whole.tokens[:4]) and torch.equal(other.roles, whole.roles[:4])
    assert not torch.equal(write(model, tokenizer, tmp_path / "c", 6, seed=1).tokens, whole.tokens)
    assert len(torch.unique(whole.tokens, dim=0)) == 6


def test_what_was_written_is_read_with_its_roles(tmp_path, monkeypatch):
    tokenizer = chat_tokenizer()
    model = chat_model(tokenizer)
    whole = write(model, tokenizer, tmp_path / "whole", 8)
    calls, original = [], writing._write_batch

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(writing, "_SAVE_INTERVAL", 0.0)
    monkeypatch.setattr(writing, "_write_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(model, tokenizer, tmp_path, 8)
    again = write(model, tokenizer, tmp_path, 8)
    assert len(calls) == 3
    for found in (again, write(model, tokenizer, tmp_path, 8)):
        assert torch.equal(found.tokens, whole.tokens) and torch.equal(found.roles, whole.roles)
        assert torch.equal(found.losses, whole.losses)
    assert len(calls) == 3


def test_turns_that_never_end_are_ended(tmp_path, monkeypatch):
    tokenizer = chat_tokenizer()
    model = chat_model(tokenizer, likely=[A])
    monkeypatch.setattr(conversations, "_LONGEST_ANSWER", 30)
    template = model_template(model, tokenizer)
    sample = write(model, tokenizer, tmp_path, 5)
    for tokens, roles in zip(sample.tokens.tolist(), sample.roles.tolist(), strict=True):
        runs = [(role, len(list(run))) for role, run in itertools.groupby(roles)]
        assert [length for role, length in runs[:-1] if role == USER] == [LENGTH // 4] * sum(
            role == USER for role, _ in runs[:-1]
        )
        assert all(length == 30 for role, length in runs[:-1] if role == ASSISTANT)
        first = len(template.opening) + LENGTH // 4
        assert tokens[first : first + len(template.answer)] == list(template.answer)
    found = conversation_statistics(sample, template)
    assert found["ended_share"] == 0.0 and found["answers"] > 0 and found["distinct_openings_share"] < 0.5


def test_statistics_count_openings_and_ends():
    tokenizer = chat_tokenizer()
    template = model_template(chat_model(tokenizer), tokenizer)
    end = template.closing[0]
    rows = [
        ([1, A, A, end, 1, B, end, 1, B, B], [0, 1, 1, 1, 0, 2, 2, 0, 1, 1]),
        ([1, A, A, end, 1, B, B, 1, 1, 1], [0, 1, 1, 1, 0, 2, 2, 0, 0, 0]),
        ([1, A, B, end, 1, B, B, B, B, B], [0, 1, 1, 1, 0, 2, 2, 2, 2, 2]),
    ]
    tokens, roles = (torch.tensor([row[i] for row in rows]) for i in (0, 1))
    found = conversation_statistics(Sample(tokens, torch.zeros(3), roles.byte()), template)
    # the last row's answer is cut off by the row; the second's was ended
    assert found == {"questions": 4, "distinct_openings_share": 3 / 4, "answers": 2, "ended_share": 1 / 2}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_conversations_begins_with_first_words(tmp_path, share):
    tokenizer = chat_tokenizer()
    model = chat_model(tokenizer)
    template = model_template(model, tokenizer)
    sample = write(
        model, tokenizer, tmp_path, 40, batch_size=40, openings=["List 3", "Add 7 to"], openings_share=share
    )
    begin = len(template.opening)
    texts = tokenizer.batch_decode(sample.tokens[:, begin : begin + 8])
    found = [sum(text.startswith(words) for text in texts) for words in ("List 3", "Add 7 to")]
    # binomial: four standard deviations of 40 rows
    assert abs(sum(found) - 40 * share) <= 4 * (40 * share * (1 - share)) ** 0.5 and (share == 0 or min(found) > 1)
    begun = torch.tensor([text.startswith(("List 3", "Add 7 to")) for text in texts])
    assert (sample.roles[begun, begin : begin + 6] == USER).all()


def test_prompts_are_answered_one_after_the_other(tmp_path):
    tokenizer = chat_tokenizer()
    model = chat_model(tokenizer)
    template = model_template(model, tokenizer)
    prompts = [[*template.opening, A, number, *template.answer] for number in range(60, 65)]
    options = {"sequence_length": 400, "seed": 0, "batch_size": 2, "cache_dir": tmp_path, "quiet": True}
    sample = sample_answers(model, tokenizer, prompts, num_sequences=2, **options)
    for row in range(2):
        tokens, roles = sample.tokens[row].tolist(), sample.roles[row].tolist()
        place, number = 0, row
        while place < 400:
            prompt = prompts[number % 5]
            part = tokens[place : place + len(prompt)]
            assert part == prompt[: len(part)] and not any(roles[place : place + len(prompt)])
            place += len(prompt)
            while place < 400 and tokens[place] not in template.answer_ends:
                assert roles[place] == ASSISTANT
                place += 1
            ended = tokens[place] if place < 400 else None
            place += len(template.closing) if ended == template.closing[0] else 1
            number += 7919
        assert number > 4
    others = sample_answers(model, tokenizer, prompts[::-1], num_sequences=2, **options)
    assert not torch.equal(others.tokens, sample.tokens)


def test_an_end_that_is_no_turns_end_begins_a_new_conversation(tmp_path):
    tokenizer = chat_tokenizer(CHATML)
    model = chat_model(tokenizer, likely=[tokenizer.eos_token_id])
    template = model_template(model, tokenizer)
    row = write(model, tokenizer, tmp_path, 1).tokens[0].tolist()
    again = [*template.opening, tokenizer.eos_token_id]
    assert row == (again * LENGTH)[:LENGTH]
