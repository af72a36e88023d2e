"""Whole passes of a model whose layers are partly open: the plain truth that `LayerStack.gated` is compared with."""

from contextlib import ExitStack, contextmanager

import torch

from optimum_clp.forward.hooks import layer_hidden, layer_input


@contextmanager
def gated(layers, gate):
    """Mix every layer's output with its input, `gate * layer(x) + (1 - gate) * x`; gradients flow to the gate."""

    def hook_for(value):
        def hook(module, args, kwargs, output):
            hidden = layer_hidden(output)
            mixed = torch.lerp(layer_input(args, kwargs).to(hidden), hidden, value.to(hidden.device, hidden.dtype))
            return type(output)((mixed, *output[1:])) if isinstance(output, (tuple, list)) else mixed

        return hook

    with ExitStack() as stack:
        for layer, value in zip(layers, gate, strict=True):
            stack.callback(layer.register_forward_hook(hook_for(value), with_kwargs=True).remove)
        yield
