"""The memory that an ONNX file takes to run, for a process that does nothing else.

It needs numpy and ONNX Runtime alone:

    python -m optimum_clp.runtime.memory_use FILE TOKENS RESULT
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

from .names import CACHE_KINDS, LOGITS_TO_KEEP
from .session import chooses_positions, open_session


def write_memory_use(file: Path, num_tokens: int, result: Path) -> None:
    """Open a file in this process, let it read a prompt and write a token, and write down what that took, in bytes.

    Args:
        file (`Path`): The ONNX file.
        num_tokens (`int`): Of the prompt and the token after it, at least 2.
        result (`Path`): Target, JSON: `before`, `loaded`, `peak` and `cache_per_token`.
    """
    before, _ = resident()
    session = open_session(file)
    loaded, _ = resident()
    inputs = {value.name: value for value in session.get_inputs()}
    past = {
        name: np.zeros((1, value.shape[1], 0, value.shape[3]), CACHE_KINDS[value.type])
        for name, value in inputs.items()
        if name.startswith("past_key_values.")
    }
    outputs = ["logits", *(name.replace("past_key_values", "present") for name in past)]
    chosen = {LOGITS_TO_KEEP: np.array(1)} if chooses_positions(session) else {}
    vocabulary = session.get_outputs()[0].shape[-1]
    tokens = np.arange(num_tokens, dtype=np.int64)[None] % (vocabulary if isinstance(vocabulary, int) else 2)
    end = 0
    for size in (num_tokens - 1, 1):
        end += size
        given = {
            "input_ids": tokens[:, end - size : end],
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(end - size, end, dtype=np.int64)[None],
        }
        feeds = {name: value for name, value in given.items() if name in inputs}
        _, *cache = session.run(outputs, feeds | past | chosen)
        past = dict(zip(past, cache, strict=True))
    _, peak = resident()
    per_token = sum(array.nbytes // array.shape[2] for array in past.values())
    found = {"before": before, "loaded": loaded, "peak": peak, "cache_per_token": per_token}
    result.write_text(json.dumps(found), encoding="utf-8")


def resident() -> tuple[int, int]:
    """Bytes that this process holds in memory now, and at most so far.

    Raises:
        OSError: If the system does not say so.
    """
    status = Path("/proc/self/status")
    if status.is_file():  # of this program alone: getrusage also counts what the process was before it was started
        text = status.read_text(encoding="ascii")
        now, most = (re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE) for name in ("VmRSS", "VmHWM"))
        if now and most:
            return 1024 * int(now[1]), 1024 * int(most[1])
    try:
        import resource
    except ImportError as error:
        raise OSError("this system does not say how much memory a process holds") from error
    # on macOS in bytes; elsewhere in kilobytes
    most_so_far = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return most_so_far, most_so_far


if __name__ == "__main__":
    write_memory_use(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
