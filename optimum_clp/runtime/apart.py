"""An ONNX file that answers from a process of its own, which holds that file and nothing else.

A session of a quantized file packs its weights anew, and holds them in memory of its own. Where a process may hold no more than a bound
beside what it holds already, the file gets one of its own, without torch:

    python -m optimum_clp.runtime.apart FILE

It reads questions from standard input and writes answers to standard output: numpy arrays, each behind its size.
"""

import io
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnxruntime

from ..errors import ModelError
from .comparison import empty_past
from .names import LOGITS_TO_KEEP, cache_names
from .own_process import command_of
from .session import chooses_positions, open_session

_SIZE = struct.Struct("<Q")


class FileApart:
    """A file in a process of its own; a context manager, at whose end the process ends.

    Args:
        file (`Path`): The ONNX file; opened when it is first asked.
    """

    def __init__(self, file: Path):
        self.file = file
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: Any = None

    def __enter__(self) -> "FileApart":
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            command_of(__name__, str(self.file)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()  # it ends when there are no more questions
        except BrokenPipeError:  # it has ended
            pass
        self._process.stdout.close()
        self._process.wait()
        self._errors.close()

    def logits(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """Logits `[batch, length, vocabulary]`, float32, of texts without a past.

        Args:
            input_ids (`np.ndarray` of shape `[batch, length]`, int64): The tokens.
            attention_mask (`np.ndarray` of shape `[batch, length]`, int64): 0 on padding.

        Raises:
            ModelError: If ONNX Runtime cannot load or run the file.
        """
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        try:
            _write(self._process.stdin, np.stack([input_ids, attention_mask]))
            return _read(self._process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise self._ended() from error

    def _ended(self) -> ModelError:
        assert self._process is not None
        status = self._process.wait()
        self._errors.seek(0)
        last = (self._errors.read().decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        rule = f"the process that runs it in ONNX Runtime ended without an answer, status {status} ({last[:300]})"
        return ModelError.of("file", str(self.file), rule, "Free memory for it, up to twice the file's size")


def answer(session: onnxruntime.InferenceSession, questions: IO[bytes], answers: IO[bytes]) -> None:
    """Answer questions until there are no more.

    Args:
        session (`onnxruntime.InferenceSession`): Of an exported file.
        questions (`IO[bytes]`): int64 `[2, batch, length]` each: tokens, and 0 on padding.
        answers (`IO[bytes]`): Logits, `[batch, length, vocabulary]` each.
    """
    names = {value.name for value in session.get_inputs()}
    past_names = cache_names("past_key_values", sum(name.startswith("past_key_values.") for name in names) // 2)
    while True:
        try:
            input_ids, mask = _read(questions)
        except EOFError:
            return
        positions = (mask.cumsum(-1) - 1).clip(min=0)
        feeds = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
        feeds = {name: array for name, array in feeds.items() if name in names}
        feeds |= dict(zip(past_names, empty_past(session, len(input_ids)), strict=True))
        if chooses_positions(session):
            feeds[LOGITS_TO_KEEP] = np.array(0)
        _write(answers, session.run(["logits"], feeds)[0])


def _write(stream: IO[bytes], array: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    stream.write(_SIZE.pack(content.tell()))
    stream.write(content.getbuffer())
    stream.flush()


def _read(stream: IO[bytes]) -> np.ndarray:
    """An array.

    Raises:
        EOFError: If there is none.
    """
    head = stream.read(_SIZE.size)
    if len(head) < _SIZE.size:
        raise EOFError
    (size,) = _SIZE.unpack(head)
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return np.load(io.BytesIO(content), allow_pickle=False)


if __name__ == "__main__":
    answer(open_session(sys.argv[1], mapped=True), sys.stdin.buffer, sys.stdout.buffer)
