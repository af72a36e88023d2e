"""Every verb makes the state that it works in, and leaves the caller's as it was.

What a caller may have set around a call (`no_grad`, `inference_mode`, `autocast`, a default dtype or device) does not reach
into it. Some of that, and the hooks and modules of the libraries below, belong to the whole process: so one thread works at
a time, and a second one is refused at once.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from .errors import BusyError, CLPError
from .freed_memory import return_freed_memory
from .out_of_memory import device_memory_error, is_out_of_memory
from .processes import check_launcher

# of the process, as what it guards is
_TURN = threading.RLock()
_DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def own_state() -> Iterator[None]:
    """Gradients on, no autocast, float32 and the CPU by default until the block ends; then all is the caller's again.

    Raises:
        BusyError: If another thread of this process is within such a block.
        ConfigurationError: If the environment of a launcher cannot be understood.
    """
    if not _TURN.acquire(blocking=False):
        rule = "another thread of this process is at work, and both would change the same settings of PyTorch"
        raise BusyError.of("thread", threading.current_thread().name, rule, "Wait for it, or use a process for each")
    with ExitStack() as stack:
        stack.callback(_TURN.release)
        # what one verb has held is not the next one's: an allocator would keep several hundred megabytes of a tuning
        stack.callback(return_freed_memory)
        check_launcher()
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        # a mode of its own costs a call for every operation, so only where there is another
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def in_own_state(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs within [`own_state`]."""

    @functools.wraps(function)
    def verb(*args: Any, **kwargs: Any) -> Any:
        try:
            with own_state():
                return function(*args, **kwargs)
        except Exception as error:
            if isinstance(error, CLPError) or not is_out_of_memory(error):
                raise
            raise device_memory_error(
                error, function.__name__, "there is too little for what it computes", "Lower the batch size"
            ) from error

    return verb


def verbs(*names: str) -> Callable[[type], Any]:
    """A decorator of a class: these of its methods run within [`own_state`]."""

    def decorate(cls: type) -> type:
        for name in names:
            method = cls.__dict__[name]
            own = (
                classmethod(in_own_state(method.__func__)) if isinstance(method, classmethod) else in_own_state(method)
            )
            setattr(cls, name, own)
        return cls

    return decorate
