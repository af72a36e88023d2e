"""The predicted memory of endpoint tuning, part of `prune --dry-run`, against the memory that the process really takes.

    OMP_NUM_THREADS=1 python -m benchmarks.tuning_memory [RESULT.json]

A random model of 219 M parameters is cut at the bottom, in the middle and at the top of its stack and tuned for two
steps, in bfloat16 and float32; each run is a process of its own, whose resident set is read every 2 ms. Linux, 4 GB and
about ten minutes on one core.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.folders import ROOT
from optimum_clp import CLPConfig, LayerSegment, plan_pruning
from optimum_clp.report.environment import environment_info
from optimum_clp.segments import endpoint_layers, kept_layers
from optimum_clp.surgery.cut import cut_model
from optimum_clp.tuning.endpoints import tune_layers

RUNS = [(dtype, start) for dtype in ("bfloat16", "float32") for start in (0, 5, 10)]


def configurations() -> list[CLPConfig]:
    return [recipe()]


def recipe() -> CLPConfig:
    """Two steps of 8 rows."""
    return CLPConfig(
        0.17,
        calibration={"train_sequences": 16, "validation_sequences": 2, "sequence_length": 256},
        tuning={"epochs": 1, "batch_size": 8},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", nargs="?", help="JSON file to write")
    parser.add_argument("--run", nargs=2, metavar=("DTYPE", "START"), help="one run, in this process")
    args = parser.parse_args()
    if args.run:
        print(json.dumps(measure(args.run[0], int(args.run[1]))))
        return
    rows = []
    for dtype, start in RUNS:
        # large blocks go back to the system when they are freed, so that the resident set is what is in use
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, "-m", "benchmarks.tuning_memory", "--run", dtype, str(start)]
        done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE)
        row = json.loads(done.stdout)
        rows.append(row)
        print(
            f"{dtype:<9} {row['segment']}  predicted {row['predicted']['total'] / 1e9:.3f} GB  measured "
            f"{row['measured'] / 1e9:.3f} GB  ratio {row['predicted']['total'] / row['measured']:.3f}",
            flush=True,
        )
    if args.result:
        result = {"command": "python -m benchmarks.tuning_memory", "environment": environment_info(), "rows": rows}
        Path(args.result).write_text(json.dumps(result, indent=1) + "\n")


def measure(dtype_name: str, start: int) -> dict:
    """Predicted parts and measured peak, in bytes, of one tuning."""
    dtype = getattr(torch, dtype_name)
    config = recipe()
    shape = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    planned = plan_pruning(shape, config, dtype=dtype).cuts[start]
    small = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=12, num_attention_heads=4
    )
    tune(small, dtype, planned.segment, config)  # what the libraries allocate once is not the model's
    gc.collect()
    before = resident()
    with Watch() as watch:
        tune(shape, dtype, planned.segment, config)
    return {
        "dtype": dtype_name,
        "segment": planned.segment.to_list(),
        "predicted": planned.tuning.to_dict(),
        "measured": watch.peak - before,
    }


def tune(shape: LlamaConfig, dtype: torch.dtype, segment: LayerSegment, config: CLPConfig) -> None:
    """Build a random model, cut it, and tune it on random tokens."""
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(shape, dtype=dtype).eval()
    text = config.calibration
    train, validation = (
        torch.randint(3, shape.vocab_size, (rows, text.sequence_length))
        for rows in (text.train_sequences, text.validation_sequences)
    )
    layers = endpoint_layers([segment], shape.num_hidden_layers)
    kept = kept_layers([segment], shape.num_hidden_layers)
    tune_layers(cut_model(dense, [segment]), dense, layers, train, validation, config.tuning, kept=kept, quiet=True)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watch:
    """Remembers the largest resident set while the block runs."""

    def __enter__(self) -> "Watch":
        self.peak, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.is_set():
            self.peak = max(self.peak, resident())
            time.sleep(0.002)


if __name__ == "__main__":
    main()
