"""Where the large arrays of an export lie: in main memory if all of them fit there, else in files of its staging folder.

They are the float32 copy of a model in 16 bits, the integers of a file until it is written, and what enters the modules of a layer on
calibration text. None of them is looked at but layer by layer, so that a model need not fit.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..architecture.lookup import decoder_layers, text_config
from ..errors import ExportError
from ..forward.memory_bound import free_memory, private_memory
from ..mapped_weights import MappedWeights, tensors_of
from ..progress import say
from ..spill import Spill
from ..tuning.activations import layer_activations
from .layer_kinds import traced_layers

# a norm's weight, and what a trace may fold into a constant, is not worth a mapping
_SMALLEST = 2**16
# float32 matrices of sums over two halves of the text, and one in float64 (`InputGrams`, `FeedbackRounding`)
_SUMS = 4 * 4 + 8
# of the largest weight: what was corrected and its integers, or what is written, transposed
_OF_A_WEIGHT = 2 * 4
# objects of a trace, and for each layer that is traced, and what an allocator keeps of a layer's rounding: measured on LLaMA's of 12 to 148 layers
_TRACE, _TRACE_OF_A_LAYER, _KEPT = 100 * 2**20, 6 * 2**20, 1.25
# of text, that run together while rounding looks at them
_ROWS = 8


class ExportRoom(Spill):
    """Room for one export.

    Args:
        folder (`Path`, *optional*): For files; without it everything lies in memory.
        left (`float`): Bytes of memory beyond what an export holds in any case.
    """

    def __init__(self, folder: Path | None = None, left: float = math.inf):
        super().__init__(folder, 0.0, smallest=_SMALLEST)
        self.left = left

    @property
    def on_disk(self) -> bool:
        """Whether large arrays lie in files."""
        return self.folder is not None

    def no_room(self, folder: Path, needed: int, free: int) -> ExportError:
        rule = f"memory does not hold the model in float32, and its disk has no room: {needed / 1e9:.1f} GB are needed next, {free / 1e9:.1f} GB are free"
        return ExportError.of("output folder", str(folder.parent), rule, "Free some space, or write to a larger disk")

    def let_go(self, tensors: Iterable[Tensor]) -> None:
        """Give the pages of tensors back that lie in files, if memory does not hold all of them."""
        if self.on_disk:
            # as mappings are now: some were made since the last time, and others are gone
            MappedWeights().let_go(tensors)


def export_room(
    model: PreTrainedModel, bits: int, rows: Tensor | None, max_memory: int | None, folder: Path, quiet: bool = False
) -> ExportRoom:
    """Choose where the large arrays of an export lie, and say so where memory does not hold them.

    Args:
        model ([`~transformers.PreTrainedModel`]): What is exported.
        bits (`int`): Of the largest quantized file, 0 for none.
        rows (`Tensor` or `None`): int64 `[rows, length]`, the text that rounding looks at, if it does.
        max_memory (`int` or `None`): Bytes that this process may hold; what is free now if not given.
        folder (`Path`): On the output folder's disk.
        quiet (`bool`): Say nothing.
    """
    private = private_memory()
    bound = private + free_memory() if max_memory is None else max_memory
    copied = float32_bytes(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rounded = parameters * bits // 8 + parameters // 8
    work = private + export_work(model, None if rows is None else rows.shape[1])
    held = work + copied + rounded + _entering(model, rows)
    if held <= bound:
        return ExportRoom(left=bound - held)
    if not quiet:
        size = f"{copied / 2**30:.2f} GiB of it in float32 and " if copied else ""
        say(
            f"export: {held / 2**30:.2f} GiB would be held, {bound / 2**30:.2f} may be; {size}what is rounded "
            f"lie in files of {folder.parent} until it is done."
        )
    return ExportRoom(folder, left=bound - work)


def float32_bytes(model: PreTrainedModel) -> int:
    """Bytes of what is no float32 tensor in main memory yet, in float32; what is there twice counts once."""
    found: dict[tuple, Tensor] = {}
    for tensor in tensors_of(model):
        if tensor.is_floating_point() and (tensor.dtype != torch.float32 or tensor.device.type != "cpu"):
            found[tensor.data_ptr() or id(tensor), tensor.shape] = tensor
    return sum(4 * tensor.numel() for tensor in found.values())


def export_work(model: PreTrainedModel, length: int | None) -> int:
    """Bytes that an export holds in any case, beside this process and the model (estimate): the objects of the trace, or a layer in work.

    Args:
        model ([`~transformers.PreTrainedModel`]): May be on the meta device.
        length (`int` or `None`): Tokens in a row of the text that rounding looks at, if it does.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    # fused experts are taken one by one
    largest = max(matrix.shape[-1] * matrix.shape[-2] for matrix in matrices)
    work = _TRACE + _TRACE_OF_A_LAYER * traced_layers(model) + _OF_A_WEIGHT * largest
    if length is None:
        return work
    # a layer's modules are sorted by what autograd keeps of some rows
    kept = max(layer_activations(layer, 4, trained=False) for layer in decoder_layers(model))
    return work + int(_KEPT * (_SUMS * _widest(model) ** 2 + _ROWS * length * kept))


def _entering(model: PreTrainedModel, rows: Tensor | None) -> int:
    """Bytes of what enters a layer and its modules, in the float model and in the rounded one, for all rows (estimate)."""
    if rows is None:
        return 0
    hidden = text_config(model.config).hidden_size
    # queries, keys and values are given one tensor, as are a gate and what it gates
    return 4 * rows.numel() * (2 * hidden + 3 * hidden + _widest(model))


def _widest(model: PreTrainedModel) -> int:
    """Most inputs of a linear module."""
    linear = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]
    return max(map(_inputs, linear), default=0)


def _inputs(module: Any) -> int:
    return module.weight.shape[0 if isinstance(module, Conv1D) else 1]
