"""Given text to token rows: documents one after the other, conversations as the tokenizer's template renders them.

A document is what the tokenizer makes of it, its own BOS and EOS included; a plain text file is one running document.
"""

import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..configuration.stages import CalibrationConfig
from ..errors import CalibrationError
from .chat_rows import packed, rendered_prompts, spoken
from .conversations import ASSISTANT, model_template, sample_answers
from .sources import Passage, read_passages
from .splits import GIVEN, TextRows
from .templates import ChatTemplate
from .writing import embedding_weight

logger = logging.getLogger(__name__)

# running text is shuffled in pieces of so many characters: long against a row, short against a file
_PIECE_CHARACTERS = 2**13
# characters that are read ahead and shuffled; the same however many rows are wanted, so that more of them begin with the
# fewer ones
_POOL_CHARACTERS = 2**22
_PASSAGES_AT_ONCE = 64
_CHARACTERS_AT_ONCE = 2**18
# prompts for each row: short ones fill it with several answers
_PROMPTS_PER_ROW = 4
_NAME = "calibration.dataset"
LEAST_ROWS = 8
"""Rows of a given text without which no run begins: a few to learn from, and some to choose and to measure by."""


def given_rows(
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    sizes: Sequence[int],
    length: int,
    seed: int,
    *,
    dense: Callable[[], PreTrainedModel] | None = None,
    quiet: bool = False,
    dealt: bool = False,
) -> list[TextRows]:
    """Rows of the text that `config` names, passages shuffled by `seed`.

    Args:
        config ([`CalibrationConfig`]): With a dataset: text, conversations, or prompts that the dense model answers.
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        model (`PreTrainedModel`): Gives the vocabulary.
        sizes (`Sequence[int]`): Test, validation and train rows.
        length (`int`): Tokens in a row.
        seed (`int`): Same seed, same rows.
        dense (`Callable`, *optional*): Gives the model that answers prompts; `model` if not given.
        quiet (`bool`): No progress bar.
        dealt (`bool`): Of the answers, as in [`~calibration.writing.Writing`].

    Returns:
        `list[TextRows]`: One for each of `sizes`; of a text that is short with fewer rows, and a warning.

    Raises:
        CalibrationError: If the text cannot be read, has less than `LEAST_ROWS` rows, or does not fit the model.
    """
    assert config.dataset is not None
    tokenizer = require_tokenizer(tokenizer, config.dataset, _NAME)
    passages = read_passages(
        config.dataset, text_column=config.text_column, piece_characters=_PIECE_CHARACTERS, name=_NAME
    )
    rows = sum(sizes)
    shuffled = _shuffled(passages, seed, _POOL_CHARACTERS)
    first = next(shuffled, None)
    shuffled = itertools.chain([] if first is None else [first], shuffled)
    if first is not None and first.messages:
        if first.messages[-1]["role"] != "assistant":
            answering = model if dense is None else dense()
            return _answered(config, tokenizer, answering, shuffled, sizes, length, seed, quiet, dealt)
        tokens, said = conversation_rows(shuffled, model_template(model, tokenizer), tokenizer, rows, length)
        found = tokens.flatten()
    else:
        said, found = None, joined_tokens(shuffled, tokenizer, rows * length)
    sizes = fitting_sizes(sizes, len(found), length, config.dataset)
    rows = sum(sizes)
    tokens = found[: rows * length].view(rows, length)
    if said is None:
        tokens = opened(tokens, tokenizer)
    _check_vocabulary(tokens, model)
    mask = said[:rows] if said is not None and config.mask == "assistant" else None
    return TextRows(tokens, (GIVEN,) * rows, mask).parted(sizes)


def _answered(
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    passages: Iterator[Passage],
    sizes: Sequence[int],
    length: int,
    seed: int,
    quiet: bool,
    dealt: bool,
) -> list[TextRows]:
    """Prompts with the dense model's own answers; no two splits share one."""
    messages = (passage.messages for passage in _of_one_kind(passages, "prompts"))
    prompts = rendered_prompts(messages, tokenizer, length, _PROMPTS_PER_ROW * sum(sizes), _NAME)
    if len(prompts) < sum(size > 0 for size in sizes):
        rule = "no two splits share a prompt, and there are fewer than splits"
        raise CalibrationError.of(_NAME, f"{len(prompts)} prompts", rule, "Give more prompts")
    ends = [max(i, round(sum(sizes[:i]) / sum(sizes) * len(prompts))) for i in range(len(sizes) + 1)]
    ends = [min(end, len(prompts) - (len(sizes) - i)) if i else 0 for i, end in enumerate(ends)]
    parts = []
    for number, size in enumerate(sizes):
        sample = sample_answers(
            model,
            tokenizer,
            prompts[ends[number] : ends[number + 1]],
            num_sequences=size,
            sequence_length=length,
            seed=seed + number,
            temperature=config.temperature,
            batch_size=config.generation_batch_size,
            cache_dir=config.cache_dir,
            quiet=quiet,
            dealt=dealt,
        )
        assert sample.roles is not None
        mask = sample.roles == ASSISTANT if config.mask == "assistant" else None
        parts.append(TextRows(sample.tokens, (GIVEN,) * size, mask))
    return parts


def conversation_rows(
    passages: Iterable[Passage],
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    rows: int | None,
    length: int,
) -> tuple[Tensor, Tensor]:
    """Conversations as rows, int64 `[rows, length]`, and which tokens the assistant says, bool of the same shape.

    Raises:
        CalibrationError: If a conversation has no answer, or the template cannot render it.
    """
    answered = (spoken(p.messages, tokenizer, template) for p in _of_one_kind(passages, "conversations"))
    return packed(answered, rows, length)


def _of_one_kind(passages: Iterable[Passage], kind: str) -> Iterator[Passage]:
    for passage in passages:
        ends = passage.messages[-1]["role"] if passage.messages else None
        found = "text" if ends is None else "conversations" if ends == "assistant" else "prompts"
        if found != kind:
            rule = f"it has {kind} and {found}, and a source is of one kind"
            raise CalibrationError.of(_NAME, passage.text[:40], rule, "Give one of them")
        yield passage


def _shuffled(passages: Iterator[Passage], seed: int, pool_characters: int) -> Iterator[Passage]:
    """The passages, shuffled within pools of `pool_characters`: so much is read ahead, and no more."""
    rng = random.Random(seed)
    while True:
        pool: list[Passage] = []
        size = 0
        for passage in passages:
            pool.append(passage)
            size += len(passage.text)
            if size >= pool_characters:
                break
        if not pool:
            return
        rng.shuffle(pool)
        yield from pool


def joined_tokens(passages: Iterable[Passage], tokenizer: PreTrainedTokenizerBase, wanted: int | None) -> Tensor:
    """Tokens of text passages one after the other, int64 `[n]`; reading stops once there are `wanted`."""
    before, after = _document_marks(tokenizer)
    parts: list[torch.Tensor] = []
    count = 0
    for batch in _batches(_of_one_kind(passages, "text")):
        encoded = tokenizer([p.text for p in batch], add_special_tokens=False, verbose=False)["input_ids"]
        ids: list[int] = []
        for passage, passage_ids in zip(batch, encoded, strict=True):
            ids += [*(before if passage.opens else ()), *passage_ids, *(after if passage.closes else ())]
        parts.append(torch.tensor(ids, dtype=torch.int64))
        count += len(ids)
        if wanted is not None and count >= wanted:
            break
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def opened(rows: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Rows of joined tokens, each of which begins as a document does: BOS, of most tokenizers that add one, in place of its first token.

    Some models are lost without it: Gemma 3 270M finds rows of C4 three times as perplexing (`docs/calibration.md`).

    Args:
        rows (`Tensor`): int64 `[rows, length]`; changed in place.
        tokenizer (`PreTrainedTokenizerBase`): One that puts nothing before a document leaves them as they are.
    """
    before = _document_marks(tokenizer)[0][: rows.shape[1]]
    if before:
        rows[:, : len(before)] = torch.tensor(before)
    return rows


def _batches(passages: Iterable[Passage]) -> Iterator[list[Passage]]:
    """Groups of passages, small enough that little is tokenized in vain."""
    batch: list[Passage] = []
    size = 0
    for passage in passages:
        batch.append(passage)
        size += len(passage.text)
        if len(batch) == _PASSAGES_AT_ONCE or size >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _document_marks(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens before and after a document: the tokenizer's own; EOS after it, if the tokenizer adds none."""
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    marked = tokenizer("a", verbose=False)["input_ids"]
    for start in range(len(marked) - len(plain) + 1):
        if marked[start : start + len(plain)] == plain and len(marked) > len(plain):
            return marked[:start], marked[start + len(plain) :]
    return [], [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def require_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, dataset: str | list[str], name: str
) -> PreTrainedTokenizerBase:
    """The tokenizer.

    Raises:
        CalibrationError: If there is none.
    """
    if tokenizer is None:
        rule = "text needs a tokenizer, and the model has none"
        remedy = "Give tokenizer=, or leave the text out: then the model writes its own"
        raise CalibrationError.of(name, dataset, rule, remedy)
    return tokenizer


def require_tokens(
    tokens: torch.Tensor, rows: int, length: int, dataset: str | list[str], name: str, alternative: str
) -> None:
    """Check that `tokens` are enough.

    Raises:
        CalibrationError: If they are not.
    """
    if len(tokens) == 0:
        raise CalibrationError.of(name, dataset, "it is empty: there is no text in it", "Give a text")
    if len(tokens) < rows * length:
        rule = f"{rows} rows of {length} tokens need {rows * length} tokens, and it has {len(tokens)}"
        raise CalibrationError.of(name, dataset, rule, f"Give more text, or {alternative}")


def fitting_sizes(sizes: Sequence[int], tokens: int, length: int, dataset: str | list[str]) -> list[int]:
    """The rows that a text of so many tokens has for each split: as many as are planned, or, with a warning, fewer.

    Args:
        sizes (`Sequence[int]`): Test, validation and train rows that are planned.
        tokens (`int`): Of the text.
        length (`int`): Tokens in a row.
        dataset: The source, for messages.

    Returns:
        `list[int]`: Of a text that is short, at most a quarter of its rows each to test and validate on.

    Raises:
        CalibrationError: If there is less than `LEAST_ROWS` rows, and less than is planned.
    """
    planned, there = sum(sizes), tokens // length
    least = min(planned, LEAST_ROWS)
    if tokens == 0:
        raise CalibrationError.of(_NAME, dataset, "it is empty: there is no text in it", "Give a text")
    if there < least:
        rule = f"{least} rows of {length} tokens, the least there must be, need {least * length} tokens, and it has {tokens}"
        raise CalibrationError.of(_NAME, dataset, rule, "Give more text, or lower calibration.sequence_length")
    if there >= planned:
        return list(sizes)
    test, validation, train = sizes
    share = max(1, there // 4) if train else there // 2
    test, validation = min(test, share), min(validation, share)
    fitted = [test, validation, min(train, there - test - validation)]
    logger.warning(
        f"calibration.dataset: the text has {tokens} tokens, which is {there} rows of {length} instead of the {planned} that are "
        f"planned: {fitted[2]} train, {fitted[1]} validation and {fitted[0]} test rows. Give more text for surer figures."
    )
    return fitted


def _check_vocabulary(rows: torch.Tensor, model: PreTrainedModel) -> None:
    size = len(embedding_weight(model))
    largest = int(rows.max())
    if largest >= size:
        rule = f"the text has this token, and the model's vocabulary ends at {size - 1}"
        raise CalibrationError.of("token", largest, rule, "Give the tokenizer that belongs to the model")
