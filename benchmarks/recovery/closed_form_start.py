"""What a closed-form start of endpoint tuning is worth: KL to the dense model before and after gradient steps.

    OMP_NUM_THREADS=1 python -m benchmarks.recovery.closed_form_start --data DATA --models-dir MODELS

DATA holds folders `stories` and `wikipedia` with a `test.txt` each, MODELS a folder `stories-llama-16l`. Fitted and tuned
on text that the dense model writes itself (192 rows of 256 tokens, 24 for validation, seed 0), measured on the first 24
rows of both test texts. Prints Markdown tables; with `--output FILE` the figures go there as JSON too. One core: 15 minutes.
"""

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks import markdown
from optimum_clp import CalibrationConfig, LayerSegment, TuningConfig
from optimum_clp.architecture.lookup import decoder_layers
from optimum_clp.calibration.rows import CalibrationData, load_calibration, tokenize_dataset
from optimum_clp.closed_form.solver import solve_endpoints
from optimum_clp.evaluation.tokens import evaluate_tokens
from optimum_clp.forward.dense_outputs import DenseOutputs
from optimum_clp.report.environment import environment_info
from optimum_clp.segments import endpoint_layers, kept_layers, target_state
from optimum_clp.surgery.cut import cut_model, own_storage
from optimum_clp.tuning.endpoints import tune_layers

TEXTS = ("stories", "wikipedia")
ROWS, LENGTH = 24, 256


@dataclass(frozen=True)
class Start:
    """A closed-form start.

    Args:
        method (`str` or `None`): `None` leaves the cut as it is.
        both (`bool`): Solve the layers on both sides of the cut, not the one before it alone.
        options (`dict`): For `solve_endpoints`.
        rows (`int` or `None`): Train rows to fit on; `None` for all.
    """

    method: str | None = None
    both: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None


LAST = {"attention": False}
STARTS = {
    "cut, untouched": Start(),
    "fold, last projection, before": Start("fold", both=False, options=LAST),
    "fold, last projection, both sides": Start("fold", options=LAST),
    "fold, attention too, both sides": Start("fold"),
    "least squares, last projection, before": Start("least_squares", both=False, options=LAST),
    "least squares, last projection, both sides": Start("least_squares", options=LAST),
    "least squares, attention too, before": Start("least_squares", both=False),
    "least squares, attention too, both sides": Start("least_squares"),
}
TUNED = (
    "cut, untouched",
    "fold, attention too, both sides",
    "least squares, last projection, before",
    "least squares, attention too, both sides",
)
RIDGES = {f"ridge {ridge:g}": Start("least_squares", options={"ridges": [ridge]}) for ridge in (1e-4, 1e-2, 1.0)}
FEWER_ROWS = {f"{rows} rows": Start("least_squares", rows=rows) for rows in (24, 48)}


def configurations() -> list:
    return [text(), recipe(2)]


def text() -> CalibrationConfig:
    return CalibrationConfig(sequence_length=LENGTH)


def recipe(epochs: int) -> TuningConfig:
    return TuningConfig(hidden_epochs=0, epochs=epochs, init="none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models-dir", type=Path, required=True)
    parser.add_argument("--segments", nargs="+", default=["3:6", "3:5", "3:8"], metavar="START:STOP")
    parser.add_argument("--epochs", type=int, nargs="+", default=[2])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    path = args.models_dir / "stories-llama-16l"
    dense = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    data = load_calibration(text(), tokenizer, dense, seed=0, quiet=True)
    tests = {
        text: DenseOutputs(dense, rows_of(args.data / text / "test.txt", tokenizer), quiet=True) for text in TEXTS
    }
    results = {"environment": environment_info(), "segments": {}}
    for bounds in args.segments:
        segment = LayerSegment(*map(int, bounds.split(":")))
        results["segments"][str(segment)] = study(dense, segment, data, tests, args.epochs)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


def rows_of(file: Path, tokenizer) -> torch.Tensor:
    return tokenize_dataset(str(file), tokenizer, sequence_length=LENGTH, num_sequences=ROWS)


def study(
    dense: PreTrainedModel,
    segment: LayerSegment,
    data: CalibrationData,
    tests: dict[str, DenseOutputs],
    epochs: list[int],
) -> list[dict]:
    """All starts of one cut, measured as they are and after tuning."""
    print(f"\nLayers {segment} of {dense.config.num_hidden_layers} removed\n")
    print(markdown.head(["", "KL, stories", "agreement", "KL, Wikipedia", "agreement", "seconds"]), flush=True)
    rows: list[dict] = []
    for name, start in {**STARTS, **RIDGES, **FEWER_ROWS}.items():
        cut, steps, seconds = started(dense, segment, data, start)
        rows.append(measured(name, cut, tests, seconds, steps=steps))
    for count in epochs:
        for name in TUNED:
            cut, steps, seconds = started(dense, segment, data, STARTS[name])
            begin = time.perf_counter()
            layers = endpoint_layers([segment], dense.config.num_hidden_layers)
            result = tune_layers(cut, dense, layers, data.train, data.validation, recipe(count), quiet=True)
            seconds += time.perf_counter() - begin
            rows.append(
                measured(f"{name}; {count} epochs", cut, tests, seconds, validation=result.best_validation_loss)
            )
    return rows


def started(
    dense: PreTrainedModel, segment: LayerSegment, data: CalibrationData, start: Start
) -> tuple[PreTrainedModel, list[dict], float]:
    """The cut model after a closed-form start, what was solved, and the seconds without those of the dense model's pass."""
    depth = dense.config.num_hidden_layers
    kept, layers = kept_layers([segment], depth), endpoint_layers([segment], depth)
    cut = cut_model(dense, [segment])
    for index in layers:
        own_storage(decoder_layers(cut)[index])
    if start.method is None:
        return cut, [], 0.0
    if not start.both:
        layers = [i for i in layers if kept[i] < segment.start]
    wanted = [layers[0], *(target_state(kept, i, depth) for i in layers)]
    train, validation = (
        DenseOutputs(dense, rows, inputs_of=wanted, quiet=True) for rows in (data.train[: start.rows], data.validation)
    )
    inputs = (train.hidden[layers[0]], validation.hidden[layers[0]])
    result = solve_endpoints(
        cut, layers, kept, train, validation, inputs, method=start.method, quiet=True, **start.options
    )
    return cut, result.to_dict()["steps"], result.seconds


def measured(name: str, cut: PreTrainedModel, tests: dict[str, DenseOutputs], seconds: float, **more: Any) -> dict:
    """A row of the table, printed."""
    figures = {text: evaluate_tokens(cut, test.tokens, reference=test, quiet=True) for text, test in tests.items()}
    shown = (cell for e in figures.values() for cell in (f"{e.kl:.4f}", f"{e.top1_agreement:.3f}"))
    print(markdown.row([name, *shown, f"{seconds:.1f}"]), flush=True)
    return {"name": name, "seconds": seconds, **more, **{text: e.to_dict() for text, e in figures.items()}}


if __name__ == "__main__":
    main()
