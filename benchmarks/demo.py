"""`make demo`: the whole pipeline on the small model that comes with the project, without network.

    python -m benchmarks.demo [--model MODEL] [--output FOLDER]

The model writes its own calibration text (seed 0), is searched, cut, tuned, exported and quantized; everything is
measured on a second sample of its own text (seed 1); at the end the int4 ONNX file writes a few sentences.
"""

import argparse
import time

import torch
from transformers import AutoTokenizer

from benchmarks.folders import MODELS, ROOT
from optimum_clp import CLPConfig, CLPPruner, OnnxCausalLM

PROMPTS = ("one day, a little girl named", "the dog was happy because", "apollo was the")
RATIO = 0.2


def configurations() -> list[CLPConfig]:
    return [recipe(RATIO)]


def recipe(ratio: float) -> CLPConfig:
    """The defaults, with a limit to the time: the whole demo takes under five minutes."""
    return CLPConfig(ratio, budget="150s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(MODELS / "stories-llama-16l"))
    parser.add_argument("--output", default=str(ROOT / "demo-output"))
    parser.add_argument("--pruning-ratio", type=float, default=RATIO)
    args = parser.parse_args()

    begin = time.perf_counter()
    pruner = CLPPruner.from_pretrained(args.model)
    pruner.prune(recipe(args.pruning_ratio), save_directory=args.output, overwrite=True)
    search, tuning = pruner.report.search, pruner.report.tuning
    print(
        f"\nThe search (strategy {search['used_strategy']}) chose layers {', '.join(map(str, pruner.segments))} of {search['num_layers']}; "
        f"layers {', '.join(map(str, tuning['layers']))} of the cut model were tuned in {tuning['steps']} steps.\n"
    )
    print(pruner.report.to_table())

    file = "onnx/model_q4.onnx"
    print(f"\nWritten by {file} through ONNX Runtime (sampled, seed 0):\n")
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    model = OnnxCausalLM.from_pretrained(args.output, file)
    torch.manual_seed(0)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], dim=1)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=True, temperature=0.6
        )
        print("  " + tokenizer.decode(out[0], skip_special_tokens=True).replace("\n", " "))
    print(f"\nEverything is in {args.output} ({time.perf_counter() - begin:.0f} s).")


if __name__ == "__main__":
    main()
