"""AdamW in float32 for weights of any dtype."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw


class MasterAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) whose weights and moments are float32 whatever the parameters' dtype.

    A float32 parameter is its own master. Others get a float32 copy, which is updated and rounded into the parameter.
    One parameter is updated at a time, so gradients are float32 for one of them only: with the masters and the two
    moments this is four float32 copies for float32 parameters, and no more for bfloat16 ones (half a copy each of the
    parameters and of their gradients).

    Args:
        parameters (`Iterable[nn.Parameter]`): What is trained.
        lr (`float`): Learning rate.
        betas (`tuple[float, float]`): Decay of the moments.
        eps (`float`): Added to the root of the second moment.
        weight_decay (`float`): Decoupled.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; parameters without a gradient are left alone."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
            if parameter.dtype != torch.float32:
                state["master"] = parameter.detach().to(torch.float32, copy=True)
        master = state.get("master", parameter)
        adamw(
            [master],
            [parameter.grad.to(torch.float32)],  # type: ignore[union-attr]
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            foreach=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if master is not parameter:
            parameter.copy_(master)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but the float32 state stays float32: torch would round it to the parameters' dtype."""
        super().load_state_dict(state_dict)
        saved = [state_dict["state"].get(i) for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for parameter, state in zip(parameters, saved, strict=True):
            for name, value in (state or {}).items():
                device = value.device if name == "step" else parameter.device
                self.state[parameter][name] = value.to(device, copy=True)
