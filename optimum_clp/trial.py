"""A trial cut before the search: what would be refused after hours of work is refused within seconds.

What it covers: that the dense model is what its config says; that a cut of as many layers as the recipe removes has a
config, passes the guard, and comes back from disk as it was. Up to `LARGEST_TRIAL` bytes the whole checkpoint is written and
read with stock classes; above that (the weights would be copied) everything but the weights' files: configuration,
tokenizer, names, shapes, buffers and logits. What depends on which layers go is left to the cut itself.
"""

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from .architecture.lookup import allowed_segments, num_layers
from .checkpoint.saving import save_checkpoint, save_configs, save_tokenizer, verify_checkpoint, verify_config
from .errors import CutError, ModelError
from .processes import by_first
from .segments import LayerSegment
from .surgery.assembly import uncut_twin
from .surgery.cut import cut_model
from .surgery.guard import check_uncut
from .surgery.sizes import count_bytes

LARGEST_TRIAL = 2**28
"""Bytes of weights that are written and read back for a trial."""


def try_cut(
    dense: PreTrainedModel, tokenizer: Any, num_removed: int | None, cache_dir: str | os.PathLike | None = None
) -> None:
    """Cut a model once, save it to a temporary folder, read it back, and forget it.

    In a group of processes, all of which make this call, the first one does so, and all of them raise what it raises:
    transformers saves nothing in the others.

    Args:
        dense (`PreTrainedModel`): The dense model; not changed.
        tokenizer (`PreTrainedTokenizerBase` or `None`): Its tokenizer.
        num_removed (`int` or `None`): How many layers the recipe removes, if it says so.
        cache_dir (`str`, `os.PathLike` or `None`): The cache of the Hub's files, as in [`save_checkpoint`].

    Raises:
        ModelError, CutError: What would be raised after the search; the message says if the dense model itself does not come
            back from disk.
    """
    by_first(lambda: _try(dense, partial(_save_and_read, tokenizer, cache_dir), num_removed or 1))


def _try(dense: PreTrainedModel, save_and_read: Callable[[PreTrainedModel], None], length: int) -> None:
    check_uncut(dense)
    trial = cut_model(dense, [_any_segment(dense.config, length)])
    try:
        save_and_read(trial)
    except CutError as error:
        _blame(dense, save_and_read, error)
        raise


def _any_segment(config: PretrainedConfig, length: int) -> LayerSegment:
    """A run of layers that can go; of another length if none of this one can, as where several shorter runs are meant."""
    count = num_layers(config)
    for candidate in (length, *range(1, count)):
        try:
            allowed = allowed_segments(config, candidate)
        except ModelError:
            continue
        return allowed[len(allowed) // 2]
    return allowed_segments(config, length)[0]


def _save_and_read(tokenizer: Any, cache_dir: str | os.PathLike | None, model: PreTrainedModel) -> None:
    with tempfile.TemporaryDirectory() as parent, _silence():
        folder = Path(parent) / "trial"
        folder.mkdir()
        if count_bytes(model) <= LARGEST_TRIAL:
            save_checkpoint(model, tokenizer, folder, cache_dir)
            verify_checkpoint(folder, model)
            return
        save_configs(model, folder)
        save_tokenizer(tokenizer, folder, cache_dir)
        if all(tensor.device.type == "cpu" for tensor in model.state_dict().values()):
            verify_config(folder, model)


@contextmanager
def _silence() -> Iterator[None]:
    """Hold back what saving tells of: it is told again when the result is saved."""
    log = logging.getLogger(save_checkpoint.__module__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.addFilter(_nothing)
        try:
            yield
        finally:
            log.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _blame(dense: PreTrainedModel, save_and_read: Callable[[PreTrainedModel], None], error: CutError) -> None:
    """Say so if the dense model, uncut, does not come back from disk either: then it is not the cut's fault."""
    try:
        save_and_read(uncut_twin(dense))
    except CutError as same:
        rule = same.problems[0].rule
    else:
        return
    raise CutError.of(
        "dense model",
        type(dense).__name__,
        f"saved and read back it would be another, cut or not: {rule}",
        "Its config and its weights were changed apart: save it, load it again, and look at what that computes",
    ) from error
