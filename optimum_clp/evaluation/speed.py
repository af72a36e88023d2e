"""Tokens per second of PyTorch models and ONNX files, measured in turn."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..forward.decoding import cache_keyword, cache_of, takes_back_its_cache
from ..forward.hooks import evaluation_mode
from ..progress import progress_bar


@dataclass(frozen=True)
class Speed:
    """Tokens per second, batch 1: medians over the rounds.

    Args:
        prefill_tokens_per_second (`float`): Tokens of the prompt over the time of its forward pass.
        decode_tokens_per_second (`float`): Tokens generated after the first, greedily; with a KV cache where the model hands
            one out, else by whole passes over the text.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float


def measure_speed(
    models: dict[str, Callable[[], Any]],
    prompt: Tensor,
    *,
    new_tokens: int = 32,
    rounds: int = 3,
    quiet: bool = False,
) -> dict[str, Speed]:
    """Prefill and decode speed of several models in interleaved rounds, so that a drifting machine hits all alike.

    Args:
        models (`dict[str, Callable]`): For each name a function that gives the model; it is called once in each round,
            and what it gives is dropped after its turn, so that the models need not fit in memory together.
        prompt (`Tensor`): int64 `[1, length]`.
        new_tokens (`int`): Tokens to decode, at least 2.
        rounds (`int`): Rounds; the median of each figure is returned.
        quiet (`bool`): No progress bar.

    Returns:
        `dict[str, Speed]`
    """
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad(), progress_bar(rounds * len(models), "Speed", quiet) as bar:
        for _ in range(rounds):
            for name, make in models.items():
                model = make()
                cached = takes_back_its_cache(model)
                with evaluation_mode(model):
                    _decode(model, prompt[:, :8], 2, cached)  # warm-up: allocations, kernels picked at first use
                    first, rest = _decode(model, prompt, new_tokens, cached)
                prefill[name].append(prompt.shape[1] / first)
                decode[name].append((new_tokens - 1) / rest)
                del model
                bar.update(1)
    return {name: Speed(statistics.median(prefill[name]), statistics.median(decode[name])) for name in models}


def _decode(model: Any, prompt: Tensor, new_tokens: int, cached: bool) -> tuple[float, float]:
    """Seconds of the prompt's forward pass, and of `new_tokens - 1` greedy steps after it (without a cache where the
    model hands none out)."""
    device = getattr(model, "device", torch.device("cpu"))
    ids = prompt.to(device)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    text, keyword = ids, cache_keyword(model)
    start = now()
    out = model(input_ids=ids, use_cache=cached)
    middle = now()
    for _ in range(new_tokens - 1):
        ids = out.logits[:, -1:].argmax(-1)
        if cached:
            # no mask, see takes_back_its_cache
            out = model(input_ids=ids, use_cache=True, **{keyword: cache_of(out)})
        else:
            text = torch.cat([text, ids], dim=1)
            out = model(input_ids=text, use_cache=False)
    return middle - start, now() - middle
