"""How much floating-point work the parts of a forward pass are, so that strategies are compared by what they cost.

The unit is the *forward-equivalent*: the work of one dense forward pass over all search rows, head included.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..forward.hooks import (
    AfterForward,
    BeforeForward,
    hooked,
    let_go_behind,
    only_trainable,
    recorded_inputs,
    run_without_head,
)
from ..forward.layer_stack import LayerStack


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Of scores and mix for all pairs of positions, as PyTorch counts the attention kernels of a GPU."""
    *batch, length, size = query
    return 2 * math.prod(batch) * length * key[-2] * (size + value[-1])


def _product_flops(added: Any, left: Any, right: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _cholesky_flops(matrix: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return matrix[-1] ** 3 // 3


def _cholesky_solve_flops(right: Any, factor: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * right[-1] * factor[-1] ** 2


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """PyTorch's counter of floating-point operations, told what it does not know: attention on a CPU, products that are
    added in place, and what solves linear systems."""
    aten = torch.ops.aten
    more = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten.addmm_: _product_flops,
        aten.linalg_cholesky_ex: _cholesky_flops,
        aten.cholesky_solve: _cholesky_solve_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        yield counter


@dataclass(frozen=True)
class ForwardWork:
    """Floating-point operations of a forward pass over one row of tokens.

    Args:
        layers (`tuple[float, ...]`): Of each decoder layer.
        head (`float`): Of the final norm and the head.
        around (`float`): Of everything before, between and beside the layers.
    """

    layers: tuple[float, ...]
    head: float
    around: float

    @property
    def forward(self) -> float:
        """Of the whole dense model."""
        return sum(self.layers) + self.head + self.around

    def of(self, layers: Sequence[int], head: bool = True) -> float:
        """Share of a dense forward pass that a pass through some layers is.

        Args:
            layers (`Sequence[int]`): The layers that are computed; with none, the model is not run for them.
            head (`bool`): Whether the head is computed too.
        """
        work = sum(self.layers[i] for i in layers) + (self.around if layers else 0) + (self.head if head else 0)
        return work / self.forward


def measure_work(model: PreTrainedModel, stack: LayerStack, row: Tensor, lets_go: bool = False) -> ForwardWork:
    """Count the operations of one forward pass.

    Matrix products are counted by PyTorch's own counter, attention by formula; kernels that neither knows (scans of
    state-space models) count as nothing.

    Args:
        model (`PreTrainedModel`): Not changed.
        stack ([`LayerStack`]): Its layers.
        row (`Tensor`): int64 `[1, length]`.
        lets_go (`bool`): Weights that lie in files are let go behind each layer.
    """
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={attention: _attention_flops})
    layers = [0.0] * len(stack)
    begun = [0.0] * len(stack)

    def entering(index: int) -> BeforeForward:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            begun[index] = counter.get_total_flops()

        return hook

    def leaving(index: int) -> AfterForward:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            layers[index] = float(counter.get_total_flops() - begun[index])
            stack.note(index, output)

        return hook

    before = [(layer, entering(index)) for index, layer in enumerate(stack.layers)]
    after = [(layer, leaving(index)) for index, layer in enumerate(stack.layers)]
    # the counter's own hooks stumble over views of weights that want a gradient
    with torch.no_grad(), only_trainable(model, ()), hooked(before, after):
        letting_go = let_go_behind(stack.layers if lets_go else ())
        with letting_go, recorded_inputs(stack.layers, [len(stack)]) as found, counter:
            run_without_head(model, row)
        of_layers = tuple(layers)  # the hooks see the head's pass too, in which layers compute nothing
        around = counter.get_total_flops() - sum(of_layers)
        with stack.head(model) as head, counter:
            head(found[len(stack)][:, :1])
    # what lies around the layers is run for the head's token as well
    of_a_token = counter.get_total_flops() - around / row.shape[1]
    return ForwardWork(of_layers, max(0.0, of_a_token) * row.shape[1], float(around))
