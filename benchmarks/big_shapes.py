"""Plans for the large published shapes, each in a process of its own: seconds and peak memory of `prune --dry-run`.

    python -m benchmarks.big_shapes [RESULT.json]

Only configs are needed, and they are made from `docs/published_shapes.json`: no download, no weights, a few minutes on one
core. The figures are those of the whole command, imports included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.folders import ROOT

SHAPES = ROOT / "docs" / "published_shapes.json"
COMMAND = """
import resource, sys
from optimum_clp.commands.clp import main
status = main(["prune", "--model", sys.argv[1], "--dry-run", "--json", "--quiet"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
sys.exit(status)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", nargs="?", help="JSON file to write")
    args = parser.parse_args()
    rows = []
    print(f"{'shape':<12} {'parameters':>15} {'cut':>15} {'segments':>8} {'seconds':>8} {'peak MiB':>9}")
    for name, shape in json.loads(SHAPES.read_text(encoding="utf-8")).items():
        plan, seconds, peak = measure(shape["config"])
        assert plan["base_model"]["num_parameters"] == shape["num_parameters"]
        rows.append({"shape": name, "seconds": round(seconds, 2), "peak_rss_bytes": peak, **summary(plan)})
        print(
            f"{name:<12} {plan['base_model']['num_parameters']:>15,} {plan['cuts'][0]['num_parameters']:>15,} "
            f"{len(plan['cuts']):>8} {seconds:>8.1f} {peak / 2**20:>9.0f}",
            flush=True,
        )
    if args.result:
        # not before: a child's peak is at least what this process has in memory when it starts it
        from optimum_clp.report.environment import environment_info

        result = {"command": "python -m benchmarks.big_shapes", "environment": environment_info(), "rows": rows}
        Path(args.result).write_text(json.dumps(result, indent=1) + "\n")


def measure(shape: dict) -> tuple[dict, float, int]:
    """The plan of a shape, the command's wall-clock seconds and its peak resident bytes."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, folder],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - begin
    if done.returncode:
        sys.exit(done.stderr)
    peak = int(done.stderr.split()[-1]) * (1 if sys.platform == "darwin" else 1024)
    return json.loads(done.stdout), seconds, peak


def summary(plan: dict) -> dict:
    """A plan without its long lists: figures of the dense model, and the smallest and largest of all cuts."""
    base, cuts = plan["base_model"], plan["cuts"]
    totals = [cut["tuning"]["total"] for cut in cuts]
    return {
        "num_layers": base["num_layers"],
        "num_removed": plan["num_removed"],
        "num_segments": len(cuts),
        "num_parameters": base["num_parameters"],
        "bytes": base["bytes"],
        "layer_parameters": sorted(set(base["layer_parameters"])),
        "num_parameters_after": sorted({cut["num_parameters"] for cut in cuts}),
        "bytes_after": sorted({cut["bytes"] for cut in cuts}),
        "onnx_bytes": {kind: sorted({cut["onnx"][kind] for cut in cuts}) for kind in cuts[0]["onnx"]},
        "tuning_bytes": [min(totals), max(totals)],
        "tuning_of_first_segment": cuts[0]["tuning"],
        "tuning_of_last_segment": cuts[-1]["tuning"],
    }


if __name__ == "__main__":
    main()
