"""The files beside the float32 one, made from its graph: rounded to integers, computing in float16, or both."""

import time
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from ..configuration.stages import ExportConfig, QuantizationConfig
from ..errors import ExportError
from ..precisions import PRECISIONS, Precision
from ..runtime.names import ACCURACY_LEVEL_ENTRY
from .graph.count import QuantizedNodes, bits_per_weight, expected_nodes
from .graph.file import drop_weights
from .graph.float_graph import fold_weight_transposes
from .graph.half import to_float16
from .graph.norms import spell_out_norms
from .graph.packing import pack_projections, packable_weights
from .graph.quantize import check_quantized_nodes, graph_matrices, quantize_graph
from .graph.scales import store_scales_in_16_bits
from .graph.six_bits import LEAST_ONNXRUNTIME, split_six_bits
from .room import ExportRoom
from .rounding.method import RoundedWeights
from .rounding.weights import round_weights, rounding_method
from .writer import FileWriter

# A step of float16 is 2^13 of float32's. Measured on models of a few layers: errors of 0.001 to 0.01.
FLOAT16_TOLERANCE = 300


@dataclass(frozen=True)
class _QuantizedGraph:
    bits: int
    format: str
    rounded: RoundedWeights
    graph: ir.Model
    nodes: QuantizedNodes
    bits_per_weight: float
    least_onnxruntime: str | None


class WeightFiles:
    """Makes the files of one export beside the float32 one, one after the other.

    Args:
        model ([`~transformers.PreTrainedModel`]): The float32 copy.
        graph (`onnx_ir.Model`): From [`~exporters.graph.float_graph.export_float_graph`].
        export ([`ExportConfig`]): Format and tolerance.
        quantization ([`QuantizationConfig`]): Which files, and how their weights are rounded.
        writer ([`~exporters.writer.FileWriter`]): Writes and checks.
        room ([`~exporters.room.ExportRoom`]): Where integers lie until they are written.
        calibration (`Tensor` or `None`): int64 `[rows, length]`, where the method looks at text.
        teacher ([`~transformers.PreTrainedModel`], *optional*): Towards which scales are trained.
        seed (`int`): Of what rounding draws.
        quiet (`bool`): No progress bar.

    Attributes:
        session_entries (`dict[str, str]`): Configuration entries of a session that runs the quantized files as they were checked.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        graph: ir.Model,
        export: ExportConfig,
        quantization: QuantizationConfig,
        writer: FileWriter,
        room: ExportRoom,
        calibration: torch.Tensor | None,
        *,
        teacher: PreTrainedModel | None = None,
        seed: int,
        quiet: bool,
    ):
        self.model, self.graph, self.quantization, self.writer = model, graph, quantization, writer
        self.room, self.teacher = room, teacher
        self.export, self.calibration, self.seed, self.quiet = export, calibration, seed, quiet
        method = rounding_method(quantization)
        self.quantize_embeddings = quantization.quantize_embeddings and not method.keeps_embedding
        own_level = method.accuracy_level
        self.accuracy_level = quantization.accuracy_level if own_level is None else own_level
        self.session_entries: dict[str, str] = {}
        if export.format == "qdq" and any(precision.is_rounded for precision in self.in_order()):
            self.session_entries[ACCURACY_LEVEL_ENTRY] = str(self.accuracy_level)
        self.matrices = graph_matrices(graph, self.quantize_embeddings)
        self._last: _QuantizedGraph | None = None

    def in_order(self) -> list[Precision]:
        """The precisions that are asked for; those of the same integers follow one another, so that they are made once."""
        asked = [PRECISIONS[name] for name in self.quantization.weights]
        bits = [precision.bits for precision in asked]
        return sorted(asked, key=lambda precision: (bits.index(precision.bits), precision.floats != 32))

    def add(self, precision: Precision) -> None:
        """Make, write and check one file.

        Raises:
            ExportError: If it does not run, or its error is above the tolerance.
            QuantizationError: If something was left in float.
        """
        started = time.perf_counter()
        if not precision.is_rounded:
            self.drop()
            graph = self.graph.clone()
            fold_weight_transposes(graph)
            spell_out_norms(graph)
            self._write_in_16_bits(precision, graph, started, tolerance=FLOAT16_TOLERANCE * self.export.tolerance)
            return
        made = self._quantized(precision)
        said: dict[str, Any] = {
            "nodes": made.nodes,
            "bits_per_weight": made.bits_per_weight,
            "rounding": made.rounded.method,
            "scale_tuning": made.rounded.scale_tuning,
            "least_onnxruntime": made.least_onnxruntime,
        }
        if precision.floats == 16:
            self._write_in_16_bits(precision, made.graph, started, **said)
        else:
            self.writer.add(precision, made.graph, started, **said)

    def drop(self) -> None:
        """Let go of the integers that the last file was made of."""
        if self._last is not None:
            drop_weights(self._last.graph)
            self._last = None

    def _write_in_16_bits(self, precision: Precision, graph: ir.Model, started: float, **said: Any) -> None:
        narrow = graph.clone()
        to_float16(narrow)
        try:
            self.writer.add(precision, narrow, started, **said)
        except ExportError:
            # hidden states that leave float16's range: sums and norms in 32 bits, products in 16
            wide = graph.clone()
            to_float16(wide, wide_sums=True)
            self.writer.add(precision, wide, started, **said)

    def _quantized(self, precision: Precision) -> _QuantizedGraph:
        """The graph with integers of the precision's bits; those of other bits are gone before these are made."""
        # a graphics processor has kernels for integers, which "unpacked" is to do without
        format = "contrib" if self.export.format == "unpacked" and precision.floats == 16 else self.export.format
        last = self._last
        if last is not None and (last.bits, last.format) == (precision.bits, format):
            return last
        rounded = last.rounded if last is not None and last.bits == precision.bits else None
        last = None
        self.drop()
        if rounded is None:
            rounded = round_weights(
                self.model,
                precision.bits,
                self.matrices,
                self.quantization,
                self.calibration,
                teacher=self.teacher,
                seed=self.seed,
                room=self.room,
                together=packable_weights(self.graph),
                # between 4 and 8 bits one format alone has operators
                offered=(6, 8) if self.quantization.six_bits and format == "contrib" else (8,),
                quiet=self.quiet,
            )
        graph = self.graph.clone()
        nodes = quantize_graph(
            graph,
            precision.bits,
            block_size=self.quantization.group_size,
            accuracy_level=self.accuracy_level,
            quantize_embeddings=self.quantize_embeddings,
            rounded=rounded.matrices,
            planned=rounded.planned,
            only_rounded=rounded.only is not None,
            format=format,
            rounding=rounded.rounding,
            keep=self.room.keep_array,
        )
        check_quantized_nodes(graph, nodes, expected_nodes(self.model, self.quantize_embeddings, rounded.only))
        pack_projections(graph)
        least = LEAST_ONNXRUNTIME if split_six_bits(graph) else None
        spell_out_norms(graph)
        store_scales_in_16_bits(graph, self.graph, self.room.keep_array)
        bits = bits_per_weight(self.graph, graph)
        self._last = _QuantizedGraph(precision.bits, format, rounded, graph, nodes, bits, least)
        return self._last
