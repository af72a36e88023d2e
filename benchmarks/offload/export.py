"""Private memory, bytes read and seconds of an ONNX export, with and without a bound on memory.

    OMP_NUM_THREADS=1 python -m benchmarks.offload.export MODEL OUTPUT [--max-memory 1GB] [--weights int4] [--rows 32]

MODEL is what `benchmarks.offload.model` wrote; it is exported whole, uncut. Prints one line of JSON, as `benchmarks.offload.stages` does. The
processes in which the files are compared with PyTorch are watched apart (`check_private_mb`). Needs Linux.
"""

import argparse
import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.offload.stages import SAMPLE_SECONDS, Watched, forget
from optimum_clp import QuantizationConfig
from optimum_clp.configuration.sizes import size_in_bytes
from optimum_clp.exporters.export import export_onnx


class Children:
    """The peak of the private memory of this process's children while a block runs."""

    def __enter__(self) -> "Children":
        self.peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(10 * SAMPLE_SECONDS):
            for child in psutil.Process().children():
                try:
                    memory = child.memory_info()
                except psutil.Error:  # it has ended
                    continue
                self.peak = max(self.peak, memory.rss - memory.shared)


def configurations() -> list[QuantizationConfig]:
    return [rounding(["int8", "int4"], "auto")]


def rounding(weights: list[str], method: str) -> QuantizationConfig:
    return QuantizationConfig(weights=weights, method=method)


def text(model: Path, rows: int, length: int) -> torch.Tensor:
    """The first rows of the model's text, int64 `[rows, length]`."""
    tokens = AutoTokenizer.from_pretrained(model)((model / "text.txt").read_text(), return_tensors="pt").input_ids[0]
    return tokens[: rows * length].view(rows, length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--max-memory")
    parser.add_argument("--weights", nargs="*", default=["int4"])
    parser.add_argument("--method", default="auto")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    forget(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    tokens = text(args.model, args.rows, args.length)
    limit = None if args.max_memory is None else size_in_bytes(args.max_memory)
    with Children() as children, Watched() as watched:
        result = export_onnx(
            model,
            args.output,
            quantization=rounding(args.weights, args.method),
            calibration=tokens,
            max_memory=limit,
            quiet=True,
        )
    size = sum(file.stat().st_size for file in args.model.glob("*.safetensors"))
    found = {"gigabytes": round(size / 1e9, 2), "max_memory": args.max_memory, "weights": args.weights}
    found |= {"rows": args.rows, **watched.to_dict(), "check_private_mb": round(children.peak / 1e6)}
    found["sha256"] = {}
    for file in result.files:
        parts = sorted((args.output / "onnx").glob(f"{Path(file.file).name}*"))
        found["sha256"][file.weights] = [digest(part) for part in parts]
    print(json.dumps(found))


def digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


if __name__ == "__main__":
    main()
