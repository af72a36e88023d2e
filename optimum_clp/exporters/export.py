"""Export of a causal LM to ONNX: one float32 file, and float16, int8 and int4 files made from the same graph."""

import gc
import os
import tempfile
import time
from pathlib import Path

import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from ..attempts import Attempts
from ..configuration.stages import ExportConfig, QuantizationConfig
from ..doors import RUNTIMES
from ..errors import ConfigurationError, ExportError
from ..freed_memory import return_freed_memory
from ..mapped_weights import tensors_of
from ..precisions import FLOAT32, PRECISIONS
from ..progress import progress_bar
from ..runtime.names import FUSED_ATTENTION
from .check import FileCheck
from .float32_copy import attention_of, float32_copy
from .graph.float_graph import export_float_graph, fold_weight_transposes, quiet_exporter
from .graph.fused import fused_obstacle
from .graph.logits import choose_positions
from .graph.norms import spell_out_norms
from .graph.six_bits import six_bits_obstacle
from .obstacle import onnx_obstacle
from .result import ExportResult
from .room import export_room
from .rounding.weights import check_calibration, needs_calibration
from .runtimes.runtime import Runtime
from .weight_files import WeightFiles
from .writer import FileWriter


def export_onnx(
    model: PreTrainedModel,
    directory: str | os.PathLike,
    export: ExportConfig | None = None,
    quantization: QuantizationConfig | None = None,
    *,
    calibration: torch.Tensor | None = None,
    teacher: PreTrainedModel | None = None,
    attempts: Attempts | None = None,
    seed: int = 0,
    max_memory: int | None = None,
    quiet: bool = False,
) -> ExportResult:
    """Write `onnx/model.onnx` and the files of other weights to a folder, each checked against PyTorch.

    The check runs every file in a plain ONNX Runtime session, over a left-padded batch, several cached steps and the end
    of the longest context; for a model of more than 250 MB in float32, in a process of its own. The float file must
    agree with PyTorch within `export.tolerance`, one of float16 within 300 times that; of the quantized files the error is recorded, their logits must be
    finite, and no linear layer may have been left in float. Files appear in the folder only after all of them have passed.

    A model in 16 bits or on an accelerator is exported in float32 from a copy on the CPU (4 bytes for each parameter);
    a float32 model on the CPU is not copied. `model` itself is left as it is. Where memory does not hold all that, the copy, the
    integers of a file and what rounding looks at lie in files of the folder until the export is done.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model, of any dtype, on any device.
        directory (`str` or `os.PathLike`): Output folder; `onnx/` is made in it.
        export ([`ExportConfig`], *optional*): Opset and tolerance. `enabled` is the caller's business.
        quantization ([`QuantizationConfig`], *optional*): Which other files, and how.
        calibration (`Tensor`, *optional*): int64 `[rows, length]` without padding, see [`~exporters.rounding.weights.needs_calibration`].
        teacher ([`~transformers.PreTrainedModel`], *optional*): Towards which the scales of an int4 file are trained, such as the dense
            model that `model` was cut from; `model` itself if not given. Of any dtype, on any device.
        attempts ([`Attempts`], *optional*): A file beside the float32 one that cannot be made is noted there, and the others are written;
            without it nothing is.
        seed (`int`): Of the tokens of the check.
        max_memory (`int`, *optional*): Bytes that this process may hold; what is free now if not given.
        quiet (`bool`): No progress bar.

    Returns:
        [`ExportResult`]: Sizes, counts and errors.

    Raises:
        ConfigurationError: If the method needs calibration text and there is none.
        ExportError: If the model cannot be traced, a file does not run or differs from PyTorch, or the disk has no room for what
            memory does not hold.
        QuantizationError: If a linear layer or the embedding was left in float.
    """
    export = export or ExportConfig()
    quantization = quantization or QuantizationConfig()
    attempts = attempts or Attempts(strict=True)
    check_calibration(quantization, calibration)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=directory, prefix=".onnx-") as staging,
        progress_bar(2 + len(quantization.weights), "Exporting to ONNX", quiet) as bar,
    ):
        started = time.perf_counter()
        obstacle = six_bits_obstacle(quantization) or onnx_obstacle(model)
        if obstacle is not None:
            raise ExportError(obstacle)
        asked = [PRECISIONS[name] for name in quantization.weights]
        bits = max((precision.bits for precision in asked if precision.is_rounded), default=0)
        rows = calibration if needs_calibration(quantization) else None
        room = export_room(model, bits, rows, max_memory, Path(staging) / "room", quiet)
        copied = float32_copy(model, room)
        # the caller's own model is the better reference where it can be called without changing it
        reference = model if _can_be_reference(model) else copied
        writer = FileWriter(Path(staging), FileCheck(reference, Path(staging), seed=seed))
        graph = _write_float_file(copied, export, writer, started)
        room.let_go(tensors_of(copied))
        bar.update(2)
        files = WeightFiles(
            copied, graph, export, quantization, writer, room, calibration, teacher=teacher, seed=seed, quiet=quiet
        )
        for precision in files.in_order():
            with attempts.stage(f"{precision.row_name} file"):
                files.add(precision)
            room.let_go(tensors_of(copied))
            bar.update()
        files.drop()
        if not export.float_file:
            writer.leave_out(FLOAT32)
        writer.publish(directory / "onnx")
    return ExportResult(
        export.opset,
        tuple(writer.files),
        writer.check.context,
        _input_shapes(graph),
        FUSED_ATTENTION in graph.metadata_props,
        files.session_entries,
    )


def write_runtime_configs(
    folder: Path, model: PreTrainedModel, result: ExportResult, attempts: Attempts | None = None
) -> dict[str, str | None]:
    """Write what each runtime of the registry reads beside the files, such as onnxruntime-genai's `genai_config.json`.

    Args:
        folder (`Path`): With `config.json` and the files of `result`.
        model ([`~transformers.PreTrainedModel`]): The model that was exported.
        result ([`ExportResult`]): From [`export_onnx`].
        attempts ([`Attempts`], *optional*): What cannot be written is noted there; otherwise its error is raised.

    Returns:
        `dict[str, str | None]`: For each runtime why nothing was written for it (a package that cannot be imported is such a
        reason), or `None`.
    """
    obstacles: dict[str, str | None] = {}
    for name in RUNTIMES:
        try:
            runtime: Runtime = RUNTIMES.get(name)()
        except ConfigurationError as error:
            # nobody has asked for an installed package's runtime: it costs its own files, not the run
            obstacles[name] = error.problems[0].rule
            continue
        obstacle: str | None = "they could not be written"
        with (attempts or Attempts(strict=True)).stage(f"files for {name}"):
            if (found := runtime.obstacle(model, result)) is None:
                runtime.write(folder, model, result)
            obstacle = found
        obstacles[name] = obstacle
    return obstacles


def _input_shapes(graph: ir.Model) -> dict[str, tuple[int | str, ...]]:
    return {
        str(value.name): tuple(size if isinstance(size, int) else str(size) for size in value.shape or ())
        for value in graph.graph.inputs
        # those that have a default are nobody's duty
        if not value.is_initializer()
    }


def _write_float_file(model: PreTrainedModel, export: ExportConfig, writer: FileWriter, started: float) -> ir.Model:
    """The float file, fused if the model allows it; returns the graph that the quantized files are made from."""
    fuse = export.format != "qdq" and fused_obstacle(model) is None
    try:
        graph = _write_float_graph(model, export, writer, fuse, started)
    except ExportError:
        if not fuse:
            raise
        # what a model does with its attention may not show in four tokens: the plain graph needs no such luck
        graph = _write_float_graph(model, export, writer, False, started)
    return_freed_memory()
    return graph


def _write_float_graph(
    model: PreTrainedModel, export: ExportConfig, writer: FileWriter, fuse: bool, started: float
) -> ir.Model:
    with quiet_exporter():
        graph = export_float_graph(model, export.opset, fuse=fuse)
    # a trace leaves hundreds of thousands of objects in cycles, several megabytes for each layer
    gc.collect()
    return_freed_memory()
    choose_positions(graph, export.logits_to_keep)
    float_graph = graph.clone()
    fold_weight_transposes(float_graph)
    spell_out_norms(float_graph)
    writer.add(FLOAT32, float_graph, started, tolerance=export.tolerance)
    return graph


def _can_be_reference(model: PreTrainedModel) -> bool:
    # an SDPA that leaves something out computes another model
    if attention_of(model) == "eager" and model.config._attn_implementation not in ("eager", None):
        return False
    return not any(module.training for module in model.modules()) and all(
        parameter.dtype == torch.float32 and parameter.device.type == "cpu" for parameter in model.parameters()
    )
