"""Which text, and how much of it: the segment that exhaustive search finds, and what its removal does to held-out text.

    python -m benchmarks.search.calibration --data DATA --models stories-llama-16l deep32 --models-dir MODELS

Arguments and folders as for `compare.py`; results go to `calibration-NAME.json`. Sources: the train text of `stories` and
of `wikipedia`, half of each, text that the dense model wrote itself, and tokens drawn at random. Measured on the test text
of `stories` and of `wikipedia`, which is never searched on.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.folders import MODELS, model_folder
from benchmarks.search.compare import HELD_OUT_ROWS, LENGTHS
from optimum_clp import SearchConfig
from optimum_clp.calibration.rows import tokenize_dataset
from optimum_clp.report.environment import environment_info
from optimum_clp.search.objective import Objective, gate_of
from optimum_clp.search.segment_search import search_segments
from optimum_clp.segments import candidate_segments, number_of_layers_to_remove

TOKENS = (512, 2048, 8192, 16384)
RATIO = 0.2


def configurations() -> list[SearchConfig]:
    return [recipe(tokens // 256) for tokens in TOKENS]


def recipe(rows: int) -> SearchConfig:
    return SearchConfig(strategy="exhaustive", num_sequences=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--models-dir", type=Path, default=MODELS)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    for name in args.models:
        study(name, args)


def study(name: str, args: argparse.Namespace) -> None:
    path = model_folder(name, args.models_dir)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    length = LENGTHS.get(name, 256)

    def rows_of(text: str, split: str) -> torch.Tensor:
        return tokenize_dataset(str(args.data / text / f"{split}.txt"), tokenizer, sequence_length=length)

    stories, wikipedia = rows_of("stories", "train"), rows_of("wikipedia", "train")
    held_out = {
        text: Objective(model, rows_of(text, "test")[:HELD_OUT_ROWS], quiet=True) for text in ("stories", "wikipedia")
    }
    depth = held_out["stories"].num_layers
    count = number_of_layers_to_remove(RATIO, depth)
    everywhere = {
        text: objective.measure(
            [gate_of([s], depth) for s in candidate_segments(depth, count)], range(len(objective.tokens))
        ).kl.mean(1)
        for text, objective in held_out.items()
    }
    results = {"model": name, "num_removed": count, "environment": environment_info(), "runs": [],
               "best_held_out": {text: kl.min().item() for text, kl in everywhere.items()}}  # fmt: skip
    for seed in args.seeds:
        sources = {
            "stories": shuffled(stories, seed),
            "wikipedia": shuffled(wikipedia, seed),
            "both": mixed(shuffled(stories, seed), shuffled(wikipedia, seed)),
            "self-written": self_written(model, max(TOKENS) // length, length, seed),
            "random tokens": random_rows(model, max(TOKENS) // length, length, seed),
        }
        for source, rows in sources.items():
            for tokens in TOKENS:
                used = rows[: max(1, tokens // length)]
                found = search_segments(model, used, count, recipe(len(used)), seed=seed, quiet=True)
                start = found.segments[0].start
                run = {
                    "source": source, "tokens": used.numel(), "seed": seed, "start": start, "kl": found.score,
                    "held_out": {text: kl[start].item() for text, kl in everywhere.items()},
                    "excess": {text: (kl[start] / kl.min()).item() - 1 for text, kl in everywhere.items()},
                }  # fmt: skip
                results["runs"].append(run)
                print(name, run, flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"calibration-{name}.json").write_text(json.dumps(results, indent=1) + "\n")


def shuffled(rows: torch.Tensor, seed: int) -> torch.Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


def mixed(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Rows of both in turn."""
    count = min(len(first), len(second))
    return torch.stack([first[:count], second[:count]], dim=1).flatten(0, 1)


def self_written(model, rows: int, length: int, seed: int) -> torch.Tensor:
    """Sampled at temperature 1 from the start token; a row that ends early begins anew."""
    torch.manual_seed(seed)
    start = torch.full((rows, 1), model.config.bos_token_id)
    with torch.no_grad():
        return model.generate(
            start, do_sample=True, top_k=0, min_new_tokens=length - 1, max_new_tokens=length - 1, pad_token_id=0
        )


def random_rows(model, rows: int, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)


if __name__ == "__main__":
    main()
