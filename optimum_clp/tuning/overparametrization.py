"""More parameters while a layer is trained, none afterwards: each linear projection `P` computes `D (P + W)`.

OverRep (arXiv 2609.06974), written anew. `W` is of `P`'s shape and starts at 0, the square `D` starts at the identity; `P`
itself is frozen. The product is made of them whenever the weight is read, so the plain weight that is left at the end is the
one that the last pass has used, bit for bit. With an activation between `P + W` and `D` the model is another one while it
learns; it is annealed, and the last fifth of the steps is without.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from ..forward.hooks import AfterForward, hooked

_ORIGINAL = ".parametrizations.weight.original"
_FACTORS = ".parametrizations.weight.0."
# shares of the steps over which the activation comes, and after which there is none, as in the authors' code
_RISEN, _GONE = 0.01, 0.8


@dataclass(frozen=True)
class Factors:
    """What a projection gets beside its own weight `P`.

    Args:
        added (`bool`): `W`, of the weight's shape.
        side (`str` or `None`): Where `D` is: `"output"` for `D (P + W)`, with as many rows as the projection has outputs;
            `"input"` for `(P + W) D`; `None` for none.
        frozen (`bool`): Whether `P` stays as it is. A `P` that is trained beside `W` gets the same gradient again, so that
            AdamW's steps on their sum are twice as long, and that is all that it does.
    """

    added: bool = True
    side: Literal["output", "input"] | None = "output"
    frozen: bool = True


EVERYWHERE = Factors()


class Annealing:
    """How much of the activation there is: it comes, goes along a cosine, and is gone before the training ends.

    Attributes:
        share (`float`): In [0, 1]; at 0 there is the identity in its place.
    """

    def __init__(self) -> None:
        self.share = 0.0

    def at(self, done: float) -> None:
        """Set the share for the next step.

        Args:
            done (`float`): Share of all steps that have been taken, in [0, 1].
        """
        if done < _RISEN:
            self.share = done / _RISEN
        else:
            self.share = 0.5 * (1 + math.cos(math.pi * min(1.0, (done - _RISEN) / (_GONE - _RISEN))))


class Product(nn.Module):
    """The weight as a product: `(I + left) (P + added) (I + right)`, a parametrization for `torch.nn.utils.parametrize`.

    `D` is kept as what it has beyond the identity: in 16 bits numbers near 0 are finer than those near 1, and weight decay
    pulls to the identity and not to 0.

    Args:
        weight (`Tensor`): `P`, `[rows, columns]`.
        added (`bool`): Whether there is `W`.
        left, right (`bool`): On which sides of the matrix, as it is stored, there is a factor.
    """

    added: Tensor | None
    left: Tensor | None
    right: Tensor | None

    def __init__(self, weight: Tensor, added: bool, left: bool, right: bool):
        super().__init__()
        rows, columns = weight.shape
        shapes = {"added": (rows, columns), "left": (rows, rows), "right": (columns, columns)}
        for name, wanted in {"added": added, "left": left, "right": right}.items():
            self.register_parameter(name, nn.Parameter(weight.new_zeros(shapes[name])) if wanted else None)

    def forward(self, original: Tensor) -> Tensor:
        return multiplied(original, self.added, self.left, self.right)


def multiplied(
    original: Tensor, added: Tensor | None = None, left: Tensor | None = None, right: Tensor | None = None
) -> Tensor:
    """`(I + left) (original + added) (I + right)`; what is not given is left out."""
    total = original if added is None else original + added
    if left is not None:
        total = torch.addmm(total, left, total)
    if right is not None:
        total = torch.addmm(total, total, right)
    return total


def projections(model: nn.Module, layers: Sequence[nn.Module]) -> list[tuple[int, str, nn.Module]]:
    """The linear modules of some layers whose weight is a plain matrix that no other module of the model has.

    Args:
        model (`nn.Module`): Holds the layers; may be on the meta device.
        layers (`Sequence[nn.Module]`): The layers.

    Returns:
        `list[tuple[int, str, nn.Module]]`: Which of the layers, name in it, module.
    """
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return [
        (place, name, module)
        for place, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and type(module.weight) is nn.Parameter
        and module.weight.is_floating_point()
        and holders[id(module.weight)] == 1
    ]


def new_sizes(module: nn.Module, given: Factors = EVERYWHERE) -> list[int]:
    """Numbers of elements of `W` and `D`, as far as a projection gets them; the module may be on the meta device."""
    weight = cast(Tensor, module.weight)
    outputs, inputs = reversed(weight.shape) if isinstance(module, Conv1D) else weight.shape
    wide = {"output": outputs, "input": inputs}.get(given.side or "")
    return [weight.numel()] * given.added + ([wide**2] if wide else [])


@contextmanager
def overparametrized(
    model: nn.Module,
    layers: Sequence[nn.Module],
    annealing: Annealing | None = None,
    factors: Callable[[int, str], Factors] = lambda place, name: EVERYWHERE,
    *,
    keep: bool = True,
) -> Iterator[None]:
    """Every linear projection of some layers has more parameters until the block ends, and is a plain one again then.

    The layers compute what they did, bit for bit, until one of the new parameters changes. Their names in the state dict are
    those of `torch.nn.utils.parametrize`; [`plain_weights`] gives the ordinary ones.

    Args:
        model (`nn.Module`): Holds the layers. A weight that several of its modules share stays as it is.
        layers (`Sequence[nn.Module]`): The layers.
        annealing ([`Annealing`], *optional*): With an activation (SiLU) beside each `D`, as much of it as this says; only where
            gradients are recorded, so that what is evaluated is what will be left.
        factors (`Callable[[int, str], Factors]`): What each projection gets, by the layer's place in `layers` and the
            projection's name in it. [`EVERYWHERE`] by default.
        keep (`bool`): Leave plain weights behind; `False` where the modules are dropped, and may be sharded by then.
    """
    chosen = [(module, factors(place, name)) for place, name, module in projections(model, layers)]
    chosen = [(module, given) for module, given in chosen if given.added or given.side]
    weights = [cast(nn.Parameter, module.weight) for module, _ in chosen]
    required = [weight.requires_grad for weight in weights]
    for weight, (module, given) in zip(weights, chosen, strict=True):
        parametrize.register_parametrization(module, "weight", _product(module, given))
        weight.requires_grad_(weight.requires_grad and not given.frozen)
    bent = [(module, _bending(annealing)) for module, given in chosen if given.side] if annealing else []
    try:
        with hooked(after=bent):
            yield
    finally:
        if keep:
            merge(layers)
        for weight, before in zip(weights, required, strict=True):
            weight.requires_grad_(before)


def merge(layers: Iterable[nn.Module]) -> None:
    """Make plain weights of what [`overparametrized`] has made of the projections of some layers, if it is still there."""
    for layer in layers:
        for module in layer.modules():
            if _is_product(module):
                parametrize.remove_parametrizations(module, "weight")


def plain_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with one weight, under its ordinary name, for each product; other tensors as they are.

    Args:
        weights (`Mapping[str, Tensor]`): A state dict of modules that hold the layers.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.endswith(_ORIGINAL):
            module = name.removesuffix(_ORIGINAL)
            given = {part: weights.get(f"{module}{_FACTORS}{part}") for part in ("added", "left", "right")}
            plain[f"{module}.weight"] = multiplied(tensor, **given)
        elif _FACTORS not in name:
            plain[name] = tensor
    return plain


def _product(module: nn.Module, given: Factors) -> Product:
    # a Conv1D has its weight the other way round
    first, last = ("input", "output") if isinstance(module, Conv1D) else ("output", "input")
    return Product(cast(Tensor, module.weight), given.added, left=given.side == first, right=given.side == last)


def _is_product(module: nn.Module) -> bool:
    if not parametrize.is_parametrized(module, "weight"):
        return False
    return isinstance(cast(Any, module).parametrizations.weight[0], Product)


def _bending(annealing: Annealing) -> AfterForward:
    """A hook that computes a projection anew, with an activation behind the factor that comes first."""

    def bend(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if not annealing.share or not torch.is_grad_enabled():
            return None
        parameters = cast(Any, module).parametrizations.weight
        product, entered = parameters[0], next(iter((*args, *kwargs.values())))
        weight = multiplied(parameters.original, product.added)
        outputs, inputs = product.left, product.right
        if isinstance(module, Conv1D):
            weight = weight.T
            outputs, inputs = (None if factor is None else factor.T for factor in (inputs, outputs))
        # of what the module has put out nothing is used, so no gradient goes through the product
        if inputs is None:
            between = _activated(F.linear(entered, weight), annealing.share)
            left = between + F.linear(between, outputs)
        else:
            between = _activated(entered + F.linear(entered, inputs), annealing.share)
            left = F.linear(between, weight)
        bias = cast(Tensor | None, module.bias)
        return left if bias is None else left + bias

    return bend


def _activated(values: Tensor, share: float) -> Tensor:
    return torch.lerp(values, F.silu(values), share)
