"""OverRep (arXiv 2609.06974), written anew from the paper's public description and code's settings; the code is Apache-2.0.

The blocks on both sides of a cut are trained, each linear projection `P` as `D (P + W)`, `W` from 0 and `D` from the
identity, with an activation between the two factors that fades in and out again, so that all of it is one matrix at the
end. What is trained is float32 at least; the products are in the model's dtype.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from optimum_clp import LayerSegment
from optimum_clp.architecture.lookup import decoder_layers
from optimum_clp.surgery.cut import own_storage

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
# `D` stands on the wide side of these: before the product. Of all others behind it
INPUT_SIDE = ("o_proj", "down_proj", "out_proj", "fc2")
# of the schedule of the activation: the shares of the steps in which it fades in, and at the end is gone
FADE_IN, GONE = 0.01, 0.2


class OverRepLinear(nn.Module):
    """A linear module as `D (P + W)`.

    Args:
        linear (`nn.Linear`): `P`, with its bias, which stays.
        add (`bool`): Whether there is a `W`.
        multiply (`bool`): Whether there is a `D`.
        input_side (`bool`): `(P + W) D` instead.
        train_base (`bool`): Whether `P` is trained too.
    """

    def __init__(self, linear: nn.Linear, *, add: bool, multiply: bool, input_side: bool, train_base: bool):
        super().__init__()
        weight = linear.weight.detach()
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.base = nn.Parameter(weight.to(wide, copy=True), requires_grad=train_base)
        self.bias, self.dtype, self.input_side = linear.bias, weight.dtype, input_side
        self.added = nn.Parameter(torch.zeros_like(self.base)) if add else None
        width = weight.shape[1] if input_side else weight.shape[0]
        self.factor = nn.Parameter(torch.eye(width, dtype=wide, device=weight.device)) if multiply else None
        # share of the identity in the activation; 1 is no activation
        self.identity = 1.0

    def forward(self, hidden: Tensor) -> Tensor:
        if self.factor is not None and self.input_side:
            hidden = self._activated(F.linear(hidden, self.factor.to(hidden.dtype)))
        weight = self.base if self.added is None else self.base + self.added
        hidden = F.linear(hidden, weight.to(hidden.dtype))
        if self.factor is not None and not self.input_side:
            hidden = F.linear(self._activated(hidden), self.factor.to(hidden.dtype))
        return hidden if self.bias is None else hidden + self.bias

    def _activated(self, hidden: Tensor) -> Tensor:
        return hidden if self.identity == 1 else torch.lerp(F.silu(hidden), hidden, self.identity)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The one plain module that it is without the activation."""
        weight = self.base.double() if self.added is None else self.base.double() + self.added.double()
        if self.factor is not None:
            weight = weight @ self.factor.double() if self.input_side else self.factor.double() @ weight
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight.to(self.dtype))
        linear.bias = self.bias
        return linear


class ScaledNorm(nn.Module):
    """A norm's weight `w` as `w (1 + s) + b`, for `torch.nn.utils.parametrize`."""

    def __init__(self, weight: Tensor):
        super().__init__()
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.scale = nn.Parameter(torch.zeros_like(weight, dtype=wide))
        self.shift = nn.Parameter(torch.zeros_like(weight, dtype=wide))

    def forward(self, weight: Tensor) -> Tensor:
        return (weight * (1 + self.scale) + self.shift).to(weight.dtype)


class OverRep:
    """The preset of the paper on the two blocks next to a cut, which are changed in place.

    The block before is a mixture: its own attention, with norms and MLP of the last block that went. There `W` is on
    attention and `D` on the MLP, and `P` is trained; the block behind has both everywhere, and its `P` is frozen.

    Args:
        model (`PreTrainedModel`): The cut model.
        dense (`PreTrainedModel`): The dense model.
        segment ([`LayerSegment`]): What was cut; there is a layer before it and one behind it.
    """

    def __init__(self, model: PreTrainedModel, dense: PreTrainedModel, segment: LayerSegment):
        before, behind = (decoder_layers(model)[i] for i in (segment.start - 1, segment.start))
        self.blocks = [before, behind]
        own_storage(nn.ModuleList(self.blocks))
        mix(before, decoder_layers(dense)[segment.stop - 1])
        for block in self.blocks:
            for name, module in list(block.named_modules()):
                if isinstance(module, nn.Linear):
                    block.set_submodule(name, self._linear(name, module, block is before))
                elif getattr(module, "weight", None) is not None and module.weight.dim() == 1:
                    parametrize.register_parametrization(module, "weight", ScaledNorm(module.weight))
                    module.parametrizations.weight.original.requires_grad_(block is before)

    def _linear(self, name: str, module: nn.Linear, first: bool) -> OverRepLinear:
        attention = name.split(".")[0] in ATTENTION
        return OverRepLinear(
            module,
            add=attention or not first,
            multiply=not attention or not first,
            input_side=name.split(".")[-1] in INPUT_SIDE,
            train_base=first,
        )

    def at(self, share: float) -> None:
        """Set the activation for a share of the steps done, in [0, 1]."""
        for linear in self._linears():
            linear.identity = identity_share(share)

    def merge(self) -> None:
        """Put plain modules back."""
        for block in self.blocks:
            for name, module in list(block.named_modules()):
                if isinstance(module, OverRepLinear):
                    block.set_submodule(name, module.merged())
                elif parametrize.is_parametrized(module):
                    parametrize.remove_parametrizations(module, "weight")

    def _linears(self) -> Iterator[OverRepLinear]:
        return (module for block in self.blocks for module in block.modules() if isinstance(module, OverRepLinear))


def mix(block: nn.Module, other: nn.Module) -> None:
    """Give a block everything of another one but its attention."""
    with torch.no_grad():
        for (name, ours), theirs in zip(block.named_parameters(), other.parameters(), strict=True):
            if name.split(".")[0] not in ATTENTION:
                ours.copy_(theirs)


def identity_share(share: float) -> float:
    """How much of the activation is the identity: from 1 to 0 while it fades in, by a cosine to 1, then 1."""
    if share < FADE_IN:
        return 1 - share / FADE_IN
    if share >= 1 - GONE:
        return 1.0
    return 0.5 * (1 - math.cos(math.pi * (share - FADE_IN) / (1 - GONE - FADE_IN)))
