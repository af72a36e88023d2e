"""Private memory, bytes read and seconds of each stage of a run, with and without a bound on memory.

    OMP_NUM_THREADS=1 python -m benchmarks.offload.stages MODEL OUTPUT [--max-memory 1GB]

MODEL is what `benchmarks.offload.model` wrote. Its files are forgotten by the system's cache first. Prints one line of JSON. Needs Linux.
What is the process's own (`RssAnon`) is looked at every 10 ms, as are the pages of files that are mapped (`RssFile`): the kernel takes those
back when it needs room. Seconds of the processor are those of this process alone: on a machine with other work they say more. `read` is what the disk was asked for (`read_bytes` of `/proc/self/io`): what the cache still has is not read again.
"""

import argparse
import gc
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optimum_clp import CLPConfig, CLPPruner

SAMPLE_SECONDS = 0.01


class Watched:
    """Peaks of this process's memory while a block runs, what it read, and how long it took."""

    def __enter__(self) -> "Watched":
        self.peaks = {"RssAnon": 0, "RssFile": 0}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._read, self._begin, self._cpu = bytes_read(), time.perf_counter(), time.process_time()
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.seconds, self.read = time.perf_counter() - self._begin, bytes_read() - self._read
        self.cpu = time.process_time() - self._cpu
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            for name, peak in self.peaks.items():
                now = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
                assert now is not None
                self.peaks[name] = max(peak, int(now[1]) * 1024)
            if self._over.wait(SAMPLE_SECONDS):
                return

    def to_dict(self) -> dict[str, float]:
        return {
            "private_mb": round(self.peaks["RssAnon"] / 1e6),
            "mapped_mb": round(self.peaks["RssFile"] / 1e6),
            "read_mb": round(self.read / 1e6),
            "seconds": round(self.seconds, 1),
            "cpu_seconds": round(self.cpu, 1),
        }


def bytes_read() -> int:
    found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def forget(folder: Path) -> None:
    """Let the system's cache forget the weights of a folder."""
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def configurations() -> list[CLPConfig]:
    return [recipe("text.txt", "cache", None)]


def recipe(text: str, cache: str, max_memory: str | None) -> CLPConfig:
    return CLPConfig(
        0.2,
        max_memory=max_memory,
        calibration={
            "dataset": text,
            "self_written_share": 0.0,
            "sequence_length": 64,
            "train_sequences": 16,
            "validation_sequences": 4,
            "test_sequences": 4,
            "cache_dir": cache,
        },
        search={"num_sequences": 8, "batch_size": 4},
        tuning={"init": "least_squares", "hidden_epochs": 1, "epochs": 1, "batch_size": 4},
        export={"enabled": False},
        evaluation={"generation": False},
    )


def digest(folder: Path) -> str:
    """Of all weights of a checkpoint."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as stream:
            while part := stream.read(2**24):
                found.update(part)
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--max-memory")
    args = parser.parse_args()
    forget(args.model)
    stages: dict[str, Any] = {}
    made: dict[str, CLPPruner] = {}
    config = recipe(str(args.model / "text.txt"), str(args.output.with_name("cache")), args.max_memory)

    def measured(name: str, work: Callable[[], Any]) -> None:
        gc.collect()
        with Watched() as watched:
            work()
        stages[name] = watched.to_dict()

    measured("load", lambda: made.update(it=CLPPruner.from_pretrained(args.model, quiet=True)))
    pruner = made["it"]
    measured("search", lambda: pruner.search(config))
    measured("cut", pruner.cut)
    measured("tune", pruner.tune)
    measured("save", lambda: pruner.save_pretrained(args.output, overwrite=True))
    size = sum(file.stat().st_size for file in args.model.glob("*.safetensors"))
    found = {"gigabytes": round(size / 1e9, 2), "max_memory": args.max_memory, "stages": stages}
    found |= {"segments": list(map(str, pruner.segments or ())), "sha256": digest(args.output)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
