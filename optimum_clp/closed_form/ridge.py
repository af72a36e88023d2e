"""Ridge regression from sums over tokens: the penalty is chosen on other rows, and the condition number is bounded."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# penalties, in units of the mean eigenvalue of the Gram matrix
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)

# a float64 Gram matrix of this width takes 2 GiB, and up to four such matrices exist at once
MAX_FLOAT64_WIDTH = 2**14

# times the dtype's rounding: 2e-4 and 0.1 of the solution at worst; the bound that is held to is far from sharp
MAX_CONDITION = {torch.float64: 1e12, torch.float32: 1e6}


def solution_bytes(num_features: int) -> int:
    """Bytes of the four square matrices that exist at once: the sums of two splits, one of them centred, and its factor."""
    return 4 * num_features**2 * (8 if num_features <= MAX_FLOAT64_WIDTH else 4)


def squared_distance(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).double().square().sum().item()


@dataclass(frozen=True)
class Solution:
    """A correction.

    Args:
        change (`Tensor`): `[out, features]`, to be added to the matrix that acts on the features.
        shift (`Tensor` or `None`): `[out]`, to be added to the bias.
        ridge (`float`): In units of the mean eigenvalue of the Gram matrix.
        condition_bound (`float`): Of the system that was solved.
    """

    change: Tensor
    shift: Tensor | None
    ridge: float
    condition_bound: float


def best_solution(fit: "RegressionSums", check: "RegressionSums", ridges: Sequence[float]) -> Solution:
    """The solution on some rows whose penalty does best on others.

    Of many penalties most are never tried: from one in the middle it goes downhill, since the error falls towards the
    best one from both sides.
    """
    allowed = sorted({max(ridge, fit.least_ridge) for ridge in ridges})

    def tried(place: int) -> tuple[float, Solution]:
        solution = fit.solve(allowed[place])
        return check.error_with(solution), solution

    start = len(allowed) // 2
    best = tried(start)
    for step in (-1, 1):
        place = start + step
        while 0 <= place < len(allowed) and (found := tried(place))[0] < best[0]:
            best, place = found, place + step
        if place != start + step:
            break
    return best[1]


class RegressionSums:
    """Sums over tokens for the regression of what is missing on the features; a constant feature stands for a bias.

    Args:
        num_features (`int`): Without the constant.
        width (`int`): Of the hidden states.
        constant (`bool`): Whether there is a bias to solve for.
        device (`torch.device`): Of the sums.

    Attributes:
        error (`float`): Sum of `|target - output|^2`.
        span (`float`): Sum of `|target - input|^2`.
    """

    def __init__(self, num_features: int, width: int, constant: bool, device: torch.device):
        # Apple's GPUs have no float64
        wide = num_features > MAX_FLOAT64_WIDTH or device.type == "mps"
        self.dtype = torch.float32 if wide else torch.float64
        self.num_features, self.constant = num_features, constant
        size = num_features + constant
        self.gram = torch.zeros(size, size, dtype=self.dtype, device=device)
        self.cross = torch.zeros(width, size, dtype=self.dtype, device=device)
        self.error = self.span = 0.0
        self.scale = 1.0

    def add(self, features: Tensor, ends: tuple[Tensor, Tensor], entered: Tensor, scale: float) -> None:
        """Add a batch.

        Args:
            features (`Tensor`): `[..., num_features]`.
            ends (`tuple[Tensor, Tensor]`): What should leave the layer and what leaves it, `[batch, length, hidden]`.
            entered (`Tensor`): What enters the layer, the same shape.
            scale (`float`): By which the projection's output enters the layer's.
        """
        target, left = ends
        self.error += squared_distance(target, left)
        self.span += squared_distance(target, entered.to(target.device))
        self.scale = scale
        z = features.to(self.gram).reshape(-1, self.num_features)
        if self.constant:
            z = torch.cat([z, torch.ones_like(z[:, :1])], dim=1)
        missing = (target.to(self.gram) - left.to(self.gram)).reshape(len(z), -1) / scale
        self.gram.addmm_(z.T, z)
        self.cross.addmm_(missing.T, z)

    @property
    def is_zero(self) -> bool:
        """Whether the features are zero (with a constant: the same) on every token, up to rounding."""
        rounding = torch.finfo(self.dtype).eps * self.num_features
        return self._centred()[0].trace().item() <= rounding * self.gram.trace().item()

    @property
    def least_ridge(self) -> float:
        """The smallest penalty for which the condition bound holds."""
        return self.num_features / (MAX_CONDITION[self.dtype] - 1)

    def solve(self, ridge: float) -> Solution:
        """Minimise `|missing - change z - shift|^2 + lambda |change|^2`, with lambda the given share of the mean eigenvalue.

        No eigenvalue of the Gram matrix is larger than its trace, and none of the penalised one smaller than lambda: the
        condition number is at most `1 + features / ridge`.
        """
        gram, cross = self._centred()
        mean = gram.trace() / self.num_features
        penalised = gram.clone()
        penalised.diagonal().add_(ridge * mean)
        factor, failed = torch.linalg.cholesky_ex(penalised)
        if failed:
            # rounding has made it indefinite
            return self.solve(10 * ridge)
        change = torch.cholesky_solve(cross.T, factor).T
        shift = None
        if self.constant:
            count = self.gram[-1, -1]
            shift = (self.cross[:, -1] - change @ self.gram[:-1, -1]) / count
        return Solution(change, shift, ridge, 1 + self.num_features / ridge)

    def error_with(self, solution: Solution) -> float:
        """The error that a solution would leave, from the sums alone; exact if the layer's output is linear in it."""
        change = solution.change
        if solution.shift is not None:
            change = torch.cat([change, solution.shift[:, None]], dim=1)
        gained = 2 * (change * self.cross).sum() - ((change @ self.gram) * change).sum()
        return self.error - self.scale**2 * gained.item()

    def _centred(self) -> tuple[Tensor, Tensor]:
        """Gram and cross sums around the means where there is a constant, so that the bias goes without penalty."""
        if not self.constant:
            return self.gram, self.cross
        means = self.gram[:-1, -1] / self.gram[-1, -1]
        return (
            self.gram[:-1, :-1] - torch.outer(self.gram[:-1, -1], means),
            self.cross[:, :-1] - torch.outer(self.cross[:, -1], means),
        )
