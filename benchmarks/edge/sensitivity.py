"""Where four bits hurt a real model: KL to its own float weights, one kind of matrix and one way to choose scales at a time.

    OMP_NUM_THREADS=1 python -m benchmarks.edge.sensitivity --model MODEL --text TEXT.safetensors --off-grid

TEXT is a file of rows that a model wrote, such as `benchmarks.edge.frontier` leaves in its folder: the first rows say how
much each column counts, the last ones are measured on. Weights are rounded to nearest in groups of 32 and run in PyTorch.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks import markdown
from benchmarks.edge.frontier import load, noise_off_grid
from benchmarks.edge.importance import mean_squares
from benchmarks.recovery.chat_model.text import load_text
from optimum_clp.evaluation.tokens import evaluate_tokens
from optimum_clp.exporters.rounding.nearest import round_to_nearest
from optimum_clp.forward.dense_outputs import DenseOutputs

Round = Callable[[Tensor, np.ndarray | None], np.ndarray]
GROUP = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--off-grid", action="store_true")
    parser.add_argument("--rows", type=int, default=16, help="that are measured on")
    parser.add_argument("--calibration-rows", type=int, default=64)
    args = parser.parse_args()
    tokens = load_text(args.text).tokens
    model = load(args.model)
    for name, move in (noise_off_grid(model) if args.off_grid else {}).items():
        model.get_parameter(name).data += move
    # table and head apart, so that each can be rounded alone
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    study = Study(model, tokens[-args.rows :], tokens[: args.calibration_rows])
    print(markdown.table([["rounded", "KL"], *([name, f"{kl:.4f}"] for name, kl in study.figures())]))


class Study:
    """One model, its float outputs on some rows, and the mean square of what enters its linear layers on others."""

    def __init__(self, model: PreTrainedModel, rows: Tensor, calibration: Tensor):
        self.model, self.rows = model, rows
        self.modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
        self.importance = mean_squares(model, self.modules, calibration)
        # looked-up rows count beside products
        head = self.importance["lm_head"]
        self.importance["model.embed_tokens"] = self.importance["lm_head"] = head + head.mean()
        # made now: later the head itself is rounded
        self.reference = FrozenReference(DenseOutputs(model, rows, batch_size=4), rows)

    def figures(self) -> Iterator[tuple[str, float]]:
        layers = [name for name in self.modules if name.endswith("_proj")]
        for kind in dict.fromkeys(name.rpartition(".")[2] for name in layers):
            yield kind, self.kl([name for name in layers if name.endswith(kind)], nearest)
        ways: Mapping[str, Round] = {
            "as it is without text": nearest,
            "the largest weight is the end of the range": full_range,
            "zero points (4.66 bits)": with_zero_points,
            "scales by what columns are multiplied by": weighted,
        }
        for name, way in ways.items():
            yield f"all layers, {name}", self.kl(layers, way)
        yield "table, looked up", self.kl(["model.embed_tokens"], nearest)
        yield "head", self.kl(["lm_head"], nearest)
        yield "table and head", self.kl(["model.embed_tokens", "lm_head"], nearest)
        yield (
            "table and head, scales by what columns are multiplied by",
            self.kl(["model.embed_tokens", "lm_head"], weighted),
        )

    def kl(self, names: list[str], way: Round) -> float:
        with self.rounded(names, way):
            kl = evaluate_tokens(self.model, self.rows, reference=self.reference, batch_size=4).kl
        assert kl is not None
        return kl

    @contextmanager
    def rounded(self, names: list[str], way: Round) -> Iterator[None]:
        before = {name: self.modules[name].weight.data for name in names}
        for name, weight in before.items():
            self.modules[name].weight.data = torch.from_numpy(way(weight, self.importance[name]))
        try:
            yield
        finally:
            for name, weight in before.items():
                self.modules[name].weight.data = weight


class FrozenReference(DenseOutputs):
    """Logits that stay as they are when the model's head changes."""

    def __init__(self, outputs: DenseOutputs, rows: Tensor):
        self.found = torch.cat([outputs.logits(slice(i, i + 4)) for i in range(0, len(rows), 4)])

    def logits(self, rows: slice | Tensor) -> Tensor:
        return self.found[rows]


def nearest(weight: Tensor, importance: np.ndarray | None) -> np.ndarray:
    return round_to_nearest(weight.numpy(), 4, GROUP).dequantize()


def weighted(weight: Tensor, importance: np.ndarray | None) -> np.ndarray:
    return round_to_nearest(weight.numpy(), 4, GROUP, importance).dequantize()


def full_range(weight: Tensor, importance: np.ndarray | None) -> np.ndarray:
    groups = weight.reshape(len(weight), -1, GROUP)
    scale = (groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8).half().float()
    return ((groups / scale).nan_to_num().round().clamp(-8, 7) * scale).reshape(weight.shape).numpy()


def with_zero_points(weight: Tensor, importance: np.ndarray | None) -> np.ndarray:
    groups = weight.reshape(len(weight), -1, GROUP)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).nan_to_num().round()
    codes = (groups / scale).nan_to_num().add(zero).round().clamp(0, 15)
    return ((codes - zero) * scale).reshape(weight.shape).numpy()


if __name__ == "__main__":
    main()
