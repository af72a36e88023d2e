"""One way to run one model, in a process of its own that answers requests on its standard input.

    python -m benchmarks.edge.runners RUNTIME FOLDER FILE THREADS PROMPT NEW KEPT

KEPT is how many positions get logits, 0 for all; of a file that onnxruntime-genai runs it was decided before.
RUNTIME is `ours`, `genai`, `eager` or `compiled`. The process loads the model, says `{"load_seconds": ...}`, and then for each line it
reads runs a prompt of PROMPT tokens and NEW - 1 further steps, greedily, and answers with the seconds of both, the tokens, and its
peak memory so far. Each imports only what it needs: a device that runs onnxruntime-genai has no PyTorch.
"""

import json
import os
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

# prompt -> (seconds of the prompt, seconds of the steps, the tokens that were chosen)
Run = Callable[[list[int]], tuple[float, float, list[int]]]


def main() -> None:
    runtime, folder, file, *numbers = sys.argv[1:]
    threads, prompt, new, kept = map(int, numbers)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    begin = time.perf_counter()
    run = RUNTIMES[runtime](Path(folder), file, threads, new, kept)
    generator = random.Random(0)
    tokens = [generator.randrange(3, 30000) for _ in range(prompt)]
    for _ in range(2 if runtime == "compiled" else 0):
        run(tokens)
    say(load_seconds=time.perf_counter() - begin)
    for _ in sys.stdin:
        first, rest, chosen = run(tokens)
        say(prefill=prompt / first, decode=(new - 1) / rest, tokens=chosen, peak_memory=peak_memory())


def say(**values) -> None:
    print(json.dumps(values), flush=True)


def peak_memory() -> int:
    """Bytes of this process that were in memory at once, at most."""
    status = Path("/proc/self/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024


def ours(folder: Path, file: str, threads: int, new: int, kept: int) -> Run:
    import torch

    from optimum_clp import OnnxCausalLM

    torch.set_num_threads(threads)
    model = OnnxCausalLM.from_pretrained(folder, file, num_threads=threads)

    def step(ids, cache):
        output = model(ids, past_key_values=cache, logits_to_keep=kept)
        return output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values

    return stepwise(step, new)


def eager(folder: Path, file: str, threads: int, new: int, kept: int) -> Run:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def step(ids, cache):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=kept)
        return output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values

    return stepwise(step, new)


def compiled(folder: Path, file: str, threads: int, new: int, kept: int) -> Run:
    """`torch.compile` over a static cache, as transformers recommends; compiled before it says that it has loaded."""
    import torch
    from transformers import AutoModelForCausalLM, StaticCache

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    fast = torch.compile(model)
    cache = StaticCache(config=model.config, max_cache_len=1024)

    @torch.no_grad()
    def run(prompt: list[int]) -> tuple[float, float, list[int]]:
        cache.reset()
        ids, chosen, times = torch.tensor([prompt]), [], [time.perf_counter()]
        for _ in range(new):
            start = len(prompt) + len(chosen) - ids.shape[1]
            position = torch.arange(start, start + ids.shape[1])[None]
            output = fast(
                input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=kept
            )
            ids = output.logits[:, -1].argmax(-1, keepdim=True)
            chosen.append(int(ids))
            times.append(time.perf_counter())
        return times[1] - times[0], times[-1] - times[1], chosen

    for _ in range(2):
        run([5] * 256)
    return run


def stepwise(step, new: int) -> Run:
    import torch

    def run(prompt: list[int]) -> tuple[float, float, list[int]]:
        ids, cache, chosen, times = torch.tensor([prompt]), None, [], [time.perf_counter()]
        for _ in range(new):
            ids, cache = step(ids, cache)
            chosen.append(int(ids))
            times.append(time.perf_counter())
        return times[1] - times[0], times[-1] - times[1], chosen

    return run


def genai(folder: Path, file: str, threads: int, new: int, kept: int) -> Run:
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    config.overlay(
        json.dumps({"model": {"decoder": {"filename": file, "session_options": {"intra_op_num_threads": threads}}}})
    )
    model = og.Model(config)

    def run(prompt: list[int]) -> tuple[float, float, list[int]]:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + new, do_sample=False)
        generator = og.Generator(model, params)
        times = [time.perf_counter()]
        generator.append_tokens(prompt)
        for _ in range(new):
            generator.generate_next_token()
            times.append(time.perf_counter())
        return times[1] - times[0], times[-1] - times[1], [int(t) for t in generator.get_sequence(0)[len(prompt) :]]

    return run


RUNTIMES = {"ours": ours, "genai": genai, "eager": eager, "compiled": compiled}

if __name__ == "__main__":
    main()
