"""Which linear modules of a decoder layer simply add to what leaves it, found by what they do, not by name."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..forward.hooks import AfterForward, hooked, replaced_output

# roundings that a projection's output may meet on its way to the layer's
_ROUNDINGS = 4


@dataclass(frozen=True)
class Projection:
    """A linear module whose output, times a factor, is added to the layer's output.

    Args:
        name (`str`): Inside the layer.
        module (`nn.Module`): The module.
        scale (`float`): The factor.
    """

    name: str
    module: nn.Module
    scale: float

    @property
    def matrix(self) -> Tensor:
        """The weight `[out, in]`, over its own storage."""
        weight = cast(Tensor, self.module.weight)
        return weight.T if isinstance(self.module, Conv1D) else weight

    @property
    def bias(self) -> Tensor | None:
        """`[out]`, if there is one."""
        return cast(Tensor | None, self.module.bias)


def find_projections(layers: nn.ModuleList, index: int, run: Callable[[], Tensor]) -> list[Projection] | str:
    """The modules that add to a layer's output.

    Every candidate's output is disturbed, and what leaves the layer has to follow. What an earlier one (attention) does
    by way of the later ones is left out: their outputs are held as they were.

    Args:
        layers (`nn.ModuleList`): All decoder layers.
        index (`int`): The layer that is looked at.
        run (`Callable`): Runs the model over one row; gives what leaves the layer, `[1, length, hidden]`.

    Returns:
        `list[Projection]` or `str`: The last to be called first; or why the last one is none.
    """
    candidates: dict[str, nn.Module] = {
        n: m for n, m in layers[index].named_modules() if isinstance(m, (nn.Linear, Conv1D))
    }
    left, calls = _called(candidates, run)
    calls = [(name, output) for name, output in reversed(calls) if output.shape[-1] == left.shape[-1]]
    if not calls:
        return f"no linear module in it puts out {left.shape[-1]} features"
    elsewhere = {id(p) for i, layer in enumerate(layers) if i != index for p in layer.parameters()}
    found: list[Projection] = []
    reasons: list[str] = []
    with ExitStack() as held:
        for name, output in calls:
            module, once = candidates[name], [called for called, _ in calls].count(name) == 1
            reason = _obstacle(name, module, output, left, once, elsewhere)
            scale = None if reason else _follows(module, output, left, run)
            if scale is None:
                between = "is not simply added to the layer's (a norm, a gate or an expert lies between)"
                reasons.append(reason or f"the output of {name} {between}")
            else:
                found.append(Projection(name, module, scale))
                held.enter_context(replaced_output(module, output))
    return found or reasons[0]


def _called(candidates: dict[str, nn.Module], run: Callable[[], Tensor]) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """What leaves the layer, and what each candidate gives, call by call."""
    calls: list[tuple[str, Tensor]] = []

    def noting(name: str) -> AfterForward:
        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            # routers are linear modules too, and may put out several tensors
            if isinstance(output, Tensor):
                # some layers add to it in place (Falcon)
                calls.append((name, output.clone()))

        return note

    with hooked(after=[(module, noting(name)) for name, module in candidates.items()]):
        return run(), calls


def _obstacle(
    name: str, module: nn.Module, output: Tensor, left: Tensor, once: bool, elsewhere: set[int]
) -> str | None:
    """Why a module cannot be one, before anything is disturbed."""
    weight = cast(Tensor, module.weight)
    if id(weight) in elsewhere:
        return f"{name} is shared with other layers"
    if not once or output.numel() != left.numel() or left.dim() != 3:
        return f"{name} is not called once for all tokens"
    if not weight.is_floating_point() or weight.is_meta:
        return f"the weight of {name} is not a plain matrix in memory"
    return None


def _follows(module: nn.Module, output: Tensor, left: Tensor, run: Callable[[], Tensor]) -> float | None:
    """The factor with which a module's output enters the layer's; `None` if it is not simply added."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(left.shape, generator=generator).to(left)
    # as large as the state itself at every token, some of which have states hundreds of times larger than others
    disturbance = noise * left.float().square().mean(-1, keepdim=True).sqrt().to(left)
    with replaced_output(module, (output + disturbance.reshape(output.shape)).to(output.dtype)):
        moved = run()
    given, came = disturbance.double().cpu(), (moved.double() - left.double()).cpu()
    scale = float((given * came).sum() / given.square().sum())
    sizes = sum(x.double().norm(dim=-1).cpu() for x in (left, moved, output.reshape(left.shape), disturbance))
    allowed = _ROUNDINGS * torch.finfo(left.dtype).eps * sizes
    followed = (came - scale * given).norm(dim=-1) <= allowed
    if followed.all() and (abs(scale) * given.norm(dim=-1) > allowed).all():
        return scale
    return None
