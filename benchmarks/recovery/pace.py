"""Tokens of fresh text that a healing by the defaults uses in a minute, in two checkouts of this project, run in turns.

    OMP_NUM_THREADS=1 python -m benchmarks.recovery.pace --model MODEL --cut START STOP --checkouts OLD NEW [--rows 64] [--rounds 3]

Counted is all that `tune` does: text written by the dense model, its pass over it, a closed-form start where there is one,
all gradient steps, validation. Each run is a process of its own with an empty cache, and takes the rows that it is given and
its checkout's defaults for everything else. CPU seconds, so that others may use the machine; ratios are of runs that
followed one another.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# run by either checkout: nothing in it may be newer than the older one
HEAL = """
import json, sys, time
from optimum_clp import CLPConfig, CLPPruner, LayerSegment
model, start, stop, rows, cache = sys.argv[1:]
text = {"train_sequences": int(rows), "validation_sequences": 8, "test_sequences": 2, "cache_dir": cache}
pruner = CLPPruner.from_pretrained(model, quiet=True)
pruner.config = CLPConfig(0.2, calibration=text)
pruner.cut([LayerSegment(int(start), int(stop))])
wall, cpu = time.perf_counter(), time.process_time()
result = pruner.tune()
print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu,
                  "loss": result.best_validation_loss, "tokens": int(rows) * 256}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--cut", nargs=2, required=True, metavar=("START", "STOP"))
    parser.add_argument("--checkouts", nargs=2, type=Path, required=True, metavar=("OLD", "NEW"))
    parser.add_argument("--rows", type=int, default=64, help="of 256 tokens, that are tuned on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--result", type=Path, help="JSON file to write")
    args = parser.parse_args()
    rounds = []
    for number in range(args.rounds):
        found = {}
        # whoever comes first may find another machine than whoever comes second
        for place in (0, 1) if number % 2 == 0 else (1, 0):
            name = ("old", "new")[place]
            found[name] = heal(args.checkouts[place], args.model, args.cut, args.rows)
            print(f"round {number}, {name}: {figures(found[name])}", flush=True)
        rounds.append(found)
        if args.result is not None:
            args.result.write_text(json.dumps(rounds, indent=1) + "\n")
    ratios = [each["old"]["cpu"] / each["new"]["cpu"] for each in rounds]
    shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"tokens per minute, new over old: {statistics.median(ratios):.2f} ({shown})")


def heal(checkout: Path, model: str, cut: list[str], rows: int) -> dict[str, Any]:
    """What one healing took, by the code of a checkout."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-W", "ignore", "-c", HEAL, str(Path(model).resolve()), *cut, str(rows), cache]
        environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
        done = subprocess.run(command, cwd=cache, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def figures(run: dict[str, Any]) -> str:
    pace = 60 * run["tokens"] / run["cpu"]
    return (
        f"{run['cpu']:.0f} CPU seconds ({run['wall']:.0f} by the clock), {pace:,.0f} tokens/min, KL {run['loss']:.3f}"
    )


if __name__ == "__main__":
    main()
