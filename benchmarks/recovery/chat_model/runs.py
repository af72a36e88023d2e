"""One run of the benchmark on disk: its record, the weights that it changed, and a lock, so that processes share the work."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.recovery.chat_model.rivals import PATCH, install_patch

# behind a method's name: with as much time as ours, or with an on-policy stage on top of the run without it
EQUAL_TIME, ON_POLICY = "@time", "+policy"


@dataclass(frozen=True)
class Run:
    """A method on a cut.

    Args:
        folder (`Path`): Where all runs are.
        method (`str`): Its name, with what is behind it.
        ratio (`float`): Of the layers that go.
        seed (`int`): Of the text and the order of its rows.
    """

    folder: Path
    method: str
    ratio: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.ratio:g}-{self.seed}"

    @property
    def base(self) -> str:
        """The method without what is behind its name."""
        return self.method.removesuffix(ON_POLICY).removesuffix(EQUAL_TIME)

    @property
    def before(self) -> "Run":
        """The run that an on-policy stage goes on from."""
        return Run(self.folder, self.method.removesuffix(ON_POLICY), self.ratio, self.seed)

    @property
    def weights(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    @property
    def work(self) -> Path:
        """For checkpoints while it trains."""
        return self.folder / "work" / self.name

    def record(self) -> dict[str, Any] | None:
        return read_json(self.folder / f"{self.name}.json")

    def save(self, record: dict[str, Any]) -> None:
        write_json(self.folder / f"{self.name}.json", record)


def read_json(file: Path) -> Any:
    return json.loads(file.read_text()) if file.is_file() else None


def write_json(file: Path, contents: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(contents, indent=1) + "\n")
    os.replace(temporary, file)


@contextmanager
def locked(folder: Path, name: str, wait: bool = False) -> Iterator[bool]:
    """Hold a name for this process until the block ends, or it does; false if another one has it.

    Args:
        folder (`Path`): Where all runs are.
        name (`str`): What is held.
        wait (`bool`): Wait for the other one instead.
    """
    file = folder / "locks" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def changed_tensors(model: PreTrainedModel, untouched: PreTrainedModel) -> dict[str, Tensor]:
    """What a healed model has that the cut has not, on the CPU: the tensors to keep."""
    before = untouched.state_dict()
    return {
        name: tensor.detach().cpu().clone()
        for name, tensor in model.state_dict().items()
        if name not in before or not torch.equal(tensor, before[name].to(tensor.device))
    }


def save_weights(file: Path, tensors: dict[str, Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, f"{file}.tmp")
    os.replace(f"{file}.tmp", file)


@torch.no_grad()
def restored(model: PreTrainedModel, file: Path) -> list[str]:
    """Put kept tensors into a cut model, and say which they are."""
    tensors = load_file(file)
    for name, tensor in tensors.items():
        layer, _, rest = name.partition(f".{PATCH}.")
        if rest:
            install_patch(model.get_submodule(layer), tensor.to(model.device))
        else:
            # not in place: the cut shares its tensors with the dense model
            parameter = model.get_parameter(name)
            parameter.data = tensor.to(parameter)
    return list(tensors)
