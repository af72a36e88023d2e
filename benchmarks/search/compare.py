"""Every strategy on every model, ratio and seed: what it costs, what it chooses, and what the choice does to held-out text.

    python -m benchmarks.search.compare --data DATA --models stories260K stories-llama-16l deep32 deep80 \
        --models-dir MODELS --output benchmarks/search/results

DATA holds `stories`, `stories-cased` and `wikipedia`, each with `train.txt` (calibration) and `test.txt` (held out: only
measured on). MODELS holds folders of models; `deep32` and `deep80` come from `benchmarks/models.py`. Each model's results go
to a file of its own, which an interrupted run continues; `tables.py` makes the tables and the plots from them.

Strategies at one budget are compared with the oracle, exhaustive search on the same rows. `fraction` is exhaustive search
on as many rows as the budget pays for. Costs are in forward-equivalents of the calibration set.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.folders import MODELS, model_folder
from optimum_clp import LayerSegment, SearchConfig
from optimum_clp.architecture.lookup import allowed_segments
from optimum_clp.calibration.rows import tokenize_dataset
from optimum_clp.evaluation.live_memory import LiveTensorBytes
from optimum_clp.report.environment import environment_info
from optimum_clp.search.objective import Objective, gate_of
from optimum_clp.search.segment_search import search_segments
from optimum_clp.segments import number_of_layers_to_remove

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
SEEDS = (0, 1, 2, 3, 4)
ROWS, HELD_OUT_ROWS, BUDGET = 32, 64, 4.0
AT_ONE_BUDGET = ("gate", "halving", "fraction")
OF_THE_FIELD = ("block_influence", "angular", "cosine_block", "taylor", "perplexity_greedy", "tail", "random")
TEXTS = {"stories260K": "stories-cased"}
LENGTHS = {"deep32": 128, "deep80": 128}
# it costs n (L - n/2) / 2 forward-equivalents: with one seed, at most so many layers, and on few rows of the deep models
GREEDY_LAYERS = 24
GREEDY_ROWS = {"deep32": 8, "deep80": 4}


@dataclasses.dataclass
class Setting:
    """A model with the rows that a seed chooses from, and held-out rows."""

    name: str
    model: torch.nn.Module
    pool: torch.Tensor
    held_out: Objective

    def rows(self, seed: int, count: int = ROWS) -> torch.Tensor:
        order = torch.randperm(len(self.pool), generator=torch.Generator().manual_seed(seed))
        return self.pool[order[:count]]


def configurations() -> list[SearchConfig]:
    return [recipe(strategy, ROWS) for strategy in ("exhaustive", *AT_ONE_BUDGET, *OF_THE_FIELD)]


def recipe(strategy: str, rows: int) -> SearchConfig:
    """Of a strategy by its name in the tables; `rows` matter to those that the budget does not bind."""
    if strategy == "fraction":
        return SearchConfig(strategy="exhaustive", num_sequences=rows)
    return SearchConfig(strategy=strategy, num_sequences=rows, budget=BUDGET)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--models-dir", type=Path, default=MODELS)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    for name in args.models:
        compare(load_setting(name, args.models_dir, args.data), args.ratios, args.seeds, args.output / f"{name}.json")


def load_setting(name: str, models_dir: Path, data: Path) -> Setting:
    path = model_folder(name, models_dir)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    length, text = LENGTHS.get(name, 256), data / TEXTS.get(name, "stories")
    pool, test = (
        tokenize_dataset(str(text / f"{split}.txt"), tokenizer, sequence_length=length) for split in ("train", "test")
    )
    return Setting(name, model, pool, Objective(model, test[:HELD_OUT_ROWS], quiet=True))


def compare(setting: Setting, ratios, seeds, output: Path) -> None:
    results = json.loads(output.read_text()) if output.is_file() else {"model": setting.name, "runs": []}
    results["environment"] = environment_info()
    results["plain_forward_bytes"] = plain_forward_bytes(setting)
    done = {(r["ratio"], r["seed"], r["strategy"]) for r in results["runs"]}
    held_out: dict[str, dict] = {}
    depth = setting.held_out.num_layers
    for ratio, count in distinct_counts(ratios, depth).items():
        for seed in seeds:
            for strategy in ("exhaustive", *AT_ONE_BUDGET, *OF_THE_FIELD):
                too_long = strategy == "perplexity_greedy" and (seed != seeds[0] or count > GREEDY_LAYERS)
                if (ratio, seed, strategy) in done or too_long:
                    continue
                run = one_run(setting, strategy, count, seed)
                run |= {"ratio": ratio, "seed": seed, "strategy": strategy}
                key = json.dumps(run["segments"])
                if key not in held_out:
                    held_out[key] = on_held_out(setting, run["segments"])
                run["held_out"] = held_out[key]
                results["runs"].append(run)
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps(results, indent=1) + "\n")
                print(f"{setting.name} {ratio} seed {seed} {strategy}: {run['segments']} "
                      f"{run['forward_equivalents']:.2f} forwards, {run['seconds']:.1f} s, "
                      f"held-out KL {run['held_out']['kl']:.4f}", flush=True)  # fmt: skip


def distinct_counts(ratios, depth: int) -> dict[float, int]:
    """Ratios that remove the same number of layers are one cell."""
    counts: dict[float, int] = {}
    for ratio in ratios:
        count = number_of_layers_to_remove(ratio, depth)
        if count not in counts.values():
            counts[ratio] = count
    return counts


def one_run(setting: Setting, strategy: str, count: int, seed: int) -> dict:
    rows = setting.rows(seed)
    used = ROWS
    if strategy == "fraction":
        used = fraction_rows(setting, count)
    if strategy == "perplexity_greedy":
        used = GREEDY_ROWS.get(setting.name, ROWS)
    config = recipe(strategy, used)
    begin = time.perf_counter()
    result = search_segments(setting.model, rows, count, config, seed=seed, quiet=True)
    seconds = time.perf_counter() - begin
    run = {
        "num_removed": count,
        "segments": [s.to_list() for s in result.segments],
        "kl": result.score,
        "num_scored": len(result.scored),
        "rows": used,
        "forward_equivalents": result.forward_equivalents * used / ROWS,
        "seconds": seconds,
    }
    if seed == 0 and (strategy != "perplexity_greedy" or count <= 8):  # counting slows the run: not on the clock
        with LiveTensorBytes(setting.model) as memory:
            search_segments(setting.model, rows, count, config, seed=seed, quiet=True)
        run["peak_bytes"] = memory.peak
    return run


def fraction_rows(setting: Setting, count: int) -> int:
    """How many rows exhaustive search can look at for the budget."""
    objective = setting.held_out
    price = 1 + sum(objective.price_of([s]) for s in allowed_segments(setting.model.config, count))
    return max(1, min(ROWS, int(BUDGET / price * ROWS)))


def on_held_out(setting: Setting, segments: list[list[int]]) -> dict:
    objective = setting.held_out
    gate = gate_of([LayerSegment(*s) for s in segments], objective.num_layers)
    found = objective.measure([gate], range(len(objective.tokens)))
    loss, dense_loss = found.loss.mean(), found.dense_loss.mean()
    return {
        "kl": found.kl.mean().item(),
        "kl_error": (found.kl.std() / len(objective.tokens) ** 0.5).item(),
        "perplexity": loss.exp().item(),
        "dense_perplexity": dense_loss.exp().item(),
    }


def plain_forward_bytes(setting: Setting) -> int:
    """Peak of a forward pass that returns all logits of one batch, weights included."""
    with torch.no_grad(), LiveTensorBytes(setting.model) as memory:
        setting.model(setting.pool[: recipe("exhaustive", ROWS).batch_size], use_cache=False)
    return memory.peak


if __name__ == "__main__":
    main()
