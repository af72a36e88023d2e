"""Export of a causal LM to ONNX: one float32 file, and weight-only int8 and int4 files made from the same graph."""

import gc
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from ..configuration.stages import ExportConfig, QuantizationConfig
from ..errors import ExportError
from ..progress import progress_bar
from ..runtime.names import ACCURACY_LEVEL_ENTRY, FUSED_ATTENTION
from .check import FileCheck, check_tolerance
from .float32_copy import attention_of, float32_twin
from .freed_memory import return_freed_memory
from .graph.count import QuantizedNodes, bits_per_weight, expected_nodes
from .graph.file import drop_weights, save_graph
from .graph.float_graph import export_float_graph, fold_weight_transposes
from .graph.fused import fused_obstacle
from .graph.logits import choose_positions
from .graph.packing import pack_projections
from .graph.quantize import check_quantized_nodes, graph_matrices, quantize_graph
from .graph.scales import store_scales_in_16_bits
from .obstacle import onnx_obstacle
from .rounding.weights import check_calibration, round_weights
from .runtimes.genai import write_genai_config
from .runtimes.transformers_js import write_transformers_js_config

FLOAT_FILE = "model.onnx"
QUANTIZED_FILES = {"int8": "model_quantized.onnx", "int4": "model_q4.onnx"}
_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class ExportedFile:
    """One ONNX file, and what was measured on it.

    Args:
        file (`str`): Path in the output folder, with forward slashes: `"onnx/model.onnx"`.
        weights (`str`): `"float32"`, `"int8"` or `"int4"`.
        bytes (`int`): Size on disk, the data file included.
        num_quantized_matmuls (`int`): Products with quantized weights, see [`~exporters.graph.count.QuantizedNodes`].
        num_quantized_embeddings (`int`): Look-ups in a quantized table.
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

    def to_dict(self) -> dict[str, Any]:
        """The report's `export` section, as JSON-ready values."""
        return {
            "opset": self.opset,
            "context": dict(self.context),
            "files": [asdict(file) for file in self.files],
        }


def export_onnx(
    model: PreTrainedModel,
    directory: str | os.PathLike,
    export: ExportConfig | None = None,
    quantization: QuantizationConfig | None = None,
    *,
    calibration: torch.Tensor | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> ExportResult:
    """Write `onnx/model.onnx` and the quantized files to a folder, each checked against PyTorch.

    The check runs every file in a plain ONNX Runtime session, over a left-padded batch, several cached steps and the end
    of the longest context; for a model of more than 250 MB in float32, in a process of its own. The float file must
    agree with PyTorch within `export.tolerance`; of the quantized files the error is recorded, their logits must be
    finite, and no linear layer may have been left in float. Files appear in the folder only after all of them have passed.

    A model in 16 bits or on an accelerator is exported in float32 from a copy on the CPU (4 bytes for each parameter);
    a float32 model on the CPU is not copied. `model` itself is left as it is.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model, of any dtype, on any device.
        directory (`str` or `os.PathLike`): Output folder; `onnx/` is made in it.
        export ([`ExportConfig`], *optional*): Opset and tolerance. `enabled` is the caller's business.
        quantization ([`QuantizationConfig`], *optional*): Which quantized files, and how.
        calibration (`Tensor`, *optional*): int64 `[rows, length]` without padding, see [`~exporters.rounding.weights.needs_calibration`].
        seed (`int`): Of the tokens of the check.
        quiet (`bool`): No progress bar.

    Returns:
        [`ExportResult`]: Sizes, counts and errors.

    Raises:
        ConfigurationError: If the method needs calibration text and there is none.
        ExportError: If the model cannot be traced, or a file does not run, or differs from PyTorch.
        QuantizationError: If a linear layer or the embedding was left in float.
    """
    export = export or ExportConfig()
    quantization = quantization or QuantizationConfig()
    check_calibration(quantization, calibration)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=directory, prefix=".onnx-") as staging,
        progress_bar(2 + len(quantization.weights), "Exporting to ONNX", quiet) as bar,
    ):
        started = time.perf_counter()
        obstacle = onnx_obstacle(model)
        if obstacle is not None:
            raise ExportError(obstacle)
        twin = float32_twin(model)
        # the caller's own model is the better witness where it can be called without changing it
        witness = model if _can_witness(model) else twin
        writer = _Writer(Path(staging), FileCheck(witness, Path(staging), seed=seed))
        fuse = export.format == "contrib" and fused_obstacle(twin) is None
        try:
            graph = _float_graph(twin, export, writer, fuse, started)
        except ExportError:
            if not fuse:
                raise
            # what a model does with its attention may not show in four tokens: the plain graph needs no such luck
            graph = _float_graph(twin, export, writer, False, started)
        # a trace leaves hundreds of thousands of objects in cycles
        gc.collect()
        return_freed_memory()
        bar.update(2)
        keeps_tables = quantization.method == "quanto" or not quantization.quantize_embeddings
        matrices = graph_matrices(graph, not keeps_tables)
        session_entries: dict[str, str] = {}
        for weights in quantization.weights:
            started = time.perf_counter()
            bits = _BITS[weights]
            rounded = round_weights(twin, bits, matrices, quantization, calibration, seed=seed, quiet=quiet)
            accuracy_level = rounded.accuracy_level or quantization.accuracy_level
            if export.format == "qdq":
                session_entries[ACCURACY_LEVEL_ENTRY] = str(accuracy_level)
            quantized = graph.clone()
            found = quantize_graph(
                quantized,
                bits,
                block_size=quantization.group_size,
                accuracy_level=accuracy_level,
                quantize_embeddings=not keeps_tables,
                rounded=rounded.matrices,
                in_8_bits=rounded.in_8_bits,
                only_rounded=quantization.method == "quanto",
                form=export.format,
                rounding=rounded.rounding,
            )
            check_quantized_nodes(quantized, found, expected_nodes(twin, not keeps_tables, rounded.only))
            pack_projections(quantized)
            store_scales_in_16_bits(quantized, graph)
            writer.add(weights, quantized, found, bits_per_weight(graph, quantized), None, started)
            # the integers of one file are gone before those of the next are made
            drop_weights(quantized)
            del quantized, rounded
            bar.update()
        writer.publish(directory / "onnx")
    return ExportResult(
        export.opset,
        tuple(writer.files),
        writer.check.context,
        _input_shapes(graph),
        FUSED_ATTENTION in graph.metadata_props,
        session_entries,
    )


def write_runtime_configs(folder: Path, model: PreTrainedModel, result: ExportResult) -> str | None:
    """Write what onnxruntime-genai and transformers.js read beside the files: `genai_config.json`, and an entry in `config.json`.

    Both take one file by themselves, the one with the fewest bits.

    Args:
        folder (`Path`): With `config.json` and the files of `result`.
        model ([`~transformers.PreTrainedModel`]): The model that was exported.
        result ([`ExportResult`]): From [`export_onnx`].

    Returns:
        `str` or `None`: Why there is no `genai_config.json`.
    """
    smallest = min(result.files, key=lambda file: _BITS.get(file.weights, 32))
    write_transformers_js_config(folder, smallest.weights)
    return write_genai_config(
        folder,
        model.config,
        model.generation_config,
        result.inputs,
        smallest.file,
        result.appends_in_place,
        result.session_entries,
    )


def _input_shapes(graph: ir.Model) -> dict[str, tuple[int | str, ...]]:
    return {
        str(value.name): tuple(size if isinstance(size, int) else str(size) for size in value.shape or ())
        for value in graph.graph.inputs
        # those that have a default are nobody's duty
        if not value.is_initializer()
    }


def _float_graph(
    twin: PreTrainedModel, export: ExportConfig, writer: "_Writer", fuse: bool, started: float
) -> ir.Model:
    """Trace, write and check the float file; the graph that the quantized files are made from."""
    with _quiet_exporter():
        graph = export_float_graph(twin, export.opset, fuse=fuse)
    choose_positions(graph, export.logits_to_keep)
    float_graph = graph.clone()
    fold_weight_transposes(float_graph)
    writer.add("float32", float_graph, QuantizedNodes(0, 0), 32.0, export.tolerance, started)
    return graph


class _Writer:
    """Writes graphs to a staging folder, checks them, and moves them to the output folder together."""

    def __init__(self, staging: Path, check: FileCheck):
        self.staging = staging
        self.check = check
        self.files: list[ExportedFile] = []
        # a dictionary, for its order: a graph that is made again is written over the first
        self.written: dict[Path, None] = {}

    def add(
        self,
        weights: str,
        graph: ir.Model,
        nodes: QuantizedNodes,
        bits_per_weight: float,
        tolerance: float | None,
        started: float,
    ) -> None:
        """Write and check one graph; `tolerance=None` asks for finite logits only."""
        file = self.staging / QUANTIZED_FILES.get(weights, FLOAT_FILE)
        written = save_graph(graph, file)
        self.written |= dict.fromkeys(written)
        error = self.check.error(file)
        check_tolerance(file, error, torch.finfo(torch.float32).max if tolerance is None else tolerance)
        self.files.append(
            ExportedFile(
                file=f"onnx/{file.name}",
                weights=weights,
                bytes=sum(path.stat().st_size for path in written),
                num_quantized_matmuls=nodes.matmuls,
                num_quantized_embeddings=nodes.embeddings,
                bits_per_weight=bits_per_weight,
                max_relative_error=error,
                seconds=time.perf_counter() - started,
            )
        )

    def publish(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        for path in self.written:
            os.replace(path, folder / path.name)


def _can_witness(model: PreTrainedModel) -> bool:
    # an SDPA that leaves something out computes another model
    if attention_of(model) == "eager" and model.config._attn_implementation not in ("eager", None):
        return False
    return not any(module.training for module in model.modules()) and all(
        parameter.dtype == torch.float32 and parameter.device.type == "cpu" for parameter in model.parameters()
    )


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without torch's notes on packages that the export does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
