import pytest
from chat_templates import CHATML, FAMILIES, SPECIAL, chat_tokenizer

from optimum_clp.calibration.templates import first_words, split_template
from optimum_clp.errors import CalibrationError


def shown(tokenizer, tokens):
    return None if tokens is None else tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pieces_of_every_family(family):
    template, *pieces, end = FAMILIES[family]
    tokenizer = chat_tokenizer(template)
    found = split_template(tokenizer)
    got = [shown(tokenizer, part) for part in (found.opening, found.answer, found.question, found.closing)]
    if family == "mistral":  # every byte is a token here, and the space behind a bracket is no word's
        pieces = ["<s>[INST] ", " [/INST]", "</s>[INST] ", "</s>"]
    assert got == pieces
    written = shown(tokenizer, found.question_end)
    assert written in tokenizer.all_special_tokens and pieces[1].startswith(
        written + shown(tokenizer, found.answer_rest), pieces[1].index(written)
    )
    assert {shown(tokenizer, [token]) for token in found.answer_ends} == {"</s>", end}


@pytest.mark.parametrize("family", [name for name, parts in FAMILIES.items() if parts[3] is not None])
def test_the_pieces_put_together_are_what_the_template_renders(family):
    tokenizer = chat_tokenizer(FAMILIES[family][0])
    found = split_template(tokenizer)

    def words(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    said = ["How are you?", "Fine.", "And now?", "Still fine."]
    roles = ["user", "assistant"] * 2
    space = words(" ") if family == "mistral" else []
    built = [*found.opening, *words(said[0]), *found.answer, *space, *words(said[1]), *found.question]
    built += [*words(said[2]), *found.answer, *space, *words(said[3]), *found.closing]
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    assert shown(tokenizer, built) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_turn_that_no_special_token_ends_is_told_by_several():
    tokenizer = chat_tokenizer(FAMILIES["mistral"][0], [token for token in SPECIAL if "INST" not in token])
    found = split_template(tokenizer)
    assert shown(tokenizer, found.question_end) == " [/I" and shown(tokenizer, found.answer) == " [/INST]"
    assert found.question_end + found.answer_rest == found.answer


def test_first_words_are_tokens_behind_the_opening():
    tokenizer = chat_tokenizer()
    assert [shown(tokenizer, words) for words in first_words(tokenizer, ["List three", "Hi"])] == ["List three", "Hi"]


BAD = {
    "raises": ("{{ raise_exception('no user') }}", "it cannot be rendered .*no user"),
    "syntax": ("{% for %}", "it cannot be rendered"),
    "no generation prompt": (CHATML.split("{% if add_generation_prompt")[0], "it has no generation prompt"),
    "changes": (CHATML.replace("m.content", "m.content | upper"), "it changes what is said: 'Kiwi' stands 0 times"),
    "repeats": (
        CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"),
        "it changes what is said: 'Kiwi' stands 2 times",
    ),
    "nothing": (None, "the model has no chat template"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_taken_apart_says_why(case):
    template, message = BAD[case]
    with pytest.raises(CalibrationError, match=rf"(?s)chat_template is .*: {message}.*Give the tokenizer"):
        split_template(chat_tokenizer(template))
