"""What an export has made, for the report and for what is written beside the files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypedDict

from ..precisions import PRECISIONS
from ..report.section import Key, to_section
from .rounding.method import ScaleTuning


class CheckedContext(TypedDict):
    """How the end of the longest context was compared with PyTorch."""

    length: Annotated[int | None, Key("Tokens, as the model's configuration declares.", minimum=1)]
    checked: Annotated[str, Key(choices=("whole", "last positions", "none"))]


@dataclass(frozen=True)
class ExportedFile:
    """One ONNX file, and what was measured on it.

    Args:
        file (`str`): Path in the output folder, with forward slashes: `"onnx/model.onnx"`.
        weights (`str`): Name in [`~precisions.PRECISIONS`].
        bytes (`int`): Size on disk, the data file included.
        num_quantized_matmuls (`int`): Products with quantized weights, see [`~exporters.graph.count.QuantizedNodes`].
        num_quantized_embeddings (`int`): Look-ups in a quantized embedding.
        bits_per_weight (`float`): Mean over the quantized weights, with scales and zero points as they are stored, and
            the filling of rows; 32 or 16 in a float file.
        max_relative_error (`float`): max|difference| / max|logit| between ONNX Runtime and PyTorch in float32.
        seconds (`float`): Time to make, write and check the file.
        rounding (`str` or `None`): Name of the method that has rounded the weights; `None` in a float file.
        scale_tuning ([`ScaleTuning`] or `None`): What training the scales has come to, where that was done.
        least_onnxruntime (`str` or `None`): ONNX Runtime's oldest version that runs it as fast as it should; `None` where it is any that
            this package takes.
    """

    file: Annotated[str, Key("Relative to the output folder.")]
    weights: Annotated[str, Key(choices=tuple(PRECISIONS))]
    bytes: Annotated[int, Key(minimum=1)]
    num_quantized_matmuls: Annotated[int, Key(minimum=0)]
    num_quantized_embeddings: Annotated[int, Key(minimum=0)]
    bits_per_weight: Annotated[
        float,
        Key(
            "Mean over the quantized weights: integers, float32 scales and zero points, filling of rows; "
            "32 or 16 in a float file.",
            minimum=2,
            maximum=64,
            finite=True,
        ),
    ]
    max_relative_error: Annotated[float, Key("max|difference| / max|logit| against PyTorch in float32.", minimum=0)]
    seconds: Annotated[float, Key(minimum=0)]
    rounding: Annotated[str | None, Key("Method that has rounded the weights; null in a float file.", added=True)] = (
        None
    )
    scale_tuning: Annotated[
        ScaleTuning | None, Key("Of the scales, after rounding; null where none was done.", added=True)
    ] = None
    least_onnxruntime: Annotated[
        str | None,
        Key("ONNX Runtime's oldest version that is fast with it; null: any that has its opset.", added=True),
    ] = None


@dataclass(frozen=True)
class ReachedSize:
    """A size that was asked for, and what came of it.

    Args:
        target_size_mb (`float`): As in the recipe.
        bytes (`int`): Of the int4 file.
        bits_per_weight (`float` or `None`): That were chosen for it; `None` where there was nothing to choose.
        met (`bool`): Whether the file is no larger than the target, nor more than 3 % smaller where its bits were chosen.
    """

    target_size_mb: Annotated[float, Key("MB of 1,000,000 bytes.", minimum=0)]
    bytes: Annotated[int, Key("Of the int4 file.", minimum=1)]
    bits_per_weight: Annotated[float | None, Key("Chosen for it; null where there was nothing to choose.")]
    met: Annotated[bool, Key("No larger, nor more than 3 % smaller where bits were chosen.")]


@dataclass(frozen=True)
class MeasuredForm:
    """One form of an int4 file, and how fast files of that form are beside the plain one (groups of 32, level 4, a head of 4 bits).

    Args:
        group_size (`int`): Weights that share a scale.
        accuracy_level (`int`): How ONNX Runtime multiplies.
        head_bits (`int`): Bits of the head.
        speed (`float`): Time of a prompt of 256 tokens and 64 after it in the plain form over that in this one.
        prompt_speed (`float`): The same of the prompt alone.
        decode_speed (`float`): The same of the tokens after it.
    """

    group_size: Annotated[int, Key(minimum=16)]
    accuracy_level: Annotated[int, Key(choices=(0, 1, 4))]
    head_bits: Annotated[int, Key(choices=(4, 8))]
    speed: Annotated[float, Key("Times as fast as the plain form: prompt and decoding together.", minimum=0)]
    prompt_speed: Annotated[float, Key(minimum=0)]
    decode_speed: Annotated[float, Key(minimum=0)]


@dataclass(frozen=True)
class SpeedChoice(MeasuredForm):
    """The form that was chosen by a measurement on this machine.

    Args:
        threads (`int`): That computed.
        measured (`tuple[MeasuredForm, ...]`): All forms that were tried, the plain one first.
    """

    threads: Annotated[int, Key(minimum=1)]
    measured: tuple[MeasuredForm, ...]


@dataclass(frozen=True)
class ReachedSpeed:
    """A speed that was asked for, and what came of it.

    Args:
        target_tokens_per_second (`float`): As in the recipe.
        tokens_per_second (`float`): That the int4 file decodes, measured on this machine after the export.
        threads (`int`): That computed.
        met (`bool`): Whether that is at least 97 % of the target.
    """

    target_tokens_per_second: Annotated[float, Key(minimum=0)]
    tokens_per_second: Annotated[float, Key("Of the int4 file, decoding, on this machine.", minimum=0)]
    threads: Annotated[int, Key(minimum=1)]
    met: Annotated[bool, Key("At least 97 % of the target.")]


@dataclass(frozen=True)
class ExportResult:
    """The files of one export.

    Args:
        opset (`int`): ONNX opset.
        files (`tuple[ExportedFile, ...]`): The float file, then the quantized ones.
        context ([`CheckedContext`]): How the longest context was looked at, see [`~exporters.check.checked_context`].
        inputs (`Mapping[str, tuple]`): Name and shape of each input, in every file the same; not in the report.
        appends_in_place (`bool`): Whether the cache may have room for more tokens, which the files write into; not in the
            report.
        session_entries (`Mapping[str, str]`): Configuration entries of an ONNX Runtime session that runs the quantized
            files as they were checked; not in the report.
        genai_obstacle (`str` or `None`): Why there is no `genai_config.json`: `runtimes["genai"]`, by the key of older reports.
        runtimes (`Mapping[str, str | None]`): For each runtime of the registry why nothing was written for it, see
            [`~exporters.export.write_runtime_configs`]; `None` where something was.
        size_target ([`ReachedSize`] or `None`): The recipe's size target, if it has one and there is an int4 file.
        speed_target ([`ReachedSpeed`] or `None`): Its speed target, likewise.
        speed_choice ([`SpeedChoice`] or `None`): What was measured for `quantization.tune_for="speed"`.
    """

    opset: Annotated[int, Key(minimum=1)]
    files: tuple[ExportedFile, ...]
    context: Annotated[
        CheckedContext,
        Key("How the end of the longest context was compared with PyTorch, in every file.", added=True),
    ]
    inputs: Annotated[Mapping[str, tuple[int | str, ...]], Key(reported=False)] = field(default_factory=dict)
    appends_in_place: Annotated[bool, Key(reported=False)] = False
    session_entries: Annotated[Mapping[str, str], Key(reported=False)] = field(default_factory=dict)
    genai_obstacle: Annotated[str | None, Key("Why there is no genai_config.json.", added=True)] = None
    runtimes: Annotated[
        Mapping[str, str | None],
        Key("For each runtime, why nothing was written for it; null where something was.", added=True),
    ] = field(default_factory=dict)
    size_target: Annotated[ReachedSize | None, Key("The size that the recipe asks for.", added=True)] = None
    speed_target: Annotated[ReachedSpeed | None, Key("The speed that the recipe asks for.", added=True)] = None
    speed_choice: Annotated[
        SpeedChoice | None, Key("The form of the int4 file that was fastest on this machine.", added=True)
    ] = None

    @property
    def smallest(self) -> ExportedFile:
        """The file with the fewest bits, for runtimes that take one by themselves."""
        return min(self.files, key=lambda file: PRECISIONS[file.weights].bits)

    def to_dict(self) -> dict[str, Any]:
        """The report's `export` section, as JSON-ready values."""
        return to_section(self)
