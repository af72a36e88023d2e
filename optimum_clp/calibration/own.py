"""Text that the dense model writes itself, of both kinds: plain, and conversations through its chat template."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..configuration.stages import CalibrationConfig
from ..errors import CalibrationError
from ..resume import weights_fingerprint
from .conversations import ASSISTANT, TEMPLATE, conversation_statistics, model_template, sample_conversations
from .openings import OPENINGS
from .sample_cache import Sample
from .self_written import sample_text
from .splits import CONVERSATIONS, PLAIN, TextRows, joined
from .summary import ConversationStatistics, TextStatistics
from .templates import ChatTemplate

logger = logging.getLogger(__name__)

_MIN_DISTINCT_SHARE = 0.5
# below it the model asks the same again and again: SmolLM2-135M-Instruct is at 1.0 with 42 questions
_MIN_DISTINCT_OPENINGS = 0.5


def own_rows(
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    sizes: Sequence[int],
    length: int,
    seed: int,
    *,
    fingerprint: str | None = None,
    quiet: bool = False,
    dealt: bool = False,
) -> tuple[list[TextRows], TextStatistics]:
    """Let the dense model write the rows of each split: `conversation_share` of them conversations, if it has a template.

    Args:
        config ([`CalibrationConfig`]): How it writes.
        tokenizer (`PreTrainedTokenizerBase` or `None`): Its template writes conversations.
        model (`PreTrainedModel`): The dense model.
        sizes (`Sequence[int]`): Train, validation and test rows.
        length (`int`): Tokens in a row.
        seed (`int`): Of train and validation rows; test rows are a sample of its own, with `seed + 1`.
        fingerprint (`str`, *optional*): Of the weights.
        quiet (`bool`): No progress bar.
        dealt (`bool`): As in [`~calibration.writing.Writing`].

    Returns:
        `tuple`: The rows of each split, and what the train rows are like.
    """
    fingerprint = fingerprint or weights_fingerprint(model, quiet)
    template = _template(config, tokenizer, model)
    spoken = [0] * len(sizes) if template is None else [shared(config.conversation_share, size) for size in sizes]
    kinds = {PLAIN: [size - count for size, count in zip(sizes, spoken, strict=True)], CONVERSATIONS: spoken}
    parts: list[list[TextRows]] = [[] for _ in sizes]
    train: list[Sample] = []
    for kind, counts in kinds.items():
        if not sum(counts):
            continue
        writer = _Writer(config, tokenizer, model, kind, length, fingerprint, quiet, dealt)
        written = writer.sample(sum(counts[:2]), seed)
        # what is measured on is a sample of its own, not the rest of the one that was tuned on
        held_out = writer.sample(counts[2], seed + 1, grows=False) if counts[2] else None
        # validation rows come first: they stay the same when more is written
        validation, learnt = writer.rows(written).parted([counts[1], counts[0]])
        tested = learnt.parted([0, len(learnt)])[0] if held_out is None else writer.rows(held_out)
        for part, split in zip(parts, (learnt, validation, tested), strict=True):
            part.append(split)
        train.append(written.rows(counts[1], sum(counts[:2])))
    statistics = _statistics(train, template, seed, config.temperature)
    return [joined(part) for part in parts], statistics


def shared(share: float, size: int) -> int:
    """`share` of `size` rows; at least one of both kinds where there is to be some of both, to tell whether one suffers."""
    count = round(share * size)
    return min(max(count, 1), size - 1) if 0 < share < 1 and size > 1 else count


@dataclass(frozen=True)
class _Writer:
    """Writes rows of one kind."""

    config: CalibrationConfig
    tokenizer: Any
    model: PreTrainedModel
    kind: str
    length: int
    fingerprint: str | None
    quiet: bool
    dealt: bool

    def sample(self, rows: int, seed: int, grows: bool = True) -> Sample:
        config = self.config
        options: dict[str, Any] = {
            "num_sequences": rows,
            "sequence_length": self.length,
            "seed": seed,
            "temperature": config.temperature,
            "batch_size": config.generation_batch_size,
            "grows": grows,
            "cache_dir": config.cache_dir,
            "fingerprint": self.fingerprint,
            "quiet": self.quiet,
            "dealt": self.dealt,
        }
        if self.kind == PLAIN:
            return sample_text(self.model, tokenizer=self.tokenizer, **options)
        share = config.openings_share
        return sample_conversations(self.model, self.tokenizer, openings=OPENINGS, openings_share=share, **options)

    def rows(self, sample: Sample) -> TextRows:
        mask = None
        if self.config.mask == "assistant" and sample.roles is not None:
            mask = sample.roles == ASSISTANT
        return TextRows(sample.tokens, (self.kind,) * len(sample.tokens), mask)


def _template(
    config: CalibrationConfig, tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel
) -> ChatTemplate | None:
    """The template to write conversations through, if there are to be some and it can be taken apart."""
    if not config.conversation_share or tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return None
    try:
        template = model_template(model, tokenizer)
        if not template.opening:
            rule = "it puts no token before the user's first words, and a model begins to write with one"
            raise CalibrationError.of("chat_template", None, rule, "Let it begin with the BOS token")
        return template
    except CalibrationError as error:
        logger.warning(
            f"calibration: the model's chat template cannot be used ({error.problems[0].rule}), so the text that it "
            "writes is plain text alone, and no conversations."
        )
        return None


def distinct_ngram_share(tokens: Tensor, n: int, counted: Tensor | None = None) -> float:
    """Share of distinct n-grams among all n-grams that lie within a row.

    Args:
        tokens (`Tensor`): int64 `[rows, length]`, `length >= n`.
        n (`int`): Tokens in an n-gram.
        counted (`Tensor`, *optional*): bool `[rows, length]`: n-grams with another token in them are passed over.

    Returns:
        `float`: In (0, 1]; near 0 for text that repeats itself.
    """
    ngrams = tokens.unfold(1, n, 1).reshape(-1, n)
    if counted is not None:
        ngrams = ngrams[counted.unfold(1, n, 1).all(-1).flatten()]
    return len(torch.unique(ngrams, dim=0)) / len(ngrams) if len(ngrams) else 1.0


def _statistics(
    train: Sequence[Sample], template: ChatTemplate | None, seed: int, temperature: float
) -> TextStatistics:
    tokens, losses = (torch.cat([getattr(sample, name) for sample in train]) for name in ("tokens", "losses"))
    said = [torch.ones_like(s.tokens, dtype=torch.bool) if s.roles is None else s.roles != TEMPLATE for s in train]
    found = TextStatistics(
        distinct_4gram_share=distinct_ngram_share(tokens, 4, torch.cat(said)),
        dense_perplexity=math.exp(min(losses.mean().item(), 700.0)),
        seed=seed,
        temperature=temperature,
        conversations=None,
    )
    _warn_if_repetitive(found["distinct_4gram_share"])
    for sample in train:
        if sample.roles is not None and template is not None and len(sample.tokens):
            spoken = found["conversations"] = conversation_statistics(sample, template)
            _warn_if_of_one_topic(spoken)
    return found


def _warn_if_of_one_topic(found: ConversationStatistics) -> None:
    share = found["distinct_openings_share"]
    if share < _MIN_DISTINCT_OPENINGS:
        logger.warning(
            f"calibration: only {share:.1%} of the questions that the model wrote begin differently (below "
            f"{_MIN_DISTINCT_OPENINGS:.0%} they are of few kinds). Raise calibration.openings_share, or give "
            "conversations or prompts in calibration.dataset."
        )


def _warn_if_repetitive(share: float) -> None:
    if share < _MIN_DISTINCT_SHARE:
        logger.warning(
            f"calibration: only {share:.1%} of the 4-grams in the text that the model wrote are distinct (below "
            f"{_MIN_DISTINCT_SHARE:.0%} it repeats itself). Give a text in calibration.dataset, or raise "
            "calibration.temperature."
        )
