"""Time and memory of endpoint tuning against LoRA on all layers, at the same loss, on the same loop.

    OMP_NUM_THREADS=1 python -m benchmarks.recovery.cost [RESULT.json]

A random model (24 layers, 40 M parameters) loses 5 layers that begin at 0.5, 0.6 and 0.75 of its depth, and is tuned for
three epochs towards the dense model's logits: by its endpoints (with and without the closed-form start) and by LoRA of
rank 8 on every linear module (peft). Both have the dense model's pass cached, and that pass is counted. Runs are
interleaved, and seconds are CPU seconds; a ratio is of two runs of one round. Next to it stands the ratio that counting
layers predicts. Half an hour on one core.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import markdown
from benchmarks.recovery.methods import Cell, lora, tuned
from optimum_clp import LayerSegment, TuningConfig
from optimum_clp.evaluation.live_memory import LiveTensorBytes
from optimum_clp.forward.dense_outputs import DenseOutputs
from optimum_clp.report.environment import environment_info

DEPTH, REMOVED, STARTS = 24, 5, (12, 14, 18)
SHAPE = LlamaConfig(
    vocab_size=4096,
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=DEPTH,
    num_attention_heads=6,
    max_position_embeddings=256,
    tie_word_embeddings=False,
)
LENGTH, EPOCHS = 128, 3


def configurations() -> list[TuningConfig]:
    return [recipe(EPOCHS), recipe(1)]


def recipe(epochs: int) -> TuningConfig:
    return TuningConfig(
        epochs=epochs,
        batch_size=8,
        learning_rate=1e-4,
        evaluations_per_epoch=1,
        patience=9,
        init="none",
        hidden_epochs=0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", nargs="?", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs=2, default=(32, 8), metavar=("TRAIN", "VALIDATION"))
    parser.add_argument("--starts", type=int, nargs="+", default=STARTS, help="where the cut begins, in layers")
    args = parser.parse_args()
    torch.manual_seed(0)
    dense = LlamaForCausalLM(SHAPE).eval()
    tokens = [torch.randint(3, SHAPE.vocab_size, (count, LENGTH)) for count in args.rows]
    cells = {start: Cell(dense, LayerSegment(start, start + REMOVED), *tokens, seed=0) for start in args.starts}
    config = recipe(EPOCHS)
    runs = {
        "endpoints": lambda cell: tuned(cell, config, layers="endpoints"),
        "endpoints, closed-form start": lambda cell: tuned(cell, config, layers="endpoints", init="least_squares"),
        "lora": lambda cell: lora(cell, config, rank=8),
    }
    seconds = {(start, name): [] for start in cells for name in runs}
    for number in range(args.rounds):
        for start, cell in cells.items():
            for name, run in runs.items():
                begin = time.process_time()
                run(cell)
                seconds[start, name].append(time.process_time() - begin)
                print(f"round {number}: {name} from {start}: {seconds[start, name][-1]:.1f} s", flush=True)
    found = []
    rows = [["start", "ms per token", "with closed form", "LoRA", "ratio (spread)", "with closed form",
             "layers predict", "share"]]  # fmt: skip
    for start, cell in cells.items():
        ours, solved, theirs = (seconds[start, name] for name in runs)
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        with_start = [b / a for a, b in zip(solved, theirs, strict=True)]
        ratio, predicted = statistics.median(ratios), predicted_ratio(cell)
        times = [1000 * statistics.median(values) / (EPOCHS * tokens[0].numel()) for values in (ours, solved, theirs)]
        found.append({"start": start, "ms_per_token": times, "ratios": ratios, "ratios_with_start": with_start,
                      "predicted": predicted})  # fmt: skip
        rows.append([f"{start} of {DEPTH}", *(f"{t:.2f}" for t in times),
                     f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})", f"{statistics.median(with_start):.2f}",
                     f"{predicted:.2f}", f"{ratio / predicted:.2f}"])  # fmt: skip
    print(markdown.table(rows))
    memory = [{"start": start, **peak_memory(cell)} for start, cell in cells.items()]
    rows = [["start", "dense pass, MB", "4 float32 copies", "above the first endpoint", "allowed", "endpoint tuning",
             "LoRA"]]  # fmt: skip
    for m in memory:
        shown = (f"{m[k] / 1e6:.0f}" for k in ("dense", "copies", "above", "allowed", "endpoints", "lora"))
        rows.append([f"{m['start']} of {DEPTH}", *shown])
    print(markdown.table(rows))
    if args.result:
        result = {"rows": args.rows, "environment": environment_info(), "time": found, "memory": memory}
        args.result.write_text(json.dumps(result, indent=1) + "\n")


def predicted_ratio(cell: Cell) -> float:
    """LoRA's work over ours, in passes of a token through one layer (forward 1, gradient of activations 1, of weights 1)."""
    layer = 4 * SHAPE.hidden_size**2 + 3 * SHAPE.hidden_size * SHAPE.intermediate_size
    head = SHAPE.hidden_size * SHAPE.vocab_size / layer
    validation = len(cell.validation) / len(cell.train)
    left, above = DEPTH - REMOVED, DEPTH - REMOVED - (cell.segment.start - 1)

    def work(layers: int, trained: int) -> float:
        # student and teacher each run their head; only the student's is gone back through
        steps = EPOCHS * (2 * layers + trained + 3 * head)
        checks = (EPOCHS + 1) * validation * (layers + 2 * head)
        return steps + checks + (1 + validation) * DEPTH

    return work(left, 0) / work(above, 2)


def peak_memory(cell: Cell) -> dict[str, int]:
    """Peaks of live tensor bytes, weights included, and what endpoint tuning is allowed.

    `above` is what a step holds beyond weights, measured without gradients' and optimizer's state: the student's forward
    pass and its backward pass, from the first endpoint on, logits included.
    """
    config = recipe(1)
    caches = 2 * (cell.train.numel() + cell.validation.numel()) * SHAPE.hidden_size * 4
    with LiveTensorBytes(cell.dense) as dense:
        DenseOutputs(cell.dense, cell.train[:8], quiet=True).logits(slice(0, 8))
    weights = sum(p.numel() * 4 for p in cell.dense.parameters())
    own = cell.num_endpoint_parameters() * 4
    with LiveTensorBytes(cell.dense) as ours:
        tuned(cell, config, layers="endpoints")
    with LiveTensorBytes(cell.dense) as theirs:
        lora(cell, config, rank=8)
    above = step_memory(cell)
    return {
        "weights": weights,
        "dense": dense.peak,
        "copies": 4 * own,
        "above": above,
        "caches": caches,
        "allowed": dense.peak + 4 * own + above + caches,
        "endpoints": ours.peak,
        "lora": theirs.peak,
    }


def step_memory(cell: Cell) -> int:
    """What one forward and backward pass from the first endpoint on holds beyond the weights and their gradients."""
    from optimum_clp.architecture.lookup import decoder_layers
    from optimum_clp.tuning.student import EndpointStudent

    model = cell.cut()
    layers = [decoder_layers(model)[i] for i in cell.endpoints]
    model.requires_grad_(False)
    for layer in layers:
        layer.requires_grad_(True)
    hidden = torch.randn(8, LENGTH, SHAPE.hidden_size)
    with torch.no_grad():
        logits = cell.dense(cell.train[:8]).logits
    student = EndpointStudent(model, layers, cell.endpoints[0], {"kd": 1.0})
    gradients = cell.num_endpoint_parameters() * 4
    with LiveTensorBytes() as step:
        student(cell.train[:8], hidden, logits, {}).mean().backward()
    return step.peak - gradients + logits.numel() * 4


if __name__ == "__main__":
    main()
