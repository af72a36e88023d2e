"""Devices that are not there: tensors that say they lie on `mtia:0`, and refuse to be mixed with those of another device.

Everything is computed on the CPU. Within the mode each tensor has a place; an operation over tensors of two places raises what PyTorch
raises on real devices, but for what PyTorch allows there: numbers without dimensions, indices, and copies.
"""

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

CPU = torch.device("cpu")
# a kind of which libraries know nothing more: they ask others for their properties, or whether they are there
ACCELERATOR = torch.device("mtia", 0)
_COPIES = {Tensor.copy_, Tensor.data.__set__, Tensor.grad.__set__}
_INDEXED = {Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put_, torch.index_put}


def place(tensor):
    """Where a tensor says that it lies."""
    return vars(tensor)["_place"] if "_place" in vars(tensor) else tensor.device


class PretendedDevices(TorchFunctionMode):
    """Within the block there are accelerators.

    Attributes:
        moved (`list[tuple[torch.device, int]]`): Copies to an accelerator: which one, bytes.
    """

    def __init__(self):
        super().__init__()
        self.moved = []

    def __enter__(self):
        made = nn.Parameter.__new__

        def new(cls, data=None, requires_grad=True):
            parameter = made(cls, data, requires_grad)
            return parameter if data is None else put(parameter, place(data))

        mapped = torch.vmap

        def vmap(*args, **kwargs):
            function = mapped(*args, **kwargs)
            return lambda *given: _put_all(function(*given), given)

        self._made, self._mapped = made, mapped
        nn.Parameter.__new__, torch.vmap = staticmethod(new), vmap
        return super().__enter__()

    def __exit__(self, *raised):
        nn.Parameter.__new__, torch.vmap = self._made, self._mapped
        return super().__exit__(*raised)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return place(args[0])
        if func in (Tensor.to, Tensor.cpu):
            return self._to(func, args, kwargs)
        asked = kwargs.get("device")
        if asked is not None:
            asked = torch.device(asked)
            kwargs["device"] = "meta" if asked.type == "meta" else "cpu"
        if func in _COPIES:
            result = func(*args, **kwargs)
            if func == Tensor.data.__set__:
                put(args[0], place(args[1]))
            return result
        found = [t for t in tree_leaves((args[:1] if func in _INDEXED else args, kwargs)) if isinstance(t, Tensor)]
        places = _places(found)
        if func is torch._has_compatible_shallow_copy_type:
            return len(places) == 1
        if func is torch.histc and not args[0].is_floating_point():  # of whole numbers on accelerators alone
            args = (args[0].float(), *args[1:])
        if len(places) > 1:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {func} got {sorted(map(str, places))}"
            )
        result = func(*args, **kwargs)
        where = asked or next(iter(places), None) or next((place(t) for t in found), CPU)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not any(tensor is known for known in found):
                put(tensor, where)
        return result

    def _to(self, func, args, kwargs):
        tensor, *rest = args
        if func is not Tensor.to:
            device, rest, func = CPU, [], Tensor.to
        else:
            device = kwargs.pop("device", None)
            device = None if device is None else torch.device(device)
            for index, value in enumerate(rest):
                if isinstance(value, Tensor):
                    device, rest[index] = place(value), value.dtype
                elif isinstance(value, (torch.device, str, int)) and not isinstance(value, bool) and index == 0:
                    device, rest[index] = torch.device(value), None
            other = kwargs.pop("other", None)
            if other is not None:
                device, kwargs["dtype"] = place(other), other.dtype
            rest = [value for value in rest if value is not None]
        if device is not None and device.type == "meta":
            return func(tensor, device, *rest, **kwargs)
        if device is None:
            result = func(tensor, *rest, **kwargs)
            return result if result is tensor else put(result, place(tensor))
        if tensor.device.type == "meta":
            return func(tensor, CPU, *rest, **kwargs)
        device = _numbered(device)
        changes = device != place(tensor)
        if changes and device != CPU:
            self.moved.append((device, tensor.nbytes))
        kwargs["copy"] = kwargs.get("copy", False) or changes
        kwargs.pop("non_blocking", None)
        rest = [value for value in rest if not isinstance(value, bool)]
        result = (
            func(tensor, *rest, **kwargs)
            if rest or len(kwargs) > 1 or "dtype" in kwargs
            else (tensor.clone() if kwargs["copy"] else tensor)
        )
        return put(result, device) if result is not tensor else tensor


def _numbered(device):
    return torch.device(device.type, device.index or 0) if device.type != "cpu" else CPU


def _places(tensors):
    return {place(tensor) for tensor in tensors if tensor.dim() and tensor.device.type == "cpu"}


def put(tensor, device):
    """Let a tensor say that it lies on a device."""
    if tensor.device.type == "cpu" and (device != CPU or "_place" in vars(tensor)):
        tensor._place = _numbered(device)
    return tensor


def _put_all(results, given):
    """Results of a function that is no single operation, where its arguments are."""
    where = next((place(tensor) for tensor in tree_leaves(given) if isinstance(tensor, Tensor)), CPU)
    return tree_map_only(Tensor, lambda tensor: put(tensor, where), results)
