"""How fast are our files beside llama.cpp's, onnxruntime-genai and PyTorch, on a real model, dense and cut?

    OMP_NUM_THREADS=1 python -m benchmarks.edge.against_llama --rounds 9 --out OUT.json dense=FOLDER,GGUF cut=FOLDER,GGUF

FOLDER holds a checkpoint and its `onnx/` files (`optimum-clp export`); GGUF is a folder or prefix of llama.cpp's files of the same weights,
`PREFIX-Q4_0.gguf` and so on (`gguf_files.py` makes them). A prompt of 256 tokens, then 63 steps of one token, greedily. All ways to run a
model are loaded in processes of their own (`runners.py`) and asked in turn, a piece at a time: each round is one run of every one, in an order
that is drawn anew. What is told is the median of the ratios of two that ran in the same round, with the quartiles: on a machine that does other
work a single time says little, and such ratios say what they can. `--clock processor` counts the processor's time of the process instead of the
time that passes, which other processes disturb less; with one thread both are the same on a quiet machine.

Needs `llama-cpp-python` (from its sdist, with `CMAKE_ARGS=-DGGML_NATIVE=ON`, or its kernels are not the processor's own) and `onnxruntime-genai`.
"""

import argparse
import json
import random
import statistics
from pathlib import Path

from benchmarks import markdown
from benchmarks.edge.speed import Runner, Variant
from optimum_clp.precisions import PRECISIONS
from optimum_clp.report.environment import environment_info

GGUF = ("Q4_0", "Q4_K_M", "Q8_0")
# our file, and what it is set against: the file of nearest quality, what runs the same file, and PyTorch
PAIRS = {
    "int4": ("llama.cpp Q4_0", "llama.cpp Q4_K_M", "genai int4", "PyTorch"),
    "int8": ("llama.cpp Q8_0", "genai int8", "PyTorch"),
}


def variants(name: str, folder: Path, gguf: str) -> list[Variant]:
    """All ways to run a model."""
    found = [Variant(name, "PyTorch", "", "eager", folder, "model.safetensors", 1)]
    for weights in PAIRS:
        file = f"onnx/{PRECISIONS[weights].onnx_file}"
        found += [
            Variant(name, f"ours {weights}", "", "ours", folder, file, 1),
            Variant(name, f"genai {weights}", "", "genai", folder, file, 1),
        ]
    prefix = Path(gguf)
    return found + [
        Variant(name, f"llama.cpp {kind}", "", "llama", prefix.parent, f"{prefix.name}-{kind}.gguf", 1)
        for kind in GGUF
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER,GGUF")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=("passing", "processor"), default="passing")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    asked = []
    for model in args.models:
        name, _, where = model.partition("=")
        folder, _, gguf = where.partition(",")
        asked += variants(name, Path(folder), gguf)
    content = {
        "clock": args.clock,
        "threads": args.threads,
        "environment": environment_info("cpu"),
        "rounds": measure(asked, args.threads, args.rounds, args.clock),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    print(table(content))


def key(variant: Variant) -> str:
    return f"{variant.model}, {variant.weights}"


def measure(asked: list[Variant], threads: int, rounds: int, clock: str) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of each, a list over the rounds."""
    running = {key(variant): Runner(variant, threads) for variant in asked}
    found: dict[str, dict[str, list[float]]] = {name: {"prompt": [], "decode": []} for name in running}
    order, drawn = list(running), random.Random(0)
    for number in range(rounds + 1):
        drawn.shuffle(order)
        for name in order:
            answer = running[name].run()
            if number:  # the first is a warm-up
                times = answer["processor"] if clock == "processor" else answer
                found[name]["prompt"].append(times["prefill"])
                found[name]["decode"].append(times["decode"])
        print(f"round {number}", flush=True)
    for runner in running.values():
        runner.close()
    return found


def table(content: dict) -> str:
    """Medians of the ratios, and their quartiles."""
    rounds = content["rounds"]
    rows = [["ours / it, tokens per second", "prompt", "decoding"]]
    for name in dict.fromkeys(each.partition(", ")[0] for each in rounds):
        for weights, others in PAIRS.items():
            ours = rounds[f"{name}, ours {weights}"]
            for other in others:
                it = rounds[f"{name}, {other}"]
                rows.append(
                    [
                        f"{name}, {weights} / {other}",
                        *(ratio(ours[speed], it[speed]) for speed in ("prompt", "decode")),
                    ]
                )
    names = {each.partition(", ")[0] for each in rounds}
    if {"dense", "cut"} <= names:
        for weights in PAIRS:
            cut, dense = (rounds[f"{name}, ours {weights}"] for name in ("cut", "dense"))
            rows.append(
                [f"cut / dense, {weights}", *(ratio(cut[speed], dense[speed]) for speed in ("prompt", "decode"))]
            )
    return markdown.table(rows)


def ratio(above: list[float], below: list[float]) -> str:
    each = [a / b for a, b in zip(above, below, strict=True)]
    low, middle, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
