"""Bytes that a model takes on disk and while it is tuned, from its shapes alone: a model on the meta device will do.

What is exact here is arithmetic over tensors that another module makes; the tests count those tensors. What is an
estimate says so.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..architecture.lookup import decoder_layers, decoder_path, text_config
from ..configuration.stages import QuantizationConfig, TuningConfig
from ..doors import ROUNDINGS, STARTS
from ..precisions import INT4, INT8, PRECISIONS
from ..segments import target_state
from ..surgery.sizes import count_bytes
from ..tuning.activations import logit_bytes, norm_activations
from ..tuning.losses import STATES, needs_of, weighted_losses
from ..tuning.overparametrization import new_sizes, projections
from ..tuning.rows import compared_layers
from ..tuning.schedule import stages_of

_FLOAT32, _FLOAT16 = 4, 2
_TOKEN = 8  # int64


@dataclass(frozen=True)
class TuningMemory:
    """Bytes that cutoff endpoint tuning holds, part by part.

    Exact, up to a few bytes for each tensor: everything but `closed_form`, `activations` and `logits`. These are estimates,
    see [`~optimum_clp.tuning.starts.Start.held_bytes`], [`~optimum_clp.tuning.activations.layer_activations`] and [`~optimum_clp.tuning.activations.logit_bytes`]. Not counted: the Python process with its libraries, a gradient that is on
    its way through one layer, and what an allocator keeps in reserve.

    Args:
        weights (`int`): The dense model, which the cut one shares.
        endpoints (`int`): The trained layers' own storage, in the model's dtype, and what `overparametrization` adds to it.
        closed_form (`int`): The sums of the closed-form start, and what enters the layers behind the first one, which are
            gone before the first step (estimate).
        masters (`int`): float32 master weights; 0 for a float32 model, which is its own master.
        gradients (`int`): In the model's dtype, and the largest one in float32 too where these differ.
        moments (`int`): AdamW's two, float32.
        caches (`int`): Tokens, and the hidden states that enter the first trained layer and that leave the dense model's
            last one (and those that a start or a loss compares the trained layers' with), for
            all train and validation rows, in main memory; at most `cache_memory_gib`, the rest is on disk.
        activations (`int`): What autograd keeps of one step above the first trained layer's input (estimate).
        logits (`int`): Logits and probabilities of one step (estimate).
    """

    weights: int
    endpoints: int
    closed_form: int
    masters: int
    gradients: int
    moments: int
    caches: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The peak: all parts, but the closed-form start and the steps after it not at the same time."""
        steps = self.masters + self.gradients + self.moments + self.activations + self.logits
        return self.weights + self.endpoints + self.caches + max(self.closed_form, steps)

    @property
    def main_memory(self) -> int:
        """The parts that stay in main memory when the model is on an accelerator."""
        return self.caches

    def to_dict(self) -> dict[str, int]:
        """All parts, `main_memory` and `total`, in bytes."""
        return {**asdict(self), "main_memory": self.main_memory, "total": self.total}


def onnx_weight_bytes(model: PreTrainedModel, weights: str, quantization: QuantizationConfig) -> int:
    """Bytes of the weights in an exported ONNX file; a tied head and embedding are stored once.

    float32 takes 4 bytes for each parameter, float16 two. A quantized matrix of `rows` outputs and `columns` inputs takes
    `rows * ceil(columns / group_size) * (group_size * bits / 8 + 2)`: integers, the last group of a row filled up, and a scale
    of 16 bits for each group (with `export.format="qdq"` without the filling, so it is at most that); a method with zero
    points takes more, its `group_bytes` instead of 2, but in the embedding. Quantized are the linear layers, the experts and, with
    `quantize_embeddings`, the embedding; without it a tied head stays in float32 too. Everything else is counted in float32, or float16 in `int4_float16`; the matrices that
    choose experts are stored in 8 bits in both kinds of file, so the figure is off by these few bytes there. A budget of
    `bits_per_weight` is counted as spent. A method may keep the embedding in float32; where it has groups of its own, the
    figure for the rest is near.

    The file also holds the graph, about 10 kB for each layer, and aligns the larger weights where they lie in a second
    file (above 1.8 GB).

    Args:
        model (`PreTrainedModel`): The model that is exported; may be on the meta device.
        weights (`str`): Name in [`~precisions.PRECISIONS`].
        quantization ([`QuantizationConfig`]): Method, budget, group size, and whether the embedding is quantized.

    Returns:
        `int`: Bytes.
    """
    precision = PRECISIONS[weights]
    number = precision.floats // 8
    if not precision.is_rounded:
        return sum(p.numel() for p in _exported(model)) * number
    rest = quantized = budget = 0
    for stored in stored_weights(model, quantization).values():
        rest += stored.rest // _FLOAT32 * number
        quantized += stored.least if precision.bits == INT4.bits else stored.most
        if precision.bits == INT4.bits and quantization.bits_per_weight is not None:
            budget += int(stored.weights * quantization.bits_per_weight / 8)
    return rest + max(quantized, budget)


@dataclass(frozen=True)
class StoredWeights:
    """Bytes of some weights in a quantized ONNX file.

    Args:
        rest (`int`): Of those that stay in float32.
        least (`int`): Of the quantized ones in 4 bits, scales included.
        most (`int`): Of these in 8 bits.
        weights (`int`): How many are quantized.
    """

    rest: int = 0
    least: int = 0
    most: int = 0
    weights: int = 0

    def __add__(self, other: "StoredWeights") -> "StoredWeights":
        return StoredWeights(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: "StoredWeights") -> "StoredWeights":
        return StoredWeights(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


def stored_weights(model: PreTrainedModel, quantization: QuantizationConfig) -> dict[int, StoredWeights]:
    """What each parameter of a model takes in a quantized ONNX file, by its `id`; see [`onnx_weight_bytes`].

    Args:
        model (`PreTrainedModel`): May be on the meta device.
        quantization ([`QuantizationConfig`]): Method, group size, and whether the embedding is quantized.
    """
    method, group = ROUNDINGS.get(quantization.method), quantization.group_size
    embedding: Any = model.get_input_embeddings().weight
    head = getattr(model.get_output_embeddings(), "weight", None)
    shapes = {id(parameter): (rows, columns) for parameter, rows, columns in _matrices(model)}
    shapes[id(embedding)] = tuple(embedding.shape)
    if method.keeps_embedding or not quantization.quantize_embeddings:
        del shapes[id(embedding)]
    found = {}
    for parameter in _exported(model):
        if id(parameter) not in shapes:
            found[id(parameter)] = StoredWeights(rest=parameter.numel() * _FLOAT32)
            continue
        rows, columns = shapes[id(parameter)]
        groups = rows * -(-columns // group)
        least, most = (
            groups * (group * bits // 8 + (_FLOAT16 if parameter is embedding else method.group_bytes[bits]))
            for bits in (PRECISIONS[name].bits for name in (INT4.name, INT8.name))
        )
        least = most if parameter is head and quantization.head_bits == 8 else least
        found[id(parameter)] = StoredWeights(0, least, most, parameter.numel())
    return found


def _exported(model: PreTrainedModel) -> list[Tensor]:
    """The parameters that an ONNX file holds, each once: of a container those of its text decoder and its head."""
    if text_config(model.config) is model.config:
        return list(model.parameters())
    # not model.get_decoder(), which in transformers 4 is the whole of some containers
    decoder = model.get_submodule(decoder_path(model).rpartition(".")[0])
    parts: list[Any] = [model.get_input_embeddings(), decoder, model.get_output_embeddings()]
    return list({id(p): p for part in parts if part is not None for p in part.parameters()}.values())


def _matrices(model: PreTrainedModel) -> Iterator[tuple[Tensor, int, int]]:
    """Weights that the export quantizes, with their numbers of outputs and inputs; experts are stacks of them."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield module.weight, module.out_features, module.in_features
        elif isinstance(module, Conv1D):
            yield module.weight, module.weight.shape[1], module.weight.shape[0]
        elif not isinstance(module, _ConvNd):
            for parameter in module.parameters(recurse=False):
                if parameter.dim() == 3:
                    yield parameter, parameter.shape[0] * parameter.shape[1], parameter.shape[2]


def tuning_memory(
    dense: PreTrainedModel,
    kept: Sequence[int],
    endpoints: Sequence[int],
    config: TuningConfig,
    *,
    activations: Sequence[tuple[int, int]],
    train_rows: int,
    validation_rows: int,
    sequence_length: int,
) -> TuningMemory:
    """What [`~optimum_clp.tuning.endpoints.tune_layers`] will hold.

    Args:
        dense (`PreTrainedModel`): The dense model; may be on the meta device.
        kept (`Sequence[int]`): Its layers that stay, ascending.
        endpoints (`Sequence[int]`): The trained ones, as indices into `kept`, ascending.
        config ([`TuningConfig`]): Batch size and loss.
        activations (`Sequence[tuple[int, int]]`): [`~optimum_clp.tuning.activations.layer_activations`] of every dense layer, frozen and trained.
        train_rows (`int`): Rows to train on.
        validation_rows (`int`): Rows of the validation split; their states are cached too.
        sequence_length (`int`): Tokens in a row.

    Returns:
        [`TuningMemory`]
    """
    layers, embedding = decoder_layers(dense), cast(Any, dense.get_input_embeddings())
    hidden, itemsize = text_config(dense.config).hidden_size, dense.dtype.itemsize
    own, learnt, products = _trained_parameters(dense, [layers[kept[i]] for i in endpoints], config)
    in_float32 = sum(numel for numel, _ in learnt) * _FLOAT32
    rounded = [numel for numel, size in learnt if size != _FLOAT32]
    rows = train_rows + validation_rows
    start = STARTS.get(config.init)()
    solved = start.targets(kept, endpoints, len(layers)).values()
    needs = frozenset().union(*(needs_of(stage.loss) for stage in stages_of(config, hidden, train_rows)))
    compared = compared_layers(endpoints) if STATES in needs else ()
    # what should leave the last layer is kept anyway
    states = {kept[endpoints[0]], len(layers), *solved, *(target_state(kept, i, len(layers)) for i in compared)}
    state = rows * sequence_length * hidden * itemsize
    limit = round(config.cache_memory_gib * 2**30)
    cached = min(state * len(states), limit)
    # a start that compares goes up from layer to layer in a copy of what enters the first
    moved = min(state, limit - cached) if solved and len(endpoints) > 1 else 0
    tokens = min(config.batch_size, train_rows) * sequence_length
    saved = sum(activations[kept[i]][i in endpoints] for i in range(endpoints[0], len(kept)))
    losses = [loss for _, loss in weighted_losses(config.loss_weights()).values()]
    vocabulary = embedding.weight.shape[0]
    whole = any(STATES in loss.needs for loss in losses)
    compared_tokens = tokens if whole else math.ceil(tokens * config.logit_share)
    return TuningMemory(
        weights=count_bytes(dense),
        endpoints=own,
        closed_form=start.held_bytes([layers[kept[i]] for i in endpoints], hidden) + moved,
        masters=sum(rounded) * _FLOAT32,
        gradients=sum(numel * size for numel, size in learnt) + max(rounded, default=0) * _FLOAT32,
        moments=2 * in_float32,
        caches=rows * sequence_length * _TOKEN + cached,
        activations=tokens * (saved + norm_activations(hidden)) + products,
        logits=max(
            logit_bytes(compared_tokens, vocabulary, itemsize, losses),
            # validation looks at all positions
            logit_bytes(tokens, vocabulary, itemsize, losses, gradient=False),
        ),
    )


def _trained_parameters(
    dense: PreTrainedModel, layers: Sequence[nn.Module], config: TuningConfig
) -> tuple[int, list[tuple[int, int]], int]:
    """What the trained layers hold.

    Returns:
        `tuple[int, list[tuple[int, int]], int]`: Bytes of all their parameters; numbers and bytes of a number in each that has
        a gradient; an estimate of the bytes that autograd keeps of the products that they are made of, whatever the tokens.
    """
    parameters = {id(p): p for layer in layers for p in layer.parameters()}
    learnt = [(p.numel(), p.element_size()) for p in parameters.values()]
    own = sum(numel * size for numel, size in learnt)
    if config.overparametrization == "none":
        return own, learnt, 0
    chosen = [module for _, _, module in projections(dense, layers)]
    frozen = {id(weight): weight for weight in (cast(Tensor, module.weight) for module in chosen)}
    learnt = [(p.numel(), p.element_size()) for p in parameters.values() if id(p) not in frozen]
    learnt += (new := [(n, cast(Tensor, m.weight).element_size()) for m in chosen for n in new_sizes(m)])
    # the sum `P + W` and the product
    kept = sum(2 * weight.nbytes for weight in frozen.values())
    return own + sum(numel * size for numel, size in new), learnt, kept
