"""What int8 and int4 ONNX files cost in perplexity, for each way to round their weights, with the bits that a weight takes.

    OMP_NUM_THREADS=1 python -m benchmarks.edge.quantization --data DATA --models-dir MODELS

MODELS holds `stories-llama-16l` and `stories260K`; `deep32` comes from `benchmarks/models.py`. DATA holds `stories` and
`stories-cased`, each with `train.txt` (looked at by the rounding, half of whose rows the model writes itself, as by
default) and `test.txt` (measured on only: 64 rows of 256 tokens, through ONNX Runtime). Each figure is kept in
`results/quantization.json` as soon as it is there; an interrupted run is continued by the same command.
"""

import argparse
import json
import tempfile
from pathlib import Path

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks import markdown
from benchmarks.folders import model_folder
from optimum_clp import CalibrationConfig, OnnxCausalLM, QuantizationConfig
from optimum_clp.calibration.rows import load_calibration, tokenize_dataset
from optimum_clp.errors import QuantizationError
from optimum_clp.evaluation.tokens import evaluate_tokens
from optimum_clp.exporters.export import export_onnx

HERE = Path(__file__).parent
TEXTS = {"stories-llama-16l": "stories", "deep32": "stories", "stories260K": "stories-cased"}
ROWS, LENGTH = 64, 256
VARIANTS = {
    "round to nearest": {"method": "rtn"},
    "quanto": {"method": "quanto"},
    "HQQ": {"method": "hqq", "weights": ["int4"]},
    "GPTQ": {"method": "gptq", "weights": ["int4"]},
    "round to nearest, budget 5.25": {"method": "rtn", "weights": ["int4"], "bits_per_weight": 5.25},
    "GPTQ, budget 5.25": {"method": "gptq", "weights": ["int4"], "bits_per_weight": 5.25},
    "GPTQ, groups of 64, budget 5": {"method": "gptq", "weights": ["int4"], "group_size": 64, "bits_per_weight": 5.0},
}


def configurations() -> list:
    roundings = [rounding(variant) for variant in VARIANTS]
    return [*roundings, *(rows_of(Path("train.txt"), quantization) for quantization in roundings)]


def rounding(variant: str) -> QuantizationConfig:
    return QuantizationConfig(**VARIANTS[variant])


def rows_of(text: Path, quantization: QuantizationConfig) -> CalibrationConfig:
    """What the rounding looks at."""
    return CalibrationConfig(
        dataset=str(text), sequence_length=LENGTH, train_sequences=quantization.calibration_sequences
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models-dir", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--output", type=Path, default=HERE / "results" / "quantization.json")
    args = parser.parse_args()
    for name in args.models:
        measure(name, args.models_dir, args.data, args.output)
    print(table(read(args.output)))


def measure(name: str, models_dir: Path, data: Path, output: Path) -> None:
    folder = model_folder(name, models_dir)
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = data / TEXTS[name]
    tests = tokenize_dataset(str(text / "test.txt"), tokenizer, sequence_length=LENGTH, num_sequences=ROWS)
    calibration = None
    for variant in VARIANTS:
        results = read(output)
        if variant in results.get(name, {}):
            continue
        quantization = rounding(variant)
        if calibration is None and quantization.method != "quanto":
            config = rows_of(text / "train.txt", quantization)
            calibration = load_calibration(config, tokenizer, model, 0, quiet=True).train
        try:
            found = files_of(model, quantization, calibration, tests)
        except QuantizationError as error:  # rows that fill their last group badly may not fit a budget at all
            print(f"{name}, {variant}: {error}")
            found = []
        results = read(output)
        results.setdefault(name, {})[variant] = found
        output.parent.mkdir(exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")


def files_of(
    model: PreTrainedModel, quantization: QuantizationConfig, calibration: Tensor | None, tests: Tensor
) -> list[dict]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        result = export_onnx(model, folder, quantization=quantization, calibration=calibration, quiet=True)
        model.config.save_pretrained(folder)
        for file in result.files:
            perplexity = evaluate_tokens(OnnxCausalLM.from_pretrained(folder, file.file), tests, quiet=True).perplexity
            found.append(
                {
                    "weights": file.weights,
                    "perplexity": perplexity,
                    "bits_per_weight": file.bits_per_weight,
                    "bytes": file.bytes,
                    "seconds": round(file.seconds, 1),
                }
            )
    return found


def read(output: Path) -> dict:
    return json.loads(output.read_text()) if output.is_file() else {}


def table(results: dict) -> str:
    lines = [["model", "weights", "rounding", "bits per weight", "MB", "perplexity"]]
    for name, variants in results.items():
        dense = next(iter(variants.values()))[0]["perplexity"]
        first = f"{name} ({dense:.4f})"
        rows = [(variant, file) for variant, files in variants.items() for file in files[1:]]
        for variant, file in sorted(rows, key=lambda row: row[1]["weights"], reverse=True):
            increase = 100 * (file["perplexity"] / dense - 1)
            size = file["bytes"] / 1e6
            figures = f"{file['bits_per_weight']:.2f}", f"{size:.2f}", f"{increase:+.2f} %"
            lines.append([first, file["weights"], variant, *figures])
            first = ""
    return markdown.table(lines)


if __name__ == "__main__":
    main()
