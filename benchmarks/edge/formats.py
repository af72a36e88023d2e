"""The two formats of ONNX files, `contrib` and `qdq`: bytes, seconds to load, and tokens for each second of decoding.

    OMP_NUM_THREADS=1 python -m benchmarks.edge.formats

Of `stories-llama-16l`, and of four random layers in the shape of Qwen3-0.6B's with 32000 tokens and a tied head. One row,
32 tokens one at a time after 32 others, one thread; rounds take turns, and medians are shown. "not optimized" is a session
with graph optimization disabled, in which ONNX Runtime runs the operators as they stand in the file.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from benchmarks import markdown
from benchmarks.folders import MODELS as CHECKPOINTS
from optimum_clp import ExportConfig, OnnxCausalLM, QuantizationConfig
from optimum_clp.exporters.export import export_onnx

HERE = Path(__file__).parent
PAST = 32
FORMATS = {form: ExportConfig(format=form) for form in ("contrib", "qdq")}
ROUNDING = QuantizationConfig(method="rtn")


def configurations() -> list:
    return [*FORMATS.values(), ROUNDING]


def stories() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "stories-llama-16l")


def qwen3_layers() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=32000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=4, head_dim=128,
                         num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True)  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


MODELS = {"stories-llama-16l": stories, "four layers of Qwen3-0.6B's shape": qwen3_layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "formats.json")
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.output.is_file() else {}
    for name in args.models:
        results[name] = measure(MODELS[name]().eval(), args.rounds)
        args.output.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


def measure(model: PreTrainedModel, rounds: int) -> list[dict]:
    rows, sessions = [], []
    with tempfile.TemporaryDirectory() as folder:
        for form, export in FORMATS.items():
            target = Path(folder) / form
            files = export_onnx(model, target, export, ROUNDING, quiet=True).files
            model.config.save_pretrained(target)
            for optimized in (True, False) if form == "qdq" else (True,):
                for file in files:
                    begin = time.perf_counter()
                    sessions.append(load(target, file.file, optimized))
                    row = {"format": form, "optimized": optimized, "weights": file.weights, "bytes": file.bytes}
                    rows.append(row | {"load_seconds": time.perf_counter() - begin, "rounds": []})
        for _ in range(rounds):
            for session, row in zip(sessions, rows, strict=True):
                row["rounds"].append(tokens_per_second(session))
    for row in rows:
        row["tokens_per_second"] = statistics.median(row.pop("rounds"))
    return rows


def load(folder: Path, file: str, optimized: bool) -> OnnxCausalLM:
    if optimized:
        return OnnxCausalLM.from_pretrained(folder, file, num_threads=1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return OnnxCausalLM.from_pretrained(folder, file, session_options=options)


def tokens_per_second(model: OnnxCausalLM, seconds: float = 0.5) -> float:
    """Of the tokens behind the first `PAST`, by the CPU's clock: other processes do not count."""
    prompt, token = torch.full((1, PAST), 5), torch.tensor([[7]])
    count, spent = 0, 0.0
    while spent < seconds:
        past = model(prompt, use_cache=True).past_key_values
        begin = time.process_time()
        for _ in range(PAST):
            past = model(token, past_key_values=past, use_cache=True).past_key_values
        spent += time.process_time() - begin
        count += PAST
    return count / spent


def table(results: dict) -> str:
    kinds = ("float32", "int8", "int4")
    lines = [["model", "format", *(title for k in kinds for title in (f"{k} MB", "load s", "tokens/s"))]]
    for name, rows in results.items():
        for form, optimized in (("contrib", True), ("qdq", True), ("qdq", False)):
            found = {r["weights"]: r for r in rows if (r["format"], r["optimized"]) == (form, optimized)}
            line = [name, f"{form}{'' if optimized else ', not optimized'}"]
            for row in (found[k] for k in kinds):
                line += [f"{row['bytes'] / 1e6:.2f}", f"{row['load_seconds']:.2f}", f"{row['tokens_per_second']:.0f}"]
            lines.append(line)
    return markdown.table(lines)


if __name__ == "__main__":
    main()
