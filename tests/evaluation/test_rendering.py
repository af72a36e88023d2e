import pytest
import torch
from byte_tokenizer import tiny_tokenizer

from optimum_clp.errors import ConfigurationError
from optimum_clp.evaluation.prompts import Prompt
from optimum_clp.evaluation.rendering import beginnings, rendered_prompts, template_obstacle

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITHOUT = CHATML.split("{% if")[0]
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
RAISING = "{{ raise_exception('no system role here') }}"
THINKING = CHATML.replace(
    "assistant\n{% endif", "assistant\n{% if enable_thinking is false %}<think></think>{% endif %}{% endif"
)
HI = Prompt((("user", "Hi there"),), "facts", None)


def tokenizer_with(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def rendered(template, prompt=HI):
    tokenizer = tokenizer_with(template)
    (found,) = rendered_prompts([prompt], tokenizer, None)
    return tokenizer.decode(list(found.ids))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (CHATML, "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"),
        # no generation prompt: what the template puts before an answer
        (WITHOUT, "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"),
        (MISTRAL, "<s>[INST] Hi there [/INST]"),
        (THINKING, "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n<think></think>"),
        (None, "Hi there"),
    ],
)
def test_a_prompt_ends_where_the_answer_begins(template, text):
    assert rendered(template) == text


def test_all_turns_are_rendered():
    talk = Prompt((("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye")))
    assert rendered(MISTRAL, talk) == "<s>[INST] Hi [/INST] Yes?</s>[INST] Bye [/INST]"


def test_what_stands_in_the_way_is_said():
    assert template_obstacle(tokenizer_with(CHATML)) is None
    assert template_obstacle(None) == "there is no tokenizer"
    assert template_obstacle(tokenizer_with(None)) == "the tokenizer has no chat template"
    assert "chat template raises TemplateError: no system role here" in template_obstacle(tokenizer_with(RAISING))
    assert template_obstacle(tokenizer_with("hello")) == "the tokenizer's chat template leaves out the user's words"


def test_a_template_that_raises_for_a_prompt_names_it():
    with pytest.raises(
        ConfigurationError, match="prompt is 'Hi there': the tokenizer's chat template raises TemplateError"
    ):
        rendered(RAISING)


def test_several_turns_need_a_template():
    talk = Prompt((("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye")))
    with pytest.raises(ConfigurationError, match="it has several turns, and the tokenizer has no chat template"):
        rendered(None, talk)


def test_prompts_that_are_too_long_are_left_out():
    tokenizer, long = tokenizer_with(CHATML), Prompt((("user", "Hi there " * 50),))
    assert [found.shown for found in rendered_prompts([long, HI, long], tokenizer, 100)] == ["Hi there"]
    with pytest.raises(ConfigurationError, match="none of the 2 prompts is at most 5 tokens long"):
        rendered_prompts([long, HI], tokenizer, 5)


def test_text_goes_on_from_its_beginning():
    rows = torch.arange(200).view(2, 100)
    assert [found.ids for found in beginnings(rows, 5, None)] == [tuple(range(32)), tuple(range(100, 132))]
    assert [len(found.ids) for found in beginnings(rows[:, :9], 1, None)] == [4]
