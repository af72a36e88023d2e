"""What `quantization.method` and `quantization.bits_per_weight` stand for: weights that are rounded before the graph is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...configuration.stages import QuantizationConfig
from ...errors import ConfigurationError
from ...quantization import quanto_integers
from ..graph.quantize import GraphMatrix
from .activation_moments import Dequantize, NamedWeight, visit_layers
from .bit_plan import plan_bits, rounding_costs
from .drift_correction import InputMoments, corrected_weights
from .matrices import (
    DAMPING,
    FeedbackRounding,
    RoundedMatrix,
    from_integers,
    round_half_quadratic,
    round_to_nearest,
)

# A table serves head and embedding. The head's inputs alone would trade errors of looked-up rows for smaller products.
_TABLE_DAMPING = 1.0


@dataclass(frozen=True)
class RoundedWeights:
    """Weights that are rounded already, and which of the others get 8 bits.

    Args:
        matrices (`dict[str, RoundedMatrix]`): By the weight's names in the graph.
        in_8_bits (`tuple[str, ...]`): Weights of an int4 file that get 8 bits.
        accuracy_level (`int`, *optional*): Of `MatMulNBits`, in place of the configuration's.
        only (`tuple[Tensor, ...]`, *optional*): The model's weights that are quantized, if it is not all of them.
        rounding (`Callable`): `(matrix, bits, block_size)` -> [`RoundedMatrix`], for weights that are not in `matrices`.
    """

    matrices: dict[str, RoundedMatrix] = field(default_factory=dict)
    in_8_bits: tuple[str, ...] = ()
    accuracy_level: int | None = None
    only: tuple[Tensor, ...] | None = None
    rounding: Callable[[np.ndarray, int, int], RoundedMatrix] = round_to_nearest


def needs_calibration(quantization: QuantizationConfig) -> bool:
    """Whether [`round_weights`] looks at calibration text if there is any."""
    return "int4" in quantization.weights and (
        quantization.method in ("auto", "gptq") or quantization.bits_per_weight is not None
    )


def check_calibration(quantization: QuantizationConfig, calibration: Tensor | None) -> None:
    """Check that there is calibration text where nothing can be done without it.

    Raises:
        ConfigurationError: If there is none.
    """
    required = quantization.method == "gptq" or quantization.bits_per_weight is not None
    if "int4" in quantization.weights and required and (calibration is None or not calibration.numel()):
        name = "method" if quantization.method == "gptq" else "bits_per_weight"
        rule = "it looks at what the model computes on calibration text, and none was given"
        remedy = 'Give calibration, int64 rows of tokens; or use the method "rtn" without bits_per_weight'
        raise ConfigurationError.of(f"quantization.{name}", getattr(quantization, name), rule, remedy)


def round_weights(
    twin: PreTrainedModel,
    bits: int,
    matrices: Mapping[str, GraphMatrix],
    quantization: QuantizationConfig,
    calibration: Tensor | None,
    *,
    seed: int = 0,
    quiet: bool = False,
) -> RoundedWeights:
    """Round the weights of a model by the method of the configuration, as far as that is not round-to-nearest.

    In 8 bits `"gptq"` and `"hqq"` round to nearest as well: there is next to nothing to gain.

    Args:
        twin ([`~transformers.PreTrainedModel`]): In float32 on the CPU, in evaluation mode; left as it was.
        bits (`int`): 4 or 8.
        matrices (`Mapping[str, GraphMatrix]`): What the graph stores in integers.
        quantization ([`QuantizationConfig`]): Method, group size, budget.
        calibration (`Tensor` or `None`): int64 `[rows, length]`, see [`needs_calibration`].
        seed (`int`): Of the sensitivities of a budget.
        quiet (`bool`): No progress bar.

    Returns:
        [`RoundedWeights`]

    Raises:
        QuantizationError: If the budget is too small, or the model's hidden states are not finite.
    """
    block_size = quantization.group_size
    in_8_bits: tuple[str, ...] = ()
    if bits == 4 and quantization.bits_per_weight is not None:
        assert calibration is not None
        costs = rounding_costs(twin, calibration, matrices, block_size, seed=seed, quiet=quiet)
        in_8_bits = plan_bits(matrices, costs, block_size, quantization.bits_per_weight)
    if quantization.method == "quanto":
        given = dict(_quanto_matrices(twin, bits))
        only = tuple(twin.get_parameter(name) for name in given)
        # level 4 would round what the weights are multiplied by
        return RoundedWeights(given, accuracy_level=1, only=only)
    if quantization.method == "hqq" and bits == 4:
        return RoundedWeights({}, in_8_bits, rounding=round_half_quadratic)
    if quantization.method in ("rtn", "hqq") or bits == 8 or calibration is None:
        return RoundedWeights({}, in_8_bits)
    found: dict[str, RoundedMatrix] = {}
    by_storage: dict[int, RoundedMatrix] = {}

    def bits_of(names: list[str]) -> int:
        return 8 if set(in_8_bits).intersection(names) else 4

    def quantize(weights: Sequence[NamedWeight], moments: InputMoments | None, tied: bool) -> list[Dequantize]:
        if moments is None:  # an embedding, whose rows are looked up
            return [round_to_nearest(w.weight, bits_of(w.names), block_size).dequantize for w in weights]
        new = [weight for weight in weights if weight.address not in by_storage]
        in_bits = [bits_of(weight.names) for weight in new]
        rounded = _round_together(new, moments, in_bits, block_size, _TABLE_DAMPING if tied else DAMPING)
        by_storage.update(zip((weight.address for weight in new), rounded, strict=True))
        for weight in weights:
            found.update(dict.fromkeys(matrices.keys() & weight.names, by_storage[weight.address]))
        return [by_storage[weight.address].dequantize for weight in weights]

    wanted = [name for name, matrix in matrices.items() if not matrix.is_router]
    visit_layers(twin, calibration, wanted, quantize, quiet=quiet)
    return RoundedWeights(found, in_8_bits)


def _round_together(
    weights: Sequence[NamedWeight], moments: InputMoments, bits: Sequence[int], block_size: int, damping: float
) -> list[RoundedMatrix]:
    """Weights of modules with the same inputs; what is needed besides the result is let go of."""
    if not weights:
        return []
    corrected = corrected_weights([weight.weight for weight in weights], moments)
    rounding = FeedbackRounding(moments.take_gram(), damping)
    return [rounding.round(values, b, block_size) for values, b in zip(corrected, bits, strict=True)]


def _quanto_matrices(twin: PreTrainedModel, bits: int) -> Iterator[tuple[str, RoundedMatrix]]:
    """quanto's own integers of every linear layer that it quantizes."""
    for name, integers, scales, shifts in quanto_integers(twin, f"int{bits}"):
        # int8 is signed in quanto, and MatMulNBits takes unsigned integers
        codes = integers if shifts is not None else (integers.to(torch.int16) + 128).to(torch.uint8)
        yield name, from_integers(codes.numpy(), bits, scales.numpy(), None if shifts is None else shifts.numpy())
