"""What a model weighs."""

from torch import nn


def count_parameters(model: nn.Module) -> int:
    """Number of distinct parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


def count_bytes(model: nn.Module) -> int:
    """Bytes of the distinct parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
