"""Rows that a model writes token by token: drawn, or forced by the script of each row.

Each row has a random stream of its own (seed and row index), and a token is the inverse of the cumulative distribution
at the next number of that stream. So a row does not depend on how many others are written, or on the global generator.
What is written is kept on disk, batch by batch: a second run reads it, and an interrupted one goes on from there.
"""

import hashlib
import os
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import CalibrationError
from ..forward.decoding import cache_keyword, cache_of, fast_decoding, last_logits_only, takes_back_its_cache
from ..forward.hooks import evaluation_mode
from ..processes import gathered, is_first, rank, world_size
from ..progress import progress_bar
from ..resume import weights_fingerprint
from .sample_cache import Sample, load_sample, sample_file, save_sample

# seconds of writing that an interruption may cost, beside the batch that it falls into
_SAVE_INTERVAL = 10.0
# tokens whose probabilities are summed before they are cumulated
_BLOCK = 256


class Wish(NamedTuple):
    """What a script wants at the next position.

    Args:
        token (`int` or `None`): This token; `None` for one that the model draws.
        role (`int`): What is kept beside the token: 0 for what nobody said, else who says it.
    """

    token: int | None
    role: int = 0


# one row's script: yields what it wants, is sent the token that was written
Script = Generator[Wish, int, None]
ANYTHING = Wish(None)


@dataclass(frozen=True)
class Writing:
    """How rows are written.

    Args:
        model (`PreTrainedModel`): Left as it is, its training mode included.
        num_sequences (`int`): Rows to write, at least 1.
        sequence_length (`int`): Tokens in a row.
        seed (`int`): Same seed and batch size, same tokens; the global random state is not touched.
        temperature (`float`): Above 0; 1 is the model's own distribution.
        batch_size (`int`): Rows written at once.
        vocabulary (`int`): Ids from here on are never drawn.
        grows (`bool`): More rows may be wanted later, which begin with these: every batch is full, and what is left over is
            kept for them. `False` writes as many as are wanted.
        roles (`bool`): Keep the scripts' roles beside the tokens.
        cache_dir (`str`, `os.PathLike` or `None`): What is written is kept here, in a folder `optimum_clp`; `None`
            for Hugging Face's cache folder (`HF_HOME`).
        fingerprint (`str` or `None`): Of the weights, if [`weights_fingerprint`] was taken before.
        quiet (`bool`): No progress bar.
        dealt (`bool`): In a group of processes (`torch.distributed`), all of which make this call, each one writes some of
            the batches, and every one gets all rows; the first keeps them on disk.
    """

    model: PreTrainedModel
    num_sequences: int
    sequence_length: int
    seed: int
    temperature: float
    batch_size: int
    vocabulary: int
    grows: bool = True
    roles: bool = False
    cache_dir: str | os.PathLike | None = None
    fingerprint: str | None = None
    quiet: bool = False
    dealt: bool = False

    def parameters(self) -> dict[str, Any]:
        """What the text depends on beside the weights and the scripts."""
        names = ["sequence_length", "seed", "temperature", "batch_size", *([] if self.grows else ["num_sequences"])]
        return {name: getattr(self, name) for name in names}

    def batches(self, done: int) -> list[range]:
        """The batches of rows that are left to write after so many."""
        size, total = self.batch_size, self.num_sequences
        # rounding differs with the size of a batch, and a row should not depend on how many are wanted
        return [range(at, at + size if self.grows else min(at + size, total)) for at in range(done, total, size)]


def write_sample(writing: Writing, script: Callable[[int, Tensor], Script], parameters: dict[str, Any]) -> Sample:
    """Write all rows, or read what an earlier run wrote.

    Args:
        writing ([`Writing`]): How.
        script (`Callable`): Makes a row's script of its index and its random numbers, float64 `[sequence_length]`; a
            number at a position where a token is forced is the script's to use.
        parameters (`dict`): JSON-ready: [`~Writing.parameters`] and all that the scripts depend on.

    Raises:
        CalibrationError: If the model's logits are not finite.
    """
    model, total, length = writing.model, writing.num_sequences, writing.sequence_length
    fingerprint = writing.fingerprint or weights_fingerprint(model, writing.quiet)
    file = sample_file(model, fingerprint, parameters, writing.cache_dir)
    exchanged, mine = (gathered, rank()) if writing.dealt else (_alone, 0)
    keeps = not writing.dealt or is_first()
    # what one process has found on its disk may not be what another has
    sample = exchanged(_found(writing, file) if keeps else None)[0]
    saved = time.monotonic()
    with evaluation_mode(model):
        cached = len(sample.tokens) < total and takes_back_its_cache(model)
    # the last batch is a whole one, and what it has beyond the wanted rows is written too
    last = max((batch.stop for batch in writing.batches(len(sample.tokens))), default=total)
    with progress_bar(last * length, "Writing calibration text (tokens)", writing.quiet or not keeps) as bar:
        bar.update(min(len(sample.tokens), last) * length)
        while len(sample.tokens) < total:
            turn = writing.batches(len(sample.tokens))[: world_size() if writing.dealt else 1]
            own = _write_batch(writing, script, turn[mine], cached, bar) if mine < len(turn) else None
            for place, written in enumerate(exchanged(own)[: len(turn)]):
                sample = sample.followed_by(written)
                bar.update(0 if place == mine else written.tokens.numel())
            if keeps and (len(sample.tokens) >= total or time.monotonic() - saved >= _SAVE_INTERVAL):
                file, saved = save_sample(file, sample), time.monotonic()
    return sample.rows(0, total)


def _alone(value: Any) -> list[Any]:
    return [value]


def _found(writing: Writing, file: Path | None) -> Sample:
    """What was written before."""
    expected = None if writing.grows else writing.num_sequences
    return load_sample(file, writing.sequence_length, writing.batch_size, expected, roles=writing.roles)


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """The token embedding, `[vocabulary, hidden]`, padding of the vocabulary included."""
    return cast(Tensor, model.get_input_embeddings().weight)


def random_stream(seed: int, row: int, length: int) -> Tensor:
    """The random numbers of one row: float64 `[length]` in [0, 1)."""
    digest = hashlib.sha256(f"{seed}:{row}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(length, generator=generator, dtype=torch.float64)


@torch.no_grad()
def _write_batch(
    writing: Writing, script: Callable[[int, Tensor], Script], batch: range, cached: bool, bar: Any
) -> Sample:
    """The rows of one batch."""
    # not inference_mode: a rotary embedding that grows with the text would keep a tensor no gradient may pass through
    rows, length = len(batch), writing.sequence_length
    uniforms = torch.stack([random_stream(writing.seed, row, length) for row in batch])
    scripts = [script(row, numbers) for row, numbers in zip(batch, uniforms, strict=True)]
    tokens = torch.empty(rows, length, dtype=torch.int64)
    roles = torch.zeros(rows, length, dtype=torch.uint8)
    losses = torch.zeros(rows, dtype=torch.float64)
    wishes = [next(script) for script in scripts]
    with evaluation_mode(writing.model), fast_decoding(writing.model):
        steps = _Steps(writing.model, rows, cached)
        for position in range(length):
            forced = torch.tensor([-1 if wish.token is None else wish.token for wish in wishes])
            written = forced
            if position:
                logits = steps.next_logits(tokens[:, :position]).float()
                probabilities = logits.softmax(-1)
                if writing.temperature == 1:
                    heated = probabilities
                else:
                    heated = (logits / writing.temperature).softmax(-1)
                written = _written(heated[:, : writing.vocabulary], forced, uniforms[:, position])
                losses += _loss(logits, probabilities, written)
            tokens[:, position] = written
            roles[:, position] = torch.tensor([wish.role for wish in wishes], dtype=torch.uint8)
            wishes = [script.send(token) for script, token in zip(scripts, written.tolist(), strict=True)]
            bar.update(rows)
    return Sample(tokens, losses / max(length - 1, 1), roles if writing.roles else None)


class _Steps:
    """The logits after a text that grows by a token for every call.

    With `cached` a call is one step of the model; without, it is a pass over all tokens before it.
    """

    def __init__(self, model: PreTrainedModel, rows: int, cached: bool):
        self.model, self.rows, self.cached = model, rows, cached
        self.device = embedding_weight(model).device
        self.keyword, self.last_only = cache_keyword(model), last_logits_only(model)
        self.cache: Any = None

    def next_logits(self, tokens: Tensor) -> Tensor:
        """Logits `[rows, vocabulary]`, in the model's dtype, of what follows int64 `[rows, position]`."""
        if self.cached:
            given = tokens[:, -1:].to(self.device)
            output = self.model(input_ids=given, use_cache=True, **{self.keyword: self.cache})
            self.cache = cache_of(output)
        else:
            output = self.model(input_ids=tokens.to(self.device), use_cache=False, **self.last_only)
        return output.logits[:, -1]


def _written(probabilities: Tensor, forced: Tensor, uniforms: Tensor) -> Tensor:
    """The next token of each row, int64 `[rows]` on the CPU: the forced one, or (-1) one that is drawn."""
    free = (forced < 0).nonzero()[:, 0]
    if not len(free):
        return forced
    device = probabilities.device
    chosen = probabilities if len(free) == len(forced) else probabilities[free.to(device)]
    drawn = _draw(chosen, uniforms[free].to(device))
    return forced.index_put((free,), drawn.cpu())


def _loss(logits: Tensor, probabilities: Tensor, tokens: Tensor) -> Tensor:
    """Nats of each row's token, float64 `[rows]` on the CPU."""
    # the token's own probability may be 0 in float32 where it was forced; the likeliest one's is not
    top, likeliest = logits.max(-1)
    chosen = logits.gather(1, tokens[:, None].to(logits.device))[:, 0]
    return (top - chosen - probabilities.gather(1, likeliest[:, None])[:, 0].log()).double().cpu()


def _draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Token ids int64 `[rows]`: the cumulative distribution of float32 `[rows, vocabulary]` inverted at float64 `[rows]`.

    They need not sum to 1. The sum over the vocabulary has two levels: cumulated in float64 over blocks, and over the tokens
    of the one block that is hit. Over all tokens it took as long as a third of the model.
    """
    blocks = F.pad(probabilities, (0, -probabilities.shape[-1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    block, left = _inverse(blocks.sum(-1), uniforms)
    rows = torch.arange(len(block), device=block.device)
    token, _ = _inverse(blocks[rows, block], left)
    return block * _BLOCK + token


def _inverse(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative sum of `[rows, n]` passes a share in [0, 1) of its total: the index, int64 `[rows]`, and what
    share of that element is below, float64 `[rows]`."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    if not torch.isfinite(total).all():
        remedy = "Load it in bfloat16 or float32, and check its weights for NaN"
        raise CalibrationError.of("model", "NaN", "its logits must be finite to write text", remedy)
    target = uniforms[:, None] * total
    # right=True skips elements of weight 0; the minimum is for a product that rounds up to the total
    index = torch.minimum(torch.searchsorted(cumulative, target, right=True), torch.searchsorted(cumulative, total))
    own = weights.gather(1, index).double()
    share = (target - (cumulative.gather(1, index) - own)) / own
    return index[:, 0], share[:, 0].clamp(0, 1)
