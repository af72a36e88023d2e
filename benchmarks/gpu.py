"""What the stages take on an accelerator: seconds, tokens per second, peak memory of the device.

    python -m benchmarks.gpu OUT.json [--shape 1b 8b] [--device cuda] [--minutes 5]

Random weights in bfloat16 in LLaMA-3's shapes, made on the device from a seed: nothing is read from a disk or a network, and speeds do not
depend on what a model has learnt. Search and tuning are measured a second time with the layers in main memory (`offloaded`), from where each is copied
when its turn comes. Prints and writes one JSON object; a stage that the minutes do not hold is left out. `benchmarks/gpu.sh` runs the tests
that need an accelerator first.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_clp.checkpoint.offloaded import bare_copy
from optimum_clp.configuration.stages import SearchConfig, TuningConfig
from optimum_clp.forward.layer_major import Residence
from optimum_clp.forward.streamed_layers import LayerCopies, run_on
from optimum_clp.report.environment import environment_info
from optimum_clp.search.segment_search import search_segments
from optimum_clp.segments import LayerSegment, endpoint_layers, kept_layers
from optimum_clp.surgery.cut import cut_model
from optimum_clp.tuning.endpoints import tune_layers

# layers, hidden size, intermediate size, heads, key heads, vocabulary
SHAPES = {
    "tiny": (6, 64, 128, 4, 2, 512),
    "1b": (16, 2048, 8192, 32, 8, 128256),
    "8b": (32, 4096, 14336, 32, 8, 128256),
}
WORK_MEMORY = 2 * 2**30
LENGTH, SEARCH_ROWS, TUNING_ROWS, VALIDATION_ROWS = 256, 32, 192, 16


def configurations() -> list:
    return [search_recipe(), tuning_recipe()]


def search_recipe() -> SearchConfig:
    return SearchConfig(num_sequences=SEARCH_ROWS)


def tuning_recipe() -> TuningConfig:
    return TuningConfig(epochs=1, hidden_epochs=1)


def model_of(shape: str, device: torch.device) -> LlamaForCausalLM:
    """Random weights in bfloat16, made where they stay."""
    layers, hidden, intermediate, heads, key_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


class Clock:
    """Seconds and peak memory of stages, as long as there is time."""

    def __init__(self, device: torch.device, minutes: float):
        self.device, self.end = device, time.monotonic() + 60 * minutes

    def measured(self, work: Callable[[], Any]) -> tuple[dict[str, float], Any] | None:
        """What some work took, and what came out; nothing if the time is over."""
        if time.monotonic() > self.end:
            return None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        begin = time.perf_counter()
        result = work()
        found: dict[str, float] = {}
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            found["peak_gb"] = round(torch.cuda.max_memory_allocated(self.device) / 1e9, 2)
        return {"seconds": round(time.perf_counter() - begin, 2), **found}, result


def measure(shape: str, device: torch.device, clock: Clock, length: int) -> dict[str, Any]:
    """All stages of one shape."""
    found: dict[str, Any] = {}
    made = clock.measured(lambda: model_of(shape, device))
    if made is None:
        return found
    found["making"], model = made
    vocabulary, depth = model.config.vocab_size, model.config.num_hidden_layers
    rows = SEARCH_ROWS + TUNING_ROWS + VALIDATION_ROWS
    tokens = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))
    searched, train, validation = tokens.split([SEARCH_ROWS, TUNING_ROWS, VALIDATION_ROWS])

    def forward() -> None:
        with torch.no_grad():
            for batch in searched.split(8):
                model(batch.to(device), use_cache=False)

    forward()  # kernels are chosen
    for name, work in (
        ("forward", forward),
        ("search", lambda: search_segments(model, searched, depth // 5, search_recipe(), quiet=True)),
    ):
        if (done := clock.measured(work)) is not None:
            found[name] = done[0]
    if "search" in found:
        found["search"]["forward_passes"] = round(found["search"]["seconds"] / found["forward"]["seconds"], 2)
    done = clock.measured(lambda: tuned(model, train, validation))
    if done is not None:
        found["tuning"], found["tuning"]["tokens_per_second"] = done
    found["offloaded"] = offloaded(model, searched, train, validation, device, clock)
    gc.collect()  # a streamed layer and its forward hold each other
    return found


def tuned(model: LlamaForCausalLM, train: Tensor, validation: Tensor, residence: Residence | None = None) -> int:
    """A cut in the middle, and its tuning: tokens per second."""
    depth = model.config.num_hidden_layers
    segment = LayerSegment(depth // 2, depth // 2 + depth // 5)
    cut = cut_model(model, [segment])
    layers, kept = endpoint_layers([segment], depth), kept_layers([segment], depth)
    options = {"kept": kept, "residence": residence, "quiet": True}
    result = tune_layers(cut, model, layers, train, validation, tuning_recipe(), **options)
    return round(result.num_tokens / result.seconds)


def offloaded(
    model: LlamaForCausalLM, searched: Tensor, train: Tensor, validation: Tensor, device: torch.device, clock: Clock
) -> dict[str, Any]:
    """The same with the layers in main memory, two of them on the device at a time. The model is moved there, and stays there."""
    layers = model.model.layers
    moved = clock.measured(lambda: layers.cpu())
    if moved is None:
        return {}
    copies = LayerCopies(device, work_memory=WORK_MEMORY)
    twin = bare_copy(model)
    run_on(twin, copies)
    residence = Residence(work_memory=WORK_MEMORY)
    layer_bytes = max(sum(p.nbytes for p in layer.parameters()) for layer in layers)
    found: dict[str, Any] = {"layers_gb": round(len(layers) * layer_bytes / 1e9, 2)}
    for name, work in (
        (
            "search",
            lambda: search_segments(
                twin, searched, len(layers) // 5, search_recipe(), residence=residence, quiet=True
            ),
        ),
        ("tuning", lambda: tuned(twin, train, validation, residence)),
    ):
        before = copies.copied
        if (done := clock.measured(work)) is None:
            break
        found[name] = done[0] | {"copied_gb": round((copies.copied - before) * layer_bytes / 1e9, 2)}
        if name == "tuning":
            found[name]["tokens_per_second"] = done[1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["1b", "8b"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--length", type=int, default=LENGTH)
    args = parser.parse_args()
    device = torch.device(args.device)
    clock = Clock(device, args.minutes)
    found: dict[str, Any] = {"environment": environment_info(device), "length": args.length, "shapes": {}}
    for shape in args.shape:
        found["shapes"][shape] = measure(shape, device, clock, args.length)
        # also what there is when the time is over
        args.output.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
