"""Self-written text on disk, so that it is written once for a model.

The file's name is a hash of every bit of the weights, the config and the sampling's parameters; the file is replaced
at once or not at all, and carries a checksum.
"""

import contextlib
import hashlib
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from transformers import PreTrainedModel

from ..private_files import is_plain, is_there, place_of, remove, replaced_file
from ..resume import cache_file
from ..version import __version__

logger = logging.getLogger(__name__)

# raised when the sampling or the file changes: every older file is then a miss
_FORMAT = 3
_VOLATILE_CONFIG_KEYS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


@dataclass(frozen=True)
class Sample:
    """Self-written text.

    Args:
        tokens (`torch.Tensor`): int64 `[rows, sequence_length]`, on the CPU.
        losses (`torch.Tensor`): float64 `[rows]`: mean cross-entropy of the model over the `sequence_length - 1`
            predicted tokens of each row, in nats, at temperature 1.
        roles (`torch.Tensor` or `None`): uint8 like `tokens`, for conversations: who says each token.
    """

    tokens: torch.Tensor
    losses: torch.Tensor
    roles: torch.Tensor | None = None

    def followed_by(self, other: "Sample") -> "Sample":
        """The rows of both."""
        roles = None if self.roles is None or other.roles is None else torch.cat([self.roles, other.roles])
        return Sample(torch.cat([self.tokens, other.tokens]), torch.cat([self.losses, other.losses]), roles)

    def rows(self, start: int, stop: int) -> "Sample":
        """Some rows."""
        part = slice(start, stop)
        return Sample(self.tokens[part], self.losses[part], None if self.roles is None else self.roles[part])


def sample_file(
    model: PreTrainedModel,
    fingerprint: str | None,
    parameters: dict[str, Any],
    cache_dir: str | os.PathLike | None,
) -> Path | None:
    """Where this text is kept; `None` without a fingerprint of the weights."""
    if fingerprint is None:
        return None
    config = {k: v for k, v in model.config.to_dict().items() if k not in _VOLATILE_CONFIG_KEYS}
    contents = [_FORMAT, __version__, config, parameters, fingerprint]
    return cache_file("self_written", contents, cache_dir, ".safetensors")


def load_sample(
    file: Path | None, sequence_length: int, batch_size: int, total: int | None = None, *, roles: bool = False
) -> Sample:
    """What earlier runs have written, in whole batches or `total` rows; no rows if there is nothing. With or without roles."""
    none = torch.empty(0, sequence_length, dtype=torch.int64)
    nothing = Sample(none, torch.empty(0, dtype=torch.float64), none.byte() if roles else None)
    if file is None or not is_there(file):
        return nothing
    try:
        if not is_plain(file):
            raise ValueError("it is no ordinary file")
        with safe_open(file, "pt") as stored:
            checksum = stored.metadata()["sha256"]
            told = stored.get_tensor("roles").clone() if roles else None
            sample = Sample(stored.get_tensor("tokens").long(), stored.get_tensor("losses").clone(), told)
        rows, length = sample.tokens.shape
        if _checksum(sample, file) != checksum or length != sequence_length:
            raise ValueError("the contents do not match the checksum")
    except Exception as error:
        remove(file)
        logger.warning(f"{file} is damaged ({error}) and is ignored: the calibration text is written again.")
        return nothing
    if rows != total and rows % batch_size:
        return nothing
    logger.info(f"text: {rows} rows that were written before are taken from {file}")
    return sample


def save_sample(file: Path | None, sample: Sample) -> Path | None:
    """Replace the file at once; `None` if that cannot be done, so that it is tried and told only once."""
    if file is None:
        return None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        contents = {"tokens": sample.tokens.int(), "losses": sample.losses}
        if sample.roles is not None:
            contents["roles"] = sample.roles
        with replaced_file(file) as stream:
            stream.write(save(contents, metadata={"sha256": _checksum(sample, file)}))
        _remove_leftovers(file)
    except Exception as error:
        logger.warning(f"{file} cannot be written ({error}): the calibration text is not kept.")
        return None
    return file


def _remove_leftovers(file: Path) -> None:
    """Files that killed processes were writing; what is younger than an hour another one may be writing now."""
    for left in file.parent.glob(f".{file.name}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.lstat().st_mtime > 3600:
                remove(left)


def _checksum(sample: Sample, file: Path) -> str:
    """Of all tensors and of the file's place: another run's text is not this one's."""
    checksum = hashlib.sha256(place_of(file).encode())
    checksum.update(sample.tokens.long().contiguous().numpy().data)
    checksum.update(sample.losses.contiguous().numpy().data)
    if sample.roles is not None:
        checksum.update(sample.roles.contiguous().numpy().data)
    return checksum.hexdigest()
