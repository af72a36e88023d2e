"""Plain text that the dense model writes itself: a model alone is enough to calibrate on.

A row begins with BOS (a model without BOS: with EOS; without both: with a random token that is not special). After EOS
comes BOS again, so every row is full. Nothing is done to the distribution but the temperature: no top-k, no top-p.
"""

import os
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..architecture.lookup import text_config
from .sample_cache import Sample
from .writing import ANYTHING, Script, Wish, Writing, embedding_weight, write_sample


@dataclass(frozen=True)
class DocumentRules:
    """Which tokens begin and end a document, and which may be written.

    Args:
        start (`int` or `None`): The first token of a document.
        ends (`tuple[int, ...]`): Tokens that end one, without `start`.
        vocabulary (`int`): Ids from here on are never written.
        special (`tuple[int, ...]`): Tokens that are no text.
    """

    start: int | None
    ends: tuple[int, ...]
    vocabulary: int
    special: tuple[int, ...]


def sample_text(
    model: PreTrainedModel,
    *,
    num_sequences: int,
    sequence_length: int,
    seed: int,
    temperature: float = 1.0,
    batch_size: int = 32,
    grows: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    cache_dir: str | os.PathLike | None = None,
    fingerprint: str | None = None,
    quiet: bool = False,
    dealt: bool = False,
) -> Sample:
    """Let the model write rows of plain text.

    Args:
        model, num_sequences, sequence_length, seed, temperature, batch_size, grows: As in [`Writing`].
        tokenizer (`PreTrainedTokenizerBase` or `None`): If given, ids that it does not have are never written.
        cache_dir, fingerprint, quiet, dealt: As in [`Writing`].

    Returns:
        [`Sample`]: int64 tokens `[num_sequences, sequence_length]` on the CPU, and the model's own loss on each row.

    Raises:
        CalibrationError: If the model's logits are not finite.
    """
    rules = document_rules(model, tokenizer)
    writing = Writing(
        model,
        num_sequences,
        sequence_length,
        seed,
        temperature,
        batch_size,
        rules.vocabulary,
        grows,
        cache_dir=cache_dir,
        fingerprint=fingerprint,
        quiet=quiet,
        dealt=dealt,
    )
    parameters = {**writing.parameters(), "rules": asdict(rules)}
    return write_sample(writing, lambda row, uniforms: _documents(rules, uniforms), parameters)


def document_rules(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> DocumentRules:
    """The rules from the model's config, its generation config and the tokenizer."""
    size = len(embedding_weight(model))
    vocabulary = size if tokenizer is None else min(size, len(tokenizer))
    begins, ends, pads = (
        [i for i in named_tokens(model, tokenizer, key) if 0 <= i < vocabulary] for key in ("bos", "eos", "pad")
    )
    special = {*begins, *ends, *pads}
    if tokenizer is not None:
        special.update(tokenizer.all_special_ids)
    start = next(iter(begins + ends), None)
    # the start token may itself be one that ends a document (GPT-2, Qwen): it is not written twice
    return DocumentRules(start, tuple(sorted(set(ends) - {start})), vocabulary, tuple(sorted(special)))


def named_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str) -> list[int]:
    """All ids that the model's config, its generation config or the tokenizer calls `name` (`"bos"`, `"eos"`, `"pad"`)."""
    holders = [text_config(model.config), getattr(model, "generation_config", None), tokenizer]
    values = [getattr(holder, f"{name}_token_id", None) for holder in holders]
    flat = [i for value in values for i in (value if isinstance(value, (list, tuple)) else [value])]
    return [i for i in flat if i is not None]


def _documents(rules: DocumentRules, uniforms: torch.Tensor) -> Script:
    """One document after the other."""
    start = rules.start
    token = yield Wish(_ordinary_token(rules, float(uniforms[0])) if start is None else start)
    while True:
        token = yield Wish(start) if start is not None and token in rules.ends else ANYTHING


def _ordinary_token(rules: DocumentRules, uniform: float) -> int:
    special = set(rules.special)
    ordinary = [i for i in range(rules.vocabulary) if i not in special]
    return ordinary[int(uniform * len(ordinary))]
