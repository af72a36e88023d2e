"""What a training run keeps on disk: the best weights, and checkpoints from which it goes on."""

import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..processes import broadcast
from .overparametrization import plain_weights
from .result import TuningStep

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
    """

    def __init__(self, accelerator: Accelerator, folder: Path):
        self.accelerator, self.folder = accelerator, folder

    def save(self, student: nn.Module, step: int) -> None:
        """Keep the student's weights as those of a step: what is left of products, under ordinary names."""
        weights = self.accelerator.get_state_dict(student)
        if self.accelerator.is_main_process:
            weights = plain_weights(weights)
            temporary = self._file(step).with_suffix(".tmp")
            torch.save({name: tensor.detach().cpu() for name, tensor in weights.items()}, temporary)
            os.replace(temporary, self._file(step))

    def load(self, step: int) -> dict[str, Tensor] | None:
        """The state dict that was kept at a step, on the CPU; `None` in all processes but the first."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return None
        return torch.load(self._file(step), map_location="cpu", mmap=True, weights_only=True)

    def drop_others(self, step: int) -> None:
        """Remove the files of other steps."""
        for other in self.folder.glob("best-*") if self.accelerator.is_main_process else ():
            if other != self._file(step):
                other.unlink(missing_ok=True)

    def _file(self, step: int) -> Path:
        return self.folder / f"best-{step}.pt"


class Checkpoints:
    """Everything that a run needs to go on to the same weights: one folder at a time, which is whole or not there.

    Args:
        accelerator (`Accelerator`): Of the run; it has prepared the student and the optimizer.
        folder (`Path`): Where they lie.
        seconds (`float`): Between two of them, at least.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, seconds: float):
        self.accelerator, self.folder, self.seconds = accelerator, folder, seconds
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
        target = self.folder / f"checkpoint-{state.step}"
        temporary = target.with_suffix(".tmp")
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (temporary / _PROGRESS).write_text(json.dumps(asdict(state)), encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            for other in self.folder.glob("checkpoint-*"):
                if other != target:
                    shutil.rmtree(other, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._last = time.monotonic()
        return True

    def resume(self) -> TrainingState | None:
        """Go on from the last whole checkpoint in the folder, if there is one."""
        found = sorted(
            (file.parent for file in self.folder.glob(f"checkpoint-*/{_PROGRESS}") if file.parent.suffix != ".tmp"),
            key=lambda folder: int(folder.name.removeprefix("checkpoint-")),
        )
        self.accelerator.wait_for_everyone()
        if not found:
            return None
        with _global_random_state_kept():
            self.accelerator.load_state(str(found[-1]))
        return TrainingState.from_dict(json.loads((found[-1] / _PROGRESS).read_text(encoding="utf-8")))


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
