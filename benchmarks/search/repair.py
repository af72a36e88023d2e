"""Which score of a cut says best how well it will heal: the untouched cut's KL, or the KL after a cheap repair?

    OMP_NUM_THREADS=1 python -m benchmarks.search.repair --models stories-llama-16l MODEL_FOLDER --cache-dir CACHE

The best segments of a fifth of the layers are scored on rows that the repair was not fitted on: untouched; with the endpoint layers
solved in closed form (`tuning.init`), all their projections or the last alone; and with a ridge map across the gap, from the
state that enters it to the dense model's state behind it. Then the best by any score are tuned shortly, all alike, and measured on
held-out rows. The text is the dense model's own. Results go to `repair-NAME.json`, which an interrupted run continues.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.folders import MODELS, model_folder
from optimum_clp import CalibrationConfig, LayerSegment, TuningConfig
from optimum_clp.architecture.lookup import allowed_segments, decoder_layers
from optimum_clp.calibration.rows import CalibrationData, load_calibration
from optimum_clp.closed_form.ridge import RIDGES, RegressionSums, best_solution
from optimum_clp.closed_form.solver import solve_endpoints
from optimum_clp.forward.dense_outputs import DenseOutputs
from optimum_clp.forward.hooks import recorded_inputs, run_without_head
from optimum_clp.forward.layer_stack import LayerStack
from optimum_clp.forward.losses import kl_divergence
from optimum_clp.report.environment import environment_info
from optimum_clp.segments import endpoint_layers, kept_layers, number_of_layers_to_remove
from optimum_clp.surgery.cut import cut_model, own_storage
from optimum_clp.tuning.endpoints import tune_layers

RATIOS, FIT_ROWS, CHECK_ROWS, SCORE_ROWS = (0.2,), 8, 4, 8
TRAIN_ROWS, TUNING_ROWS, HELD_OUT_ROWS = 64, 48, 12
EVERY = 2  # of the score rows' tokens
# of a number of layers: cuts that are repaired, the best by their KL; tuned, the best by any score
REPAIRED, TUNED = 14, 6


def configurations() -> list:
    return [text(), tuning()]


def text() -> CalibrationConfig:
    return CalibrationConfig(
        sequence_length=256, train_sequences=TRAIN_ROWS, validation_sequences=8, test_sequences=24
    )


def tuning() -> TuningConfig:
    return TuningConfig(init="least_squares", hidden_epochs=0, epochs=2, learning_rate=4e-4, evaluations_per_epoch=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True, help="names in --models-dir, or folders")
    parser.add_argument("--models-dir", type=Path, default=MODELS)
    parser.add_argument("--names", nargs="+", help="of the models in the results, if not their folders'")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--repaired", type=int, default=REPAIRED, help="cuts of each ratio, the best by their KL")
    parser.add_argument("--tuned", type=int, default=TUNED, help="of them, the best by any score")
    parser.add_argument("--cache-dir", type=Path, required=True, help="for the text")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    for model, name in zip(args.models, args.names or [Path(m).name for m in args.models], strict=True):
        folder = Path(model) if Path(model).is_dir() else model_folder(model, args.models_dir)
        study = Study(name, folder, args.dtype, args.cache_dir, args.output / f"repair-{name}.json")
        for ratio in args.ratios:
            study.run(ratio, args.repaired, args.tuned)


class Study:
    """One model's figures, and the file that they are kept in."""

    def __init__(self, name: str, folder: Path, dtype: str, cache: Path, file: Path):
        self.name, self.file = name, file
        self.dense = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        config = text()
        config.cache_dir = str(cache)
        self.data: CalibrationData = load_calibration(config, AutoTokenizer.from_pretrained(folder), self.dense, 0)
        self.depth = len(decoder_layers(self.dense))
        self.results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"model": name, "cuts": {}}
        self.results["environment"] = environment_info()
        self.results["dtype"] = str(self.dense.dtype).removeprefix("torch.")

        parts = self.data.train[: FIT_ROWS + CHECK_ROWS + SCORE_ROWS].split([FIT_ROWS, CHECK_ROWS, SCORE_ROWS])
        states = range(self.depth)
        self.fit, self.check, self.score = (DenseOutputs(self.dense, part, inputs_of=states) for part in parts)
        self.held_out = DenseOutputs(self.dense, self.data.test[:HELD_OUT_ROWS])
        with torch.no_grad(), self.score.stack.head(self.dense) as head:
            self.dense_log = head(self.score.hidden[self.depth][:, 1::EVERY]).float().log_softmax(-1)
        self.layer_maps: list[Tensor] | None = None

    def run(self, ratio: float, repaired: int, tuned: int) -> None:
        segments = allowed_segments(self.dense.config, number_of_layers_to_remove(ratio, self.depth))
        repairs: dict[str, Callable[[LayerSegment], float]] = {
            "linear_map": lambda s: self.kl_behind(s, mapped(self.score.hidden[s.start], self.gap_map(s, False))),
            "closed_form": lambda s: self.kl_solved(s, attention=True),
        }
        variants: dict[str, Callable[[LayerSegment], float]] = {
            "linear_map_normed": lambda s: self.kl_behind(
                s, mapped(self.score.hidden[s.start], self.gap_map(s, True))
            ),
            "layer_maps": self.kl_with_layer_maps,
            "closed_form_last": lambda s: self.kl_solved(s, attention=False),
        }
        self.measure({"cut": lambda s: self.kl_behind(s, self.score.hidden[s.start])}, segments)
        best = sorted(segments, key=lambda s: self.entry(s)["cut"])[:repaired]
        self.measure(repairs, best)
        chosen = self.best_ones(best, ["cut", *repairs], tuned)
        for segment in chosen:
            self.measure({"held_out_cut": lambda s: self.held_out_kl(cut_model(self.dense, [s]))}, [segment])
            self.measure({"tuned": self.tuned}, [segment])
        self.measure(variants, chosen)

    def measure(self, scores: dict[str, Callable[[LayerSegment], Any]], segments: list[LayerSegment]) -> None:
        for key, score in scores.items():
            for segment in segments:
                self.keep(segment, key, lambda score=score, segment=segment: score(segment))

    def keep(self, segment: LayerSegment, key: str, measure: Callable[[], Any]) -> None:
        entry = self.entry(segment)
        if key in entry:
            return
        begin = time.perf_counter()
        entry[key] = measure()
        entry.setdefault("seconds", {})[key] = round(time.perf_counter() - begin, 2)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.results, indent=1) + "\n")
        print(self.name, segment.to_list(), key, entry[key], entry["seconds"][key], flush=True)

    def entry(self, segment: LayerSegment) -> dict[str, Any]:
        return self.results["cuts"].setdefault(f"{segment.start}-{segment.stop}", {})

    def best_ones(self, segments: list[LayerSegment], scores: list[str], count: int) -> list[LayerSegment]:
        """The best by each score in turn, from the first places down."""
        ranked = [sorted(segments, key=lambda s, k=k: self.entry(s)[k]) for k in scores]
        return list(dict.fromkeys(s for place in zip(*ranked, strict=True) for s in place))[:count]

    def kl_behind(self, segment: LayerSegment, hidden: Tensor) -> float:
        """KL on the score rows if `hidden` enters the layer behind a segment."""
        return self.score_kl(self.dense, segment.stop, hidden)

    @torch.no_grad()
    def score_kl(self, model: PreTrainedModel, first: int, hidden: Tensor) -> float:
        """KL on every second token of the score rows, if `hidden` enters a layer of a model."""
        stack, last, found = LayerStack(model), len(decoder_layers(model)), {}
        parts = []
        for rows in torch.arange(len(hidden)).split(4):
            if first == last:
                found = {last: hidden[rows]}
            else:
                with recorded_inputs(stack.layers, [last]) as found, stack.resumed(first, hidden[rows]):
                    run_without_head(model, self.score.tokens[rows])
            with self.score.stack.head(self.dense) as head:
                log = head(found[last][:, 1::EVERY]).float().log_softmax(-1)
            wanted = self.dense_log[rows]
            parts.append((wanted.exp() * (wanted - log)).sum(-1))
        return torch.cat(parts).double().mean().item()

    def gap_map(self, segment: LayerSegment, normed: bool) -> Tensor:
        return fitted(self.fit.hidden, self.check.hidden, segment.start, segment.stop, normed)

    def kl_with_layer_maps(self, segment: LayerSegment) -> float:
        """Every layer that goes replaced by its own map."""
        if self.layer_maps is None:
            sides = self.fit.hidden, self.check.hidden
            self.layer_maps = [fitted(*sides, i, i + 1, False) for i in range(self.depth)]
        hidden = self.score.hidden[segment.start]
        for index in range(segment.start, segment.stop):
            hidden = mapped(hidden, self.layer_maps[index])
        return self.kl_behind(segment, hidden)

    def kl_solved(self, segment: LayerSegment, attention: bool) -> float:
        """KL on the score rows of the cut model with its endpoint layers solved, as tuning starts."""
        cut, kept = cut_model(self.dense, [segment]), kept_layers([segment], self.depth)
        layers = endpoint_layers([segment], self.depth, 1)
        for index in layers:
            own_storage(decoder_layers(cut)[index])
        inputs = self.fit.hidden[layers[0]], self.check.hidden[layers[0]]
        solve_endpoints(cut, layers, kept, self.fit, self.check, inputs, attention=attention, quiet=True)
        return self.score_kl(cut, layers[0], self.score.hidden[layers[0]])

    @torch.no_grad()
    def held_out_kl(self, model: PreTrainedModel) -> float:
        outputs, total = self.held_out, 0.0
        for rows in torch.arange(len(outputs.tokens)).split(4):
            logits = model(input_ids=outputs.tokens[rows], use_cache=False).logits
            total += kl_divergence(outputs.logits(rows), logits).double().sum().item()
        return total / outputs.tokens.numel()

    def tuned(self, segment: LayerSegment) -> dict:
        cut = cut_model(self.dense, [segment])
        layers, kept = endpoint_layers([segment], self.depth, 1), kept_layers([segment], self.depth)
        result = tune_layers(
            cut,
            self.dense,
            layers,
            self.data.train[:TUNING_ROWS],
            self.data.validation,
            tuning(),
            kept=kept,
            quiet=True,
        )
        return {
            "validation": [step.validation_loss for step in result.history],
            "held_out": self.held_out_kl(cut),
        }


def fitted(fit: dict[int, Tensor], check: dict[int, Tensor], start: int, stop: int, normed: bool) -> Tensor:
    """What a ridge map adds to the state entering `start`, so that it is like the one entering `stop`: `[d, d + 1]`."""

    def sums(states: dict[int, Tensor]) -> RegressionSums:
        width = states[start].shape[-1]
        found = RegressionSums(width, width, True, torch.device("cpu"))
        for entered, target in zip(states[start].split(4), states[stop].split(4), strict=True):
            if normed:
                size = target.float().square().mean(-1, keepdim=True).sqrt()
                entered, target = entered.float() / size, target.float() / size
            found.add(entered, (target, entered), entered, 1.0)
        return found

    solution = best_solution(sums(fit), sums(check), RIDGES)
    assert solution.shift is not None
    return torch.cat([solution.change, solution.shift[:, None]], dim=1)


def mapped(hidden: Tensor, matrix: Tensor) -> Tensor:
    change, shift = matrix[:, :-1].float(), matrix[:, -1].float()
    states = hidden.float()
    return (states + states @ change.T + shift).to(hidden.dtype)


if __name__ == "__main__":
    main()
