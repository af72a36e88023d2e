"""What an interrupted run goes on from: the cache folder, the names of what lies in it, and the journal of a search.

A name is a hash of all that the outcome depends on, so that what is found under it can be used as it is.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import nn

from .locks import Lock
from .mapped_weights import MappedWeights
from .private_files import append_line, digest, is_there, open_plain, place_of, remove, replaced_file
from .processes import gathered, is_first, wait_for_all
from .progress import progress_bar

logger = logging.getLogger(__name__)

# parts of a recipe that a search does not depend on: its rows stand for the text, and the others come after it, or say in which
# order it is computed
_NOT_SEARCHED_BY = ("calibration", "tuning", "quantization", "export", "evaluation", "max_memory")


def cache_file(kind: str, contents: Any, cache_dir: str | os.PathLike | None, suffix: str = "") -> Path | None:
    """Where something is kept that depends on `contents` alone; nothing is made. `None` for a user without a home folder.

    Args:
        kind (`str`): What the file's name begins with.
        contents: JSON-ready; what is not is taken as its string.
        cache_dir (`str`, `os.PathLike` or `None`): A folder, in which `optimum_clp` is ours; `None` for Hugging Face's
            cache folder (`HF_HOME`).
        suffix (`str`): What the file's name ends with; empty for a folder.
    """
    try:
        folder = Path(constants.HF_HOME if cache_dir is None else cache_dir).expanduser() / "optimum_clp"
    except RuntimeError:
        logger.warning(
            "There is no home folder: nothing is kept, and a run cannot be resumed. Set calibration.cache_dir."
        )
        return None
    return folder / f"{kind}-{_digest(json.dumps(contents, sort_keys=True, default=str))}{suffix}"


def weights_fingerprint(model: nn.Module, quiet: bool = False) -> str | None:
    """A hash of every bit of the weights, about a second per gigabyte; `None` if they are not in memory."""
    return tensors_fingerprint([*model.named_parameters(), *model.named_buffers()], quiet)


def tensors_fingerprint(tensors: Sequence[tuple[str, torch.Tensor]], quiet: bool = False) -> str | None:
    """A hash of every bit of some tensors and of their names; `None` if one of them is not in memory."""
    if any(tensor.is_meta for _, tensor in tensors):
        return None
    fingerprint, mapped = hashlib.sha256(), MappedWeights()
    with progress_bar(len(tensors), "Fingerprint of the weights", quiet) as bar:
        for name, tensor in tensors:
            fingerprint.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            fingerprint.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            mapped.let_go([tensor])
            bar.update(1)
    return fingerprint.hexdigest()


def parameters_fingerprint(model: nn.Module, quiet: bool = False) -> str | None:
    """As [`weights_fingerprint`], without buffers: those of a model that is read back may have another precision."""
    return tensors_fingerprint(list(model.named_parameters()), quiet)


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


class Caches:
    """What the stages of a run keep on disk, locked, until the run has ended.

    A stage that is called alone is a run. Within a longer one its cache stays until all is written, so that a run which was
    interrupted in its last stage does not begin again with its first.
    """

    def __init__(self) -> None:
        self._places: dict[Path, Lock] = {}
        self._depth = 0

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """A run, or a stage of the run that has begun: at its end all is removed; after an exception, all stays."""
        self._depth += 1
        done = False
        try:
            yield
            done = True
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._leave(done)

    @property
    def is_of_one_stage(self) -> bool:
        """Whether a stage is at work that was called by itself, and is no part of a longer run."""
        return self._depth == 1

    def take(self, place: Path | None, folder: bool = False) -> Path | None:
        """Lock a place; while another process works there, wait for it. A link is not followed: it goes.

        Args:
            place (`Path` or `None`): Of [`cache_file`].
            folder (`bool`): It is one; a file there goes, with a warning.

        Returns:
            `Path` or `None`: The place; `None`, with a warning, if nothing can be kept there.
        """
        if place is None or place in self._places:
            return place
        lock = Lock(place.with_name(f"{place.name}.lock"))
        # the others of a group wait with the first one, and keep nothing where it cannot
        kept = gathered(_lock(place, lock, folder) if is_first() else None)[0]
        if kept is not None:
            self._places[place] = lock
        return kept

    def _leave(self, done: bool) -> None:
        if done:
            wait_for_all()
        for place, lock in self._places.items():
            if done and is_first():
                remove(place)
            lock.release()
        self._places.clear()


class Journal:
    """What a search has measured, on disk, so that an interrupted search goes on where it was.

    A search asks for the same measurements in the same order whenever it is run with the same model, rows, settings and
    seed. So it is run again from the start, and what the journal knows is not computed again: the result is the same to the
    last bit. Each measurement is one line of a file that is only ever appended to: a digest of what follows and of the file's
    own name, then the measurement. A line whose digest is another is measured again; a link is not followed.

    Args:
        file (`Path` or `None`): `None` keeps nothing.
        writes (`bool`): `False` only reads, for the processes of a group that are not the first.
    """

    def __init__(self, file: Path | None = None, writes: bool = True):
        self.file = file
        self.writes = writes
        self.known: dict[str, Any] = {}
        if file is not None and is_there(file):
            self._read(file)
        if self.known:
            logger.info(f"{len(self.known)} measurements that an earlier run has made are taken from {file}")

    def knows(self, key: Any) -> bool:
        """Whether something was measured under `key` before."""
        return _digest(json.dumps(key, sort_keys=True)) in self.known

    def recall(self, key: Any, measure: Callable[[], Any]) -> Any:
        """What was measured under `key` before; else `measure()`, which must be JSON-ready and is kept."""
        name = _digest(json.dumps(key, sort_keys=True))
        if name in self.known:
            return self.known[name]
        value = self.known[name] = measure()
        if self.file is not None and self.writes:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                append_line(self.file, self._line(name, value))
            except OSError as error:
                logger.warning(f"{self.file} cannot be written ({error}): the search cannot be resumed.")
                self.file = None
        return value

    def _line(self, name: str, value: Any) -> str:
        assert self.file is not None
        entry = json.dumps({"key": name, "value": value})
        return f"{digest(entry, place_of(self.file))} {entry}"

    def _read(self, file: Path) -> None:
        try:
            with open_plain(file) as stream:
                *lines, rest = stream.read().split(b"\n")
        except OSError as error:
            self._drop(file, str(error))
            return
        bad = sum(not self._learnt(line, file) for line in lines)
        if bad:
            self._drop(file, f"{bad} of its {len(lines)} records are not what was written")
        elif rest:  # what interrupted the search has cut off its last line
            self._learnt(rest, file)
            self._write_again(file)

    def _learnt(self, line: bytes, file: Path) -> bool:
        """Take over a record; false if it is damaged."""
        told, _, entry = line.partition(b" ")
        if told != digest(entry, place_of(file)).encode():
            return False
        record = json.loads(entry)  # what has its digest is what was written
        self.known[record["key"]] = record["value"]
        return True

    def _drop(self, file: Path, reason: str) -> None:
        if self.writes:
            self._write_again(file)
            logger.warning(f"{file} is damaged ({reason}): what is missing is measured again.")

    def _write_again(self, file: Path) -> None:
        """Leave the good records alone, so that what is appended begins on a line of its own."""
        if not self.writes:
            return
        try:
            with replaced_file(file) as stream:
                for name, value in self.known.items():
                    stream.write(self._line(name, value).encode() + b"\n")
        except OSError as error:
            logger.warning(f"{file} cannot be written ({error}): the search cannot be resumed.")
            self.file = None


def _lock(place: Path, lock: Lock, folder: bool) -> Path | None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock.wait(f"The cache {place} (--text-cache-dir names another)")
        if folder and is_there(place) and (place.is_symlink() or not place.is_dir()):
            logger.warning(f"{place} is damaged (it is no folder): what it kept is done again.")
            remove(place)
        if folder:
            place.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        logger.warning(f"{place} cannot be written ({error}): this run cannot be resumed.")
        return None
    return place


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
