"""Bytes that a model takes on disk and while it is tuned, from its shapes alone: a model on the meta device will do.

What is exact here is arithmetic over tensors that another module makes; the tests count those tensors. What is an
estimate says so.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..architecture.lookup import decoder_layers, text_config
from ..configuration.stages import QuantizationConfig, TuningConfig
from ..doors import ROUNDINGS, STARTS
from ..forward.losses import chunk_tokens
from ..precisions import INT4, PRECISIONS
from ..segments import target_state
from ..surgery.sizes import count_bytes
from ..tuning.losses import LOGITS, STATES, TEACHER_LOGITS, needs_of, weighted_losses
from ..tuning.overparametrization import new_sizes, projections
from ..tuning.rows import compared_layers
from ..tuning.schedule import stages_of

_FLOAT32, _FLOAT16 = 4, 2
_TOKEN = 8  # int64


@dataclass(frozen=True)
class TuningMemory:
    """Bytes that cutoff endpoint tuning holds, part by part.

    Exact, up to a few bytes for each tensor: everything but `closed_form`, `activations` and `logits`. These are estimates,
    see [`~optimum_clp.tuning.starts.Start.held_bytes`], [`layer_activations`] and [`logit_bytes`]. Not counted: the Python process with its libraries, a gradient that is on
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
        return sum(p.numel() for p in model.parameters()) * number
    bits, method = precision.bits, ROUNDINGS.get(quantization.method)
    embedding: Any = model.get_input_embeddings().weight
    shapes = {id(parameter): (rows, columns) for parameter, rows, columns in _matrices(model)}
    shapes[id(embedding)] = tuple(embedding.shape)
    if method.keeps_embedding or not quantization.quantize_embeddings:
        del shapes[id(embedding)]
    group = quantization.group_size
    rest = quantized = budget = 0
    for parameter in model.parameters():
        if id(parameter) in shapes:
            rows, columns = shapes[id(parameter)]
            of_group = _FLOAT16 if parameter is embedding else method.group_bytes[bits]
            quantized += rows * -(-columns // group) * (group * bits // 8 + of_group)
            if bits == INT4.bits and quantization.bits_per_weight is not None:
                budget += int(parameter.numel() * quantization.bits_per_weight / 8)
        else:
            rest += parameter.numel() * number
    return rest + max(quantized, budget)


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
        activations (`Sequence[tuple[int, int]]`): [`layer_activations`] of every dense layer, frozen and trained.
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
    return TuningMemory(
        weights=count_bytes(dense),
        endpoints=own,
        closed_form=start.held_bytes([layers[kept[i]] for i in endpoints], hidden) + moved,
        masters=sum(rounded) * _FLOAT32,
        gradients=sum(numel * size for numel, size in learnt) + max(rounded, default=0) * _FLOAT32,
        moments=2 * in_float32,
        caches=rows * sequence_length * _TOKEN + cached,
        activations=tokens * (saved + norm_activations(hidden)) + products,
        logits=logit_bytes(tokens, embedding.weight.shape[0], itemsize, config),
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


def norm_activations(width: int) -> int:
    """Bytes for each token that a frozen norm keeps: its input, and one number, in float32."""
    return _FLOAT32 * (width + 1)


def layer_activations(layer: nn.Module, itemsize: int, *, trained: bool) -> int:
    """Estimate of the bytes that autograd keeps of one decoder layer, for each token of a step.

    Made for layers as llama's, mistral's, qwen2's and qwen3's: RMS norms in float32, attention that does not keep its
    matrix (`sdpa`; `eager` does), a gated MLP. With `b` bytes in a number, width `H`, query, key and value widths `q`,
    `k`, `v` and MLP width `I`, a frozen layer keeps `8 (H + 1) + b (2q + k + v + 3I)`, and a trained one
    `b (4H + q + I)` more, the inputs of its weights. Other layers go by the same rule over their modules: a norm keeps
    its input, in each sublayer of linear layers the last keeps its input and the others their output. Neither masks nor
    sparse experts are understood: the figure is rough there.

    Args:
        layer (`nn.Module`): A decoder layer; may be on the meta device.
        itemsize (`int`): Bytes in a number of the model's dtype.
        trained (`bool`): Whether its weights get gradients.

    Returns:
        `int`: Bytes for each token.
    """
    norms, sublayers = list(_norm_widths(layer)), list(_sublayers(layer))
    total = sum(map(norm_activations, norms))
    for linears in sublayers:
        total += itemsize * (linears[-1].in_features + sum(linear.out_features for linear in linears[:-1]))
    if trained:
        total += itemsize * (2 * sum(norms) + sum(linears[-1].in_features for linears in sublayers))
    return total


def logit_bytes(tokens: int, vocabulary: int, itemsize: int, config: TuningConfig) -> int:
    """Estimate of the bytes that the head and the losses hold at the end of a forward pass.

    The logits that some loss needs, in the model's dtype; float32 probabilities for the backward pass, for each loss as
    many sets as it needs logits (two for `kd`, one for `ce`); and three float32 copies of the chunk of tokens that is being
    computed.
    """
    needs = [loss.needs & {LOGITS, TEACHER_LOGITS} for _, loss in weighted_losses(config.loss_weights()).values()]
    distributions, logits = sum(map(len, needs)), len(frozenset().union(*needs))
    chunk = 3 * min(tokens, chunk_tokens(vocabulary))
    return vocabulary * (tokens * (logits * itemsize + distributions * _FLOAT32) + chunk * _FLOAT32)


def _norm_widths(layer: nn.Module) -> Iterator[int]:
    """Width of the tensor that each norm sees: modules with nothing but a vector of weights (and biases)."""
    for module in layer.modules():
        for name, child in module.named_children():
            own = list(child.parameters())
            if isinstance(child, nn.Linear) or not own or any(p.dim() != 1 for p in own) or list(child.children()):
                continue
            # qwen3's q_norm has the width of one head and sees all that q_proj puts out
            projection = getattr(module, name.replace("_norm", "_proj"), None)
            yield projection.out_features if isinstance(projection, nn.Linear) else own[0].numel()


def _sublayers(layer: nn.Module) -> Iterator[list[nn.Linear]]:
    """The linear layers of each submodule that holds some directly, in the order of their declaration."""
    for module in layer.modules():
        linears = [child for child in module.children() if isinstance(child, nn.Linear)]
        if linears:
            yield linears
