"""Files that are only to be timed: a model's own graph and shapes, with integers that are drawn, in several forms.

How fast a file runs depends on its shapes and its form, and not on what its weights are. So no weight is read or rounded: a model of few
layers, or of all of them, is traced with drawn weights, and each form of it is written beside the others.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from ..configuration.stages import ExportConfig, QuantizationConfig
from ..precisions import INT4
from .graph.file import save_graph
from .graph.float_graph import export_float_graph, quiet_exporter
from .graph.fused import fused_obstacle
from .graph.logits import choose_positions
from .graph.norms import spell_out_norms
from .graph.packing import pack_projections
from .graph.quantize import graph_matrices, quantize_graph
from .graph.scales import store_scales_in_16_bits
from .rounding.matrices import GraphMatrix, RoundedMatrix, narrowed
from .rounding.weights import head_names, rounding_method


@dataclass(frozen=True)
class WeightForm:
    """What of an int4 file makes it fast or slow.

    Args:
        group_size (`int`): Weights that share a scale.
        accuracy_level (`int`): How ONNX Runtime multiplies.
        head_bits (`int`): 4 or 8: bits of the head, and of the embedding that it shares.
    """

    group_size: int
    accuracy_level: int
    head_bits: int = INT4.bits

    @classmethod
    def of(cls, quantization: QuantizationConfig) -> "WeightForm":
        """The form that a recipe gives its int4 file."""
        own = rounding_method(quantization).accuracy_level
        level = quantization.accuracy_level if own is None else own
        return cls(quantization.group_size, level, quantization.head_bits or INT4.bits)


def write_probes(
    model: PreTrainedModel,
    forms: Sequence[WeightForm],
    folder: Path,
    export: ExportConfig,
    *,
    quantize_embeddings: bool = True,
) -> list[Path]:
    """Write an int4 file of each form, all of one graph.

    Args:
        model ([`~transformers.PreTrainedModel`]): In float32 on the CPU, in evaluation mode; whatever weights it has, as long as its
            outputs are finite.
        forms (`Sequence[WeightForm]`): A file each.
        folder (`Path`): An existing one.
        export ([`ExportConfig`]): Format and opset.
        quantize_embeddings (`bool`): As `quantization.quantize_embeddings`.

    Returns:
        `list[Path]`: The files, in the order of the forms.

    Raises:
        ExportError: If the model cannot be traced.
    """
    fuse = export.format != "qdq" and fused_obstacle(model) is None
    with quiet_exporter():
        graph = export_float_graph(model, export.opset, fuse=fuse)
    choose_positions(graph, export.logits_to_keep)
    matrices = graph_matrices(graph, quantize_embeddings)
    head = head_names(model)
    files = []
    for index, form in enumerate(forms):
        drawn = _drawn(matrices, form, head)
        written = graph.clone()
        quantize_graph(
            written,
            INT4.bits,
            block_size=form.group_size,
            accuracy_level=form.accuracy_level,
            quantize_embeddings=quantize_embeddings,
            rounded=drawn,
            format=export.format,
        )
        pack_projections(written)
        spell_out_norms(written)
        store_scales_in_16_bits(written, graph, lambda array: array)
        file = folder / f"probe_{index}.onnx"
        save_graph(written, file)
        files.append(file)
    return files


def _drawn(matrices: Mapping[str, GraphMatrix], form: WeightForm, head: Collection[str]) -> dict[str, RoundedMatrix]:
    """Integers of a form, drawn so that a product keeps the size of what enters it."""
    generator = np.random.default_rng(0)
    found = {}
    for name, matrix in matrices.items():
        bits = 8 if matrix.is_router or (name in head and form.head_bits == 8) else INT4.bits
        blocks = -(-matrix.columns // form.group_size)
        width = blocks * form.group_size * bits // 8
        integers = generator.integers(0, 256, (matrix.rows, width), dtype=np.uint8)
        # of integers drawn evenly the root of the mean square is 2^bits / root of 12
        scale = 12**0.5 / 2**bits / matrix.columns**0.5
        scales = narrowed(np.full((matrix.rows, blocks), scale, dtype=np.float32))
        found[name] = RoundedMatrix(integers, scales, bits, matrix.columns)
    return found
