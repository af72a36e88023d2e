"""Scales of rounded weights, trained: the integers stay as they are, and the model comes back towards what another one says.

The last stage of EfficientQAT (arXiv 2407.11062: only the sizes of the steps are trained, end to end), written anew and with another
target: a model's distribution, not the text. Rounding looks at one matrix after the other; this looks at what they do together, and
where the other model is the one that was cut, it heals some of the cut in all layers.
"""

import math
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup
from transformers.pytorch_utils import Conv1D

from ...architecture.lookup import decoder_layers, text_config
from ...forward.losses import kl_divergence
from ...progress import progress_bar
from ...tuning.activations import layer_activations, logit_bytes
from ...tuning.losses import Distillation
from ..experts import unrolled_experts
from .input_grams import linear_matrix, weight_names
from .matrices import RoundedMatrix, fits_16_bits, narrowed, unpack, zero_point
from .method import RoundingProblem, ScaleTuning
from .nearest import round_to_nearest
from .products import product_dtype, products_in

# Of a scale's relative change, at this divergence and above: three times as much harms. Nearer to the teacher it goes with the root of the
# divergence, which goes with the size of rounding's errors: docs/onnx_lab_notes.md, "Scales, trained".
_RATE, _AT = 1e-3, 0.16
_BATCH = 4
_WARMUP = 0.05
# of the rows one in so many judges, and no more than so many do
_JUDGING, _MOST_JUDGES = 8, 16
# float32 numbers for each scale: it, its change, what is added to it and two moments; and a product of two of them
_OF_A_SCALE = 6 * 4


def judging_rows(rows: int) -> int:
    """How many of so many rows judge; 0 if there are too few to train on and to judge by."""
    judging = min(_MOST_JUDGES, rows // _JUDGING)
    return judging if rows - judging >= _BATCH else 0


def tuning_bytes(model: PreTrainedModel, length: int, block_size: int) -> int:
    """Bytes that [`tune_scales`] holds beside the model and its integers (estimate): numbers for each scale, and what autograd keeps.

    Args:
        model ([`~transformers.PreTrainedModel`]): May be on the meta device.
        length (`int`): Tokens in a row.
        block_size (`int`): Weights that share a scale.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    scales = sum(matrix.numel() for matrix in matrices) // block_size
    largest = max(matrix.shape[-1] * matrix.shape[-2] for matrix in matrices)
    layers = sum(layer_activations(layer, 4, trained=True) for layer in decoder_layers(model))
    logits = logit_bytes(_BATCH * length, text_config(model.config).vocab_size, 4, [Distillation()])
    # a weight, its gradient, and the product that the scales' gradient is the sum of
    return _OF_A_SCALE * scales + 3 * 4 * largest + _BATCH * length * layers + logits


def complete(problem: RoundingProblem, matrices: Mapping[str, RoundedMatrix]) -> dict[str, RoundedMatrix]:
    """All matrices that the graph stores in integers but those that choose experts: the ones that are missing to nearest.

    Args:
        problem ([`~exporters.rounding.method.RoundingProblem`]): What was to be rounded.
        matrices (`Mapping[str, RoundedMatrix]`): What a method has made of it.
    """
    wanted = {name for name, matrix in problem.matrices.items() if not matrix.is_router}
    found = dict(matrices)
    with unrolled_experts(problem.model):
        for module, names in _holders(problem.model, wanted):
            if not found.keys() & names:
                weight = module.weight.detach() if isinstance(module, nn.Embedding) else linear_matrix(module)
                form = problem.form_of(names)
                rounded = round_to_nearest(cast(Tensor, weight).numpy(), form.bits, form.block_size)
                found |= dict.fromkeys(names, rounded.kept(problem.room.keep_array))
    return found


def tune_scales(
    model: PreTrainedModel,
    matrices: Mapping[str, RoundedMatrix],
    tokens: Tensor,
    *,
    teacher: PreTrainedModel | None = None,
    epochs: int = 1,
    seed: int = 0,
    quiet: bool = False,
) -> tuple[dict[str, RoundedMatrix], ScaleTuning | None]:
    """Train the scales of rounded weights towards a teacher, by KL on text.

    Steps of Adam on the relative change of every scale, four rows each, with a warm-up and a cosine, the smaller the nearer it is already; products in bfloat16
    where the processor has them. Integers and zero points stay. What is trained is kept if it is better on the last eighth of the
    rows (at most 16), which no step sees. Weights are made of their integers whenever they are needed, on the way back too.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model that was rounded, in float32 on the CPU, in evaluation mode; left as it was.
        matrices (`Mapping[str, RoundedMatrix]`): By the weight's name in the graph; a weight without one stays in float.
        tokens (`Tensor`): int64 `[rows, length]`, without padding.
        teacher ([`~transformers.PreTrainedModel`], *optional*): With the same vocabulary, of any dtype, on any device, such as the
            dense model that `model` was cut from; `model` itself if not given.
        epochs (`int`): Passes over the rows that are trained on.
        seed (`int`): Of their order.
        quiet (`bool`): No progress bar.

    Returns:
        `tuple[dict[str, RoundedMatrix], ScaleTuning | None]`: The matrices to go on with, and what was measured; `None` where
        the text is too short (under 8 rows) to train on and to judge by, or a divergence is not finite.
    """
    judging = judging_rows(len(tokens))
    if not judging or not matrices:
        return dict(matrices), None
    train, judges = tokens[:-judging], tokens[-judging:]
    order = torch.Generator().manual_seed(seed)
    steps = [rows for _ in range(epochs) for rows in _batches(len(train), order)]
    with unrolled_experts(model), _as_stored(model, matrices) as stored, torch.enable_grad():
        student = _Student(model, stored, teacher, judges)
        before = student.divergence(judges)
        if not math.isfinite(before):
            return dict(matrices), None
        rate = _RATE * min(1.0, before / _AT) ** 0.5
        optimizer = torch.optim.Adam([part.change for part in student.parts], lr=rate, betas=(0.9, 0.99))
        schedule = get_cosine_schedule_with_warmup(optimizer, round(_WARMUP * len(steps)), len(steps))
        with progress_bar(len(steps), "Tuning the scales", quiet) as bar:
            for rows in steps:
                with student.weights_made_again():
                    student.loss(train[rows]).mean().backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                bar.update()
        for part in student.parts:
            part.narrow()
        after = student.divergence(judges)
        tuned = {name: replace(matrix, scales=stored[name].start.numpy()) for name, matrix in matrices.items()}
    if not math.isfinite(after):
        return dict(matrices), None
    seen = sum(len(rows) for rows in steps) * tokens.shape[1]
    return tuned if after < before else dict(matrices), ScaleTuning(seen, before, after, after < before)


def _batches(rows: int, order: torch.Generator) -> list[Tensor]:
    """One pass over rows; what does not fill the last batch is left out."""
    return [part for part in torch.randperm(rows, generator=order).split(_BATCH) if len(part) == _BATCH]


class _Student:
    """The rounded model and its teacher, which may be the same modules with their own weights."""

    def __init__(
        self, model: PreTrainedModel, stored: Mapping[str, "_Stored"], teacher: PreTrainedModel | None, tokens: Tensor
    ):
        self.model, self.teacher = model, teacher
        # one that has several names is there once
        self.parts = list(dict.fromkeys(stored.values()))
        self.dtype = product_dtype(model, tokens)
        for part in self.parts:
            part.dtype = self.dtype

    def loss(self, rows: Tensor) -> Tensor:
        """KL from the teacher, `[rows, length]`."""
        with products_in(self.dtype):
            return kl_divergence(self._taught(rows), _logits(self.model, rows))

    @torch.no_grad()
    def divergence(self, rows: Tensor) -> float:
        """The mean over tokens."""
        return float(torch.cat([self.loss(part).double().mean(-1) for part in rows.split(_BATCH)]).mean())

    def weights_made_again(self) -> saved_tensors_hooks:
        """For what autograd keeps inside the block: of a weight its module and its place, not its numbers."""
        made: dict[int, tuple[_Stored, weakref.ref[Tensor]]] = {}
        for part in self.parts:
            part.made = made

        def pack(kept: Tensor) -> Any:
            part, weight = made.get(kept.untyped_storage().data_ptr(), (None, None))
            # where a weight lay that is gone may lie something else
            if weight is None or weight() is None:
                return kept
            return part, kept.dtype, kept.size(), kept.stride(), kept.storage_offset()

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            part, dtype, *place = packed
            return part.weight(dtype).as_strided(*place)

        return saved_tensors_hooks(pack, unpack)

    @torch.no_grad()
    def _taught(self, rows: Tensor) -> Tensor:
        if self.teacher is not None:
            return _logits(self.teacher, rows.to(self.teacher.device)).to(rows.device)
        for part in self.parts:
            part.in_float = True
        try:
            return _logits(self.model, rows)
        finally:
            for part in self.parts:
                part.in_float = False


def _logits(model: PreTrainedModel, rows: Tensor) -> Tensor:
    return model(input_ids=rows, use_cache=False).logits


class _Stored(nn.Module):
    """A weight as a file stores it, as a function of the relative change of its scales.

    Args:
        matrix ([`RoundedMatrix`]): The file's.

    Attributes:
        made (`dict`): Where the numbers of weights lie that autograd may keep, whose they are, and the tensor that is gone when they are.
        in_float (`bool`): Whether modules have their own weight for now.
        dtype (`torch.dtype`): Of a weight that is multiplied by.
    """

    start: Tensor

    def __init__(self, matrix: RoundedMatrix):
        super().__init__()
        self.bits, self.columns = matrix.bits, matrix.columns
        self.integers = matrix.integers
        self.zero_points: Tensor | int = zero_point(matrix.bits)
        if matrix.zero_points is not None:
            self.zero_points = torch.from_numpy(matrix.zero_points)[..., None]
        self.start = torch.from_numpy(matrix.scales)
        self.change = nn.Parameter(torch.zeros_like(self.start))
        self.narrows = fits_16_bits(matrix.scales)
        self.made: dict[int, tuple[_Stored, weakref.ref[Tensor]]] = {}
        self.in_float, self.dtype = False, torch.float32

    def read(self, dtype: torch.dtype, transposed: bool) -> Tensor:
        """The matrix, as a module has it whose weight may lie the other way round; gradients go to the change."""
        weight = cast(Tensor, _Weight.apply(self.change, self, dtype))
        placed = weight[:, : self.columns]
        placed = placed.T if transposed else placed
        self.made[weight.untyped_storage().data_ptr()] = self, weakref.ref(placed)
        return placed

    def signed(self) -> Tensor:
        """The integers less their zero points, float32 `[rows, blocks, block size]`."""
        codes = torch.from_numpy(unpack(self.integers, self.bits))
        # in place: of what is as large as a matrix it is new memory that costs most
        return codes.reshape(*self.start.shape, -1).float().sub_(self.zero_points)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The matrix as it is stored, the filling of its rows included, `[rows, blocks * block size]`."""
        scales = self.start * (1 + self.change.detach())
        return self.signed().mul_(scales[..., None]).flatten(1).to(dtype)

    @torch.no_grad()
    def narrow(self) -> None:
        """Give the scales the numbers that are stored."""
        scales = (self.start * (1 + self.change)).numpy()
        self.start = torch.from_numpy(narrowed(scales) if self.narrows and fits_16_bits(scales) else scales)
        self.change.zero_()


class _Weight(torch.autograd.Function):
    """A stored weight; on the way back its integers are looked up again, and nothing is kept of it."""

    @staticmethod
    def forward(ctx: Any, change: Tensor, stored: _Stored, dtype: torch.dtype) -> Tensor:
        ctx.stored = stored
        return stored.weight(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        integers = ctx.stored.signed()
        # the integers' memory is this function's own; the gradient's is not
        products = integers.mul_(gradients[0].reshape(integers.shape))
        return products.sum(-1).mul_(ctx.stored.start), None, None


class _Reading(nn.Module):
    """A parametrization for PyTorch: a module's weight is the stored one."""

    def __init__(self, module: nn.Module, stored: _Stored):
        super().__init__()
        # in a tuple, or what several modules read would be a part of each of them
        self._stored = (stored,)
        self._transposed = isinstance(module, Conv1D)
        # what is looked up enters the sums of all layers, which autocast leaves in float32
        self._looked_up = isinstance(module, nn.Embedding)

    def forward(self, original: Tensor) -> Tensor:
        (stored,) = self._stored
        if stored.in_float:
            return original
        return stored.read(torch.float32 if self._looked_up else stored.dtype, self._transposed)


def _holders(model: PreTrainedModel, names: Collection[str]) -> Iterator[tuple[Any, list[str]]]:
    """Linear modules and the embedding whose weight has one of the names, and which of the names it has."""
    embedding, aliases = model.get_input_embeddings(), weight_names(model)
    for module in list(model.modules()):
        if module is embedding or linear_matrix(module) is not None:
            found = [name for name in aliases[id(module.weight)] if name in names]
            if found:
                yield module, found


@contextmanager
def _as_stored(model: PreTrainedModel, matrices: Mapping[str, RoundedMatrix]) -> Iterator[dict[str, _Stored]]:
    """The model's modules read their weights from the stored ones until the block ends; those by name."""
    holders = list(_holders(model, matrices))
    stored: dict[str, _Stored] = {}
    for _, names in holders:
        if names[0] not in stored:
            stored |= dict.fromkeys(names, _Stored(matrices[names[0]]))
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        for module, names in holders:
            # it may have another dtype than the weight that it stands for
            parametrize.register_parametrization(module, "weight", _Reading(module, stored[names[0]]), unsafe=True)
        yield stored
    finally:
        for module, _ in holders:
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
                _weight_first(module)
        for parameter in required:
            parameter.requires_grad_(True)


def _weight_first(module: nn.Module) -> None:
    """Put a bias behind the weight, where it was: a parametrization that goes leaves the weight behind all others."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if name != "weight":
            delattr(module, name)
            module.register_parameter(name, parameter)
