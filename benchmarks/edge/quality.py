"""What the files say, dense and cut: perplexity, and KL to the dense model, in float32, int8 and int4.

    OMP_NUM_THREADS=1 python -m benchmarks.edge.quality --data DATA --models-dir MODELS

`stories-llama-16l` on `stories`, `stories260K` on `stories-cased`: 64 rows of 256 tokens of `test.txt`, which nothing else
looks at, through ONNX Runtime. The cut model is `CLPPruner.prune` by default settings (20 % of the layers, endpoints
tuned) with `train.txt` as its text. A model that is in `results/quality.json` is not measured again.
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks import markdown
from optimum_clp import CLPConfig, CLPPruner, OnnxCausalLM
from optimum_clp.calibration.rows import load_calibration, tokenize_dataset
from optimum_clp.evaluation.tokens import evaluate_tokens
from optimum_clp.exporters.export import export_onnx
from optimum_clp.forward.dense_outputs import DenseOutputs
from optimum_clp.report.environment import environment_info

HERE = Path(__file__).parent
TEXTS = {"stories-llama-16l": "stories", "stories260K": "stories-cased"}


def configurations() -> list[CLPConfig]:
    return [recipe(Path("train.txt"))]


def recipe(text: Path) -> CLPConfig:
    """The defaults, with a text."""
    return CLPConfig(calibration_dataset=str(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models-dir", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--output", type=Path, default=HERE / "results" / "quality.json")
    args = parser.parse_args()
    results = (
        json.loads(args.output.read_text()) if args.output.is_file() else {"environment": environment_info("cpu")}
    )
    for name in args.models:
        if name not in results:
            results[name] = measure(args.models_dir / name, args.data / TEXTS[name])
            args.output.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


def measure(folder: Path, text: Path) -> dict[str, dict]:
    pruner = CLPPruner.from_pretrained(folder, quiet=True)
    dense = pruner.model
    config = recipe(text / "train.txt")
    tests = tokenize_dataset(str(text / "test.txt"), pruner.tokenizer, sequence_length=256, num_sequences=64)
    reference = DenseOutputs(dense, tests, quiet=True)
    calibration = load_calibration(config.calibration, pruner.tokenizer, dense, config.seed, quiet=True).train
    found = {}
    for name, model in (("dense", dense), ("cut", pruner.prune(config))):
        with tempfile.TemporaryDirectory() as target:
            result = export_onnx(model, target, calibration=calibration[:128], quiet=True)
            model.config.save_pretrained(target)
            for file in result.files:
                session = OnnxCausalLM.from_pretrained(target, file.file)
                evaluation = evaluate_tokens(session, tests, reference=reference, quiet=True)
                found[f"{name}, {file.weights}"] = {
                    "bytes": file.bytes,
                    "bits_per_weight": file.bits_per_weight,
                    **evaluation.to_dict(),
                }
    return found


def table(results: dict) -> str:
    lines = [["model", "", "weights", "bits per weight", "MB", "perplexity", "KL to dense"]]
    for name, rows in results.items():
        for key, row in rows.items() if name != "environment" else ():
            figures = f"{row['bits_per_weight']:.2f}", f"{row['bytes'] / 1e6:.2f}", f"{row['perplexity']:.3f}"
            lines.append([name, *key.split(", "), *figures, f"{row['kl']:.4f}"])
    return markdown.table(lines)


if __name__ == "__main__":
    main()
