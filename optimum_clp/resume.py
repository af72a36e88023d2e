"""What an interrupted run goes on from: the cache folder, the names of what lies in it, and the journal of a search.

A name is a hash of all that the outcome depends on, so that what is found under it can be used as it is.
"""

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import nn

from .processes import is_first, wait_for_all
from .progress import progress_bar

# parts of a recipe that a search does not depend on: its rows stand for the text, and the others come after it
_NOT_SEARCHED_BY = ("calibration", "tuning", "quantization", "export")


def cache_file(kind: str, contents: Any, cache_dir: str | os.PathLike | None, suffix: str = "") -> Path:
    """Where something is kept that depends on `contents` alone; nothing is made.

    Args:
        kind (`str`): What the file's name begins with.
        contents: JSON-ready; what is not is taken as its string.
        cache_dir (`str`, `os.PathLike` or `None`): A folder, in which `optimum_clp` is ours; `None` for Hugging Face's
            cache folder (`HF_HOME`).
        suffix (`str`): What the file's name ends with; empty for a folder.
    """
    folder = Path(constants.HF_HOME if cache_dir is None else cache_dir).expanduser() / "optimum_clp"
    return folder / f"{kind}-{_digest(json.dumps(contents, sort_keys=True, default=str))}{suffix}"


def weights_fingerprint(model: nn.Module, quiet: bool = False) -> str | None:
    """A hash of every bit of the weights, about a second per gigabyte; `None` if they are not in memory."""
    return tensors_fingerprint([*model.named_parameters(), *model.named_buffers()], quiet)


def tensors_fingerprint(tensors: Sequence[tuple[str, torch.Tensor]], quiet: bool = False) -> str | None:
    """A hash of every bit of some tensors and of their names; `None` if one of them is not in memory."""
    if any(tensor.is_meta for _, tensor in tensors):
        return None
    fingerprint = hashlib.sha256()
    with progress_bar(len(tensors), "Fingerprint of the weights", quiet) as bar:
        for name, tensor in tensors:
            fingerprint.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            fingerprint.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            bar.update(1)
    return fingerprint.hexdigest()


def search_journal(
    dense: nn.Module,
    fingerprint: str | None,
    recipe: dict[str, Any],
    rows: Iterable[torch.Tensor],
    cache_dir: str | os.PathLike | None,
) -> Path | None:
    """Where a search keeps what it measures; `None` without a fingerprint.

    Args:
        dense (`nn.Module`): The dense model, with a `config`.
        fingerprint (`str` or `None`): Of its weights.
        recipe (`dict`): As `CLPConfig.to_dict` gives it; stages that a search does not depend on are passed over.
        rows (`Iterable[torch.Tensor]`): All that is searched on, int64 `[rows, length]`, on the CPU.
        cache_dir (`str`, `os.PathLike` or `None`): As in [`cache_file`].
    """
    recipe = {name: value for name, value in recipe.items() if name not in _NOT_SEARCHED_BY}
    return _stage_file("search", dense, fingerprint, recipe, rows, cache_dir, ".jsonl")


def tuning_folder(
    dense: nn.Module,
    cut: nn.Module,
    fingerprint: str | None,
    recipe: dict[str, Any],
    rows: Iterable[torch.Tensor],
    cache_dir: str | os.PathLike | None,
    quiet: bool = False,
) -> Path | None:
    """Where tuning keeps its checkpoints; `None` if weights are not in memory.

    Args:
        dense (`nn.Module`): The dense model, with a `config`.
        cut (`nn.Module`): The cut model, whose weights that are not the dense model's may be tuned already.
        fingerprint (`str` or `None`): Of the dense model's weights.
        recipe (`dict`): JSON-ready: the settings, the seed, what was cut and which layers are trained.
        rows (`Iterable[torch.Tensor]`): All that is trained and chosen on, int64 `[rows, length]`, on the CPU.
        cache_dir (`str`, `os.PathLike` or `None`): As in [`cache_file`].
        quiet (`bool`): No progress bar.
    """
    shared = {parameter.data_ptr() for parameter in dense.parameters()}
    own = tensors_fingerprint([(n, p) for n, p in cut.named_parameters() if p.data_ptr() not in shared], quiet)
    if own is None:
        return None
    return _stage_file("tuning", dense, fingerprint, {**recipe, "own": own}, rows, cache_dir)


def remove_folder(folder: Path | None) -> None:
    """Remove what a stage that has ended in every process kept for its resumption."""
    wait_for_all()
    if folder is not None and is_first():
        shutil.rmtree(folder, ignore_errors=True)


class Journal:
    """What a search has measured, on disk, so that an interrupted search goes on where it was.

    A search asks for the same measurements in the same order whenever it is run with the same model, rows, settings and
    seed. So it is run again from the start, and what the journal knows is not computed again: the result is the same to the
    last bit. Each measurement is one line of a file that is only ever appended to.

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
        digest = _digest(json.dumps(key, sort_keys=True))
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


def _stage_file(
    stage: str,
    dense: Any,
    fingerprint: str | None,
    recipe: dict[str, Any],
    rows: Iterable[torch.Tensor],
    cache_dir: str | os.PathLike | None,
    suffix: str = "",
) -> Path | None:
    """The name of what a stage keeps, from all that its outcome depends on; `None` without a fingerprint."""
    if fingerprint is None:
        return None
    contents = {
        "weights": fingerprint,
        "model": dense.config.to_dict(),
        "recipe": recipe,
        "rows": [hashlib.sha256(part.contiguous().numpy().tobytes()).hexdigest() for part in rows],
        "threads": torch.get_num_threads(),
    }
    return cache_file(stage, contents, cache_dir, suffix)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
