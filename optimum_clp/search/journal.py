"""What a search has measured, on disk, so that an interrupted search goes on where it was.

A search asks for the same measurements in the same order whenever it is run with the same model, rows, settings and
seed. So it is run again from the start, and what the journal knows is not computed again: the result is the same to the
last bit. The file's name is a hash of all that the measurements depend on.
"""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import constants


def journal_file(stage: str, contents: dict[str, Any], cache_dir: str | os.PathLike | None) -> Path:
    """Where the journal of a stage is kept.

    Args:
        stage (`str`): What the file's name begins with.
        contents (`dict`): JSON-ready: everything that the outcome depends on.
        cache_dir (`str`, `os.PathLike` or `None`): A folder; `None` for the user's cache folder.
    """
    name = hashlib.sha256(json.dumps(contents, sort_keys=True, default=str).encode()).hexdigest()[:32]
    folder = Path(constants.HF_HOME if cache_dir is None else cache_dir).expanduser() / "optimum_clp"
    return folder / f"{stage}-{name}.jsonl"


class Journal:
    """Measurements by their keys; each is one line of a file that is only ever appended to.

    Args:
        file (`Path` or `None`): `None` keeps nothing.
        writes (`bool`): `False` only reads, for the processes of a group that are not the first.
    """

    def __init__(self, file: Path | None = None, writes: bool = True):
        self.file = file
        self.writes = writes
        self.known: dict[str, Any] = {}
        if file is not None and file.is_file():
            for line in file.read_text(encoding="utf-8").splitlines():
                # the last line may have been cut off by what interrupted the search
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    self.known[entry["key"]] = entry["value"]

    def recall(self, key: Any, measure: Callable[[], Any]) -> Any:
        """What was measured under `key` before; else `measure()`, which must be JSON-ready and is kept."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        if digest in self.known:
            return self.known[digest]
        value = self.known[digest] = measure()
        if self.file is not None and self.writes:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"key": digest, "value": value}) + "\n")
            except OSError as error:
                warnings.warn(f"{self.file} cannot be written ({error}): the search cannot be resumed.", stacklevel=2)
                self.file = None
        return value

    def close(self) -> None:
        """Remove the file: the search has ended, and its result is in the report."""
        if self.file is not None and self.writes:
            self.file.unlink(missing_ok=True)
