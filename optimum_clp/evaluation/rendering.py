"""Prompts as tokens: through the tokenizer's chat template, or the beginnings of held-out text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigurationError
from .prompts import Prompt

# words that no template brings itself
_ASKED, _ANSWERED = "qzquestionqz", "qzanswerqz"
# tokens of a held-out row that are given to a base model, which goes on from there
BEGINNING = 32


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as a model gets it.

    Args:
        ids (`tuple[int, ...]`): At least one token.
        shown (`str`): Its last words, for a reader.
        kind (`str`): As in [`Prompt`].
        answer (`str` or `None`): As in [`Prompt`].
    """

    ids: tuple[int, ...]
    shown: str
    kind: str = ""
    answer: str | None = None


def template_obstacle(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """Why a model cannot be asked through a chat template: a clause, or `None` if it can."""
    if tokenizer is None:
        return "there is no tokenizer"
    if not getattr(tokenizer, "chat_template", None):
        return "the tokenizer has no chat template"
    try:
        rendered = _with_generation_prompt(tokenizer, [{"role": "user", "content": _ASKED}])
    except Exception as error:  # Jinja's, and whatever a template raises itself
        return f"the tokenizer's chat template raises {_first_line(error)}"
    return None if _ASKED in rendered else "the tokenizer's chat template leaves out the user's words"


def rendered_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, longest: int | None
) -> list[PromptTokens]:
    """Prompts through the chat template, up to where the answer begins; without one, the words alone.

    A template that has no generation prompt (`add_generation_prompt` adds nothing) gets what it puts before an answer that
    is there. Thinking is switched off where a template can do so (`enable_thinking`, Qwen3): what is measured is a short
    answer.

    Args:
        prompts (`Sequence[Prompt]`): What to ask.
        tokenizer (`PreTrainedTokenizerBase`): Without a chat template it takes prompts of one turn only.
        longest (`int` or `None`): Tokens that a prompt may have; longer ones are left out.

    Returns:
        `list[PromptTokens]`: In the same order; fewer where some are too long.

    Raises:
        ConfigurationError: If the template raises for one of them, one has several turns and there is no template, or all
            are too long.
    """
    found = []
    for prompt in prompts:
        ids = tuple(_ids(prompt, tokenizer))
        if ids and (longest is None or len(ids) <= longest):
            found.append(PromptTokens(ids, prompt.last_words, prompt.kind, prompt.answer))
    if not found:
        rule = f"none of the {len(prompts)} prompts is at most {longest} tokens long, which is what the model takes"
        raise ConfigurationError.of("prompts", len(prompts), rule, "Give shorter ones")
    return found


def beginnings(rows: torch.Tensor, number: int, tokenizer: PreTrainedTokenizerBase | None) -> list[PromptTokens]:
    """The first tokens of held-out rows, int64 `[rows, length]`: [`BEGINNING`] of them, or half a row that is shorter."""
    length = max(1, min(BEGINNING, rows.shape[1] // 2))
    return [
        PromptTokens(tuple(ids), "" if tokenizer is None else decoded(tokenizer, ids))
        for ids in rows[:number, :length].tolist()
    ]


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Tokens as text, without special ones."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        if len(prompt.messages) > 1:
            rule = "it has several turns, and the tokenizer has no chat template"
            raise ConfigurationError.of("prompt", prompt.last_words, rule, 'Give rows with "prompt" to a base model')
        return tokenizer(prompt.last_words, verbose=False)["input_ids"]
    try:
        text = _with_generation_prompt(tokenizer, prompt.for_template())
    except Exception as error:
        rule = f"the tokenizer's chat template raises {_first_line(error)}"
        raise ConfigurationError.of("prompt", prompt.last_words, rule, "Correct or remove that prompt") from error
    # the template has written the special tokens
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _with_generation_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    def render(turns: list[dict[str, str]], **options: Any) -> str:
        text = tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False, **options)
        assert isinstance(text, str)
        return text

    asked = render(messages, add_generation_prompt=True)
    if asked != (plain := render(messages, add_generation_prompt=False)):
        return asked
    answered = render([*messages, {"role": "assistant", "content": _ANSWERED}])
    before, found, _ = answered.partition(_ANSWERED)
    # a space before the answer belongs to its first token (Mistral)
    return before.rstrip(" ") if found and before.startswith(plain.rstrip()) else asked


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}"
