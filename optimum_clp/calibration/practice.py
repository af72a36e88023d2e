"""Text that a cut model writes itself, to learn from what the dense model thinks of it.

A chat model answers the questions of the rows that it was healed on; another one writes plain text.
"""

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import CalibrationError
from .conversations import ASSISTANT, model_template, sample_answers
from .self_written import sample_text
from .splits import TextRows
from .templates import ChatTemplate

OWN = "own"
# of the answers, as of those that generation is measured on: at 1 a small model's answers are soon about nothing, which
# teaches little of what it will be asked for
TEMPERATURE = 0.8


def practice_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: Tensor,
    *,
    num_sequences: int,
    seed: int,
    batch_size: int,
    cache_dir: str | os.PathLike | None = None,
    quiet: bool = False,
    dealt: bool = False,
) -> TextRows:
    """Let a model write rows of its own.

    Args:
        model (`PreTrainedModel`): Writes with the weights that it has now.
        tokenizer (`PreTrainedTokenizerBase` or `None`): Its template tells questions and answers apart.
        rows (`Tensor`): int64 `[rows, length]`: conversations among them give the questions.
        num_sequences (`int`): Rows to write, at least 1, as long as these.
        seed, batch_size, cache_dir, quiet, dealt: As in [`~calibration.writing.Writing`].

    Returns:
        [`TextRows`]: Of the kind `"own"`. With a mask of what the model itself has said, if it answers questions.
    """
    options: dict[str, Any] = {"num_sequences": num_sequences, "sequence_length": rows.shape[1], "seed": seed}
    options |= {"temperature": TEMPERATURE, "batch_size": batch_size, "cache_dir": cache_dir, "quiet": quiet}
    options["dealt"] = dealt
    try:
        template = model_template(model, tokenizer)
    except CalibrationError:
        prompts: list[tuple[int, ...]] = []
    else:
        prompts = first_questions(rows, template)
    kinds = (OWN,) * num_sequences
    if not prompts or tokenizer is None:
        written = sample_text(model, tokenizer=tokenizer, grows=False, **options)
        return TextRows(written.tokens, kinds)
    answers = sample_answers(model, tokenizer, prompts, **options)
    assert answers.roles is not None
    return TextRows(answers.tokens[:num_sequences], kinds, answers.roles[:num_sequences] == ASSISTANT)


def first_questions(rows: Tensor, template: ChatTemplate) -> list[tuple[int, ...]]:
    """The beginning of each row that is a conversation, up to where the assistant's first answer begins.

    Args:
        rows (`Tensor`): int64 `[rows, length]`.
        template ([`ChatTemplate`]): Which they were rendered through. A row that does not begin as it does is none.
    """
    found = []
    for row in rows.tolist():
        if tuple(row[: len(template.opening)]) != template.opening:
            continue
        end = _find(row, template.question_end + template.answer_rest, len(template.opening))
        # at least a quarter of the row is left for the answer
        if end is not None and end <= 3 * len(row) // 4:
            found.append(tuple(row[:end]))
    return found


def _find(row: Sequence[int], piece: Sequence[int], start: int) -> int | None:
    """Where the first occurrence of some tokens ends."""
    size = len(piece)
    for place in range(start, len(row) - size + 1):
        if tuple(row[place : place + size]) == tuple(piece):
            return place + size
    return None
