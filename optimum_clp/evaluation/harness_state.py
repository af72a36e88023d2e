"""What lm-eval finds and leaves of the process while it works: nothing printed, its own seeds, errors that name the task."""

import contextlib
import logging
import os
import random
import sys
from collections.abc import Iterator
from typing import TextIO

import lm_eval
import numpy as np
import torch
from huggingface_hub import constants

from ..errors import CalibrationError, CLPError
from ..progress import draws_bars

# lm-eval's own, of its command line
_SEED, _NUMPY_SEED, _TORCH_SEED = 0, 1234, 1234


@contextlib.contextmanager
def named_errors(name: str, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """What lm-eval, a task's own code and `datasets` raise, as errors that name the task; but for those that are let pass."""
    try:
        yield
    except (CLPError, MemoryError):
        raise
    except ModuleNotFoundError as error:
        rule = f"it needs the package {error.name}, which is not installed"
        raise CalibrationError.of(
            "task", name, rule, f"pip install {error.name}, or what its page in lm-eval names"
        ) from error
    except Exception as error:
        if isinstance(error, passing):
            raise
        said = first_line(error)
        rule = f"lm-eval {lm_eval.__version__} cannot measure it ({type(error).__name__}: {said})"
        remedy = "Mend what it says, or give the examples as NAME=FILE"
        if isinstance(error, ConnectionError) and constants.HF_HUB_OFFLINE:
            rule = f"its data is not in the cache, and HF_HUB_OFFLINE is set ({said})"
            remedy = "Let it be fetched once without HF_HUB_OFFLINE, or give the examples as NAME=FILE"
        raise CalibrationError.of("task", name, rule, remedy) from error


def first_line(error: Exception) -> str:
    """What an error says, in one line for another error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def silent(unless_watched: bool = False) -> Iterator[TextIO]:
    """Drop what lm-eval and `datasets` print, log and draw; also keep lm-eval from starting processes for its standard errors.
    Gives standard error as it was, for whoever has something to say."""
    logger, before = logging.getLogger("lm_eval"), os.environ.get("DISABLE_MULTIPROC")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    os.environ["DISABLE_MULTIPROC"] = "1"  # forked from a process with threads, they hang now and then
    try:
        if unless_watched and draws_bars():
            yield sys.stderr
            return
        stderr = sys.stderr
        with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            yield stderr
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """lm-eval's seeds, which tasks draw by while they are read and asked; then the caller's again."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        random.seed(_SEED)
        np.random.seed(_NUMPY_SEED)
        torch.manual_seed(_TORCH_SEED)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
