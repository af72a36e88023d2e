"""Text to token rows: training, validation and test rows that never share a token of the source.

A document is what the tokenizer makes of it, its own BOS and EOS included; a plain text file is one running document. Rows are cut
from the joined documents, and each begins with the tokenizer's BOS, if it adds one.
`docs/calibration.md` gives the reasons, with figures.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..architecture.lookup import within_context
from ..configuration.stages import CalibrationConfig
from ..errors import CalibrationError
from ..report.section import to_section
from .given import conversation_rows, given_rows, joined_tokens, opened, require_tokenizer, require_tokens
from .own import own_rows, shared
from .sources import checked_source, describe, hub_dataset, read_passages
from .splits import TextRows, joined
from .summary import CalibrationSummary, TextStatistics
from .templates import split_template

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationData:
    """Token rows without padding, on the CPU.

    Args:
        train (`torch.Tensor`): int64 `[train_sequences, sequence_length]`; for the search and for tuning.
        validation (`torch.Tensor`): int64 `[validation_sequences, sequence_length]`; for early stopping.
        test (`torch.Tensor`): int64 `[test_sequences, sequence_length]`; for the figures in the report.
        source (`str`): Where the text comes from, in a few words.
        statistics ([`TextStatistics`] or `None`): For self-written text.
        validation_kinds (`tuple[str, ...]`): For each validation row `"given"`, or of what the dense model wrote `"plain"` or
            `"conversations"`.
        train_kinds, test_kinds (`tuple[str, ...]`): The same for the other rows.
        train_mask, validation_mask (`torch.Tensor` or `None`): bool `[rows, sequence_length]`: the tokens that are to be
            learnt, the assistant's; `None` for all. Of rows that are no conversations all count.
        dataset (`str` or `None`): Hub id of the dataset that was read, if it was one.
    """

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor
    source: str
    statistics: TextStatistics | None = None
    validation_kinds: tuple[str, ...] = ()
    train_kinds: tuple[str, ...] = ()
    test_kinds: tuple[str, ...] = ()
    train_mask: torch.Tensor | None = None
    validation_mask: torch.Tensor | None = None
    dataset: str | None = None

    @property
    def sequence_length(self) -> int:
        """Tokens in a row."""
        return self.train.shape[1]

    def to_dict(self) -> dict[str, Any]:
        """The `calibration` section of the report, as JSON-ready values."""
        summary = CalibrationSummary(
            source=self.source,
            sequence_length=self.sequence_length,
            train_sequences=len(self.train),
            validation_sequences=len(self.validation),
            test_sequences=len(self.test),
            statistics=self.statistics,
            train_kinds=dict(Counter(self.train_kinds)),
            validation_kinds=dict(Counter(self.validation_kinds)),
            test_kinds=dict(Counter(self.test_kinds)),
            mask="all" if self.train_mask is None else "assistant",
            dataset=self.dataset,
        )
        return to_section(summary)


def load_calibration(
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    seed: int,
    quiet: bool = False,
    *,
    fingerprint: str | None = None,
    dense: Callable[[], PreTrainedModel] | None = None,
    dealt: bool = False,
) -> CalibrationData:
    """Read or write the text that `config` asks for, and split it.

    Args:
        config ([`CalibrationConfig`]): The source and the number of rows. Rows are shortened to the longest text that the
            model can take if that is less than `sequence_length`.
        tokenizer (`PreTrainedTokenizerBase` or `None`): Needed for given text, not for self-written text.
        model (`PreTrainedModel`): The dense model: gives the context length and the vocabulary, and writes the text
            if `config.dataset` is `None`. Left as it is.
        seed (`int`): Same seed, same rows.
        quiet (`bool`): No progress bar.
        fingerprint (`str`, *optional*): Of the weights, if [`weights_fingerprint`] was taken before.
        dense (`Callable`, *optional*): Gives the dense model where `model` may be a cut one, for prompts to be answered.
        dealt (`bool`): In a group of processes, all of which make this call, each one writes a part of the text.

    Returns:
        [`CalibrationData`]. The three splits of given text follow one another in the shuffled source, so a document can
        lie in two of them only where one split ends and the next begins, and no token position is in two. The test
        split of self-written text is a second sample, with `seed + 1`.

    Raises:
        CalibrationError: If the text cannot be read, there is too little of it, a token is not in the model's vocabulary, or
            so many rows do not fit into this machine's memory.
    """
    length = within_context(config.sequence_length, model.config)
    sizes = [config.train_sequences, config.validation_sequences, config.test_sequences]
    _require_memory(sizes, length)
    own = _self_written_rows(config)
    parts: list[list[TextRows]] = []
    statistics = None
    if config.dataset is not None:
        given = [size - count for size, count in zip(sizes, own, strict=True)]
        # train rows come last: the others stay the same when there are more of them
        known: dict[str, Any] = {"dense": dense, "quiet": quiet, "dealt": dealt}
        parts.append(given_rows(config, tokenizer, model, given[::-1], length, seed, **known)[::-1])
    if sum(own):
        written, statistics = own_rows(
            config, tokenizer, model, own, length, seed, fingerprint=fingerprint, quiet=quiet, dealt=dealt
        )
        parts.append(written)
    train, validation, test = (joined(pieces) for pieces in zip(*parts, strict=True))
    if len(set(train.kinds)) > 1:
        # the search looks at the first rows only: they should be of all kinds
        train = train.shuffled(seed)
    names = [] if config.dataset is None else [describe(config.dataset)]
    names += ["self-written"] if sum(own) else []
    # rows are a view of one tensor; clones let the splits be freed one by one
    return CalibrationData(
        train.tokens.clone(),
        validation.tokens.clone(),
        test.tokens.clone(),
        source=" and ".join(names),
        statistics=statistics,
        validation_kinds=validation.kinds,
        train_kinds=train.kinds,
        test_kinds=test.kinds,
        train_mask=train.mask,
        validation_mask=validation.mask,
        dataset=hub_dataset(config.dataset),
    )


def load_test_rows(
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    seed: int,
    quiet: bool = False,
    *,
    fingerprint: str | None = None,
    dense: Callable[[], PreTrainedModel] | None = None,
) -> torch.Tensor:
    """The test rows of [`load_calibration`], without the rows that the dense model would write for the other splits.

    Args:
        config, tokenizer, model, seed, quiet, fingerprint, dense: As there.

    Returns:
        `torch.Tensor`: int64 `[test_sequences, sequence_length]`.
    """
    known: dict[str, Any] = {"dense": dense, "quiet": quiet}
    if config.dataset is None:
        # a sample of its own; two of the others, so that both kinds of text are there
        few = replace(config, train_sequences=2, validation_sequences=2)
        return load_calibration(few, tokenizer, model, seed, fingerprint=fingerprint, **known).test
    length = within_context(config.sequence_length, model.config)
    sizes = [config.train_sequences, config.validation_sequences, config.test_sequences]
    given = [size - count for size, count in zip(sizes, _self_written_rows(config), strict=True)]
    return given_rows(config, tokenizer, model, given[::-1], length, seed, **known)[0].tokens.clone()


def _require_memory(sizes: Sequence[int], length: int) -> None:
    """Say before any text is read or written that its rows cannot be held: int64, and once more while they are parted."""
    needed, there = 2 * 8 * sum(sizes) * length, psutil.virtual_memory().total
    if needed > there:
        rule = f"with the other splits these rows of {length} tokens take {needed:,} bytes, and this machine has {there:,}"
        remedy = "Choose fewer or shorter rows: calibration.train_sequences, sequence_length or tuning.tokens"
        raise CalibrationError.of("calibration.train_sequences", sizes[0], rule, remedy)


def _self_written_rows(config: CalibrationConfig) -> list[int]:
    """How many rows of each split the dense model writes; what is measured on is the given text where there is one."""
    sizes = [config.train_sequences, config.validation_sequences, config.test_sequences]
    if config.dataset is None:
        return sizes
    share = config.self_written_share
    return [*(shared(share, size) for size in sizes[:2]), 0]


def tokenize_dataset(
    dataset: str | list[str],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    sequence_length: int,
    num_sequences: int | None = None,
    text_column: str = "text",
    name: str = "dataset",
) -> torch.Tensor:
    """Token rows of a given text in its own order, for measuring.

    Args:
        dataset (`str` or `list[str]`): As [`CalibrationConfig.dataset`]; without a split, `wikitext2` means its test
            split and `c4` its validation split.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        sequence_length (`int`): Tokens in a row, at least 1.
        num_sequences (`int` or `None`): The number of rows, from the start of the text; `None` for all whole rows.
        text_column (`str`): The column with the text, where there are columns.
        name (`str`): What the text is called in errors.

    Returns:
        `torch.Tensor`: int64 `[rows, sequence_length]` without padding, on the CPU.

    Raises:
        CalibrationError: If the text cannot be read, or has not one row. Fewer than `num_sequences` are a warning.
    """
    dataset = checked_source(dataset, name)
    tokenizer = require_tokenizer(tokenizer, dataset, name)
    passages = read_passages(dataset, text_column=text_column, evaluation=True, name=name)
    wanted = None if num_sequences is None else num_sequences * sequence_length
    first = next(passages, None)
    passages = itertools.chain([] if first is None else [first], passages)
    spoken = first is not None and bool(first.messages)
    if spoken:
        template = split_template(tokenizer)
        tokens = conversation_rows(passages, template, tokenizer, num_sequences, sequence_length)[0].flatten()
    else:
        tokens = joined_tokens(passages, tokenizer, wanted)
    require_tokens(tokens, 1, sequence_length, dataset, name, "ask for shorter rows")
    rows = min(num_sequences or len(tokens), len(tokens) // sequence_length)
    if num_sequences is not None and rows < num_sequences:
        logger.warning(f"{name}: the text has {rows} rows of {sequence_length} tokens, not {num_sequences}")
    found = tokens[: rows * sequence_length].view(rows, sequence_length)
    return found if spoken else opened(found, tokenizer)
