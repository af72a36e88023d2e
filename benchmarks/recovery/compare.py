"""Every way to heal a cut, on the same cuts and the same text: how near the dense model it comes, for how much.

    OMP_NUM_THREADS=1 python -m benchmarks.recovery.compare --data DATA --models-dir MODELS \
        --models stories260K stories-llama-16l deep32 --ratios 0.1 0.2 0.3 0.4 --seeds 0 1 2

DATA holds `stories`, `stories-cased` and `wikipedia`, each with a `test.txt`, which is only measured on. MODELS holds
folders of models; `deep32` comes from `benchmarks/models.py`. LoRA needs peft. Each model's results go to a file of
its own, which an interrupted run continues; `tables.py` makes the tables and the plots from them.

All methods get the segment that the default search finds, the same rows (text that the dense model wrote), and with
gradient steps the same number of tokens: 192 rows of 128 for 2 epochs, or with `--defaults` what the package takes when
nothing is said (192 rows of 256 for 4 epochs), into a folder of its own. One learning rate for each method and model is
chosen on the validation rows of ratio 0.2 and seed 0, which therefore come first, from the same five; a rate at an end
of them is not accepted before its neighbour has been tried.
"""

import argparse
import dataclasses
import gc
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.folders import MODELS, model_folder
from benchmarks.recovery import tables
from benchmarks.recovery.methods import METHODS, Cell, Healed, Method
from optimum_clp import CalibrationConfig, LayerSegment, SearchConfig, TuningConfig
from optimum_clp.calibration.rows import CalibrationData, load_calibration, tokenize_dataset
from optimum_clp.calibration.self_written import sample_text
from optimum_clp.evaluation.tokens import evaluate_tokens
from optimum_clp.forward.dense_outputs import DenseOutputs
from optimum_clp.freed_memory import return_freed_memory
from optimum_clp.report.environment import environment_info
from optimum_clp.search.segment_search import search_segments
from optimum_clp.segments import number_of_layers_to_remove

HERE = Path(__file__).parent
RATIOS, SEEDS = (0.2, 0.1, 0.3, 0.4), (0, 1, 2)
TEST_ROWS, BATCH_SIZE = 48, 8
RATES, FACTOR, EXTENSIONS = (2e-4, 5e-4, 1.25e-3, 3.1e-3, 7.8e-3), 2.5, 4
TEXTS = {"stories260K": ("stories-cased", "self-written")}
# what the dense model writes for testing has a seed that no cell has
TEST_SEED = 1000
RIVAL_SIZE = 1.5
EQUAL_TIME_CELL = (0.2, 0)
# one configuration for all cells: a method's rate is chosen here and holds everywhere
RATE_CELL = (0.2, 0)


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much text all methods get, in rows of `length` tokens, and how often."""

    length: int = 128
    train_rows: int = 192
    validation_rows: int = 24
    epochs: int = 2

    def text(self) -> CalibrationConfig:
        """What the dense model writes."""
        return CalibrationConfig(
            dataset=None,
            sequence_length=self.length,
            train_sequences=self.train_rows,
            validation_sequences=self.validation_rows,
            test_sequences=1,
        )


def package_defaults() -> Budget:
    """The package's own when the tables were made: 192 rows, four epochs of KL."""
    text = CalibrationConfig()
    return Budget(text.sequence_length, 192, text.validation_sequences, 4)


def configurations() -> list:
    """Every configuration of a run: the text, the search, and a recipe for each method with gradient steps."""
    budgets = (Budget(), package_defaults())
    recipes = [recipe(m, RATES[0], b.epochs) for b in budgets for m in METHODS.values() if m.loss is not None]
    return [*(budget.text() for budget in budgets), search_recipe(), *recipes]


def search_recipe() -> SearchConfig:
    return SearchConfig()


def recipe(method: Method, rate: float, epochs: int) -> TuningConfig:
    """Of a method's gradient steps; only the loss differs."""
    return TuningConfig(
        init="none",
        hidden_epochs=0,
        loss=method.loss,
        learning_rate=rate,
        epochs=epochs,
        batch_size=BATCH_SIZE,
        mixed_precision="no",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--models-dir", type=Path, default=MODELS)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--defaults", action="store_true", help="as much text as the package takes by default")
    parser.add_argument("--output", type=Path, help="folder; by default results, or results/defaults")
    args = parser.parse_args()
    budget = package_defaults() if args.defaults else Budget()
    output = args.output or HERE / ("results/defaults" if args.defaults else "results")
    for name in args.models:
        setting = load_setting(name, args.models_dir, args.data, budget)
        Comparison(setting, output / f"{name}.json").run(args.ratios, args.seeds, args.methods)
    tables.write(output)


@dataclasses.dataclass
class Setting:
    """A model, and the text to measure on."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    tests: dict[str, DenseOutputs]
    budget: Budget

    def data(self, seed: int) -> CalibrationData:
        return load_calibration(self.budget.text(), self.tokenizer, self.model, seed, quiet=True)


def load_setting(name: str, models_dir: Path, data: Path, budget: Budget) -> Setting:
    path = model_folder(name, models_dir)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    tests = {}
    size = {"num_sequences": TEST_ROWS, "sequence_length": budget.length}
    for text in TEXTS.get(name, ("stories", "wikipedia")):
        if text == "self-written":
            rows = sample_text(model, seed=TEST_SEED, tokenizer=tokenizer, quiet=True, **size).tokens
        else:
            rows = tokenize_dataset(str(data / text / "test.txt"), tokenizer, **size)
        tests[text] = DenseOutputs(model, rows, quiet=True)
    return Setting(name, model, tokenizer, tests, budget)


class Comparison:
    """The runs of one model, and the file that they are kept in."""

    def __init__(self, setting: Setting, file: Path):
        self.setting, self.file = setting, file
        self.results = json.loads(file.read_text()) if file.is_file() else {"model": setting.name}
        self.results["num_layers"] = setting.model.config.num_hidden_layers
        self.results["setting"] = {
            "sequence_length": setting.budget.length,
            "train_sequences": setting.budget.train_rows,
            "validation_sequences": setting.budget.validation_rows,
            "test_sequences": TEST_ROWS,
            "epochs": setting.budget.epochs,
            "batch_size": BATCH_SIZE,
            "learning_rates": list(RATES),
        }
        self.results["environment"] = {**environment_info(), "num_threads": torch.get_num_threads()}
        self.results["dense"] = {name: measured(setting.model, test) for name, test in setting.tests.items()}
        self.results.setdefault("cells", [])
        self.results.setdefault("runs", [])

    def run(self, ratios, seeds, methods) -> None:
        for seed in seeds:
            data = self.setting.data(seed)
            validation = DenseOutputs(self.setting.model, data.validation, quiet=True)
            for ratio, count in distinct_counts(ratios, self.results["num_layers"]).items():
                cell = Cell(
                    self.setting.model, self._segment(ratio, seed, count, data), data.train, data.validation, seed
                )
                for name in methods:
                    method = METHODS[name]
                    if self.found(ratio, seed, name) or (method.needs_before and not cell.before):
                        continue
                    self._keep(ratio, cell, name, method, *self._heal(ratio, cell, name, method), validation)
                if (ratio, seed) == EQUAL_TIME_CELL:
                    self._equal_time(ratio, cell, methods, validation)

    def found(self, ratio: float, seed: int, name: str) -> dict | None:
        key = (ratio, seed, name)
        return next((r for r in self.results["runs"] if (r["ratio"], r["seed"], r["method"]) == key), None)

    def _segment(self, ratio: float, seed: int, count: int, data: CalibrationData) -> LayerSegment:
        for cell in self.results["cells"]:
            if (cell["ratio"], cell["seed"]) == (ratio, seed):
                return LayerSegment(*cell["segment"])
        result = search_segments(self.setting.model, data.train, count, search_recipe(), seed=seed, quiet=True)
        (segment,) = result.segments
        self.results["cells"].append(
            {
                "ratio": ratio,
                "seed": seed,
                "num_removed": count,
                "segment": segment.to_list(),
                "search_kl": result.score,
                "text": data.statistics,
            }
        )
        return segment

    def _heal(self, ratio: float, cell: Cell, name: str, method: Method) -> tuple[Healed, dict]:
        if method.loss is None:
            return timed(lambda: method.heal(cell))
        chosen = self.found(*RATE_CELL, name)
        if chosen is not None:
            healed, run = trained(cell, method, chosen["learning_rate"], self.setting.budget.epochs)
            return healed, {**run, "learning_rate": chosen["learning_rate"], "rate_of": list(RATE_CELL)}
        return best_of_rates(cell, name, method, self.setting.budget.epochs)

    def _equal_time(self, ratio: float, cell: Cell, methods, validation: DenseOutputs) -> None:
        """Rivals that are no larger than ours, with as many epochs as our seconds pay for."""
        ours = self.found(ratio, cell.seed, "clp")
        for name in methods:
            run, method = self.found(ratio, cell.seed, name), METHODS[name]
            if ours is None or run is None or method.kind != "rival" or method.loss is None:
                continue
            longer = f"{name}_equal_time"
            size = round(run["num_trained"] / ours["num_trained"], 2)
            if size > RIVAL_SIZE or run["cpu_seconds"] >= ours["cpu_seconds"]:
                continue
            if self.found(ratio, cell.seed, longer):
                continue
            # what is done once is not repeated by more epochs
            share = run["details"]["cache_seconds"] / run["wall_seconds"]
            once, each = run["cpu_seconds"] * share, run["cpu_seconds"] * (1 - share) / self.setting.budget.epochs
            epochs = math.ceil(1.05 * (ours["cpu_seconds"] - once) / each)
            healed, again = trained(cell, method, run["learning_rate"], epochs)
            while again["cpu_seconds"] < ours["cpu_seconds"] and healed.stopped == "finished":
                epochs += 1
                healed, again = trained(cell, method, run["learning_rate"], epochs)
            again |= {"learning_rate": run["learning_rate"], "epochs": epochs}
            self._keep(ratio, cell, longer, method, healed, again, validation)

    def _keep(
        self, ratio: float, cell: Cell, name: str, method: Method, healed: Healed, run: dict, validation: DenseOutputs
    ) -> None:
        record = {
            "model": self.setting.name,
            "ratio": ratio,
            "seed": cell.seed,
            "segment": cell.segment.to_list(),
            "method": name,
            "kind": method.kind,
            "loss": method.loss,
            "plain_checkpoint": method.plain,
            **{f.name: getattr(healed, f.name) for f in dataclasses.fields(healed) if f.name != "model"},
            **run,
            "validation": measured(healed.model, validation),
            "test": {text: measured(healed.model, test) for text, test in self.setting.tests.items()},
        }
        self.results["runs"].append(record)
        self._relate_to_control()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.results, indent=1) + "\n")
        shown = " ".join(f"{text} KL {figures['kl']:.4f}" for text, figures in record["test"].items())
        rates = f", {len(run['tried'])} rates" if "tried" in run else ""
        print(f"{self.setting.name} {ratio} seed {cell.seed} {cell.segment} {name}: {shown}, validation KL "
              f"{record['validation']['kl']:.4f}, {healed.num_trained} trained, {run['cpu_seconds']:.1f} s, rate "
              f"{run.get('learning_rate')}{rates}", flush=True)  # fmt: skip

    def _relate_to_control(self) -> None:
        for run in self.results["runs"]:
            control = self.found(run["ratio"], run["seed"], "dense_ce")
            for text, figures in run["test"].items() if control is not None else ():
                figures["retention_of_tuned_dense"] = control["test"][text]["perplexity"] / figures["perplexity"]


def distinct_counts(ratios, depth: int) -> dict[float, int]:
    """Ratios that remove the same number of layers are one cell, that of the ratio nearest to it."""
    counts = {ratio: number_of_layers_to_remove(ratio, depth) for ratio in ratios}
    nearest = {
        n: min((r for r in ratios if counts[r] == n), key=lambda r, n=n: abs(r - n / depth)) for n in counts.values()
    }
    return {ratio: n for ratio, n in counts.items() if nearest[n] == ratio}


def measured(model: PreTrainedModel, text: DenseOutputs) -> dict:
    return evaluate_tokens(model, text.tokens, reference=text, quiet=True).to_dict()


def trained(cell: Cell, method: Method, rate: float, epochs: int) -> tuple[Healed, dict]:
    return timed(lambda: method.heal(cell, recipe(method, rate, epochs)))


def best_of_rates(cell: Cell, name: str, method: Method, epochs: int) -> tuple[Healed, dict]:
    """The rate with the best validation loss, with a worse one on both sides of it."""
    rates, tried, best = list(RATES), {}, None
    while len(tried) < len(RATES) + EXTENSIONS:
        for rate in (r for r in rates if r not in tried):
            healed, run = trained(cell, method, rate, epochs)
            tried[rate] = {
                "learning_rate": rate,
                "validation_loss": healed.validation_loss,
                "best_step": healed.best_step,
                "stopped": healed.stopped,
                "cpu_seconds": run["cpu_seconds"],
            }
            print(f"  {name} rate {rate}: {healed.validation_loss:.4f}, {run['cpu_seconds']:.1f} s", flush=True)
            if best is None or healed.validation_loss < best[0].validation_loss:
                best = (healed, {**run, "learning_rate": rate})
        assert best is not None
        # where no step helps, no rate is better than another
        if best[1]["learning_rate"] not in (rates[0], rates[-1]) or best[0].best_step == 0:
            break
        if best[1]["learning_rate"] == rates[0]:
            rates.insert(0, float(f"{rates[0] / FACTOR:.3g}"))
        else:
            rates.append(float(f"{rates[-1] * FACTOR:.3g}"))
    return best[0], {**best[1], "tried": [tried[rate] for rate in rates if rate in tried]}


def timed(heal) -> tuple[Healed, dict]:
    """What a method gives, and its seconds and memory: by how much the process grew at most while it ran."""
    base = _start_of_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    healed = heal()
    run = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
    return healed, {**run, "peak_bytes": None if base is None else _status("VmHWM") - base}


def _start_of_peak() -> int | None:
    """Resident bytes now, from which the peak is counted anew; `None` where the system does not tell."""
    gc.collect()
    # or what an earlier method has freed would be filled first
    return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(name: str) -> int:
    (kilobytes,) = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


if __name__ == "__main__":
    main()
