"""What autograd keeps of a step, and what its head and losses hold, estimated from shapes alone: a model on the meta device will do."""

from collections.abc import Iterable, Iterator

from torch import nn

from ..forward.losses import chunk_tokens
from .losses import LOGITS, TEACHER_LOGITS, Loss

_FLOAT32 = 4


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


def logit_bytes(tokens: int, vocabulary: int, itemsize: int, losses: Iterable[Loss], *, gradient: bool = True) -> int:
    """Estimate of the bytes that the head and the losses hold at the end of a forward pass.

    The logits that some loss needs, in the model's dtype; what is kept for the backward pass: float32 probabilities, for each
    loss as many sets as it needs logits (one for `ce`), or the gradient in the model's dtype (`kd`); and four float32 copies of
    the chunk of tokens that is being computed.

    Args:
        tokens (`int`): Whose logits are made.
        vocabulary (`int`): Of the model.
        itemsize (`int`): Bytes in a number of the model's dtype.
        losses (`Iterable[Loss]`): That have a weight.
        gradient (`bool`): There is a backward pass.
    """
    losses = list(losses)
    needs = [loss.needs & {LOGITS, TEACHER_LOGITS} for loss in losses]
    pairs = zip(losses, needs, strict=True)
    kept = sum(itemsize if getattr(loss, "keeps_gradient", False) else len(need) * _FLOAT32 for loss, need in pairs)
    logits = len(frozenset().union(*needs)) * itemsize
    chunk = 4 * min(tokens, chunk_tokens(vocabulary)) * _FLOAT32
    return vocabulary * (tokens * (logits + (kept if gradient else 0)) + chunk)


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
