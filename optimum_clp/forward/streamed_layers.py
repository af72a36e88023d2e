"""Layers that run elsewhere than where they lie: on an accelerator that does not hold the model.

Weights lie in main memory, most of them mapped from files, and stay there for all that reads them: a cut, a fingerprint, a checkpoint.
A layer's forward has copies of them on the device where it runs. The copies that were used last are kept, so that all rows of a pass
that goes layer by layer, or both ways through a step of the tuning, are one copy; and the next layer is fetched while one runs: from
pinned memory, on a stream of its own.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..architecture.lookup import decoder_layers
from .hooks import layer_input, replaced_forward

ROTATING = 2
"""Layers on the device at the least: the one that runs, and the next."""


class LayerCopies:
    """Copies of layers' weights on the device that they run on.

    Args:
        device (`torch.device`): Where layers run.
        staying (`int`): Copies that are kept for good: those of the layers that were asked for first. Beside them there are
            two, of the layer that runs and of the next one.
        work_memory (`float`): Bytes of the device for what exists while a batch is computed and measured.

    Attributes:
        copied (`int`): Layers that were copied so far.
    """

    def __init__(self, device: torch.device, *, staying: int = 0, work_memory: float = math.inf):
        self.device, self.staying, self.work_memory = device, staying, work_memory
        self.copied = 0
        self._held: OrderedDict[tuple, _Held] = OrderedDict()
        self._overlaps = device.type == "cuda" and torch.cuda.is_available()
        self._pool = ThreadPoolExecutor(1, "layer-copies") if self._overlaps else None
        self._stream = torch.cuda.Stream(device) if self._overlaps else None

    def __deepcopy__(self, memo: dict) -> "LayerCopies":
        return self  # a copied model runs on the same device, within the same memory

    def __len__(self) -> int:
        """Layers that are there, or on their way."""
        return len(self._held)

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Some tensors' copies on the device, ready for what is computed there next; without gradient."""
        key = _key(tensors)
        held = self._found(key, tensors)
        try:
            copies, ready = held.copies.result()
        except BaseException:
            self._held.pop(key, None)  # asked for again, it is tried again
            raise
        if ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(ready)
            # a graph may hold them longer than they are held here; nothing else does
            for copy in copies if torch.is_grad_enabled() else ():
                copy.record_stream(current)
        return copies

    def prefetch(self, tensors: Sequence[Tensor]) -> None:
        """Begin to copy some tensors that will be asked for next."""
        self._found(_key(tensors), tensors)

    def within(self, other: "LayerCopies") -> None:
        """Hold from now on what another one of the same device may hold; what is there is dropped."""
        self.work_memory = other.work_memory
        self.keep(other.staying)

    def keep(self, staying: int) -> None:
        """Let so many layers stay from now on; what is there is dropped."""
        self.staying = staying
        if self._overlaps:
            torch.cuda.synchronize(self.device)  # what is dropped may still be at work there
        self._held.clear()

    def _found(self, key: tuple, tensors: Sequence[Tensor]) -> "_Held":
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        staying = sum(held.stays for held in self._held.values())
        rotating = [k for k, held in self._held.items() if not held.stays]
        stays = staying < self.staying
        leaving = rotating[: max(0, len(rotating) + 1 - ROTATING)] if not stays else []
        old = [self._held.pop(k) for k in leaving]
        self._held[key] = held = _Held(tensors, stays, self._begun(list(tensors), old))
        self.copied += 1
        return held

    def _begun(self, tensors: list[Tensor], old: list["_Held"]) -> "Future[tuple[list[Tensor], Any]]":
        """Begin to copy some tensors, once the old ones are gone, so that no more are there than may be."""
        if self._pool is not None:
            used = torch.cuda.Event()
            used.record(torch.cuda.current_stream(self.device))
            return self._pool.submit(self._overlapping, tensors, old, used)
        old.clear()
        done: Future[tuple[list[Tensor], Any]] = Future()
        try:
            with torch.no_grad():
                done.set_result(([tensor.detach().to(self.device, copy=True) for tensor in tensors], None))
        except Exception as error:  # told to whoever asks for the copies
            done.set_exception(error)
        return done

    def _overlapping(self, tensors: list[Tensor], old: list["_Held"], used: Any) -> tuple[list[Tensor], Any]:
        """Copy on a stream of its own, in a thread of its own: pages of a file are read, too, while the device computes."""
        if old:
            # Python is ahead of the device: what it is done with there may still be at work here
            used.synchronize()
            old.clear()
        with torch.no_grad(), torch.cuda.stream(self._stream):
            copies = []
            for tensor in tensors:
                here = tensor.detach()
                # pinned memory is kept by PyTorch until the copy is done, and used again
                here = here.pin_memory() if here.device.type == "cpu" else here
                copies.append(here.to(self.device, non_blocking=True, copy=True))
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return copies, ready


class _Held:
    """A layer's copies, with the tensors that they are of: as long as these are there, nothing else has their addresses."""

    def __init__(self, sources: Sequence[Tensor], stays: bool, copies: "Future[tuple[list[Tensor], Any]]"):
        self.sources, self.stays, self.copies = [tensor.detach() for tensor in sources], stays, copies


def _key(tensors: Sequence[Tensor]) -> tuple:
    """What says that copies are these tensors', and that they were not written to since."""
    return tuple((tensor.data_ptr(), tensor.shape, tensor._version) for tensor in tensors)


class _Way:
    """Which layer of a model will be asked for next: the one above, or on the way back through a step of the tuning the one below.

    Args:
        layers (`nn.ModuleList`): The model's.
    """

    def __init__(self, layers: nn.ModuleList):
        self.layers = layers
        self._last, self._back = -1, False

    def behind(self, layer: nn.Module) -> nn.Module | None:
        """The layer that comes after one that runs now; `None` behind the last one."""
        index = next(i for i, known in enumerate(self.layers) if known is layer)
        down = self._last == index + 1 or (self._last == index and self._back)
        # nothing but the backward pass of a step goes down; a pass without gradient that comes to a lower layer begins anew
        self._last, self._back = index, down and torch.is_grad_enabled()
        following = index - 1 if self._back else index + 1
        return self.layers[following] if 0 <= following < len(self.layers) else None


class StreamedForward:
    """A layer's forward with its weights on the device where it runs.

    Where the layer's weights or what enters it were moved since, it is the layer's own forward and no more. Weights that want a
    gradient are copied anew each time, so that they get it where they lie.

    Args:
        layer (`nn.Module`): The layer.
        way (`_Way`): Of all layers of its model.
        copies ([`LayerCopies`]): Of the device.
    """

    def __init__(self, layer: nn.Module, way: _Way, copies: LayerCopies):
        self.layer, self.way, self.copies = layer, way, copies
        self.__wrapped__ = layer.forward  # for whoever looks at the signature
        self.lies = {tensor.device for tensor in self.tensors()}

    def tensors(self) -> list[Tensor]:
        """The layer's parameters and buffers, each in every place where it stands."""
        return [owner[name] for owner, name in _slots(self.layer)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        slots, tensors = _slots(self.layer), self.tensors()
        if not self._streams(tensors, args, kwargs):
            return self.__wrapped__(*args, **kwargs)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            here = [tensor.to(self.copies.device, copy=True) for tensor in tensors]
        else:
            here = self.copies.of(tensors)
            for copy, tensor in zip(here, tensors, strict=True):
                copy.requires_grad_(tensor.requires_grad)  # PyTorch chooses kernels by that, also without gradients
            following = streamed_forward(self.way.behind(self.layer))
            if following is not None:
                self.copies.prefetch(following.tensors())
        try:
            for (owner, name), copy in zip(slots, here, strict=True):
                owner[name] = copy
            return self.__wrapped__(*args, **kwargs)
        finally:
            for (owner, name), tensor in zip(slots, tensors, strict=True):
                owner[name] = tensor

    def _streams(self, tensors: Sequence[Tensor], args: tuple, kwargs: dict[str, Any]) -> bool:
        runs = layer_input(args, kwargs).device
        return _same(runs, self.copies.device) and {tensor.device for tensor in tensors} == self.lies


def stream_layers(model: PreTrainedModel, copies: LayerCopies) -> None:
    """Let the decoder layers of a model that do not lie on a device run there.

    Args:
        model (`PreTrainedModel`): Its layers' `forward` is replaced, as accelerate does it; all around them is on the device.
        copies ([`LayerCopies`]): Of the device.
    """
    layers = decoder_layers(model)
    way = _Way(layers)
    for layer in layers:
        settle(layer, move=False)
        # the CPU may stand in for an accelerator: a layer that lies there runs on a copy all the same
        if any(not _same(p.device, copies.device) or p.device.type == "cpu" for p in layer.parameters()):
            vars(layer)["forward"] = StreamedForward(layer, way, copies)


def run_on(model: PreTrainedModel, copies: LayerCopies) -> None:
    """Let a model run on a device: what is around its decoder layers lies there from now on, the layers stay where they lie.

    Args:
        model (`PreTrainedModel`): Nobody else's modules; its tensors may be another model's, and are not changed.
        copies ([`LayerCopies`]): Of the device.
    """
    inside = set(decoder_layers(model).modules())
    moved: dict[int, Any] = {}
    for module in model.modules():
        if module in inside:
            continue
        move_tensors(_alone(module), copies.device, moved)
        for name, value in list(vars(module).items()):
            # rotary embeddings keep a tensor that is neither parameter nor buffer
            if isinstance(value, Tensor):
                setattr(module, name, value.to(copies.device))
    stream_layers(model, copies)


@contextmanager
def recomputed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Until the block ends autograd keeps nothing of layers that run elsewhere than where they lie, and computes them again.

    Else it would keep the copies of all of them until its way back.
    """

    def again(forward: StreamedForward) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run

    with ExitStack() as stack:
        for layer in layers:
            if (forward := streamed_forward(layer)) is not None:
                stack.enter_context(replaced_forward(layer, again(forward)))
        yield


def copies_of(model: nn.Module) -> LayerCopies | None:
    """What a model's layers run on, if some of them lie elsewhere."""
    found = (streamed_forward(module) for module in model.modules())
    return next((forward.copies for forward in found if forward is not None), None)


def streamed_forward(module: nn.Module | None) -> StreamedForward | None:
    """The forward of a layer that runs elsewhere than where it lies; `None` of any other module."""
    found = None if module is None else vars(module).get("forward")
    return found if isinstance(found, StreamedForward) else None


def settle(module: nn.Module, *, move: bool = True) -> None:
    """Let the layers in a module run where they lie from now on.

    Args:
        module (`nn.Module`): Layers, or what holds some.
        move (`bool`): They come to lie where they ran, in memory of their own. Other models over the same tensors keep theirs.
    """
    for part in list(module.modules()):
        forward = streamed_forward(part)
        if forward is None:
            continue
        # what was there before, if it was no method of the class
        del vars(part)["forward"]
        own = forward.__wrapped__
        if getattr(own, "__func__", None) is not type(part).forward:
            vars(part)["forward"] = own
        if move:
            move_tensors(part, forward.copies.device, {})


def move_tensors(module: nn.Module, device: torch.device, moved: dict[int, Tensor]) -> None:
    """Put copies on a device in the place of a module's parameters and buffers; the tensors themselves stay as they are.

    Args:
        module (`nn.Module`): Its own tensors, and those of the modules in it.
        device (`torch.device`): Where the copies lie.
        moved (`dict[int, Tensor]`): What was moved before, by the identity of the original: tied weights stay one.
    """
    for owner, name in _slots(module):
        tensor = owner[name]
        if id(tensor) not in moved:
            copy = tensor.detach().to(device, copy=True)
            is_parameter = isinstance(tensor, nn.Parameter)
            moved[id(tensor)] = nn.Parameter(copy, requires_grad=tensor.requires_grad) if is_parameter else copy
        owner[name] = moved[id(tensor)]


def _alone(module: nn.Module) -> nn.Module:
    """A module's own tensors, without those of the modules in it."""
    alone = nn.Module()
    alone._parameters, alone._buffers = module._parameters, module._buffers
    return alone


def _slots(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where a module's parameters and buffers stand: a dictionary of one of its parts, and a key."""
    return [
        (owner, name)
        for part in module.modules()
        for owner in (part._parameters, part._buffers)
        for name, tensor in owner.items()
        if tensor is not None
    ]


def _same(device: torch.device, other: torch.device) -> bool:
    """Whether two devices are one; `cuda` is the current one."""
    return device.type == other.type and (device.index or 0) == (other.index or 0)
