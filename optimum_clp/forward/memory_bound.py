"""What a bound on memory leaves for a pass over a model: whether all weights may stay, or how many layers at a time.

Weights that lie in files are read when they are needed ([`MappedWeights`]), so a model need not fit: one layer must, beside
what is around the layers, this process's own memory, and what exists while a row is computed.
"""

import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..architecture.lookup import decoder_layers, text_config
from ..errors import ConfigurationError
from ..mapped_weights import MappedWeights
from .control_groups import free_in_control_groups
from .layer_major import Residence
from .streamed_layers import ROTATING, LayerCopies, copies_of

_FLOAT, _TEMPORARIES = 4, 5
_FEWEST_TOKENS = 16  # whose logits exist together
_ROWS = 8
_PROBE = 2**26  # bytes that are read to see how fast a disk is


@dataclass(frozen=True)
class PassMemory:
    """Bytes that a pass over a model holds.

    Args:
        private (`int`): This process's own memory: Python, the libraries, and weights that lie in no file.
        layers (`tuple[int, ...]`): Of each decoder layer's weights, what lies in files.
        around (`int`): Of all other weights, what lies in files: embedding, final norm, head.
        least (`int`): One row on its way through a layer, and the logits of a few tokens (estimate).
        plain (`int`): A batch on its way, with all its logits (estimate).
    """

    private: int
    layers: tuple[int, ...]
    around: int
    least: int
    plain: int

    @property
    def weights(self) -> int:
        """All weights that lie in files."""
        return sum(self.layers) + self.around

    @property
    def resident(self) -> int:
        """With every weight in memory: what the plain order of passes takes."""
        return self.private + self.weights + self.plain

    @property
    def smallest(self) -> int:
        """With one layer in memory at a time: the smallest bound that will do."""
        return self.private + self.around + max(self.layers) + self.least

    def residence(self, bound: float, folder: Path | None) -> Residence | None:
        """How a pass keeps a bound, at least `smallest`: `None` if every weight may stay.

        Args:
            bound (`float`): Bytes that this process may hold.
            folder (`Path` or `None`): For hidden states that memory does not hold.
        """
        if self.resident <= bound or not any(self.layers):
            return None
        spare, largest = max(0.0, bound - self.smallest), max(self.layers)
        more = min(len(self.layers) - 1, int(spare / 2 // largest))
        rest = spare - more * largest
        return Residence(1 + more, rest / 2, self.least + rest / 2, folder)


def pass_memory(
    model: PreTrainedModel, length: int, mapped: MappedWeights | None = None, private: int | None = None
) -> PassMemory:
    """What passes over a model hold.

    Args:
        model (`PreTrainedModel`): Not run. On the meta device all weights are taken to lie in files.
        length (`int`): Tokens in a row.
        mapped ([`MappedWeights`], *optional*): Which weights lie in files; as it is now, if not given.
        private (`int`, *optional*): This process's own memory; as it is now, if not given.
    """
    mapped = mapped or MappedWeights()

    def in_files(tensors: Mapping[int, Tensor]) -> int:
        return sum(tensor.nbytes for tensor in tensors.values() if tensor.is_meta or mapped.holds(tensor))

    of_layers, outside = _parts(model)
    least, plain = _computed(model, of_layers, length)
    return PassMemory(
        private=private_memory() if private is None else private,
        layers=tuple(map(in_files, of_layers)),
        around=in_files(outside),
        least=least,
        plain=plain,
    )


def _parts(model: PreTrainedModel) -> tuple[list[dict[int, Tensor]], dict[int, Tensor]]:
    """The weights of each layer, and all others, each once."""
    of_layers: list[dict[int, Tensor]] = [{id(p): p for p in layer.parameters()} for layer in decoder_layers(model)]
    inside = set().union(*of_layers)
    return of_layers, {id(p): p for p in model.parameters() if id(p) not in inside}


def _computed(model: PreTrainedModel, of_layers: list[dict[int, Tensor]], length: int) -> tuple[int, int]:
    """Bytes that exist while one row is computed, with the logits of a few tokens; and while a batch is, with all of them."""
    config, element = text_config(model.config), model.dtype.itemsize
    # what the matrices of a layer put out, all of it at once
    widths = max(sum(p.shape[0] for p in layer.values() if p.dim() == 2) for layer in of_layers)
    row = length * (widths + 4 * config.hidden_size) * element
    least = row + _FEWEST_TOKENS * config.vocab_size * _FLOAT * _TEMPORARIES
    return least, _ROWS * (row + length * config.vocab_size * (element + _FLOAT))


def copies_within(
    bound: int, model: PreTrainedModel, length: int, device: torch.device, *, reserved: int = 0, name: str = "0"
) -> LayerCopies:
    """How much of a model an accelerator holds within a bound: what is around its layers for good, and copies of the layers.

    Args:
        bound (`int`): Bytes of the accelerator that may be held.
        model (`PreTrainedModel`): Not run.
        length (`int`): Tokens in a row.
        device (`torch.device`): The accelerator.
        reserved (`int`): Bytes that something else will take there: the numbers of an optimizer.
        name (`str`): The accelerator, as `max_memory` calls it.

    Returns:
        [`LayerCopies`]: As many as there is room for beside a batch, at least the layer that runs and the next one.

    Raises:
        ConfigurationError: If the bound is too small; it says what would do.
    """
    of_layers, outside = _parts(model)
    least, plain = _computed(model, of_layers, length)
    largest = max(sum(p.nbytes for p in layer.values()) for layer in of_layers)
    around = sum(p.nbytes for p in outside.values())
    smallest = around + ROTATING * largest + least + reserved
    if bound < smallest:
        rule = f"there are {_shown(around)} around the layers, two layers of {_shown(largest)}, and {_shown(reserved)} of a tuning"
        remedy = f"Give at least {name}={-(-smallest // 2**20)}MiB"
        raise ConfigurationError.of("max_memory", f"{name}={_shown(bound)}", rule, remedy)
    spare = bound - smallest
    staying = min(len(of_layers), int(max(0, spare - (plain - least)) // largest))
    return LayerCopies(device, staying=staying, work_memory=least + spare - staying * largest)


def residence_under(
    bound: int | None, model: PreTrainedModel, length: int, folder: Path | None = None, *, strict: bool = True
) -> tuple[PassMemory, Residence | None]:
    """How passes over a model keep a bound on memory.

    Args:
        bound (`int` or `None`): Bytes that this process may hold; `None` for what is free now.
        model (`PreTrainedModel`): Not run.
        length (`int`): Tokens in a row.
        folder (`Path`, *optional*): For hidden states that memory does not hold.
        strict (`bool`): Too small a bound is an error; else one layer at a time is as near to it as can be.

    Returns:
        `tuple[PassMemory, Residence | None]`: What they hold, and how many layers at a time; `None` for all.

    Raises:
        ConfigurationError: If the bound is given and too small; it says what would do.
    """
    needs = pass_memory(model, length)
    if bound is not None and strict:
        check_bound(bound, needs)
    bound = needs.private + free_memory() if bound is None else bound
    found, copies = needs.residence(bound, folder), copies_of(model)
    if copies is None:
        return needs, found
    # on an accelerator that does not hold the layers each is copied once, whether or not main memory holds them all
    states = max(0.0, bound - needs.resident) if found is None else found.state_memory
    return needs, Residence(1, states, copies.work_memory, folder)


def check_bound(bound: int, needs: PassMemory) -> None:
    """Check that a bound on memory can be kept.

    Raises:
        ConfigurationError: If it cannot; it says what would do.
    """
    smallest = needs.smallest if any(needs.layers) else needs.resident
    if bound >= smallest:
        return
    # rounded up, so that what is proposed is enough
    proposed = f"{-(-smallest // 2**20)}MiB"
    own = f"this process itself holds {_shown(needs.private)}"
    if any(needs.layers):
        rule = f"{own}, a layer is {_shown(max(needs.layers))}, and what is around the layers {_shown(needs.around)}"
    else:
        rule = f"{own}, with weights that lie in no file and cannot be let go"
    raise ConfigurationError.of("max_memory", bound, rule, f"Give at least {proposed}")


def private_memory() -> int:
    """Bytes of this process's own: what is not mapped from a file."""
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else int(psutil.Process().memory_info().rss)


def free_memory() -> int:
    """Bytes that this process can still have, of the machine's memory and of its container's."""
    return int(min(psutil.virtual_memory().available, free_in_control_groups(private_memory())))


def free_device_memory(device: torch.device) -> float:
    """Bytes of an accelerator that this process can still have; without end where its library does not say so."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return math.inf
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def disk_speed(file: Path) -> float | None:
    """Bytes a second at which a file is read from its disk; `None` where the system does not let that be seen.

    Args:
        file (`Path`): Its first 64 MiB are read, and forgotten before that by the system's cache.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    try:
        with open(file, "rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, _PROBE, os.POSIX_FADV_DONTNEED)
            begin, done = time.perf_counter(), 0
            while done < _PROBE and (part := stream.read(2**22)):
                done += len(part)
        return done / max(1e-9, time.perf_counter() - begin) if done else None
    except OSError:
        return None


def _shown(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def streaming(model: PreTrainedModel, needs: PassMemory, residence: Residence) -> str:
    """What passes over a model hold, and how long its weights take to be read, in a sentence."""
    layers, files, copies = len(needs.layers), MappedWeights().files_of(model), copies_of(model)
    if copies is not None:
        there = min(layers, copies.staying + ROTATING)
        moved = sum(p.nbytes for layer in decoder_layers(model) for p in layer.parameters() if p.device.type == "cpu")
        return f"layer by layer on {copies.device}, {there} of {layers} there at a time; each reading of the weights copies {_shown(moved)}."
    held = needs.private + needs.around + residence.layers * max(needs.layers) + residence.work_memory
    held += residence.state_memory
    together = f"layer by layer, {residence.layers} of {layers} in memory at a time, at most {_shown(held)}"
    read = f"each reading of the weights is {_shown(needs.weights)}"
    speed = disk_speed(files[0]) if files else None
    if speed is None:
        return f"{together}; {read}."
    return f"{together}; {read}, {needs.weights / speed:.0f} s at the {speed / 1e9:.1f} GB/s of its disk."
