"""Files that appear together: written to a staging folder, checked there, and moved when all of them have passed."""

import logging
import os
import time
from pathlib import Path

import onnx_ir as ir
import torch

from ..disk_room import nothing_half_written, room_for
from ..errors import ExportError
from ..precisions import FLOAT32, Precision
from .check import FileCheck, check_tolerance
from .graph.count import QuantizedNodes
from .graph.file import save_graph, stored_bytes
from .result import ExportedFile
from .rounding.method import ScaleTuning

logger = logging.getLogger(__name__)


class FileWriter:
    """Writes graphs to a staging folder, checks them, and moves them to the output folder together.

    Args:
        staging (`Path`): A temporary folder on the output folder's disk.
        check ([`~exporters.check.FileCheck`]): What every file is compared with.
    """

    def __init__(self, staging: Path, check: FileCheck):
        self.staging = staging
        self.check = check
        self.files: list[ExportedFile] = []
        # a dictionary, for its order: a graph that is made again is written over the first
        self.written: dict[Path, None] = {}

    def add(
        self,
        precision: Precision,
        graph: ir.Model,
        started: float,
        *,
        nodes: QuantizedNodes | None = None,
        bits_per_weight: float | None = None,
        tolerance: float | None = None,
        rounding: str | None = None,
        scale_tuning: ScaleTuning | None = None,
        least_onnxruntime: str | None = None,
    ) -> None:
        """Write and check one graph.

        Args:
            precision ([`Precision`]): Of its weights.
            graph (`onnx_ir.Model`): The graph; left as it is.
            started (`float`): `time.perf_counter()` when the work on it began.
            nodes ([`~exporters.graph.count.QuantizedNodes`], *optional*): The quantized ones; none if not given.
            bits_per_weight (`float`, *optional*): Those of the weights as stored; those of `precision` if not given.
            tolerance (`float`, *optional*): Of the relative error; if not given, finite logits are enough.
            rounding (`str`, *optional*): Name of the method that has rounded the weights.
            scale_tuning ([`ScaleTuning`], *optional*): Of their scales.
            least_onnxruntime (`str`, *optional*): The oldest version that is fast with it.

        Raises:
            ExportError: If the file does not run, its error is above the tolerance, or the disk has no room for it.
        """
        file = self.staging / precision.onnx_file
        with (
            nothing_half_written(self.staging),
            room_for(f"onnx/{file.name}", self.staging, stored_bytes(graph), ExportError),
        ):
            written = save_graph(graph, file)
        error = self.check.error(file, in_float=precision is FLOAT32)
        check_tolerance(file, error, torch.finfo(torch.float32).max if tolerance is None else tolerance)
        self.written |= dict.fromkeys(written)
        self.files.append(
            ExportedFile(
                file=f"onnx/{file.name}",
                weights=precision.name,
                bytes=sum(path.stat().st_size for path in written),
                num_quantized_matmuls=nodes.matmuls if nodes else 0,
                num_quantized_embeddings=nodes.embeddings if nodes else 0,
                bits_per_weight=float(precision.bits) if bits_per_weight is None else bits_per_weight,
                max_relative_error=error,
                seconds=time.perf_counter() - started,
                rounding=rounding,
                scale_tuning=scale_tuning,
                least_onnxruntime=least_onnxruntime,
            )
        )

    def leave_out(self, precision: Precision) -> None:
        """Let go of a file that was written, unless there is no other."""
        if len(self.files) > 1:
            self.files = [file for file in self.files if file.weights != precision.name]
            for path in [path for path in self.written if path.name.startswith(precision.onnx_file)]:
                path.unlink()
                del self.written[path]

    def publish(self, folder: Path) -> None:
        """Move all files to a folder, which is made if it is missing."""
        folder.mkdir(exist_ok=True)
        for path in self.written:
            os.replace(path, folder / path.name)
        for made in self.files:
            logger.info(f"export: {made.file}, {made.bytes / 1e6:.2f} MB, checked against PyTorch")
