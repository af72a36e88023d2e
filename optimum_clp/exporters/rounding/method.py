"""What a rounding method is: what it is given, what it gives back, and what it says of itself."""

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from ...report.section import Key
from ..room import ExportRoom
from .matrices import GraphMatrix, IntegerForm, RoundedMatrix, Rounding


@dataclass(frozen=True)
class RoundingProblem:
    """What is to be rounded.

    Args:
        model ([`~transformers.PreTrainedModel`]): In float32 on the CPU, in evaluation mode; to be left as it was.
        bits (`int`): Of the file, 4 or 8.
        matrices (`Mapping[str, GraphMatrix]`): What the graph stores in integers, by the weight's name in the graph.
        block_size (`int`): Weights that share a scale.
        calibration (`Tensor` or `None`): int64 `[rows, length]`, without padding.
        planned (`Mapping[str, IntegerForm]`): Of the weights of an int4 file that are to have more bits, by their names in the graph.
        seed (`int`): For whatever is drawn.
        quiet (`bool`): No progress bar.
        room ([`~exporters.room.ExportRoom`]): Where large arrays may lie that stay for long: `matrix.kept(problem.room.keep_array)`.
    """

    model: PreTrainedModel
    bits: int
    matrices: Mapping[str, GraphMatrix]
    block_size: int
    calibration: Tensor | None = None
    planned: Mapping[str, IntegerForm] = field(default_factory=dict)
    seed: int = 0
    quiet: bool = False
    room: ExportRoom = field(default_factory=ExportRoom)

    def form_of(self, names: Collection[str]) -> IntegerForm:
        """Bits and block size of a weight, which has all these names."""
        planned = [self.planned[name] for name in names if name in self.planned]
        return planned[0] if planned else IntegerForm(self.bits, self.block_size)


@dataclass(frozen=True)
class ScaleTuning:
    """What training the scales of a file has come to.

    Args:
        tokens (`int`): That the steps have seen, repeats counted.
        kl_before (`float`): KL from the teacher on rows that no step sees, nats per token.
        kl_after (`float`): The same with the trained scales.
        kept (`bool`): Whether they were better, and are in the file.
    """

    tokens: Annotated[int, Key("That the steps have seen, repeats counted.", minimum=1)]
    kl_before: Annotated[
        float, Key("From the dense model, or the exported one where that was not at hand, on rows that no step sees.")
    ]
    kl_after: Annotated[float, Key("The same with the trained scales.")]
    kept: Annotated[bool, Key("Whether they were better, and are in the file.")]


@dataclass(frozen=True)
class RoundedWeights:
    """What a method has made of the weights.

    Args:
        matrices (`dict[str, RoundedMatrix]`): Those that are rounded already, by their names in the graph.
        rounding (`Callable`, *optional*): `(matrix, bits, block_size)` -> [`RoundedMatrix`], for the others, one by one while
            the graph is rewritten; to nearest if not given. A look-up has no zero points that are no integers: what is looked
            up is rounded to nearest in any case.
        only (`tuple[Tensor, ...]`, *optional*): The model's weights that are quantized, if it is not all of them; these are
            then all in `matrices`.
        planned (`Mapping[str, IntegerForm]`): Of the weights of an int4 file that have more than 4 bits; a method leaves it alone.
        method (`str`, *optional*): Name of the method that has rounded, where the choice was left to another one.
        scale_tuning ([`ScaleTuning`], *optional*): Of the scales, after the method; a method leaves it alone.
    """

    matrices: dict[str, RoundedMatrix] = field(default_factory=dict)
    rounding: Rounding | None = None
    only: tuple[Tensor, ...] | None = None
    planned: Mapping[str, IntegerForm] = field(default_factory=dict)
    method: str | None = None
    scale_tuning: ScaleTuning | None = None


class RoundingMethod(Protocol):
    """A way to round the weights of the ONNX files, what `quantization.method` names; a class that is made without arguments.

    What it says of itself is read from the class, before any work.

    Attributes:
        text_bits (`frozenset[int]`): Bits of the files for which it looks at calibration text, if there is any.
        needs_text (`bool`): Whether it can do nothing for these files without text.
        zero_points (`frozenset[int]`): Bits of the files whose matrices have zero points of their own.
        group_bytes (`Mapping[int, int]`): By bits, what each group of `quantization.group_size` weights takes beside its
            integers, in bytes, for the sizes that are told before any work: a scale, and a zero point where there is one.
        keeps_embedding (`bool`): Whether the embedding, and a head that is tied to it, stay in float32.
        accuracy_level (`int` or `None`): Of the products, in place of `quantization.accuracy_level`.
        budget_obstacle (`str` or `None`): Why `quantization.bits_per_weight` means nothing to it, as a whole clause.
    """

    text_bits: ClassVar[frozenset[int]] = frozenset()
    needs_text: ClassVar[bool] = False
    zero_points: ClassVar[frozenset[int]] = frozenset()
    group_bytes: ClassVar[Mapping[int, int]] = {8: 2, 4: 2}
    keeps_embedding: ClassVar[bool] = False
    accuracy_level: ClassVar[int | None] = None
    budget_obstacle: ClassVar[str | None] = None

    @abstractmethod
    def round(self, problem: RoundingProblem) -> RoundedWeights:
        """Round the weights, all of them or those that it has a way of its own for.

        Args:
            problem ([`RoundingProblem`]): With calibration text where [`needs_text`] asks for it.

        Returns:
            [`RoundedWeights`]

        Raises:
            QuantizationError: If it cannot.
        """
        ...
