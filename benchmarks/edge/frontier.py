"""The frontier of file size and quality: our ONNX files beside llama.cpp's formats, dense and cut.

    OMP_NUM_THREADS=1 python -m benchmarks.edge.frontier --data DATA --out OUT --off-grid dense=MODEL cut20=FOLDER

The first model is the one that KL is to; the others are cut from it (folders that `optimum-clp prune` wrote). Ours are the
files of `export`, run by ONNX Runtime, at several budgets of bits; llama.cpp's are its own rounding of the same weights,
without an importance matrix and, by `--imatrix`, with one from the rows that our rounding sees, dequantized and run in PyTorch,
so that nothing is lost there to int8 activations, as it is where llama.cpp runs them. So ours are measured with float activations
too (`texts_float_activations`); `builder` are the files of onnxruntime-genai's own model builder (where it is installed), run as
ours are. Bytes are those of the weights and graph, without tokenizer. DATA holds the texts and tasks of `recovery/chat_model/evaluation.py`.

`--off-grid` moves every linear weight by uniform noise of half a step of Q4_1, and the table by half a step of Q8_0, from a fixed
seed: the weights that `benchmarks.smollm2` makes lie on these grids, and the formats and their finer relatives would give them back
without a loss. A cut
model's layers are moved as they are in the dense model, by what its report says of the cut.

OUT gets one JSON file for each model and format; what is there is not measured again. `--six-bits` are budgets that may give 6 bits too. `--speeds` adds to each of them the speed
of the file on one thread, in tokens for each second of the processor: a prompt of 256 tokens and 63 steps, llama.cpp's files by
`llama-cpp-python`, all others by ONNX Runtime. Ours are rounded to nearest there, which takes seconds and runs alike. `--table OUT`
prints the table and draws `OUT/frontier.png`.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from benchmarks import markdown
from benchmarks.edge.gguf_files import FORMATS, gguf_names, load_gguf, rounded_gguf, write_gguf
from benchmarks.edge.importance import mean_squares
from benchmarks.edge.speed import Runner, Variant
from benchmarks.recovery.chat_model.evaluation import TASKS, Judge, Size
from benchmarks.recovery.chat_model.text import Text, written_text
from optimum_clp import OnnxCausalLM
from optimum_clp.calibration.rows import tokenize_dataset
from optimum_clp.configuration.stages import QuantizationConfig
from optimum_clp.exporters.export import export_onnx
from optimum_clp.report.environment import environment_info
from optimum_clp.report.report import CLPReport

# of the int4 file; by default all of its matrices have 4 bits and a scale for 32 of them
BUDGETS = (4.5, 4.75, 5.5, 6.25)
INT8 = "int8"
# behind the name of a format of llama.cpp
IMATRIX = "imatrix"
# behind the name of a budget
SIX_BITS = "six"
# whose lines the plot has, and how
OURS_OF_SIX, LLAMA_OF_MATRIX = "ours, 6 bits too", f"llama.cpp, {IMATRIX}"
STYLES = {"ours": "o-", OURS_OF_SIX: "P-.", "llama.cpp": "s:", LLAMA_OF_MATRIX: "D--", "builder": "^:"}
# options of onnxruntime-genai's builder: its own, and the best of those that its help names, in our blocks
BUILDER = {
    "builder": [],
    "builder k_quant": ["algo_config=k_quant_last", "block_size=32", "is_symmetric=false"],
    "builder k_quant mixed": ["algo_config=k_quant_mixed", "block_size=32", "is_symmetric=false"],
}
TEXT_SEED, TEST_SEED = 0, 1000
# runs of a file, and one before that is not counted; parts of a run, and what `runners.py` calls them
SPEED_RUNS = 5
PARTS = {"prompt": "prefill", "decoding": "decode"}


def configurations() -> list[QuantizationConfig]:
    return [settings(name) for name in (*map(our_name, (*BUDGETS, INT8)), *map(with_six_bits, BUDGETS[1:]))]


def our_name(plan: float | str) -> str:
    return plan if isinstance(plan, str) else f"int4 {plan:g}"


def with_six_bits(budget: float) -> str:
    return f"{our_name(budget)} {SIX_BITS}"


@dataclass(frozen=True)
class Built:
    """A file.

    Args:
        facts (`dict[str, Any]`): Of its size and how it was made.
        runs (`Callable`): What computes its logits, as a causal language model of transformers does.
        runtime (`str`): What runs it fast, of `runners.py`.
        folder (`Path`): Where it lies.
        file (`str`): In this folder.
        exact (`Callable` or `None`): The same weights, with activations in float where `runs` rounds them to int8.
    """

    facts: dict[str, Any]
    runs: Any
    runtime: str
    folder: Path
    file: str
    exact: Any = None


class BuilderFile:
    """A file of onnxruntime-genai's builder, whose inputs and names are not those of ours: the logits of whole rows.

    Args:
        file (`Path`): ONNX.
        config (`PretrainedConfig`): The model's.
    """

    def __init__(self, file: Path, config: PretrainedConfig):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        heads = config.num_key_value_heads
        self.cache = heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> CausalLMOutput:
        rows, length = input_ids.shape
        heads, width = self.cache
        given = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        given["position_ids"] = np.arange(length)[None].repeat(rows, 0)
        empty = np.zeros((rows, heads, 0, width), np.float32)
        feeds = {each.name: given.get(each.name, empty) for each in self.session.get_inputs()}
        return CausalLMOutput(logits=torch.from_numpy(self.session.run(["logits"], feeds)[0]))


def settings(name: str) -> QuantizationConfig:
    """Of one of our files."""
    kind, budget, six = (*name.split(), "", "")[:3]
    # 4.5 is what there is without a budget
    bits = None if budget in ("", "4.5") else float(budget)
    return QuantizationConfig(weights=[kind], bits_per_weight=bits, six_bits=six == SIX_BITS)


def main() -> None:
    args = parsed()
    if args.table is not None:
        records = [json.loads(file.read_text()) for file in sorted(args.table.glob("*.json"))]
        print(table(records))
        plot(records, args.table / "frontier.png")
        return
    names = [*map(our_name, (*args.budgets, INT8)), *map(with_six_bits, args.six_bits)]
    frontier = Frontier(args)
    for model in args.models:
        for name in [*names, *args.formats, *(f"{name} {IMATRIX}" for name in args.imatrix), *args.builder]:
            (frontier.measure_speed if args.speeds else frontier.measure)(model, name)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="NAME=FOLDER", help="the dense model first")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, metavar="OUT")
    parser.add_argument("--off-grid", action="store_true")
    parser.add_argument(
        "--budgets", nargs="*", type=float, default=BUDGETS, help="bits for a weight of our int4 files"
    )
    parser.add_argument("--six-bits", nargs="*", type=float, default=[], help="budgets that may give 6 bits too")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--imatrix", nargs="*", choices=FORMATS, default=[], help="formats with an importance matrix")
    parser.add_argument("--builder", nargs="*", choices=BUILDER, default=[])
    parser.add_argument("--speeds", action="store_true")
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--given", type=Path, metavar="FILE", help="text that every second calibration row is of")
    parser.add_argument("--rows", type=int, default=16, help="of each text")
    parser.add_argument("--examples", type=int, default=200, help="of each task; 0 for none")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=["lambada"])
    args = parser.parse_args()
    args.models = dict(model.split("=", 1) for model in args.models)
    if args.table is None and None in (args.data, args.out, *(args.models or [None])):
        parser.error("--data, --out and models, or --table")
    return args


class Frontier:
    """All files of some models, and the judge of them.

    Args:
        args (`argparse.Namespace`): The command line's.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.out, self.folders = args, args.out, args.models
        self.out.mkdir(parents=True, exist_ok=True)
        folder = next(iter(self.folders.values()))
        self.moves = noise_off_grid(load(folder)) if args.off_grid else {}
        self.dense = self._load(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(next(iter(self.folders.values())))
        if args.speeds:
            # a budget's sensitivities take a look at text, whatever it says
            self.calibration = torch.arange(2 * 64).reshape(2, 64)
            return
        self.calibration = self._text("calibration", TEXT_SEED, args.calibration_rows).tokens
        if args.given is not None:
            rows = len(self.calibration[1::2])
            given = tokenize_dataset(str(args.given), self.tokenizer, sequence_length=256, num_sequences=rows)
            self.calibration = self.calibration.clone()
            self.calibration[1::2] = given
        own = self._text("test", TEST_SEED, 2 * args.rows)
        size = Size(rows=args.rows, examples=args.examples)
        self.judge = Judge(self.dense, self.tokenizer, own, args.data, size, batch_size=4)
        self.judge.tasks = [task for task in self.judge.tasks if task.name in args.tasks]

    def _text(self, name: str, seed: int, rows: int) -> Text:
        file = self.out / f"text-{name}-{rows}.safetensors"
        options = {"num_rows": rows, "length": 256, "seed": seed, "batch_size": 64}
        return written_text(self.dense, self.tokenizer, file, **options)

    def measure(self, model: str, name: str) -> None:
        """One file of one model, unless it has been."""
        file = self._record_of(model, name)
        if file.is_file():
            return
        started = time.perf_counter()
        for built in self._build(name)(self.folders[model], name):
            record = {"model": model, "format": name, "ours": built.runtime == "ours" and name not in BUILDER}
            record |= built.facts | {"texts": self.judge.measure_texts(built.runs)}
            if built.exact is not None:
                record["texts_float_activations"] = self.judge.measure_texts(built.exact)
            if self.args.examples:
                record["tasks"] = self.judge.measure_tasks(built.runs)
            record |= {"seconds": time.perf_counter() - started, "environment": environment_info("cpu")}
            _write(file, record)

    def measure_speed(self, model: str, name: str) -> None:
        """The speed of a file, if it has been measured otherwise."""
        file = self._record_of(model, name)
        if not file.is_file() or "tokens_per_second" in (record := json.loads(file.read_text())):
            return
        for built in self._build(name)(self.folders[model], name):
            # one process at a time: what is compared is each one's own time of the processor
            runner = Runner(Variant(model, name, "", built.runtime, built.folder, built.file, 1), 1)
            answers = [runner.run()["processor"] for _ in range(SPEED_RUNS + 1)][1:]
            runner.close()
            found = {what: [answer[key] for answer in answers] for what, key in PARTS.items()}
            record["tokens_per_second"] = {
                what: dict(
                    zip(("median", "least", "most"), (statistics.median(each), min(each), max(each)), strict=True)
                )
                for what, each in found.items()
            }
            _write(file, record)

    def _record_of(self, model: str, name: str) -> Path:
        return self.out / f"{model}-{name.replace(' ', '-')}.json"

    def _build(self, name: str) -> Any:
        return self._llama if name.split()[0] in FORMATS else self._builder if name in BUILDER else self._ours

    def _load(self, folder: str) -> PreTrainedModel:
        model = load(folder)
        for name, weight in model.named_parameters():
            original = original_name(name, folder)
            if original in self.moves:
                weight.data += self.moves[original]
        return model

    def _ours(self, folder: str, name: str) -> Iterator[Built]:
        model = self._load(folder)
        with tempfile.TemporaryDirectory(dir=self.out) as target:
            started = time.process_time()
            # as `prune` exports: the dense model is the teacher, a dense one its own
            teacher = None if folder == next(iter(self.folders.values())) else self.dense
            quantization = settings(name)
            if self.args.speeds:
                quantization.method = "rtn"
            result = export_onnx(
                model, target, quantization=quantization, calibration=self.calibration, teacher=teacher
            )
            model.config.save_pretrained(target)
            written = result.files[-1]
            tuning = written.scale_tuning
            facts = {"bytes": written.bytes, "bits_per_weight": written.bits_per_weight}
            facts["scale_tuning"] = None if tuning is None else asdict(tuning)
            facts["export_cpu_seconds"] = time.process_time() - started
            runs, exact = (
                OnnxCausalLM.from_pretrained(target, file)
                for file in (written.file, with_float_activations(Path(target), written.file))
            )
            yield Built(facts, runs, "ours", Path(target), written.file, exact)

    def _builder(self, folder: str, name: str) -> Iterator[Built]:
        with tempfile.TemporaryDirectory(dir=self.out) as place:
            source, target = Path(place, "model"), Path(place, "onnx-model")
            self._load(folder).save_pretrained(source)
            self.tokenizer.save_pretrained(source)
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", target / "onnx"]
            options = ["--extra_options", *BUILDER[name]] if BUILDER[name] else []
            command += ["-p", "int4", "-e", "cpu", "-c", Path(place, "cache"), *options]
            subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
            (target / "config.json").write_bytes((source / "config.json").read_bytes())
            size = sum(file.stat().st_size for file in (target / "onnx").glob("model.onnx*"))
            runs = BuilderFile(target / "onnx" / "model.onnx", self.dense.config)
            yield Built({"bytes": size}, runs, "ours", target, "onnx/model.onnx")

    def _llama(self, folder: str, name: str) -> Iterator[Built]:
        model = self._load(folder)
        with tempfile.TemporaryDirectory(dir=self.out) as target:
            source, rounded = Path(target, "float.gguf"), Path(target, "rounded.gguf")
            write_gguf(model, source)
            kind, _, guided = name.partition(" ")
            rounded_gguf(source, rounded, kind, importance_of(model, self.calibration) if guided else None)
            size, types = load_gguf(model, rounded)
            yield Built({"bytes": size, "types": types}, model, "llama", rounded.parent, rounded.name)


def with_float_activations(folder: Path, file: str) -> str:
    """A second graph over the weights of one of our files, whose products are of float activations; its name."""
    model = onnx.load(folder / file, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    name = file.replace(".onnx", "_float_activations.onnx")
    onnx.save(model, folder / name)
    return name


def _write(file: Path, record: dict[str, Any]) -> None:
    file.write_text(json.dumps(record, indent=1) + "\n")


def load(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def importance_of(model: PreTrainedModel, rows: torch.Tensor) -> dict[str, np.ndarray]:
    """An importance matrix as llama.cpp's own tool collects it, by names in a GGUF file: of all linear layers but a tied head."""
    tied = model.get_output_embeddings() if model.config.tie_word_embeddings else None
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not tied}
    names = gguf_names(model)
    return {names[f"{name}.weight"]: values for name, values in mean_squares(model, linear, rows).items()}


def noise_off_grid(model: PreTrainedModel, seed: int = 0, block: int = 32) -> dict[str, torch.Tensor]:
    """For every linear weight, by name: noise within half a step of a 4-bit grid over its block's range.

    Of the table, which is the head too, and of a head of its own: of the grid of Q8_0.
    """
    generator = torch.Generator().manual_seed(seed)
    head, moves = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            blocks = module.weight.data.reshape(len(module.weight), -1, block)
            step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / 15
            noise = torch.rand(blocks.shape, generator=generator) - 0.5
            moves[f"{name}.weight"] = (noise * step).reshape(module.weight.shape)
    for name, weight in model.named_parameters():  # a tied one has the table's name
        if weight is head.weight or weight is model.get_input_embeddings().weight:
            blocks = weight.data.reshape(len(weight), -1, block)
            noise = torch.rand(blocks.shape, generator=generator) - 0.5
            moves[name] = (noise * blocks.abs().amax(-1, keepdim=True) / 127).reshape(weight.shape)
    return moves


def original_name(name: str, folder: str) -> str:
    """A weight's name in the dense model, if the folder's report tells of a cut."""
    if not Path(folder, "clp_report.json").is_file():
        return name
    cut = CLPReport.load(folder).cut or {}

    def original(match: re.Match) -> str:
        layer = int(match[0])
        for start, stop in sorted(cut.get("segments", ())):
            layer += (stop - start) * (layer >= start)
        return str(layer)

    return re.sub(r"(?<=layers\.)\d+", original, name, count=1)


def table(records: list[dict[str, Any]]) -> str:
    texts = list(records[0]["texts"])
    tasks = ["lambada"] if any("lambada" in record.get("tasks", {}) for record in records) else []
    speeds = list(PARTS) if any("tokens_per_second" in record for record in records) else []
    titles = [*(f"KL, {text}" for text in texts), *(f"PPL, {text}" for text in texts), *tasks]
    rows = [["model", "file", "MB", *titles, *(f"{part}, tokens/s" for part in speeds)]]
    for record in sorted(records, key=lambda r: (r["model"] != "dense", r["model"], r["bytes"])):
        figures = _figures(record["texts"])
        scores = [record.get("tasks", {}).get(task) for task in tasks]
        name = f"**ours, {record['format']}**" if record["ours"] else record["format"]
        last = ["" if score is None else f"{score['accuracy']:.3f}" for score in scores]
        speed = record.get("tokens_per_second", {})
        last += [f"{speed[part]['median']:.0f}" if speed else "" for part in speeds]
        size = f"{record['bytes'] / 1e6:.1f}"
        rows.append([record["model"], name, size, *figures, *last])
        if "texts_float_activations" in record:
            exact = _figures(record["texts_float_activations"])
            rows.append([record["model"], "its weights, activations in float", size, *exact, *[""] * len(last)])
    return markdown.table(rows)


def _figures(texts: dict[str, Any]) -> list[str]:
    """KL on each text, then perplexity."""
    kl = [f"{text['kl']:.4f}" for text in texts.values()]
    return kl + [f"{text['perplexity']:.2f}" for text in texts.values()]


def plot(records: list[dict[str, Any]], file: Path) -> None:
    """Mean KL of all texts over the file's size: lines for each model, ours, llama.cpp's and the builder's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5))
    models = sorted({record["model"] for record in records}, key=lambda name: (name != "dense", name))
    for color, model in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], models, strict=False):
        for whose, style in STYLES.items():
            chosen = [r for r in records if (r["model"], maker(r)) == (model, whose)]
            points = sorted((r["bytes"] / 1e6, mean_kl(r), r["format"], decoding(r)) for r in chosen)
            if not points:
                continue
            sizes, divergences, _, speeds = zip(*points, strict=True)
            axes.plot(sizes, divergences, style, color=color, label=f"{model}, {whose}", markersize=4)
            # the area of a mark is its speed
            axes.scatter(sizes, divergences, s=speeds, color=color, marker=style[0], alpha=0.4)
            for point in points:
                name = point[2].removesuffix(f" {IMATRIX}").removesuffix(f" {SIX_BITS}")
                axes.annotate(name, point[:2], fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes.set(
        xlabel="MB (area of a mark: tokens for each second of decoding)",
        ylabel="KL to the dense model in float32, mean of all texts",
        yscale="log",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def maker(record: dict[str, Any]) -> str:
    """Whose file a record is of."""
    if record["ours"]:
        return OURS_OF_SIX if record["format"].endswith(f" {SIX_BITS}") else "ours"
    if record["format"] in BUILDER:
        return "builder"
    return LLAMA_OF_MATRIX if record["format"].endswith(IMATRIX) else "llama.cpp"


def decoding(record: dict[str, Any]) -> float:
    return record.get("tokens_per_second", {}).get("decoding", {}).get("median", 0.0)


def mean_kl(record: dict[str, Any]) -> float:
    return sum(text["kl"] for text in record["texts"].values()) / len(record["texts"])


if __name__ == "__main__":
    main()
