"""A chat model is cut and healed: ours against those who try the same, at equal tokens and at equal time.

    OMP_NUM_THREADS=1 python -m benchmarks.recovery.chat --model MODEL --data DATA --out OUT

MODEL is a folder or an id of the Hub (`python -m benchmarks.smollm2 FOLDER` makes one without a Hub). DATA holds the texts
and tasks of `chat_model/evaluation.py`, which are measured on only. OUT gets one JSON file for each method, ratio and
seed, the tensors that it changed, and the text, which the dense model writes. What is there is not done again; an
interrupted run goes on; two of these processes side by side take different runs.

    python -m benchmarks.recovery.chat --table OUT

prints the tables. `gpu.sh` beside this file is one run for one GPU.
"""

import argparse
import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.recovery.chat_model import ours as our_way
from benchmarks.recovery.chat_model.evaluation import Judge, Size, is_complete
from benchmarks.recovery.chat_model.on_policy import on_policy
from benchmarks.recovery.chat_model.rivals import RIVALS
from benchmarks.recovery.chat_model.runs import (
    EQUAL_TIME,
    ON_POLICY,
    Run,
    changed_tensors,
    locked,
    read_json,
    restored,
    save_weights,
    write_json,
)
from benchmarks.recovery.chat_model.tables import show
from benchmarks.recovery.chat_model.text import KINDS, Text, load_text, questions, written_text
from benchmarks.recovery.chat_model.training import Trained, train
from benchmarks.recovery.methods import Cell
from optimum_clp import LayerSegment, SearchConfig
from optimum_clp.calibration.conversations import model_template
from optimum_clp.evaluation.tokens import evaluate_tokens
from optimum_clp.forward.dense_outputs import DenseOutputs, StateStore
from optimum_clp.report.environment import environment_info
from optimum_clp.search.segment_search import search_segments
from optimum_clp.segments import number_of_layers_to_remove

# by hand; the names of `RIVALS` and these are all methods
DENSE, OURS, CLOSED_FORM = "dense", "ours", "closed_form"
METHODS = [
    DENSE,
    "cut",
    "replaceme",
    "linear_patch_free",
    CLOSED_FORM,
    OURS,
    *(n for n, r in RIVALS.items() if r.trains),
]
# of every method with gradient steps; an end that is best is gone beyond
RATES, FACTOR, EXTENSIONS = (5e-5, 1.6e-4, 5e-4, 1.6e-3), 3.2, 2
# the text that nothing is trained on has a seed that no run has
TEST_SEED = 1000
RATE_CELL = (0.2, 0)


def configurations() -> list:
    return [search_recipe(), *our_way.configurations()]


def search_recipe() -> SearchConfig:
    return SearchConfig()


def main() -> None:
    args = parsed()
    if args.table is not None:
        print(show(args.table))
        return
    bench = Bench(args)
    # every method's rate is chosen in the first cell, which therefore comes first
    cells = sorted(((r, s) for r in args.ratio for s in args.seeds), key=lambda cell: (cell != RATE_CELL, *cell))
    for ratio, seed in cells:
        for method in args.only:
            bench.run(Run(args.out, method, ratio, seed))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder, or id of the Hub")
    parser.add_argument("--data", type=Path, help="folder of texts and tasks")
    parser.add_argument("--out", type=Path, help="folder of all runs")
    parser.add_argument("--table", type=Path, metavar="OUT", help="print the tables of a folder of runs")
    parser.add_argument("--only", nargs="+", default=METHODS, metavar="METHOD",
                        help=f"{', '.join(METHODS)}; with {EQUAL_TIME} or {ON_POLICY} behind the name")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--ratio", nargs="+", type=float, default=[0.2])
    parser.add_argument("--cut", nargs=2, type=int, metavar=("START", "STOP"), help="instead of the default search's")
    parser.add_argument("--text", type=Path, help="file of rows to train on, instead of writing them")
    parser.add_argument("--rows", type=int, default=384, help="to train on, half of them conversations")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--held-out", type=int, default=8, help="rows of each kind that choose the rate")
    parser.add_argument("--epochs", type=float, default=3, help="passes over the rows, for every method")
    parser.add_argument("--rate", type=float, help="of all methods, instead of choosing one for each")
    parser.add_argument("--rate-rows", type=int, default=96, help="that a rate is tried on, for one epoch")
    parser.add_argument("--rounds", type=int, default=48, help="of an on-policy stage")
    parser.add_argument("--batch", type=int, default=8, help="rows in a step")
    parser.add_argument("--write-batch", type=int, default=128, help="rows that are written at once")
    parser.add_argument("--test-rows", type=int, default=Size.rows, help="of each kind of text")
    parser.add_argument("--examples", type=int, default=Size.examples, help="of each task")
    parser.add_argument("--prompts", type=int, default=Size.prompts)
    parser.add_argument("--new-tokens", type=int, default=Size.new_tokens, help="of an answer, at most")
    parser.add_argument("--cache-gib", type=float, default=4, help="of hidden states in main memory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", help="of the weights; auto is the checkpoint's")
    args = parser.parse_args()
    if args.table is None and None in (args.model, args.data, args.out):
        parser.error("--model, --data and --out, or --table")
    if args.cut is not None and len(args.ratio) > 1:
        parser.error("--cut: it is one cut, and --ratio asks for several")
    for method in args.only:
        if Run(Path(), method, 0.2, 0).base not in METHODS:
            parser.error(f"--only {method}: there are {', '.join(METHODS)}")
    return args


class Bench:
    """All runs of one model.

    Args:
        args (`argparse.Namespace`): The command line's.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, args.out
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
        self.dense: PreTrainedModel = model.to(args.device).eval()
        self._texts: dict[int, Text] = {}
        self._judge: Judge | None = None

    def run(self, run: Run) -> None:
        """Heal and measure, or what is missing of it; nothing if another process is at it."""
        record = run.record()
        if record is not None and is_complete(record["evaluation"]):
            return
        with locked(self.out, run.name) as mine:
            if not mine:
                print(f"{run.name}: another process is at it", flush=True)
                return
            record = run.record()
            if record is None:
                cell = self.cell(run.ratio, run.seed)
                if run.base in RIVALS and RIVALS[run.base].between and len(cell.endpoints) < 2:
                    print(f"{run.name}: it needs a layer on either side of {cell.segment}", flush=True)
                    return
                model, record = self._healed(run, cell)
                run.save(record)
            elif run.method == DENSE:
                model = self.dense
            else:
                model = self.cell(run.ratio, run.seed).cut()
                restored(model, run.weights)
            for part, figures in self.judge().missing(record["evaluation"], model):
                record["evaluation"][part] = figures
                run.save(record)
            shutil.rmtree(run.work, ignore_errors=True)
            print(line(record), flush=True)

    def _healed(self, run: Run, cell: Cell) -> tuple[PreTrainedModel, dict[str, Any]]:
        record = {
            "method": run.method,
            "ratio": run.ratio,
            "seed": run.seed,
            "segment": cell.segment.to_list(),
            "setting": {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items() if k in SETTING},
            "environment": {**environment_info(self.args.device), "num_threads": torch.get_num_threads()},
            "evaluation": {},
        }
        if run.method == DENSE:
            return self.dense, record
        begin = time.perf_counter()
        if run.method.endswith(ON_POLICY):
            model, trained, more = self._on_policy(run, cell)
        elif trains(run.base):
            model, trained, more = self._trained(run, cell)
        else:
            model, more = self._solved(run.base, cell), {}
            trained = Trained(0, 0, [], time.perf_counter() - begin, time.perf_counter() - begin)
        untouched = cell.cut()
        save_weights(run.weights, changed_tensors(model, untouched))
        return model, {**record, **more, **asdict(trained), "validation": self._validation(model, cell)}

    def _solved(self, method: str, cell: Cell) -> PreTrainedModel:
        return our_way.closed_form(cell) if method == CLOSED_FORM else RIVALS[method].prepare(cell)

    def _trained(self, run: Run, cell: Cell) -> tuple[PreTrainedModel, Trained, dict[str, Any]]:
        rate, variant = self._rate(run.base, cell)
        epochs = self.args.epochs
        if run.method.endswith(EQUAL_TIME):
            epochs *= self._time_share(run)
        model, trained = self._train(run.base, cell, rate, variant, epochs, run.work)
        return model, trained, {"rate": rate, "variant": variant, "epochs": epochs}

    def _train(
        self, method: str, cell: Cell, rate: float, variant: int, epochs: float, folder: Path
    ) -> tuple[PreTrainedModel, Trained]:
        if method == OURS:
            kinds = self.text(cell.seed).split(self.args.held_out)[1].kinds
            return our_way.ours(cell, rate, epochs, self.args.batch, folder, self.args.cache_gib, kinds)
        healing = RIVALS[method].prepare(cell)[variant]
        store = StateStore(folder, self.args.cache_gib * 2**30)
        return healing.model, train(healing, cell, rate, epochs, self.args.batch, folder, store)

    def _time_share(self, run: Run) -> float:
        """How much more time ours took than the method did with equal tokens."""
        mine, theirs = (Run(self.out, method, run.ratio, run.seed).record() for method in (run.base, OURS))
        if mine is None or theirs is None:
            raise SystemExit(f"{run.name}: {run.base} and {OURS} come first")
        # not by the clock: other processes are at work
        return theirs["cpu_seconds"] / mine["cpu_seconds"]

    def _on_policy(self, run: Run, cell: Cell) -> tuple[PreTrainedModel, Trained, dict[str, Any]]:
        before = run.before.record()
        if before is None:
            raise SystemExit(f"{run.name}: {run.before.method} comes first")
        model, text = cell.cut(), self.text(run.seed)
        names = restored(model, run.before.weights)
        prompts = questions(text.of_kind("conversations"), model_template(self.dense, self.tokenizer).answer)
        rate, folder = before.get("rate", RATES[0]), run.work
        options = {"rounds": self.args.rounds, "batch_size": min(self.args.batch, len(prompts)), "folder": folder}
        trained = on_policy(model, names, cell, prompts, rate=rate, **options)
        return model, trained, {"rate": rate, "seconds_before": before["seconds"]}

    def _rate(self, method: str, cell: Cell) -> tuple[float, int]:
        """The rate and the variant with the lowest KL on validation rows after one epoch of a few rows; chosen once."""
        if self.args.rate is not None:
            return self.args.rate, 0
        file = self.out / f"rate-{method}.json"
        with locked(self.out, file.stem, wait=True):
            tried = read_json(file) or []
            rates = list(dict.fromkeys([*RATES, *(t["rate"] for t in tried)]))
            few = Cell(cell.dense, cell.segment, cell.train[: self.args.rate_rows], cell.validation, cell.seed)
            variants = len(RIVALS[method].prepare(few)) if method in RIVALS else 1
            while True:
                pairs = [(rate, v) for rate in rates for v in range(variants)]
                for rate, variant in pairs[len(tried) :] if len(tried) < len(pairs) else ():
                    tried.append(self._try(method, few, rate, variant))
                    write_json(file, tried)
                best = min(tried, key=lambda t: t["kl"])
                if best["rate"] not in (min(rates), max(rates)) or len(rates) == len(RATES) + EXTENSIONS:
                    return best["rate"], best["variant"]
                further = best["rate"] * (FACTOR if best["rate"] == max(rates) else 1 / FACTOR)
                rates.append(float(f"{further:.2g}"))

    def _try(self, method: str, cell: Cell, rate: float, variant: int) -> dict[str, Any]:
        folder = self.out / "work" / f"rate-{method}-{rate:g}-{variant}"
        # ours has two stages, of one epoch each
        model, trained = self._train(method, cell, rate, variant, 2 if method == OURS else 1, folder)
        shutil.rmtree(folder, ignore_errors=True)
        kl = self._validation(model, cell)["kl"]
        print(f"  {method} rate {rate:g} variant {variant}: KL {kl:.4f}, {trained.seconds:.0f} s", flush=True)
        return {"rate": rate, "variant": variant, "kl": kl if math.isfinite(kl) else 1e9, "seconds": trained.seconds}

    def _validation(self, model: PreTrainedModel, cell: Cell) -> dict[str, Any]:
        reference = DenseOutputs(cell.dense, cell.validation, batch_size=self.args.batch)
        return evaluate_tokens(model, cell.validation, reference=reference, batch_size=self.args.batch).to_dict()

    def cell(self, ratio: float, seed: int) -> Cell:
        """A cut, and the rows of a seed."""
        train_rows, validation = self.text(seed).split(self.args.held_out)
        return Cell(self.dense, self._segment(ratio), train_rows.tokens, validation.tokens, seed)

    def text(self, seed: int) -> Text:
        """What a seed trains on and chooses by; one file for all seeds if it is given."""
        if seed not in self._texts:
            rows = self.args.rows + len(KINDS) * self.args.held_out
            self._texts[seed] = load_text(self.args.text) if self.args.text else self._written("train", rows, seed)
        return self._texts[seed]

    def _written(self, name: str, num_rows: int, seed: int) -> Text:
        """Text that the dense model writes, once for all processes."""
        file = self.out / f"text-{name}-{seed}.safetensors"
        with locked(self.out, file.stem, wait=True):
            size = {"num_rows": num_rows, "length": self.args.length, "batch_size": self.args.write_batch}
            return written_text(self.dense, self.tokenizer, file, seed=seed, **size)

    def _segment(self, ratio: float) -> LayerSegment:
        """The same for all methods and seeds: what was given, or what the default search finds."""
        if self.args.cut is not None:
            return LayerSegment(*self.args.cut)
        file = self.out / f"segment-{ratio:g}.json"
        with locked(self.out, file.stem, wait=True):
            found = read_json(file)
            if found is None:
                count = number_of_layers_to_remove(ratio, self.dense.config.num_hidden_layers)
                rows = self.text(0).split(self.args.held_out)[0].tokens
                result = search_segments(self.dense, rows, count, search_recipe(), seed=0)
                found = result.segments[0].to_list()
                write_json(file, found)
            return LayerSegment(*found)

    def judge(self) -> Judge:
        """What all models are measured by."""
        if self._judge is None:
            args = self.args
            own = self._written("test", len(KINDS) * args.test_rows, TEST_SEED)
            size = Size(args.test_rows, args.examples, args.prompts, args.new_tokens)
            self._judge = Judge(self.dense, self.tokenizer, own, args.data, size, args.batch)
        return self._judge


# of the command line, what a record keeps: nothing of where things lie
SETTING = ("rows", "length", "held_out", "epochs", "rate_rows", "rounds", "batch", "test_rows", "examples", "prompts",
           "new_tokens", "device", "dtype")  # fmt: skip


def trains(method: str) -> bool:
    return method == OURS or (method in RIVALS and RIVALS[method].trains)


def line(record: dict[str, Any]) -> str:
    """A record in a few words."""
    texts = record["evaluation"].get("texts", {})
    shown = " ".join(f"{name} {figures['kl']:.3f}" for name, figures in texts.items())
    rate, seconds = record.get("rate"), record.get("seconds", 0.0)
    return f"{record['method']} {record['ratio']} seed {record['seed']}: KL {shown}; rate {rate}, {seconds:.0f} s"


if __name__ == "__main__":
    main()
