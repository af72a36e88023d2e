"""Is the cut model worth anything as a draft for its own dense model? Both as int4 files, greedily, on prompts of a chat model.

    OMP_NUM_THREADS=1 python -m benchmarks.edge.speculative DENSE CUT --rounds 3 --out benchmarks/edge/results/speculative.json

DENSE and CUT are folders with tokenizer and `onnx/model_q4.onnx`. The dense model answers alone, and with the cut one as `assistant_model` that
drafts 2, 4 or 8 tokens at a time; in turn, prompt by prompt. Told are the draft tokens that were accepted, tokens for each run of the dense
model, and tokens per second beside the dense model alone, by the processor's time of the process (with one thread that is what passes on a quiet
machine). Where two tokens are nearly as likely, the answers may part ways: several tokens at once are multiplied by other kernels than one, and sums
in another order are other sums.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks import markdown
from optimum_clp import OnnxCausalLM
from optimum_clp.evaluation.prompts import load_prompts
from optimum_clp.report.environment import environment_info

DRAFTS = (0, 2, 4, 8)
NEW = 64


class Counted:
    """How often a model was called, and for how many tokens."""

    def __init__(self, model: OnnxCausalLM):
        self.calls, self.tokens, self.plain = 0, 0, model.forward
        model.forward = self.forward

    def forward(self, input_ids, *args, **kwargs):
        self.calls, self.tokens = self.calls + 1, self.tokens + input_ids.shape[1]
        return self.plain(input_ids, *args, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("cut", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.dense)
    dense, cut = (OnnxCausalLM.from_pretrained(f, "onnx/model_q4.onnx", num_threads=1) for f in (args.dense, args.cut))
    counted = Counted(dense)
    prompts = [encoded(tokenizer, text) for text in texts(args.prompts)]
    records = []
    for number in range(args.rounds):
        for index, ids in enumerate(prompts):
            alone = None
            for drafted in DRAFTS:
                record = answer(dense, cut, counted, ids, drafted)
                alone = alone or record
                same = record["answer"] == alone["answer"]
                said = {name: record[name] for name in ("seconds", "tokens", "runs")}
                records.append({"round": number, "prompt": index, "drafted": drafted, "same": same, **said})
        print(f"round {number}", flush=True)
    content = {"environment": environment_info("cpu"), "records": records}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content) + "\n")
    print(table(records))


def texts(count: int) -> list[str]:
    asked = [prompt.messages[-1][1] for prompt in load_prompts(None)]
    return asked[:: max(1, len(asked) // count)][:count]


def encoded(tokenizer, text: str) -> torch.Tensor:
    messages = [{"role": "user", "content": text}]
    shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(shown, return_tensors="pt", add_special_tokens=False).input_ids


def answer(dense: OnnxCausalLM, cut: OnnxCausalLM, counted: Counted, ids: torch.Tensor, drafted: int) -> dict:
    """One answer: what it says, the processor's seconds, and runs of the dense model."""
    options: dict = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    if drafted:
        settings = cut.generation_config
        settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = drafted, "constant"
        settings.assistant_confidence_threshold = 0.0
        options["assistant_model"] = cut
    counted.calls = 0
    begin = time.process_time()
    said = dense.generate(ids, **options)[0, ids.shape[1] :].tolist()
    return {"seconds": time.process_time() - begin, "tokens": len(said), "runs": counted.calls, "answer": said}


def table(records: list[dict]) -> str:
    rows = [
        [
            "drafted at once",
            "accepted",
            "tokens for each run of the dense model",
            "tokens per second / the dense model alone",
            "same answer",
        ]
    ]
    alone = {(r["round"], r["prompt"]): r["tokens"] / r["seconds"] for r in records if r["drafted"] == 0}
    for drafted in DRAFTS[1:]:
        own = [r for r in records if r["drafted"] == drafted]
        tokens, runs = sum(r["tokens"] for r in own), sum(r["runs"] for r in own)
        ratios = [r["tokens"] / r["seconds"] / alone[r["round"], r["prompt"]] for r in own]
        low, middle, high = statistics.quantiles(ratios, n=4)
        # each run gives one token of the dense model's own besides
        accepted = (tokens - runs) / (runs * drafted)
        speed = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        same = f"{sum(r['same'] for r in own)} of {len(own)}"
        rows.append([str(drafted), f"{accepted:.0%}", f"{tokens / runs:.2f}", speed, same])
    return markdown.table(rows)


if __name__ == "__main__":
    main()
