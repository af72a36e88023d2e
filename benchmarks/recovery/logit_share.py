"""What a step of `kd` loses when it compares the logits of fewer positions, and what it saves; and rates of both stages.

    OMP_NUM_THREADS=1 python -m benchmarks.recovery.logit_share --model MODEL --cut 6 10 --out OUT

The dense model writes the rows. The endpoints first learn hidden states on some of them, once; every run goes on from there:
one epoch of `kd` on so many rows with a share of the positions (`--runs ROWS,SHARE ...`), and the same at other rates
(`--rates FACTOR ...`, of the default, for the last of the runs, and for the stage of hidden states from the untouched cut).
Validation looks at all positions. OUT gets one JSON file for each; what is there is not run again. CPU seconds are of the
whole call: the dense model's pass over the rows, steps, and the validations before and after.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks import markdown
from optimum_clp import CalibrationConfig, LayerSegment, TuningConfig
from optimum_clp.architecture.lookup import decoder_layers
from optimum_clp.calibration.own import own_rows
from optimum_clp.segments import endpoint_layers, kept_layers
from optimum_clp.surgery.cut import cut_model, own_storage
from optimum_clp.tuning.endpoints import tune_layers

HIDDEN_ROWS, VALIDATION_ROWS, LENGTH = 128, 24, 256


def configurations() -> list:
    return [hidden(576), logits(576, 0.25), text()]


def hidden(width: int, factor: float = 1.0) -> TuningConfig:
    """Three epochs of hidden states; the factor is of the rate for many steps, `0.18 / sqrt(width)`."""
    rate = factor * 0.18 / width**0.5
    return TuningConfig(
        loss="hidden", epochs=3, hidden_epochs=0, learning_rate=rate, batch_size=4, evaluations_per_epoch=1
    )


def logits(width: int, share: float, factor: float = 1.0) -> TuningConfig:
    """An epoch of `kd`; the factor is of the default rate."""
    rate = factor * 0.1 / width
    return TuningConfig(hidden_epochs=0, epochs=1, learning_rate=rate, logit_share=share, evaluations_per_epoch=1)


def text() -> CalibrationConfig:
    return CalibrationConfig()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--cut", nargs=2, type=int, required=True, metavar=("START", "STOP"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--runs", nargs="*", default=["64,1", "64,0.25", "192,0.25", "192,0.125"], metavar="ROWS,SHARE"
    )
    parser.add_argument("--rates", nargs="*", type=float, default=[], metavar="FACTOR")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [(int(rows), float(share)) for rows, share in (run.split(",") for run in args.runs)]
    study = Study(args.model, LayerSegment(*args.cut), args.out, max(rows for rows, _ in runs))
    rows = [["stage", "rows", "share", "rate", "before", "after", "CPU s"]]
    rows += [study.logits(*run) for run in runs]
    rows += [study.logits(*runs[-1], factor) for factor in args.rates]
    rows += [study.hidden(factor) for factor in args.rates]
    print(markdown.table(rows))


class Study:
    """One cut, rows that the dense model wrote, and endpoints that have learnt hidden states."""

    def __init__(self, name: str, segment: LayerSegment, out: Path, rows: int):
        self.segment, self.out = segment, out
        self.dense: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
        self.width = self.dense.config.hidden_size
        depth = self.dense.config.num_hidden_layers
        self.kept, self.layers = kept_layers([segment], depth), endpoint_layers([segment], depth, 1)
        sizes = [max(rows, HIDDEN_ROWS), VALIDATION_ROWS, 1]
        (self.train, self.validation, _), _ = own_rows(
            text(), AutoTokenizer.from_pretrained(name), self.dense, sizes, LENGTH, 0
        )

    def logits(self, rows: int, share: float, factor: float = 1.0) -> list[str]:
        """An epoch of `kd`, from what hidden states have taught."""
        config = logits(self.width, share, factor)
        started = self._started
        return self._row("kd", rows, share, factor, lambda: self._tuned(started(), rows, config))

    def hidden(self, factor: float) -> list[str]:
        """Hidden states, from the untouched cut."""
        config = hidden(self.width, factor)
        untouched = cut_model(self.dense, [self.segment])
        return self._row("hidden", HIDDEN_ROWS, 1.0, factor, lambda: self._tuned(untouched, HIDDEN_ROWS, config))

    def _started(self) -> PreTrainedModel:
        file, model = self.out / "hidden.pt", cut_model(self.dense, [self.segment])
        layers = [decoder_layers(model)[i] for i in self.layers]
        if file.is_file():
            for layer, weights in zip(layers, torch.load(file), strict=True):
                # a cut model shares the dense one's tensors
                own_storage(layer)
                layer.load_state_dict(weights)
        else:
            self._tuned(model, HIDDEN_ROWS, hidden(self.width))
            torch.save([layer.state_dict() for layer in layers], file)
        return model

    def _tuned(self, model: PreTrainedModel, rows: int, config: TuningConfig) -> dict[str, Any]:
        begin = time.process_time()
        result = tune_layers(
            model,
            self.dense,
            self.layers,
            self.train.tokens[:rows],
            self.validation.tokens,
            config,
            kept=self.kept,
            validation_kinds=self.validation.kinds,
        )
        losses = [step.validation_loss for step in result.history]
        return {"losses": losses, "steps": result.steps, "cpu_seconds": time.process_time() - begin}

    def _row(self, stage: str, rows: int, share: float, factor: float, run: Any) -> list[str]:
        file = self.out / f"{stage}-{rows}-{share:g}-{factor:g}.json"
        if not file.is_file():
            file.write_text(json.dumps(run(), indent=1) + "\n")
        found = json.loads(file.read_text())
        before, after = found["losses"][0], min(found["losses"])
        figures = [f"{before:.4f}", f"{after:.4f}", f"{found['cpu_seconds']:.0f}"]
        return [stage, str(rows), f"{share:g}", f"{factor:g}", *figures]


if __name__ == "__main__":
    main()
