"""Which modules of a layer depend on which others, seen in the graph that autograd keeps of one forward pass."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from ...forward.hooks import hooked, layer_input


def dependency_levels(
    layer: nn.Module, modules: Collection[nn.Module], run: Callable[[], object]
) -> list[list[nn.Module]]:
    """Sort modules so that each comes after all those whose outputs take part in its input.

    In a LLaMA layer: queries, keys and values; the attention's output; gate and up projection; down projection. What a
    router chooses is no dependency, since choices have no gradient; what it multiplies by is one.

    Args:
        layer (`nn.Module`): The layer, called once by `run` with hidden states.
        modules (`Collection[nn.Module]`): Parts of it, called with their input as the first argument.
        run (`Callable`): A forward pass through the layer, which keeps what its gradients need for as long as it lasts.

    Returns:
        `list[list[nn.Module]]`: The levels, each in the order of the calls; a module that was not called is in none.
    """
    levels: dict[nn.Module, int] = {}
    behind: dict[Any, int] = {}

    def level_of(value: Tensor) -> int:
        """One more than the highest level among the modules that have taken part in a tensor, else 0."""
        highest, nodes, seen = 0, [value.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in behind:
                highest = max(highest, behind[node])
            else:
                nodes.extend(parent for parent, _ in node.next_functions)
        return highest

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        level = max(level_of(args[0]), levels.pop(module, 0))
        levels[module] = level

    def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        behind[output.grad_fn] = levels[module] + 1

    entered = [(layer, _follow), *((module, before) for module in modules)]
    with torch.enable_grad(), hooked(entered, [(module, after) for module in modules]):
        run()
    return [
        found
        for level in sorted(set(levels.values()))
        if (found := [m for m, known in levels.items() if known == level])
    ]


def _follow(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Let autograd follow what enters a layer; a copy, for layers that add to it in place."""
    hidden = layer_input(args, kwargs).detach().requires_grad_().clone()
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
