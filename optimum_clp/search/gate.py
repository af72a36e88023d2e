"""The concave gate: one valley over the layer index, differentiable in its start.

With the logistic function `sigma` and the valley of width `n` at real start `s` with steepness `k`,

    v(x) = sigma(k (x - s + 1/2)) - sigma(k (x - s - n + 1/2)),

the gate of layer `l` in a stack of `L` layers is

    g_l = 1 - [v(l) + v(-1 - l) + v(2L - 1 - l)].

The sum of `v` over all integers telescopes to `n` for every `s` and `k`, so the gate closes exactly `n` layers without a
sparsity penalty. The two further terms fold back what a shallow valley spills over the ends of the stack; without them
the closed mass would shrink there, and a shallow gate would favour the ends. (The gate's formula is a reconstruction:
the paper's body was not to be had.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def concave_gate(start: Tensor | float, length: int, num_layers: int, steepness: float) -> Tensor:
    """Gate values of all layers: near 0 on the `length` layers from `start`, near 1 elsewhere.

    Args:
        start (`Tensor` or `float`): Scalar start of the valley in layers, in [0, num_layers - length]; may require grad.
        length (`int`): Layers to close, in [1, num_layers - 1].
        num_layers (`int`): Decoder layers of the dense model.
        steepness (`float`): Steepness of the valley's sides per layer, above 0; infinity gives [`hard_gate`] for an
            integer start.

    Returns:
        `Tensor`: float64 `[num_layers]` with values in [0, 1] that sum to `num_layers - length` (up to what lies more
        than one stack beyond the ends, below 1e-3 for `steepness * num_layers` of at least 8).
    """
    return concave_gates([(start, length)], num_layers, [steepness])


def concave_gates(
    valleys: Sequence[tuple[Tensor | float, Tensor | float]], num_layers: int, steepness: Sequence[float]
) -> Tensor:
    """The gate of several valleys: 1 minus the sum of their `v`, clipped where two overlap.

    Args:
        valleys (`Sequence[tuple]`): Start and length of each, in layers, real numbers; may require grad. The closed mass
            of a length that is not whole is that length up to what is lost where the sides are steeper than a layer.
        num_layers (`int`): Decoder layers of the dense model.
        steepness (`Sequence[float]`): Of each valley's sides per layer, above 0.

    Returns:
        `Tensor`: float64 `[num_layers]`, values in [0, 1].
    """
    layers = torch.arange(num_layers, dtype=torch.float64)
    closed = torch.zeros(num_layers, dtype=torch.float64)
    for (start, length), steep in zip(valleys, steepness, strict=True):
        start, length = (torch.as_tensor(value, dtype=torch.float64) for value in (start, length))
        for position in (layers, -1 - layers, 2 * num_layers - 1 - layers):
            # sigma(a) - sigma(b) cancels in the far tails; there both are 0 or 1 to double precision, and so is the gate
            closed = closed + torch.sigmoid(steep * (position - start + 0.5))
            closed = closed - torch.sigmoid(steep * (position - start - length + 0.5))
    return (1 - closed).clamp(0, 1)


def hard_gate(start: int, length: int, num_layers: int) -> Tensor:
    """The limit of [`concave_gate`] for infinite steepness: float64 `[num_layers]`, 0 on the segment and 1 elsewhere."""
    gate = torch.ones(num_layers, dtype=torch.float64)
    gate[start : start + length] = 0
    return gate
