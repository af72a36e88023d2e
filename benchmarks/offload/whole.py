"""A whole run, from `prune` to an int4 ONNX file, in a process that may hold less than the model, and in a control group that allows no more.

    OMP_NUM_THREADS=1 python -m benchmarks.offload.whole MODEL OUTPUT [--max-memory 1536MiB] [--limit 2560MiB] [--result FILE]

MODEL is what `benchmarks.offload.model` wrote. Its files are forgotten by the system's cache first. `--limit` makes a control group of that
many bytes, in which the cache of what this process and its children read counts too; it takes a cgroup file system that is writable, as root's
is in many containers, and is refused where it is not. FILE is written anew behind each stage: the same command goes on where an
interrupted search or tuning was, and `starts` says how often it was given. Needs Linux.

For each stage: the peaks of what this process holds for itself (`RssAnon`), of what its children do (those that compare ONNX files), and of
both together; bytes that the disk was asked for; seconds, and those of the processor, children included.
"""

import argparse
import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from benchmarks.offload.export import digest
from benchmarks.offload.stages import SAMPLE_SECONDS, bytes_read, forget
from optimum_clp import CLPConfig, CLPPruner
from optimum_clp import output_folder as output
from optimum_clp.configuration.sizes import size_in_bytes

_GROUPS = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
)


class Stages:
    """What each stage of a run takes; the work between two of them is the outer one's.

    Args:
        file (`Path` or `None`): Written anew whenever a stage ends.
        found (`dict`): What is written, with the stages under `stages`.
    """

    def __init__(self, file: Path | None, found: dict[str, Any]):
        self.file, self.found = file, found
        self._open: list[str] = []
        self._over = threading.Event()
        self._mark = self._now()

    def __enter__(self) -> "Stages":
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._over.set()
        self._thread.join()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A block is this stage's, but for the stages within it."""
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()
            if self.file is not None:
                self.file.write_text(json.dumps(self.found, indent=1))

    def _count(self) -> None:
        now = self._now()
        if self._open:
            taken = self._figures(self._open[-1])
            for name, before, after in zip(("read_mb", "seconds", "cpu_seconds"), self._mark, now, strict=True):
                taken[name] = round(taken[name] + after - before, 1)
        self._mark = now

    def _figures(self, stage: str) -> dict[str, float]:
        names = ("private_mb", "children_private_mb", "together_mb", "read_mb", "seconds", "cpu_seconds")
        return self.found["stages"].setdefault(stage, dict.fromkeys(names, 0))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        used = os.times()
        processor = used.user + used.system + used.children_user + used.children_system
        return bytes_read() / 1e6, time.perf_counter(), processor

    def _look(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            own, children = private_bytes(os.getpid()), sum(map(private_bytes, _children()))
            if not (stage := self._open[-1:]):
                continue
            taken = self._figures(stage[0])
            seen = {"private_mb": own, "children_private_mb": children, "together_mb": own + children}
            for name, size in seen.items():
                taken[name] = max(taken[name], round(size / 1e6))


def _children() -> list[int]:
    with contextlib.suppress(psutil.Error):
        return [child.pid for child in psutil.Process().children(recursive=True)]
    return []


def private_bytes(process: int) -> int:
    """`RssAnon` of a process; 0 if it has ended."""
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


@contextlib.contextmanager
def limited(limit: int | None) -> Iterator[dict[str, int]]:
    """A block in a control group of so many bytes; what the group's peak was is there afterwards.

    Raises:
        SystemExit: If no control group can be made here.
    """
    found: dict[str, int] = {}
    if limit is None:
        yield found
        return
    for root, name, peak in _GROUPS:
        group = root / f"optimum-clp-{os.getpid()}"
        try:
            group.mkdir()
            (group / name).write_text(str(limit))
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        try:
            yield found
        finally:
            with contextlib.suppress(OSError, ValueError):
                found |= {"limit_mb": limit // 10**6, "peak_mb": int((group / peak).read_text()) // 10**6}
            (root / "cgroup.procs").write_text(str(os.getpid()))
            group.rmdir()
        return
    raise SystemExit(
        "--limit: no control group can be made here (is the cgroup file system writable, and are you root?)"
    )


def configurations() -> list[CLPConfig]:
    return [recipe("text.txt", "cache", None, "rtn")]


def recipe(text: str, cache: str, max_memory: str | None, method: str) -> CLPConfig:
    """All stages, with little text."""
    return CLPConfig(
        0.2,
        max_memory=max_memory,
        calibration={
            "dataset": text,
            "self_written_share": 0.0,
            "sequence_length": 64,
            "train_sequences": 8,
            "validation_sequences": 2,
            "test_sequences": 4,
            "cache_dir": cache,
        },
        search={"num_sequences": 4, "batch_size": 4},
        tuning={"init": "least_squares", "hidden_epochs": 1, "epochs": 1, "batch_size": 4},
        quantization={"weights": ["int4"], "method": method, "calibration_sequences": 8},
        evaluation={"generation": False},
    )


def run(model: Path, folder: Path, config: CLPConfig, stages: Stages) -> CLPPruner:
    """`prune`, each stage of it apart."""
    with stages.stage("load"):
        pruner = CLPPruner.from_pretrained(model, quiet=True)
    with contextlib.ExitStack() as watched:
        # what `prune` calls is watched where it is called
        names = {"search": "search", "cut": "cut", "tune": "tuning", "save_pretrained": "checkpoint"}
        of_pruner = [(pruner, name, stage) for name, stage in names.items()]
        within = [(output, "export_onnx", "export"), (output, "measure_outcome", "evaluation")]
        for owner, name, stage in [*of_pruner, *within]:
            watched.enter_context(mock.patch.object(owner, name, _within(stages, stage, getattr(owner, name))))
        with stages.stage("before and between"):
            pruner.prune(config, folder, overwrite=True)
    return pruner


def _within(stages: Stages, stage: str, work: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        with stages.stage(stage):
            return work(*args, **kwargs)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--max-memory")
    parser.add_argument("--limit", help="bytes of a control group, such as 2560MiB")
    parser.add_argument("--method", default="rtn", help="how weights are rounded")
    parser.add_argument("--result", type=Path)
    args = parser.parse_args()
    size = sum(file.stat().st_size for file in args.model.glob("*.safetensors"))
    found: dict[str, Any] = {"gigabytes": round(size / 1e9, 2), "max_memory": args.max_memory, "method": args.method}
    earlier = json.loads(args.result.read_text()) if args.result is not None and args.result.exists() else {}
    found |= {"starts": 1 if "sha256" in earlier else earlier.get("starts", 0) + 1, "stages": {}}
    cache = args.output.with_name(args.output.name + "-cache")
    config = recipe(str(args.model / "text.txt"), str(cache), args.max_memory, args.method)
    forget(args.model)
    with limited(None if args.limit is None else size_in_bytes(args.limit)) as group:
        with Stages(args.result, found) as stages:
            pruner = run(args.model, args.output, config, stages)
    found |= {"control_group": group or None, "segments": list(map(str, pruner.segments or ()))}
    found["failures"] = pruner.report.failures
    files = sorted([*args.output.glob("*.safetensors"), *(args.output / "onnx").glob("*.onnx*")])
    found["sha256"] = {str(file.relative_to(args.output)): digest(file) for file in files}
    if args.result is not None:
        args.result.write_text(json.dumps(found, indent=1))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
