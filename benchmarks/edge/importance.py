"""How much each column of a linear weight counts: the mean square of what it is multiplied by."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def mean_squares(model: PreTrainedModel, modules: Mapping[str, nn.Module], rows: Tensor) -> dict[str, np.ndarray]:
    """For each linear one of `modules`, by name: float32 of shape `(inputs,)`, over all tokens of `rows`."""
    sums: dict[str, Tensor] = {}

    def add(name: str, inputs: Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros(())) + inputs.reshape(-1, inputs.shape[-1]).square().sum(0)

    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: add(name, args[0]))
        for name, module in modules.items()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for batch in rows.split(4):
            model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: (total / rows.numel()).numpy() for name, total in sums.items()}
