"""Conversations of others to rows, rendered by the tokenizer's template, with the assistant's tokens marked.

A row begins where a conversation does and goes on with the next ones; what does not fit into it is left out.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import CalibrationError
from .chats import Message
from .templates import ChatTemplate, render

logger = logging.getLogger(__name__)

# tokens that an answer should have room for behind a prompt
_ROOM = 8


@dataclass(frozen=True)
class Spoken:
    """A conversation as tokens.

    Args:
        tokens (`list[int]`): As the template renders it.
        assistant (`list[bool]`): Which of them the assistant says, the token that ends its turn included.
    """

    tokens: list[int]
    assistant: list[bool]


def spoken(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> Spoken:
    """Render a conversation, and find the assistant's tokens: from where the template says that it begins to write to the
    token that ends its turn.

    That place is where the rendered conversation so far, with its generation prompt, ends. Where a template writes the past
    otherwise, it is where the answer's own text begins.

    Raises:
        CalibrationError: If the template raises, or changes an answer so that it cannot be found.
    """
    whole = render(tokenizer, messages, False)
    tokens = _tokens(tokenizer, whole)
    assistant = [False] * len(tokens)
    place = 0
    for index, message in enumerate(messages):
        said = message["content"].strip()
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:index], True)
        begin = len(before) if whole.startswith(before) else whole.find(said, place)
        found = whole.find(said, begin)
        if begin < 0 or found < 0:
            rule = f"it changes what the assistant says: {said[:40]!r} is not in what it makes of it"
            remedy = 'Set calibration.mask="all", or give the tokenizer a template that leaves answers as they are'
            raise CalibrationError.of("chat_template", str(tokenizer.chat_template)[:60], rule, remedy)
        place = found + len(said)
        first, last = (_shared(_tokens(tokenizer, whole[:cut]), tokens) for cut in (begin, place))
        last += last < len(tokens) and tokens[last] in template.answer_ends
        assistant[first:last] = [True] * (last - first)
    return Spoken(tokens, assistant)


def packed(conversations: Iterable[Spoken], rows: int | None, length: int) -> tuple[Tensor, Tensor]:
    """Rows that begin with a conversation and go on with the next ones.

    Args:
        conversations (`Iterable[Spoken]`): Read only as far as they are needed.
        rows (`int` or `None`): At most so many.
        length (`int`): Tokens in a row.

    Returns:
        `tuple`: int64 tokens and bool marks of the assistant's, `[rows, length]`; a row in which the assistant says nothing
        is left out, and so is a last one that is not full.
    """
    full: list[tuple[list[int], list[bool]]] = []
    tokens: list[int] = []
    marks: list[bool] = []
    for conversation in conversations:
        if rows is not None and len(full) == rows:
            break
        tokens, marks = tokens + conversation.tokens, marks + conversation.assistant
        if len(tokens) >= length:
            if any(marks[1:length]):
                full.append((tokens[:length], marks[:length]))
            tokens, marks = [], []
    if not full:
        return torch.empty(0, length, dtype=torch.int64), torch.empty(0, length, dtype=torch.bool)
    return torch.tensor([row for row, _ in full]), torch.tensor([row for _, row in full])


def rendered_prompts(
    prompts: Iterable[Sequence[Message]], tokenizer: PreTrainedTokenizerBase, length: int, most: int, name: str
) -> list[list[int]]:
    """Prompts up to where the assistant begins to write, as tokens; those that leave no room in a row are left out.

    Args:
        prompts (`Iterable`): Messages that end with the user's.
        tokenizer (`PreTrainedTokenizerBase`): With a chat template.
        length (`int`): Tokens in a row.
        most (`int`): No more are read.
        name (`str`): What they are called in errors.

    Raises:
        CalibrationError: If none is left.
    """
    kept, long = [], 0
    for messages in prompts:
        tokens = _tokens(tokenizer, render(tokenizer, messages, True))
        if len(tokens) + _ROOM <= length:
            kept.append(tokens)
        else:
            long += 1
        if len(kept) == most:
            break
    if not kept:
        rule = f"all {long} prompts are longer than a row of {length} tokens, and leave no room for an answer"
        raise CalibrationError.of(name, f"{long} prompts", rule, "Raise calibration.sequence_length, or shorten them")
    if long:
        logger.warning(
            f"{name}: {long} prompts are left out: in a row of {length} tokens they leave no room for an answer."
        )
    return kept


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _shared(tokens: Sequence[int], whole: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(tokens, whole, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(whole)))
