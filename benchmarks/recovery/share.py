"""How much of the tuning text should the dense model write itself, if the user gives a text of one kind?

    python -m benchmarks.recovery.share --data DATA --models-dir MODELS

Layers [3, 6) of `stories-llama-16l` are cut and healed with stories as the given text, for several shares of self-written
rows; KL to the dense model on held-out stories and Wikipedia. A quarter of an hour on one core.
"""

import argparse
from pathlib import Path

from benchmarks import markdown
from optimum_clp import CalibrationConfig, CLPPruner, LayerSegment, TuningConfig
from optimum_clp.calibration.rows import load_calibration, tokenize_dataset
from optimum_clp.evaluation.tokens import evaluate_tokens
from optimum_clp.forward.dense_outputs import DenseOutputs
from optimum_clp.segments import kept_layers
from optimum_clp.surgery.cut import cut_model
from optimum_clp.tuning.endpoints import tune_layers

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
SEGMENT = LayerSegment(3, 6)


def configurations() -> list:
    return [*(text(Path("train.txt"), share) for share in SHARES), recipe()]


def text(file: Path, share: float) -> CalibrationConfig:
    return CalibrationConfig(
        dataset=str(file),
        self_written_share=share,
        sequence_length=128,
        train_sequences=384,
        validation_sequences=48,
    )


def recipe() -> TuningConfig:
    return TuningConfig(init="least_squares", hidden_epochs=0, epochs=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pruner = CLPPruner.from_pretrained(args.models_dir / "stories-llama-16l", quiet=True)
    dense, tokenizer = pruner.model, pruner.tokenizer
    tests = {
        kind: tokenize_dataset(
            str(args.data / kind / "test.txt"), tokenizer, sequence_length=128, num_sequences=48, name="text"
        )
        for kind in ("stories", "wikipedia")
    }
    references = {kind: DenseOutputs(dense, tokens, quiet=True) for kind, tokens in tests.items()}
    print(markdown.head(["self-written share", "stories", "Wikipedia"]))

    def show(name: str, model) -> None:
        found = [evaluate_tokens(model, tests[k], reference=references[k], quiet=True).kl for k in tests]
        print(markdown.row([name, *(f"{kl:.3f}" for kl in found)]), flush=True)

    show("untouched cut", cut_model(dense, [SEGMENT]))
    for share in SHARES:
        given = text(args.data / "stories" / "train.txt", share)
        data = load_calibration(given, tokenizer, dense, args.seed, quiet=True)
        model = cut_model(dense, [SEGMENT])
        tune_layers(
            model,
            dense,
            [2, 3],
            data.train,
            data.validation,
            recipe(),
            kept=kept_layers([SEGMENT], 16),
            validation_kinds=data.validation_kinds,
            seed=args.seed,
            quiet=True,
        )
        show(f"{share:g}", model)


if __name__ == "__main__":
    main()
