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
    start = torch.as_tensor(start, dtype=torch.float64)
    layers = torch.arange(num_layers, dtype=torch.float64)

    def valley(position: Tensor) -> Tensor:
        # sigma(a) - sigma(b) cancels in the far tails; there both are 0 or 1 to double precision, and so is the gate
        return torch.sigmoid(steepness * (position - start + 0.5)) - torch.sigmoid(
            steepness * (position - start - length + 0.5)
        )

    closed = valley(layers) + valley(-1 - layers) + valley(2 * num_layers - 1 - layers)
    return (1 - closed).clamp(0, 1)


def hard_gate(start: int, length: int, num_layers: int) -> Tensor:
    """The limit of [`concave_gate`] for infinite steepness: float64 `[num_layers]`, 0 on the segment and 1 elsewhere."""
    gate = torch.ones(num_layers, dtype=torch.float64)
    gate[start : start + length] = 0
    return gate
