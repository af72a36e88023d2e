"""What an export has made, for the report and for what is written beside the files."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..precisions import PRECISIONS


@dataclass(frozen=True)
class ExportedFile:
    """One ONNX file, and what was measured on it.

    Args:
        file (`str`): Path in the output folder, with forward slashes: `"onnx/model.onnx"`.
        weights (`str`): `"float32"`, `"int8"` or `"int4"`.
        bytes (`int`): Size on disk, the data file included.
        num_quantized_matmuls (`int`): Products with quantized weights, see [`~exporters.graph.count.QuantizedNodes`].
        num_quantized_embeddings (`int`): Look-ups in a quantized embedding.
        bits_per_weight (`float`): Mean over the quantized weights, with scales and zero points as they are stored, and
            the filling of rows; 32 in the float file.
        max_relative_error (`float`): max|difference| / max|logit| between ONNX Runtime and PyTorch in float32.
        seconds (`float`): Time to make, write and check the file.
    """

    file: str
    weights: str
    bytes: int
    num_quantized_matmuls: int
    num_quantized_embeddings: int
    bits_per_weight: float
    max_relative_error: float
    seconds: float


@dataclass(frozen=True)
class ExportResult:
    """The files of one export.

    Args:
        opset (`int`): ONNX opset.
        files (`tuple[ExportedFile, ...]`): The float file, then the quantized ones.
        context (`Mapping[str, Any]`): How the longest context was looked at, see [`~exporters.check.checked_context`].
        inputs (`Mapping[str, tuple]`): Name and shape of each input, in every file the same; not in the report.
        appends_in_place (`bool`): Whether the cache may have room for more tokens, which the files write into; not in the
            report.
        session_entries (`Mapping[str, str]`): Configuration entries of an ONNX Runtime session that runs the quantized
            files as they were checked; not in the report.
    """

    opset: int
    files: tuple[ExportedFile, ...]
    context: Mapping[str, Any]
    inputs: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    appends_in_place: bool = False
    session_entries: Mapping[str, str] = field(default_factory=dict)

    @property
    def smallest(self) -> ExportedFile:
        """The file with the fewest bits, for runtimes that take one by themselves."""
        return min(self.files, key=lambda file: PRECISIONS[file.weights].bits)

    def to_dict(self) -> dict[str, Any]:
        """The report's `export` section, as JSON-ready values."""
        return {
            "opset": self.opset,
            "context": dict(self.context),
            "files": [asdict(file) for file in self.files],
        }
