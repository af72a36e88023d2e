"""The whole pipeline on a random model in the shape of Qwen3-0.6B, in bfloat16: seconds and peak memory of each step.

    python -m benchmarks.large_shape OUTPUT

Little text is used: this measures what a model of that size takes, not what it says.
"""

import argparse
import resource
import sys
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from optimum_clp import CLPConfig, CLPPruner


def configurations() -> list[CLPConfig]:
    return [recipe("cache")]


def recipe(cache: str) -> CLPConfig:
    """As little text as every step can do with."""
    return CLPConfig(
        0.2,
        calibration={
            "sequence_length": 64,
            "train_sequences": 8,
            "validation_sequences": 2,
            "test_sequences": 2,
            "cache_dir": cache,
        },
        search={"num_sequences": 4, "batch_size": 2},
        tuning={"epochs": 1, "batch_size": 2},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="output folder; about 4 GB")
    args = parser.parse_args()
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        bos_token_id=151643,
        eos_token_id=151645,
    )
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).eval()
    pruner = CLPPruner.from_pretrained(model, quiet=True)
    show("model", time.perf_counter())
    with tempfile.TemporaryDirectory() as cache:
        config = recipe(cache)
        steps = {
            "search": lambda: pruner.search(config),
            "cut": pruner.cut,
            "tune": pruner.tune,
            "save": lambda: pruner.save_pretrained(args.output, overwrite=True),
        }
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            show(name, begin)
    print(pruner.report.to_table())


def show(name: str, begin: float) -> None:
    unit = 2**30 if sys.platform == "darwin" else 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    print(f"{name:<7} {time.perf_counter() - begin:7.1f} s   peak {peak:5.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
