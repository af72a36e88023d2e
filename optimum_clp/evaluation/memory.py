"""The memory that an ONNX file needs to run, measured as a device would run it: alone in a process."""

import importlib.util
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..errors import ExportError
from ..report.section import Key
from ..runtime import memory_use as child
from ..runtime.own_process import last_words, run_to_its_end


@dataclass(frozen=True)
class FileMemory:
    """Resident memory of a process that runs an ONNX file on the CPU, and nothing else; without torch."""

    before: Annotated[int, Key("With Python, numpy and ONNX Runtime loaded, in bytes.", minimum=0)]
    loaded: Annotated[int, Key("With the file opened, in bytes.", minimum=0)]
    peak: Annotated[int, Key("The most at any time, in bytes: loading, the prompt and a token after it.", minimum=0)]
    num_tokens: Annotated[int, Key("Context: tokens of the prompt, and that one.", minimum=2)]
    cache_per_token: Annotated[
        int, Key("Bytes of the cache of keys and values for each token of context, in `peak` too.", minimum=0)
    ]


def memory_is_told() -> bool:
    """Whether the system says how much memory a process holds; Windows does not, to Python's own library."""
    return importlib.util.find_spec("resource") is not None


def measure_memory(file: Path, num_tokens: int) -> FileMemory:
    """Measure the memory of an ONNX file in a process of its own, which reads `num_tokens - 1` tokens at once and writes one.

    Args:
        file (`Path`): The ONNX file.
        num_tokens (`int`): At least 2, and no more than the model's context.

    Raises:
        ExportError: If it cannot be run, or the system does not say how much memory a process holds.
    """
    with tempfile.TemporaryDirectory() as parent:
        result = Path(parent) / "memory.json"
        process = run_to_its_end(child.__name__, str(file), str(num_tokens), str(result))
        if process.returncode == 0:
            return FileMemory(num_tokens=num_tokens, **json.loads(result.read_text(encoding="utf-8")))
    raise ExportError.of(
        file.name,
        f"exit status {process.returncode}",
        f"the process that measures its memory ended without a result ({last_words(process)})",
        "Free memory for it, up to three times the file's size; or lower evaluation.memory_context",
    )
