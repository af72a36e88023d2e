"""What stands in for Python and torch functions while a model is traced, and is gone afterwards."""

import gc
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel


class RealPair:
    """A complex tensor as its real and imaginary parts, with what rotary embeddings do with one.

    Args:
        real (`Tensor`): Real part.
        imaginary (`Tensor`): Imaginary part, of the same shape.
    """

    def __init__(self, real: Tensor, imaginary: Tensor):
        self.real = real
        self.imaginary = imaginary

    def __mul__(self, other: "RealPair | Tensor | float") -> "RealPair":
        if not isinstance(other, RealPair):
            return RealPair(self.real * other, self.imaginary * other)
        return RealPair(
            self.real * other.real - self.imaginary * other.imaginary,
            self.real * other.imaginary + self.imaginary * other.real,
        )

    def __getitem__(self, index) -> "RealPair":
        return RealPair(self.real[index], self.imaginary[index])

    def unsqueeze(self, dim: int) -> "RealPair":
        """Both parts with a new axis."""
        return RealPair(self.real.unsqueeze(dim), self.imaginary.unsqueeze(dim))

    def to(self, *args, **kwargs) -> "RealPair":
        """Both parts on another device."""
        return RealPair(self.real.to(*args, **kwargs), self.imaginary.to(*args, **kwargs))

    @property
    def device(self) -> torch.device:
        """Device of both parts."""
        return self.real.device


@contextmanager
def traceable(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block `model` can be traced.

    Args:
        model (`PreTrainedModel`): The model; only functions that its class uses are replaced.
    """
    with _real_numbers(), _larger_by_example(model), _collector_paused(), warnings.catch_warnings():
        # torch warns about each axis name that equals another one, which is what is meant here
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _real_numbers() -> Iterator[None]:
    """`torch.polar`, `view_as_complex` and `view_as_real` make and take [`RealPair`]s.

    Llama 4 and DeepSeek-V2 rotate by complex multiplication, and ONNX has no complex type.
    """

    def polar(length: Tensor, angle: Tensor) -> RealPair:
        return RealPair(length * angle.cos(), length * angle.sin())

    def view_as_complex(tensor: Tensor) -> RealPair:
        return RealPair(*tensor.unbind(-1))

    def view_as_real(pair: RealPair) -> Tensor:
        return torch.stack([pair.real, pair.imaginary], dim=-1)

    with (
        mock.patch.object(torch, "polar", polar),
        mock.patch.object(torch, "view_as_complex", view_as_complex),
        mock.patch.object(torch, "view_as_real", view_as_real),
    ):
        yield


@contextmanager
def _larger_by_example(model: PreTrainedModel) -> Iterator[None]:
    """`max` in MPT's code, of 0 and a length, is decided by the example inputs.

    It cuts the table of ALiBi biases to the length of the text. torch.export keeps the maximum as an expression, and
    then cannot prove that the result fits.
    """

    def larger(first, second):
        if not isinstance(second, torch.SymInt):
            return max(first, second)
        return second if second.node.hint > first else first

    if model.config.model_type != "mpt":
        yield
        return
    with mock.patch.object(sys.modules[type(model).__module__], "max", larger, create=True):
        yield


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Without garbage collection, which takes a quarter of the time while a trace makes millions of objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
