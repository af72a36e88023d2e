"""Text that the dense model writes itself: plain sampling, so that a model alone is enough to calibrate on.

Each row has a random stream of its own (seed and row index), and a token is the inverse of the cumulative distribution
at the next number of that stream. So a row does not depend on how many others are written, or on the global generator.
What is written is kept on disk, batch by batch: a second run reads it, and an interrupted one goes on from there.
"""

import hashlib
import os
import time
from dataclasses import asdict, dataclass
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..architecture.lookup import text_config
from ..errors import CalibrationError
from ..forward.decoding import cache_keyword, cache_of, takes_back_its_cache
from ..forward.hooks import evaluation_mode
from ..progress import progress_bar
from ..resume import weights_fingerprint
from .sample_cache import Sample, load_sample, sample_file, save_sample

# seconds of writing that an interruption may cost, beside the batch that it falls into
_SAVE_INTERVAL = 10.0


@dataclass(frozen=True)
class _Rules:
    """Which tokens begin and end a document, and which may be written."""

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
    tokenizer: PreTrainedTokenizerBase | None = None,
    cache_dir: str | os.PathLike | None = None,
    fingerprint: str | None = None,
    quiet: bool = False,
) -> Sample:
    """Let the model write rows of text.

    A row begins with BOS (a model without BOS: with EOS; without both: with a random token that is not special). After
    EOS comes BOS again, so every row is full. Nothing is done to the distribution but the temperature: no top-k, no
    top-p.

    Args:
        model (`PreTrainedModel`): Left as it is, its training mode included.
        num_sequences (`int`): Rows to write, at least 1.
        sequence_length (`int`): Tokens in a row, BOS included.
        seed (`int`): Same seed and batch size, same tokens; the global random state is not touched.
        temperature (`float`): Above 0; 1 is the model's own distribution.
        batch_size (`int`): Rows written at once.
        tokenizer (`PreTrainedTokenizerBase` or `None`): If given, ids that it does not have are never written.
        cache_dir (`str`, `os.PathLike` or `None`): What is written is kept here, in a folder `optimum_clp`; `None`
            for Hugging Face's cache folder (`HF_HOME`).
        fingerprint (`str` or `None`): Of the weights, if [`weights_fingerprint`] was taken before.
        quiet (`bool`): No progress bar.

    Returns:
        [`Sample`]: int64 tokens `[num_sequences, sequence_length]` on the CPU, and the model's own loss on each row.

    Raises:
        CalibrationError: If the model's logits are not finite.
    """
    rules = _rules(model, tokenizer)
    parameters = {
        "num_sequences": num_sequences,
        "sequence_length": sequence_length,
        "seed": seed,
        "temperature": temperature,
        "batch_size": batch_size,
        "rules": asdict(rules),
    }
    file = sample_file(model, fingerprint or weights_fingerprint(model, quiet), parameters, cache_dir)
    sample = load_sample(file, num_sequences, sequence_length, batch_size)
    saved = time.monotonic()
    with evaluation_mode(model):
        cached = len(sample.tokens) < num_sequences and takes_back_its_cache(model)
    with progress_bar(num_sequences * sequence_length, "Writing calibration text", quiet) as bar:
        bar.update(len(sample.tokens) * sequence_length)
        while (done := len(sample.tokens)) < num_sequences:
            rows = range(done, min(done + batch_size, num_sequences))
            uniforms = torch.stack([_stream(seed, row, sequence_length) for row in rows])
            batch = _write_batch(model, uniforms, rules, temperature, cached, bar)
            sample = Sample(torch.cat([sample.tokens, batch.tokens]), torch.cat([sample.losses, batch.losses]))
            if len(sample.tokens) == num_sequences or time.monotonic() - saved >= _SAVE_INTERVAL:
                file, saved = save_sample(file, sample), time.monotonic()
    return sample


def embedding_weight(model: PreTrainedModel) -> torch.Tensor:
    """The token embedding, `[vocabulary, hidden]`, padding of the vocabulary included."""
    return cast(torch.Tensor, model.get_input_embeddings().weight)


def _stream(seed: int, row: int, length: int) -> torch.Tensor:
    """The random numbers of one row: float64 `[length]` in [0, 1)."""
    digest = hashlib.sha256(f"{seed}:{row}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(length, generator=generator, dtype=torch.float64)


def _rules(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> _Rules:
    size = len(embedding_weight(model))
    vocabulary = size if tokenizer is None else min(size, len(tokenizer))
    holders = [text_config(model.config), getattr(model, "generation_config", None), tokenizer]

    def token_ids(key: str) -> list[int]:
        values = [getattr(holder, key, None) for holder in holders]
        flat = [i for value in values for i in (value if isinstance(value, (list, tuple)) else [value])]
        return [i for i in flat if i is not None and 0 <= i < vocabulary]

    begins, ends = token_ids("bos_token_id"), token_ids("eos_token_id")
    special = {*begins, *ends, *token_ids("pad_token_id")}
    if tokenizer is not None:
        special.update(tokenizer.all_special_ids)
    start = next(iter(begins + ends), None)
    # the start token may itself be one that ends a document (GPT-2, Qwen): it is not written twice
    return _Rules(start, tuple(sorted(set(ends) - {start})), vocabulary, tuple(sorted(special)))


@torch.no_grad()
def _write_batch(
    model: PreTrainedModel, uniforms: torch.Tensor, rules: _Rules, temperature: float, cached: bool, bar
) -> Sample:
    """One batch: `uniforms` float64 `[rows, length]` in, a [`Sample`] of so many tokens out.

    With `cached` a token is one step of the model; without, it is a pass over all tokens before it.
    """
    # not inference_mode: a rotary embedding that grows with the text would keep a tensor no gradient may pass through
    device = embedding_weight(model).device
    rows, length = uniforms.shape
    tokens = torch.empty(rows, length, dtype=torch.int64)
    tokens[:, 0] = _first_tokens(uniforms[:, 0], rules)
    losses = torch.zeros(rows, dtype=torch.float64)
    ends = torch.tensor(rules.ends, dtype=torch.int64)
    cache, keyword = None, cache_keyword(model)
    bar.update(rows)
    with evaluation_mode(model):
        for position in range(1, length):
            current = tokens[:, position - 1]
            if cached:
                output = model(input_ids=current[:, None].to(device), use_cache=True, **{keyword: cache})
                cache = cache_of(output)
            else:
                output = model(input_ids=tokens[:, :position].to(device), use_cache=False)
            logits = output.logits[:, -1].float()
            drawn = _draw(logits[:, : rules.vocabulary] / temperature, uniforms[:, position].to(logits.device)).cpu()
            if rules.start is not None:
                drawn = torch.where(torch.isin(current, ends), rules.start, drawn)
            tokens[:, position] = drawn
            chosen = logits.gather(1, drawn[:, None].to(logits.device))[:, 0]
            losses += (logits.logsumexp(-1) - chosen).double().cpu()
            bar.update(rows)
    return Sample(tokens, losses / max(length - 1, 1))


def _first_tokens(uniforms: torch.Tensor, rules: _Rules) -> torch.Tensor:
    if rules.start is not None:
        return torch.full(uniforms.shape, rules.start, dtype=torch.int64)
    special = set(rules.special)
    ordinary = torch.tensor([i for i in range(rules.vocabulary) if i not in special])
    return ordinary[(uniforms * len(ordinary)).long()]


def _draw(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Token ids int64 `[rows]`: the cumulative distribution of float32 `logits` inverted at `uniforms`."""
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    if not torch.isfinite(total).all():
        remedy = "Load it in bfloat16 or float32, and check its weights for NaN"
        raise CalibrationError.of("model", "NaN", "its logits must be finite to write text", remedy)
    # right=True skips tokens of probability 0; the clamp is for a product that rounds up to the total
    index = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True)
    last = torch.searchsorted(cumulative, total)
    return torch.minimum(index, last)[:, 0]
