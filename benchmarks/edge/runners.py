"""One way to run one model, in a process of its own that answers requests on its standard input.

    python -m benchmarks.edge.runners RUNTIME FOLDER FILE THREADS PROMPT NEW KEPT

KEPT is how many positions get logits, 0 for all; of a file that onnxruntime-genai runs it was decided before.
RUNTIME is `ours`, `genai`, `eager`, `compiled` or `llama`. The process loads the model, says `{"load_seconds": ...}`, and then for each line it
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

# prompt -> (moments: before the prompt, after it, after the last step; the tokens that were chosen)
Run = Callable[[list[int]], tuple[list["Moment"], list[int]]]
# seconds that passed, and of the processor in this process
Moment = tuple[float, float]


def now() -> Moment:
    return time.perf_counter(), time.process_time()


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
        moments, chosen = run(tokens)
        passing, processor = (speeds([moment[i] for moment in moments], prompt, new) for i in range(2))
        say(**passing, processor=processor, tokens=chosen, peak_memory=peak_memory())


def speeds(moments: list[float], prompt: int, new: int) -> dict[str, float]:
    begin, first, end = moments
    return {"prefill": prompt / (first - begin), "decode": (new - 1) / (end - first)}


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
    def run(prompt: list[int]) -> tuple[list[Moment], list[int]]:
        cache.reset()
        ids, chosen, times = torch.tensor([prompt]), [], [now()]
        for _ in range(new):
            start = len(prompt) + len(chosen) - ids.shape[1]
            position = torch.arange(start, start + ids.shape[1])[None]
            output = fast(
                input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=kept
            )
            ids = output.logits[:, -1].argmax(-1, keepdim=True)
            chosen.append(int(ids))
            times.append(now())
        return [times[0], times[1], times[-1]], chosen

    for _ in range(2):
        run([5] * 256)
    return run


def stepwise(step, new: int) -> Run:
    import torch

    def run(prompt: list[int]) -> tuple[list[Moment], list[int]]:
        ids, cache, chosen, times = torch.tensor([prompt]), None, [], [now()]
        for _ in range(new):
            ids, cache = step(ids, cache)
            chosen.append(int(ids))
            times.append(now())
        return [times[0], times[1], times[-1]], chosen

    return run


def genai(folder: Path, file: str, threads: int, new: int, kept: int) -> Run:
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    config.overlay(
        json.dumps({"model": {"decoder": {"filename": file, "session_options": {"intra_op_num_threads": threads}}}})
    )
    model = og.Model(config)

    def run(prompt: list[int]) -> tuple[list[Moment], list[int]]:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + new, do_sample=False)
        generator = og.Generator(model, params)
        times = [now()]
        generator.append_tokens(prompt)
        for _ in range(new):
            generator.generate_next_token()
            times.append(now())
        return [times[0], times[1], times[-1]], [int(t) for t in generator.get_sequence(0)[len(prompt) :]]

    return run


def llama(folder: Path, file: str, threads: int, new: int, kept: int) -> Run:
    """llama.cpp through llama-cpp-python's low-level calls: no sampler, and logits of the last position alone."""
    import ctypes

    import llama_cpp as api
    import numpy as np

    @api.llama_log_callback
    def quiet(level, text, data):
        pass

    api.llama_log_set(quiet, ctypes.c_void_p(0))
    api.llama_backend_init()
    model = api.llama_model_load_from_file(str(folder / file).encode(), api.llama_model_default_params())
    settings = api.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 512, 512, 512
    settings.n_threads = settings.n_threads_batch = threads
    context = api.llama_init_from_model(model, settings)
    width = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))

    def decode(ids: list[int]) -> int:
        tokens = (api.llama_token * len(ids))(*ids)
        if api.llama_decode(context, api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), (width,))
        return int(logits.argmax())

    def run(prompt: list[int]) -> tuple[list[Moment], list[int]]:
        api.llama_memory_clear(api.llama_get_memory(context), True)
        ids, chosen, times = prompt, [], [now()]
        for _ in range(new):
            ids = [decode(ids)]
            chosen += ids
            times.append(now())
        return [times[0], times[1], times[-1]], chosen

    # what the callback refers to lives as long as the run
    run.kept = quiet  # type: ignore[attr-defined]
    return run


RUNTIMES = {"ours": ours, "genai": genai, "eager": eager, "compiled": compiled, "llama": llama}

if __name__ == "__main__":
    main()
