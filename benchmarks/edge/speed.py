"""Bytes, seconds to load, memory, and tokens for each second: our files, onnxruntime-genai's own builder's, and PyTorch.

    python -m benchmarks.edge.speed [--threads 1] [--rounds 5] [--output RESULT.json]

Of `speed100m` (`benchmarks/models.py`, 119 million weights) and of what is left of it when 3 of its 15 layers are cut. A
prompt of 256 tokens, then 63 steps of one token, greedily. Every way to run a model is a process of its own
(`runners.py`), started anew in each round, in which it runs three times: the first is not counted. Rounds take turns, so a
ratio is of two processes that ran one after the other; the table has medians, and the ratios with their range. Compiled
models live through all rounds. In the rows "(last logits)" the prompt's last position alone gets logits, as `generate()`
asks for; the file of onnxruntime-genai's builder is made with `prune_lm_head` there.

onnxruntime-genai's builder gets the settings that our files have (blocks of 32, `accuracy_level` 4, embedding and head
shared), and in a second row its own. Before anything is timed, the float files must choose the same tokens.

Needs `onnxruntime-genai` and a C++ compiler (for `torch.compile`). Models and files are kept in `benchmarks/.cache/edge`.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM

from benchmarks import markdown
from benchmarks.folders import CACHE, ROOT
from benchmarks.models import speed100m
from optimum_clp import ExportConfig, LayerSegment, QuantizationConfig
from optimum_clp.exporters.export import export_onnx, write_runtime_configs
from optimum_clp.precisions import PRECISIONS
from optimum_clp.report.environment import environment_info
from optimum_clp.surgery.cut import cut_model

HERE = Path(__file__).parent
FOLDER = CACHE / "edge"
CUT = LayerSegment(6, 9)
LAST = "dense (last logits)"
PROMPT, NEW, RUNS = 256, 64, 3
FILES = {name: precision.onnx_file for name, precision in PRECISIONS.items()}
SAME = ["shared_embeddings=true", "int4_block_size=32", "int4_accuracy_level=4"]
BUILDER_PRECISIONS = {"float32": "fp32", "int8": "int8", "int4": "int4"}


EVERY, LAST_ALONE = ExportConfig(), ExportConfig(logits_to_keep=1)
ROUNDING = QuantizationConfig(method="rtn")


def configurations() -> list:
    return [EVERY, LAST_ALONE, ROUNDING]


@dataclass(frozen=True)
class Variant:
    """One row: a model, its weights, who made the file, and what runs it."""

    model: str
    weights: str
    maker: str
    runtime: str
    folder: Path
    file: str
    kept: int = 0

    @property
    def key(self) -> str:
        return f"{self.model}, {self.weights}, {self.maker}"

    def bytes(self) -> int:
        file = self.folder / self.file
        return sum(path.stat().st_size for path in (*file.parent.glob(f"{file.name}*"),))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "speed.json")
    args = parser.parse_args()
    variants = prepare()
    results = measure(variants, args.threads, args.rounds)
    content = {
        "command": f"python -m benchmarks.edge.speed --threads {args.threads} --rounds {args.rounds}",
        "environment": environment_info("cpu"),
        "threads": args.threads,
        "variants": results,
    }
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(content, indent=1) + "\n")
    print(table(content))
    plot(content, args.output.with_suffix(".png"))


def prepare() -> list[Variant]:
    """Models and files, made where they are not there yet."""
    variants = []
    for name in ("dense", "cut"):
        checkpoint = speed100m() if name == "dense" else cut_checkpoint()
        ours = exported(checkpoint, FOLDER / f"{name}-ours", EVERY)
        variants.append(Variant(name, "float32", "PyTorch", "eager", checkpoint, "model.safetensors"))
        variants.append(Variant(name, "float32", "torch.compile", "compiled", checkpoint, "model.safetensors"))
        for weights, file in FILES.items():
            variants.append(Variant(name, weights, "ours", "genai", ours, f"onnx/{file}"))
            variants.append(
                Variant(name, weights, "builder", "genai", built(checkpoint, name, weights, SAME), "model.onnx")
            )
            variants.append(Variant(name, weights, "ours, generate()", "ours", ours, f"onnx/{file}"))
        own = built(checkpoint, name, "int4", [])
        variants.append(Variant(name, "int4", "builder, its own settings", "genai", own, "model.onnx"))
    return [*variants, *last_logits()]


def last_logits() -> list[Variant]:
    """The dense model, with logits of the prompt's last position alone."""
    checkpoint, every = speed100m(), FOLDER / "dense-ours"
    last = exported(checkpoint, FOLDER / "dense-last-ours", LAST_ALONE)
    variants = [
        Variant(LAST, "float32", "PyTorch", "eager", checkpoint, "model.safetensors", 1),
        Variant(LAST, "float32", "torch.compile", "compiled", checkpoint, "model.safetensors", 1),
    ]
    for weights, file in FILES.items():
        theirs = built(checkpoint, "dense-last", weights, [*SAME, "prune_lm_head=true"])
        variants += [
            Variant(LAST, weights, "ours", "genai", last, f"onnx/{file}", 1),
            Variant(LAST, weights, "builder", "genai", theirs, "model.onnx", 1),
            Variant(LAST, weights, "ours, generate()", "ours", every, f"onnx/{file}", 1),
        ]
    return variants


def exported(checkpoint: Path, folder: Path, export: ExportConfig) -> Path:
    """A folder with our files."""
    if not (folder / "genai_config.json").is_file():
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
        write_runtime_configs(folder, model, export_onnx(model, folder, export, quantization=ROUNDING))
    return folder


def cut_checkpoint() -> Path:
    folder = FOLDER / "cut"
    if not (folder / "config.json").is_file():
        dense = AutoModelForCausalLM.from_pretrained(speed100m())
        shutil.copytree(speed100m(), folder)
        cut_model(dense, [CUT]).save_pretrained(folder)
    return folder


def built(checkpoint: Path, name: str, weights: str, options: list[str]) -> Path:
    """A folder that onnxruntime-genai's builder has made."""
    folder = FOLDER / f"{name}-builder-{weights}{'' if options else '-own'}"
    if not (folder / "genai_config.json").is_file():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-o", folder]
        command += ["-p", BUILDER_PRECISIONS[weights], "-e", "cpu", "-c", FOLDER / "builder-cache"]
        command += ["--extra_options", *options] if options else []
        subprocess.run(
            [str(part) for part in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    return folder


class Runner:
    """A process of `runners.py`."""

    def __init__(self, variant: Variant, threads: int):
        arguments = [variant.runtime, variant.folder, variant.file, threads, PROMPT, NEW, variant.kept]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.edge.runners", *map(str, arguments)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.load_seconds = self.answer()["load_seconds"]

    def run(self) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()


def measure(variants: list[Variant], threads: int, rounds: int) -> dict[str, dict]:
    found: dict[str, dict] = {
        v.key: {"bytes": v.bytes(), "load_seconds": [], "prefill": [], "decode": [], "peak_memory": 0}
        for v in variants
    }
    compiled = {v.key: Runner(v, threads) for v in variants if v.runtime == "compiled"}
    for number in range(rounds):
        begin = time.perf_counter()
        for variant in variants:
            runner = compiled.get(variant.key) or Runner(variant, threads)
            record = found[variant.key]
            answers = [runner.run() for _ in range(RUNS)][1:]
            record["load_seconds"].append(runner.load_seconds)
            for speed in ("prefill", "decode"):
                record[speed].append(statistics.median(answer[speed] for answer in answers))
            record["peak_memory"] = max(record["peak_memory"], answers[-1]["peak_memory"])
            record["tokens"] = answers[-1]["tokens"]
            if variant.key not in compiled:
                runner.close()
        if number == 0:
            check_tokens(found)
        print(f"round {number}: {time.perf_counter() - begin:.0f} s", flush=True)
    for runner in compiled.values():
        runner.close()
    return found


def check_tokens(found: dict[str, dict]) -> None:
    """Models in float32 must say the same, whoever made the file and whatever runs it."""
    for model in ("dense", "cut", LAST):
        tokens = {key: record["tokens"] for key, record in found.items() if key.startswith(f"{model}, float32")}
        if len({tuple(chosen) for chosen in tokens.values()}) != 1:
            raise SystemExit(f"not the same tokens: {tokens}")


def table(content: dict) -> str:
    rows = [["model", "weights", "file", "MB", "load, s", "peak, MB", "prompt, tokens/s", "decoding, tokens/s"]]
    variants = content["variants"]
    for key, record in variants.items():
        speeds = (f"{statistics.median(record[speed]):.1f}" for speed in ("prefill", "decode"))
        rows.append([*key.split(", ", 2), f"{record['bytes'] / 1e6:.1f}",
                     f"{statistics.median(record['load_seconds']):.2f}", f"{record['peak_memory'] / 1e6:.0f}",
                     *speeds])  # fmt: skip
    compared = [["ratio", "prompt", "decoding"]]
    for above, below in ratios():
        cells = []
        for speed in ("prefill", "decode"):
            pairs = zip(variants[above][speed], variants[below][speed], strict=True)
            each = [a / b for a, b in pairs]
            cells.append(f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})")
        compared.append([f"{above} / {below}", *cells])
    lines = [markdown.table(rows), markdown.table(compared)]
    for weights in FILES:
        sizes = [variants[f"{model}, {weights}, ours"]["bytes"] for model in ("dense", "cut")]
        lines.append(f"Bytes of a token, dense / cut, {weights}: {sizes[0] / sizes[1]:.3f}")
    return "\n".join(lines)


def ratios() -> list[tuple[str, str]]:
    found = []
    for model in ("dense", "cut", LAST):
        for weights in FILES:
            found.append((f"{model}, {weights}, ours", f"{model}, {weights}, builder"))
        if model != LAST:
            found.append((f"{model}, int4, ours", f"{model}, int4, builder, its own settings"))
        for weights in FILES:
            found += [
                (f"{model}, {weights}, ours", f"{model}, float32, {maker}") for maker in ("PyTorch", "torch.compile")
            ]
    found += [(f"cut, {weights}, ours", f"dense, {weights}, ours") for weights in FILES]
    return found + [(f"{LAST}, {weights}, ours", f"dense, {weights}, ours") for weights in FILES]


def plot(content: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    variants = content["variants"]
    keys = [key for key in variants if "generate" not in key and not key.startswith(LAST)]
    figure, axes = plt.subplots(1, 2, figsize=(11, 6), sharey=True)
    colors = {"ours": "tab:blue", "builder": "tab:orange", "builder, its own settings": "tab:red"}
    for axis, speed, title in zip(axes, ("prefill", "decode"), ("Prompt", "Decoding"), strict=True):
        for place, key in enumerate(reversed(keys)):
            values = variants[key][speed]
            middle = statistics.median(values)
            spread = [[middle - min(values)], [max(values) - middle]]
            maker = key.split(", ", 2)[2]
            axis.barh(place, middle, xerr=spread, color=colors.get(maker, "tab:gray"), error_kw={"elinewidth": 0.8})
        axis.set_title(f"{title}, tokens/s")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(
        range(len(keys)), [f"{key} ({variants[key]['bytes'] / 1e6:.0f} MB)" for key in reversed(keys)], fontsize=8
    )
    figure.suptitle(f"speed100m, CPU, {content['threads']} thread(s), median and range")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
