"""Text to token rows: training, validation and test rows that never share a token of the source.

A document is what the tokenizer makes of it, its own BOS and EOS included; a plain text file is one running document.
`docs/calibration.md` gives the reasons, with figures.
"""

import math
import random
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..architecture.lookup import within_context
from ..configuration.stages import CalibrationConfig
from ..errors import CalibrationError
from ..report.section import to_section
from ..resume import weights_fingerprint
from .sample_cache import Sample
from .self_written import embedding_weight, sample_text
from .sources import Passage, describe, read_passages
from .summary import CalibrationSummary, TextStatistics

# running text is shuffled in pieces of so many characters: long against a row, short against a file
_PIECE_CHARACTERS = 2**13
# characters in the shuffled pool for each token that is wanted, about four times what is needed
_POOL_CHARACTERS_PER_TOKEN = 16
_PASSAGES_AT_ONCE = 64
_CHARACTERS_AT_ONCE = 2**18
_MIN_DISTINCT_SHARE = 0.5


@dataclass(frozen=True)
class CalibrationData:
    """Token rows without padding, on the CPU.

    Args:
        train (`torch.Tensor`): int64 `[train_sequences, sequence_length]`; for the search and for tuning.
        validation (`torch.Tensor`): int64 `[validation_sequences, sequence_length]`; for early stopping.
        test (`torch.Tensor`): int64 `[test_sequences, sequence_length]`; for the figures in the report.
        source (`str`): Where the text comes from, in a few words.
        statistics ([`TextStatistics`] or `None`): For self-written text.
        validation_kinds (`tuple[str, ...]`): For each validation row `"given"` or `"self-written"`.
        test_kinds (`tuple[str, ...]`): Of the test rows; empty where they are all of one kind.
    """

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor
    source: str
    statistics: TextStatistics | None = None
    validation_kinds: tuple[str, ...] = ()
    test_kinds: tuple[str, ...] = ()

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

    Returns:
        [`CalibrationData`]. The three splits of given text follow one another in the shuffled source, so a document can
        lie in two of them only where one split ends and the next begins, and no token position is in two. The test
        split of self-written text is a second sample, with `seed + 1`.

    Raises:
        CalibrationError: If the text cannot be read, there is too little of it, or a token is not in the model's
            vocabulary.
    """
    length = within_context(config.sequence_length, model.config)
    sizes = [config.train_sequences, config.validation_sequences, config.test_sequences]
    own = _self_written_rows(config)
    given = [size - count for size, count in zip(sizes, own, strict=True)]
    parts: list[tuple[torch.Tensor, ...]] = []
    statistics = None
    if config.dataset is not None:
        rows = _read_rows(config, tokenizer, sum(given), length, seed)
        _check_vocabulary(rows, model)
        parts.append(rows.split(given))
    if sum(own):
        written, held_out = _write_rows(config, tokenizer, model, own, length, seed, fingerprint, quiet)
        parts.append((*written.tokens.split(own[:2]), held_out))
        statistics = TextStatistics(
            distinct_4gram_share=distinct_ngram_share(written.tokens[: own[0]], 4),
            dense_perplexity=math.exp(min(written.losses[: own[0]].mean().item(), 700.0)),
            seed=seed,
            temperature=config.temperature,
        )
        _warn_if_repetitive(statistics["distinct_4gram_share"])
    splits = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
    if len(parts) == 2:
        # the search looks at the first rows only: they should be of both kinds
        splits[0] = splits[0][torch.randperm(sizes[0], generator=torch.Generator().manual_seed(seed))]
    names = [] if config.dataset is None else [describe(config.dataset)]
    names += ["self-written"] if sum(own) else []
    kinds = ("given",) * given[1] + ("self-written",) * own[1]
    # rows are a view of one tensor; clones let the splits be freed one by one
    train, validation, test = (split.clone() for split in splits)
    return CalibrationData(train, validation, test, " and ".join(names), statistics, kinds)


def _self_written_rows(config: CalibrationConfig) -> list[int]:
    """How many rows of each split the dense model writes; what is measured on is the given text where there is one."""
    sizes = [config.train_sequences, config.validation_sequences, config.test_sequences]
    if config.dataset is None:
        return sizes
    share = config.self_written_share
    counts = [round(share * size) for size in sizes[:2]]
    if 0 < share < 1:
        # both kinds are needed to tell whether one of them suffers
        counts = [min(max(count, 1), size - 1) for count, size in zip(counts, sizes, strict=False)]
    return [*counts, 0]


def _write_rows(
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    counts: list[int],
    length: int,
    seed: int,
    fingerprint: str | None,
    quiet: bool,
) -> tuple[Sample, torch.Tensor]:
    """Self-written train and validation rows as one sample, and the test rows as another one's tokens."""
    fingerprint = fingerprint or weights_fingerprint(model, quiet)

    def sample(rows: int, seed: int) -> Sample:
        return sample_text(
            model,
            num_sequences=rows,
            sequence_length=length,
            seed=seed,
            temperature=config.temperature,
            batch_size=config.generation_batch_size,
            tokenizer=tokenizer,
            cache_dir=config.cache_dir,
            fingerprint=fingerprint,
            quiet=quiet,
        )

    written = sample(sum(counts[:2]), seed)
    # what is measured on is a sample of its own, not the rest of the one that was tuned on
    held_out = sample(counts[2], seed + 1).tokens if counts[2] else written.tokens[:0]
    return written, held_out


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
        CalibrationError: If the text cannot be read, or has fewer tokens than `num_sequences` rows (or one) need.
    """
    tokenizer = _require_tokenizer(tokenizer, dataset, name)
    passages = read_passages(dataset, text_column=text_column, evaluation=True, name=name)
    wanted = None if num_sequences is None else num_sequences * sequence_length
    tokens = _tokenize(passages, tokenizer, wanted)
    _require_tokens(tokens, num_sequences or 1, sequence_length, dataset, name, "ask for fewer or shorter rows")
    rows = num_sequences or len(tokens) // sequence_length
    return tokens[: rows * sequence_length].view(rows, sequence_length)


def distinct_ngram_share(tokens: torch.Tensor, n: int) -> float:
    """Share of distinct n-grams among all n-grams that lie within a row.

    Args:
        tokens (`torch.Tensor`): int64 `[rows, length]`, `length >= n`.
        n (`int`): Tokens in an n-gram.

    Returns:
        `float`: In (0, 1]; near 0 for text that repeats itself.
    """
    ngrams = tokens.unfold(1, n, 1).reshape(-1, n)
    return len(torch.unique(ngrams, dim=0)) / len(ngrams)


def _warn_if_repetitive(share: float) -> None:
    if share < _MIN_DISTINCT_SHARE:
        warnings.warn(
            f"calibration: only {share:.1%} of the 4-grams in the text that the model wrote are distinct (below "
            f"{_MIN_DISTINCT_SHARE:.0%} it repeats itself). Give a text in calibration.dataset, or raise "
            "calibration.temperature.",
            stacklevel=3,
        )


def _read_rows(
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: int,
    length: int,
    seed: int,
) -> torch.Tensor:
    """Rows of the given text, passages shuffled by `seed`: int64 `[rows, length]`."""
    assert config.dataset is not None
    name = "calibration.dataset"
    tokenizer = _require_tokenizer(tokenizer, config.dataset, name)
    passages = read_passages(
        config.dataset,
        text_column=config.text_column,
        piece_characters=_PIECE_CHARACTERS,
        name=name,
    )
    shuffled = _shuffled(passages, seed, rows * length * _POOL_CHARACTERS_PER_TOKEN)
    tokens = _tokenize(shuffled, tokenizer, rows * length)
    remedy = "lower calibration.train_sequences, validation_sequences, test_sequences or sequence_length"
    _require_tokens(tokens, rows, length, config.dataset, name, remedy)
    return tokens[: rows * length].view(rows, length)


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


def _tokenize(passages: Iterable[Passage], tokenizer: PreTrainedTokenizerBase, wanted: int | None) -> torch.Tensor:
    """Tokens of the passages one after the other, int64 `[n]`; reading stops once there are `wanted`."""
    before, after = _document_marks(tokenizer)
    parts: list[torch.Tensor] = []
    count = 0
    for batch in _batches(passages):
        encoded = tokenizer([p.text for p in batch], add_special_tokens=False, verbose=False)["input_ids"]
        ids: list[int] = []
        for passage, passage_ids in zip(batch, encoded, strict=True):
            ids += [*(before if passage.opens else ()), *passage_ids, *(after if passage.closes else ())]
        parts.append(torch.tensor(ids, dtype=torch.int64))
        count += len(ids)
        if wanted is not None and count >= wanted:
            break
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


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


def _require_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, dataset: str | list[str], name: str
) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        rule = "text needs a tokenizer, and the model has none"
        remedy = "Give tokenizer=, or leave the text out: then the model writes its own"
        raise CalibrationError.of(name, dataset, rule, remedy)
    return tokenizer


def _require_tokens(
    tokens: torch.Tensor, rows: int, length: int, dataset: str | list[str], name: str, alternative: str
) -> None:
    if len(tokens) == 0:
        raise CalibrationError.of(name, dataset, "it is empty: there is no text in it", "Give a text")
    if len(tokens) < rows * length:
        rule = f"{rows} rows of {length} tokens need {rows * length} tokens, and it has {len(tokens)}"
        raise CalibrationError.of(name, dataset, rule, f"Give more text, or {alternative}")


def _check_vocabulary(rows: torch.Tensor, model: PreTrainedModel) -> None:
    size = len(embedding_weight(model))
    largest = int(rows.max())
    if largest >= size:
        rule = f"the text has this token, and the model's vocabulary ends at {size - 1}"
        raise CalibrationError.of("token", largest, rule, "Give the tokenizer that belongs to the model")
