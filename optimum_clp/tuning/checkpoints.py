"""What a training run keeps on disk: the best weights, and checkpoints from which it goes on."""

import copy
import json
import logging
import math
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import numpy
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import TuningError
from ..private_files import digest, file_digest, make_private, open_plain, place_of, remove, replaced_file
from ..processes import broadcast, gathered
from .overparametrization import plain_weights
from .result import TuningStep

logger = logging.getLogger(__name__)

_PROGRESS = "progress.json"


@dataclass
class TrainingState:
    """Where the loop is; everything that it decides from, beside weights and optimizer.

    Args:
        step (`int`): Optimizer steps taken.
        stage (`int`): Stages that have ended.
        stage_step (`int`): Steps taken in the one after them.
        stage_steps (`list[int]`): Steps that each ended one has taken.
        best_step (`int`): Step of the weights that are kept.
        stale (`int`): Evaluations since then.
        history (`list[TuningStep]`): All evaluations.
        losses (`list[float]`): Training losses of this process since the last one.
        last_loss (`float`): The last loss that was looked at.
        rates (`list[float]`): Peak rate of each stage.
        stopped (`str` or `None`): `"finished"`, `"patience"` or `"nan"` at the end.
    """

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    stage_steps: list[int] = field(default_factory=list)
    best_step: int = 0
    stale: int = 0
    history: list[TuningStep] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    last_loss: float = math.nan
    rates: list[float] = field(default_factory=list)
    stopped: str | None = None

    @property
    def best_loss(self) -> float:
        """Validation loss of the weights that are kept."""
        return min(step.validation_loss for step in self.history if step.step == self.best_step)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainingState":
        """From what `dataclasses.asdict` gave."""
        return cls(**{**values, "history": [TuningStep(**step) for step in values["history"]]})


class BestWeights:
    """The weights with the best validation loss so far, in a file that the first process writes.

    Args:
        accelerator (`Accelerator`): Of the run.
        folder (`Path`): Where the file lies.

    Attributes:
        digest (`str` or `None`): SHA-256 of the file, in the first process.
    """

    def __init__(self, accelerator: Accelerator, folder: Path):
        self.accelerator, self.folder = accelerator, folder
        self.digest: str | None = None
        self._held: dict[str, Tensor] | None = None

    def save(self, student: nn.Module, step: int) -> None:
        """Keep the student's weights as those of a step: what is left of products, under ordinary names."""
        weights = self.accelerator.get_state_dict(student)
        if not self.accelerator.is_main_process:
            return
        kept = {name: tensor.detach().cpu() for name, tensor in plain_weights(weights).items()}
        try:
            with replaced_file(self._file(step)) as stream:
                torch.save(kept, stream)
            self.digest, self._held = file_digest(self._file(step)), None
        # torch says of a full disk what it likes
        except (OSError, RuntimeError) as error:
            logger.warning(f"{self._file(step)} cannot be written ({error}): the best weights stay in memory.")
            self.digest, self._held = None, copy.deepcopy(kept)

    def load(self, step: int) -> dict[str, Tensor] | None:
        """The state dict that was kept at a step, on the CPU; `None` in all processes but the first.

        Raises:
            TuningError: If the file has been damaged since.
        """
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return None
        if self._held is not None:
            return self._held
        if not self.is_whole(step, self.digest):
            rule = "its bytes are not those that were written in this run"
            remedy = "Run the same command again: it begins where the file is good. Check the disk"
            raise TuningError.of("best weights", str(self._file(step)), rule, remedy)
        return torch.load(self._file(step), map_location="cpu", mmap=True, weights_only=True)

    def is_whole(self, step: int, digest: str | None) -> bool:
        """Whether the file of a step is there, with this digest."""
        with suppress(OSError):
            return file_digest(self._file(step)) == digest
        return False

    def drop_others(self, step: int | None) -> None:
        """Remove the files of other steps; all if `None`."""
        for other in self.folder.glob("*best-*") if self.accelerator.is_main_process else ():
            if step is None or other != self._file(step):
                remove(other)

    def _file(self, step: int) -> Path:
        return self.folder / f"best-{step}.pt"


class Checkpoints:
    """Everything that a run needs to go on to the same weights: one folder at a time, which is whole or not there.

    Its last file says which files there are, with the digest of each, of the best weights, and of itself: where anything is
    another, the checkpoint is dropped, with a warning, and the run begins anew.

    Args:
        accelerator (`Accelerator`): Of the run; it has prepared the student and the optimizer.
        folder (`Path`): Where they lie.
        seconds (`float`): Between two of them, at least.
        best ([`BestWeights`]): Of the run; they lie in the same folder.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, seconds: float, best: BestWeights):
        self.accelerator, self.folder, self.seconds, self.best = accelerator, folder, seconds, best
        self._last = time.monotonic()

    def save_if_due(self, state: TrainingState) -> bool:
        """Save the whole state if it is time; all processes do, when the first one says so.

        Returns:
            `bool`: Whether there is a new checkpoint.
        """
        due = time.monotonic() - self._last >= self.seconds
        if self.accelerator.num_processes > 1:
            due = bool(broadcast(torch.tensor(float(due), device=self.accelerator.device)).item())
        if not due:
            return False
        try:
            saved = self._save(state)
        except (OSError, RuntimeError) as error:
            if self.accelerator.num_processes > 1:
                raise  # the others wait
            logger.warning(f"{self.folder} cannot be written ({error}): no more checkpoints.")
            remove(self._folder_of(state).with_suffix(".tmp"))
            saved, self.seconds = False, math.inf
        self._last = time.monotonic()
        return saved

    def _save(self, state: TrainingState) -> bool:
        target = self._folder_of(state)
        temporary, first = target.with_suffix(".tmp"), self.accelerator.is_main_process
        if first:
            remove(temporary)
            temporary.mkdir(mode=0o700)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        # weights that lie in memory alone are lost with this process
        whole = not first or self.best.digest is not None
        if first and not whole:
            remove(temporary)
        elif first:
            self._seal(temporary, target.name, state)
            make_private(temporary)
            remove(target)
            os.replace(temporary, target)
            self._drop(others_than=target)
        self.accelerator.wait_for_everyone()
        return whole

    def resume(self) -> TrainingState | None:
        """Go on from the last checkpoint in the folder, if there is one that is whole; what is not goes."""
        found = gathered(self._found() if self.accelerator.is_main_process else None)[0]
        if found is None:
            return None
        name, state, self.best.digest = found
        logger.info(f"tuning: goes on from {self.folder / name}, where an earlier one ended")
        with _global_random_state_kept():
            self.accelerator.load_state(str(self.folder / name))
        return TrainingState.from_dict(state)

    def _found(self) -> tuple[str, dict[str, Any], str] | None:
        """The last whole checkpoint: its name, its state, and the digest of the best weights."""
        for folder in sorted(
            self.folder.glob("checkpoint-*"), key=lambda folder: folder.lstat().st_mtime_ns, reverse=True
        ):
            if folder.suffix == ".tmp":
                continue
            try:
                values = self._unsealed(folder)
            except (OSError, ValueError) as error:
                remove(folder)
                logger.warning(f"{folder} is damaged ({error}): what it kept is trained again.")
                continue
            self._drop(others_than=folder)
            return folder.name, values["state"], values["best"]
        self._drop()
        self.best.drop_others(None)
        return None

    def _unsealed(self, folder: Path) -> dict[str, Any]:
        """What the last file of a checkpoint says.

        Raises:
            OSError, ValueError: If it is not what was written.
        """
        if folder.is_symlink():
            raise ValueError("it is a link")
        with open_plain(folder / _PROGRESS) as stream:
            told, _, text = stream.read().partition(b" ")
        if told != digest(text, self._place(folder.name)).encode():
            raise ValueError(f"its {_PROGRESS} is not what was written")
        values = json.loads(text)
        if values["versions"] != _versions():
            raise ValueError(f"it was written with {values['versions']}")
        if _files_of(folder) != {*values["files"], _PROGRESS}:
            raise ValueError("its files are not those that were written")
        for name, written in values["files"].items():
            if file_digest(folder / name) != written:
                raise ValueError(f"its {name} is not what was written")
        state = values["state"]
        if not self.best.is_whole(state["best_step"], values["best"]):
            raise ValueError("the best weights beside it are not what was written")
        return values

    def _seal(self, folder: Path, name: str, state: TrainingState) -> None:
        files = {name: file_digest(folder / name) for name in _files_of(folder)}
        values = {"state": asdict(state), "best": self.best.digest, "files": files, "versions": _versions()}
        text = json.dumps(values)
        with replaced_file(folder / _PROGRESS) as stream:
            stream.write(f"{digest(text, self._place(name))} {text}".encode())

    def _place(self, name: str) -> str:
        return f"{place_of(self.folder)}/{name}"

    def _folder_of(self, state: TrainingState) -> Path:
        return self.folder / f"checkpoint-{state.step}"

    def _drop(self, others_than: Path | None = None) -> None:
        """Remove all checkpoints, begun ones too, but one."""
        for other in self.folder.glob("checkpoint-*"):
            if other != others_than:
                remove(other)


def _files_of(folder: Path) -> set[str]:
    return {
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_symlink() or not file.is_dir()
    }


def _versions() -> list[str]:
    """Of what reads a checkpoint."""
    return [f"torch {torch.__version__}", f"accelerate {accelerate.__version__}"]


@contextmanager
def _global_random_state_kept() -> Iterator[None]:
    """Put the global random generators back at the end."""
    python, numbers = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numbers)
