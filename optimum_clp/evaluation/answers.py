"""Answers that a model writes: several prompts at once, greedy or sampled, without padding.

Rows of a batch begin at the same place and are not padded: while a row's own prompt lasts, its tokens are given and not
chosen. So what a row says is what it says alone (up to rounding), also where positions are learnt, states are carried
along or a graph knows no left padding; the price is a few more steps for prompts of unlike length, which are therefore
sorted. Rows that have ended are left out as soon as they are half of the batch: the others are run again as a whole, which
works with every kind of cache.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..architecture.lookup import text_config
from ..calibration.writing import random_stream
from ..errors import ModelError
from ..forward.decoding import cache_keyword, cache_of, takes_back_its_cache
from ..forward.hooks import evaluation_mode
from ..progress import progress_bar


@dataclass(frozen=True)
class Answer:
    """What a model has said.

    Args:
        tokens (`tuple[int, ...]`): At least one; the token that ends it is the last, if it ended by itself.
        ended (`bool`): Whether it ended by itself.
    """

    tokens: tuple[int, ...]
    ended: bool

    @property
    def words(self) -> tuple[int, ...]:
        """The tokens without the one that ends it."""
        return self.tokens[:-1] if self.ended else self.tokens


@dataclass(frozen=True)
class AnswerRules:
    """How answers are written.

    Args:
        ends (`frozenset[int]`): Tokens that end one.
        vocabulary (`int`): Tokens beyond it, which pad the model's table, are never chosen.
        max_new_tokens (`int`): Tokens that one may have, the one that ends it included; at least 1.
        context (`int` or `None`): Tokens that prompt and answer may have together.
        temperature (`float` or `None`): Of sampling; `None` takes the most likely token.
        seed (`int`): Each prompt has a random stream of its own: seed and place in the list.
    """

    ends: frozenset[int]
    vocabulary: int
    max_new_tokens: int
    context: int | None = None
    temperature: float | None = None
    seed: int = 0


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Every token that ends an answer, by the model's configurations and the tokenizer; may be empty."""
    holders = (text_config(model.config), getattr(model, "generation_config", None), tokenizer)
    values = [getattr(holder, "eos_token_id", None) for holder in holders]
    flat = [i for value in values for i in (value if isinstance(value, (list, tuple)) else [value])]
    return frozenset(i for i in flat if i is not None)


def write_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    rules: AnswerRules,
    *,
    batch_size: int,
    name: str,
    quiet: bool = False,
) -> list[Answer]:
    """Let a model answer.

    Args:
        model: Called like a causal language model of transformers: one of PyTorch, or an [`OnnxCausalLM`]. Left as it is.
        prompts (`Sequence[Sequence[int]]`): Tokens, at least one each, shorter than the context.
        rules ([`AnswerRules`]): How.
        batch_size (`int`): Prompts that are answered at once.
        name (`str`): What the progress bar says.
        quiet (`bool`): No progress bar.

    Returns:
        `list[Answer]`: In the prompts' order.

    Raises:
        ModelError: If the model's logits are not finite.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    answers: dict[int, Answer] = {}
    with torch.no_grad(), evaluation_mode(model), progress_bar(len(prompts), name, quiet) as bar:
        decoder = _Decoder(model, takes_back_its_cache(model))
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            batch = _Batch(
                [list(prompts[index]) for index in rows],
                [random_stream(rules.seed, index, rules.max_new_tokens) for index in rows],
                rules,
            )
            for place, answer in batch.write(decoder, bar.update).items():
                answers[rows[place]] = answer
    return [answers[index] for index in range(len(prompts))]


class _Decoder:
    """A model that goes on with a batch of texts, all of one length, token by token."""

    def __init__(self, model: Any, cached: bool):
        self.model, self.cached = model, cached
        self.device = getattr(model, "device", torch.device("cpu"))
        self.keyword = cache_keyword(model)
        # logits are a vocabulary wide: those of the last place are enough
        keeps = "logits_to_keep" in inspect.signature(getattr(model, "forward", model)).parameters
        self.last: dict[str, Any] = {"logits_to_keep": 1} if keeps else {}
        self.text = torch.empty(0, 0, dtype=torch.int64)
        self.cache: Any = None

    def start(self, texts: list[list[int]]) -> Tensor:
        """Logits `[texts, vocabulary]` after each text."""
        self.text = torch.tensor(texts, device=self.device)
        output = self.model(input_ids=self.text, use_cache=self.cached, **self.last)
        self.cache = cache_of(output) if self.cached else None
        return output.logits[:, -1].float()

    def step(self, tokens: list[int]) -> Tensor:
        """The same after one more token for each."""
        column = torch.tensor(tokens, device=self.device)[:, None]
        self.text = torch.cat([self.text, column], dim=1)
        if not self.cached:
            return self.start(self.text.tolist())
        given = {self.keyword: self.cache}
        # no mask, see takes_back_its_cache
        output = self.model(input_ids=column, use_cache=True, **given)
        self.cache = cache_of(output)
        return output.logits[:, -1].float()


class _Batch:
    """Prompts that are answered side by side."""

    def __init__(self, texts: list[list[int]], streams: list[Tensor], rules: AnswerRules):
        self.texts, self.streams, self.rules = texts, streams, rules
        self.starts = [len(text) for text in texts]
        room = [rules.max_new_tokens if rules.context is None else rules.context - start for start in self.starts]
        self.limits = [
            start + max(1, min(rules.max_new_tokens, free)) for start, free in zip(self.starts, room, strict=True)
        ]

    def write(self, decoder: _Decoder, told: Callable[[int], Any]) -> dict[int, Answer]:
        """The answers; `told` hears how many more have ended."""
        done: dict[int, Answer] = {}
        rows, length = list(range(len(self.texts))), min(self.starts)
        logits = decoder.start([self.texts[row][:length] for row in rows])
        while len(done) < len(self.texts):
            before = len(done)
            chosen = self._chosen(logits[:, : self.rules.vocabulary], rows, length)
            for row, token in zip(rows, chosen, strict=True):
                if row not in done and len(self.texts[row]) == length:
                    self._append(row, token, done)
            told(len(done) - before)
            length += 1
            going = [row for row in rows if row not in done]
            if 2 * len(going) > len(rows):
                # a row that has ended goes on with anything
                logits = decoder.step([self.texts[row][min(length, len(self.texts[row])) - 1] for row in rows])
            elif going:
                rows = going
                logits = decoder.start([self.texts[row][:length] for row in rows])
        return done

    def _chosen(self, logits: Tensor, rows: list[int], length: int) -> list[int]:
        """The next token of each row by its logits `[rows, vocabulary]`; a row whose prompt still lasts has no use for it."""
        if not torch.isfinite(logits.max()):
            remedy = "Load it in bfloat16 or float32, and check its weights for NaN"
            raise ModelError.of("model", "NaN", "its logits must be finite to answer", remedy)
        if self.rules.temperature is None:
            return logits.argmax(-1).tolist()
        last = self.rules.max_new_tokens - 1
        numbers = [self.streams[row][min(max(length - self.starts[row], 0), last)] for row in rows]
        # the inverse of the cumulative distribution, as in calibration/self_written.py
        cumulative = (logits / self.rules.temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:].contiguous()
        wanted = torch.stack(numbers)[:, None].to(total.device) * total
        found = torch.searchsorted(cumulative, wanted, right=True)
        return torch.minimum(found, torch.searchsorted(cumulative, total))[:, 0].tolist()

    def _append(self, row: int, token: int, done: dict[int, Answer]) -> None:
        text, start = self.texts[row], self.starts[row]
        text.append(token)
        ended = token in self.rules.ends
        if ended or len(text) >= self.limits[row]:
            done[row] = Answer(tuple(text[start:]), ended)
