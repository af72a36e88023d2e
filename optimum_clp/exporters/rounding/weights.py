"""The weights of an ONNX file, rounded as `quantization.method`, `bits_per_weight` and `scale_epochs` say."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from ...configuration.stages import QuantizationConfig
from ...doors import ROUNDINGS
from ...errors import ConfigurationError
from ...precisions import INT4, PRECISIONS
from ..room import ExportRoom
from .bit_plan import plan_bits, rounding_costs
from .matrices import GraphMatrix, IntegerForm
from .method import RoundedWeights, RoundingMethod, RoundingProblem
from .nearest import NEAREST
from .scale_tuning import complete, judging_rows, tune_scales, tuning_bytes

logger = logging.getLogger(__name__)

# Rows that rounding looks at where scales are trained on all of them afterwards, one in so many and at least so many: docs/onnx_lab_notes.md
_BEFORE_SCALES, _FEWEST_BEFORE_SCALES = 4, 32


def rounding_method(quantization: QuantizationConfig) -> RoundingMethod:
    """The method that a configuration names."""
    return ROUNDINGS.get(quantization.method)()


def needs_calibration(quantization: QuantizationConfig) -> bool:
    """Whether any file of the configuration is rounded by looking at calibration text if there is any."""
    return _has_budget(quantization) or _reads_text(quantization)


def check_calibration(quantization: QuantizationConfig, calibration: Tensor | None) -> None:
    """Check that there is calibration text where nothing can be done without it.

    Raises:
        ConfigurationError: If there is none.
    """
    asks = rounding_method(quantization).needs_text and _reads_text(quantization)
    if (asks or _has_budget(quantization)) and (calibration is None or not calibration.numel()):
        name = "method" if asks else "bits_per_weight"
        rule = "it looks at what the model computes on calibration text, and none was given"
        remedy = f'Give calibration, int64 rows of tokens; or use the method "{NEAREST}" without bits_per_weight'
        raise ConfigurationError.of(f"quantization.{name}", getattr(quantization, name), rule, remedy)


def round_weights(
    model: PreTrainedModel,
    bits: int,
    matrices: Mapping[str, GraphMatrix],
    quantization: QuantizationConfig,
    calibration: Tensor | None,
    *,
    teacher: PreTrainedModel | None = None,
    seed: int = 0,
    room: ExportRoom | None = None,
    offered: Sequence[int] = (8,),
    together: Collection[Collection[str]] = (),
    quiet: bool = False,
) -> RoundedWeights:
    """Round the weights of a model by the method of the configuration, within its budget.

    Args:
        model ([`~transformers.PreTrainedModel`]): In float32 on the CPU, in evaluation mode; left as it was.
        bits (`int`): 4 or 8.
        matrices (`Mapping[str, GraphMatrix]`): What the graph stores in integers.
        quantization ([`QuantizationConfig`]): Method, group size, budget, passes over the text in which scales are trained.
        calibration (`Tensor` or `None`): int64 `[rows, length]`, see [`needs_calibration`].
        teacher ([`~transformers.PreTrainedModel`], *optional*): Towards which scales are trained; `model` if not given.
        seed (`int`): Of the sensitivities of a budget, and of the order of rows.
        room ([`~exporters.room.ExportRoom`], *optional*): Where what is rounded lies; main memory if not given.
        offered (`Sequence[int]`): Bits that a budget may give a weight instead of 4, ascending.
        together (`Collection[Collection[str]]`): Weights of as many columns that a budget gives the same bits, by their names.
        quiet (`bool`): No progress bar.

    Returns:
        [`RoundedWeights`]: With the forms of the weights that the budget gives more bits, and the name of the method that has rounded.

    Raises:
        QuantizationError: If the budget is too small, or the model's hidden states are not finite.
    """
    block_size = quantization.group_size
    fixed = matrices.keys() & head_names(model) if quantization.head_bits == 8 and bits == INT4.bits else ()
    more_bits = dict.fromkeys(sorted(fixed), IntegerForm(8, block_size))
    if bits == INT4.bits and quantization.bits_per_weight is not None:
        assert calibration is not None
        costs = rounding_costs(model, calibration, matrices, block_size, seed=seed, quiet=quiet)
        # what has 8 bits in any case, as a router has
        planned = {name: replace(m, is_router=m.is_router or name in fixed) for name, m in matrices.items()}
        more_bits |= plan_bits(planned, costs, block_size, quantization.bits_per_weight, offered, together)
    room = room or ExportRoom()
    problem = RoundingProblem(model, bits, matrices, block_size, calibration, more_bits, seed, quiet, room)
    method, tunes = rounding_method(quantization), _tunes_scales(problem, quantization)
    rounded = method.round(_with_some_rows(problem) if tunes else problem)
    rounded = replace(rounded, planned=more_bits, method=rounded.method or quantization.method)
    return _with_tuned_scales(problem, rounded, teacher, quantization.scale_epochs) if tunes else rounded


def _tunes_scales(problem: RoundingProblem, quantization: QuantizationConfig) -> bool:
    """Whether scales are trained afterwards: if that is asked for, and there are text and memory for it."""
    tokens = problem.calibration
    reads_text = problem.bits in rounding_method(quantization).text_bits
    if not quantization.scale_epochs or not reads_text or tokens is None or not judging_rows(len(tokens)):
        return False
    needed = tuning_bytes(problem.model, tokens.shape[1], problem.block_size)
    if needed > problem.room.left:
        logger.warning(
            f"quantization.scale_epochs: {needed / 2**30:.2f} GiB would be held beside the export, {max(0.0, problem.room.left) / 2**30:.2f} may be: "
            "the scales of the int4 file stay as rounding has chosen them."
        )
        return False
    return True


def _with_some_rows(problem: RoundingProblem) -> RoundingProblem:
    """Of the rows that train scales some for the rounding itself, from the first to the last: kinds of text may follow one another."""
    assert problem.calibration is not None
    train = problem.calibration[: len(problem.calibration) - judging_rows(len(problem.calibration))]
    count = min(len(train), max(_FEWEST_BEFORE_SCALES, len(problem.calibration) // _BEFORE_SCALES))
    return replace(problem, calibration=train[[i * len(train) // count for i in range(count)]])


def _with_tuned_scales(
    problem: RoundingProblem, rounded: RoundedWeights, teacher: PreTrainedModel | None, epochs: int
) -> RoundedWeights:
    model, tokens = problem.model, problem.calibration
    assert tokens is not None
    matrices = complete(problem, rounded.matrices)
    tuned, result = tune_scales(
        model, matrices, tokens, teacher=teacher, epochs=epochs, seed=problem.seed, quiet=problem.quiet
    )
    # without a gain nothing is another than without the tuning
    kept = result is not None and result.kept
    return replace(rounded, matrices=tuned if kept else rounded.matrices, scale_tuning=result)


def head_names(model: PreTrainedModel) -> set[str]:
    """The names of the head's weight, which is the embedding's too where they are tied; empty if it has none."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    found = model.named_parameters(remove_duplicate=False)
    return set() if weight is None else {name for name, parameter in found if parameter is weight}


def _reads_text(quantization: QuantizationConfig) -> bool:
    """Whether the method looks at text for any of the files."""
    bits = {PRECISIONS[name].bits for name in quantization.weights}
    return not bits.isdisjoint(rounding_method(quantization).text_bits)


def _has_budget(quantization: QuantizationConfig) -> bool:
    bits = {PRECISIONS[name].bits for name in quantization.weights}
    return INT4.bits in bits and quantization.bits_per_weight is not None
