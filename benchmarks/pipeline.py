"""The whole pipeline on a real model and real text: what a cut costs, what tuning brings back, what int8 and int4 cost.

For each ratio and each source of tuning text: the segment by gate and by exhaustive search; held-out perplexity and KL
to the dense model of the cut, the tuned, the int8 and the int4 model; the same on text of another kind; and the dense
model given the same steps on the same layers (what exceeds that is adaptation to the text, not recovery).

    python -m benchmarks.pipeline --model MODEL --data FOLDER --other TEST.txt --output results.json

FOLDER holds `train.txt` (calibration and tuning) and `test.txt` (measured on, never tuned on).
"""

import argparse
import copy
import dataclasses
import json
import tempfile
import time
from pathlib import Path

from optimum_clp import CLPConfig, CLPPruner, OnnxCausalLM, SearchConfig, TuningConfig
from optimum_clp.calibration.rows import load_calibration, tokenize_dataset
from optimum_clp.evaluation.tokens import evaluate_tokens
from optimum_clp.forward.dense_outputs import DenseOutputs
from optimum_clp.report.environment import environment_info
from optimum_clp.search.segment_search import search_segments
from optimum_clp.segments import endpoint_layers
from optimum_clp.tuning.endpoints import tune_layers

RATIOS = (0.1, 0.2, 0.3)
SOURCES = ("given", "self-written")
LOSSES = ("kd", "ce")
ORACLE = SearchConfig(strategy="exhaustive")


def configurations() -> list:
    recipes = [recipe(ratio, 0, text, loss) for ratio in RATIOS for text in ("train.txt", None) for loss in LOSSES]
    return [*recipes, *(without_start(config.tuning) for config in recipes), ORACLE]


def recipe(ratio: float, seed: int, dataset: str | None, loss: str) -> CLPConfig:
    return CLPConfig(ratio, seed=seed, calibration_dataset=dataset, search={"strategy": "gate"}, tuning={"loss": loss})


def without_start(tuning: TuningConfig) -> TuningConfig:
    """What the dense model, which has nothing to refit, is tuned with."""
    return dataclasses.replace(tuning, init="none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--other", type=Path, required=True, help="test text of another kind")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--sources", nargs="+", default=SOURCES, choices=SOURCES)
    parser.add_argument("--loss", default="kd", choices=LOSSES)
    parser.add_argument("--no-onnx", action="store_true", help="leave out the export")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    pruner = CLPPruner.from_pretrained(args.model, quiet=True)
    texts = {"test": args.data / "test.txt", "other": args.other}
    length = min(256, pruner.model.config.max_position_embeddings)
    tokens = {name: tokenize_dataset(str(f), pruner.tokenizer, sequence_length=length) for name, f in texts.items()}
    references = {name: DenseOutputs(pruner.model, rows, quiet=True) for name, rows in tokens.items()}

    def measure(model) -> dict:
        return {
            name: evaluate_tokens(model, tokens[name], reference=references[name], quiet=True).to_dict()
            for name in tokens
        }

    results = {
        "model": Path(args.model).name,
        "texts": {name: f"{f.parent.name}/{f.name}" for name, f in texts.items()},
        "seed": args.seed,
        "environment": environment_info(),
        "dense": measure(pruner.model),
        "runs": [],
    }
    for source in args.sources:
        for ratio in args.ratios:
            begin = time.perf_counter()
            run = one_run(pruner, source, ratio, args, measure)
            run["seconds"] = time.perf_counter() - begin
            results["runs"].append(run)
            args.output.write_text(json.dumps(results, indent=1) + "\n")  # an interrupted run keeps what it has
            print(summary(run), flush=True)


def one_run(pruner: CLPPruner, source: str, ratio: float, args: argparse.Namespace, measure) -> dict:
    """All figures of one ratio and one source of tuning text."""
    dataset = str(args.data / "train.txt") if source == "given" else None
    config = recipe(ratio, args.seed, dataset, args.loss)
    gate = pruner.search(config)
    data = load_calibration(config.calibration, pruner.tokenizer, pruner.model, config.seed, quiet=True)
    oracle = search_segments(pruner.model, data.train, gate.num_removed, ORACLE, seed=args.seed, quiet=True)
    run = {
        "source": source,
        "ratio": ratio,
        "loss": args.loss,
        "gate": gate.to_dict(),
        "exhaustive": oracle.to_dict(),
        "gate_excess": gate.score / oracle.score - 1,
        "cut": measure(pruner.cut()),
    }
    run["tuning"] = pruner.tune().to_dict()
    run["tuned"] = measure(pruner.pruned_model)
    run["dense_control"] = dense_control(pruner, data, config, measure)
    if args.no_onnx:
        return run
    with tempfile.TemporaryDirectory() as folder:
        pruner.export(folder)
        run["export"] = pruner.report.export
        for entry in pruner.report.export["files"]:
            run[f"onnx {entry['weights']}"] = measure(OnnxCausalLM.from_pretrained(folder, entry["file"]))
    return run


def dense_control(pruner: CLPPruner, data, config: CLPConfig, measure) -> dict:
    """The dense model after the same tuning of the layers that became the endpoints."""
    layers = endpoint_layers(pruner.segments, pruner.model.config.num_hidden_layers, config.tuning.endpoint_width)
    kept = [
        i
        for i in range(pruner.model.config.num_hidden_layers)
        if not any(s.start <= i < s.stop for s in pruner.segments)
    ]
    control = copy.deepcopy(pruner.model)
    result = tune_layers(
        control,
        pruner.model,
        [kept[j] for j in layers],
        data.train,
        data.validation,
        without_start(config.tuning),
        seed=config.seed,
        quiet=True,
    )
    return {**measure(control), "improved": result.improved}


def summary(run: dict) -> str:
    """One line for a terminal."""
    figures = "  ".join(
        f"{name} {run[name]['test']['perplexity']:.2f}/{run[name]['other']['perplexity']:.2f}"
        for name in ("cut", "tuned", "dense_control", "onnx float32", "onnx int8", "onnx int4")
        if name in run
    )
    return (
        f"{run['source']} {run['ratio']}: gate {run['gate']['segments']} excess {run['gate_excess']:+.2%}  "
        f"{figures}  ({run['seconds']:.0f} s)"
    )


if __name__ == "__main__":
    main()
