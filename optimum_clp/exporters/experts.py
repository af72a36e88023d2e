"""Mixture-of-experts layers as ordinary linear layers, in the form that a trace and a quantizer can follow.

transformers sorts the tokens by expert, or loops over the experts that were hit: the first has no ONNX operator, the
second has no fixed graph. Here each expert in turn takes the tokens that chose it, which may be none, and adds to
their rows. The graph holds all experts; an expert that no token chose multiplies nothing and reads no weights.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _Experts(nn.Module):
    """What stands in for a module of fused experts; its linear layers are views of that module's weights.

    A subclass has the `forward` of the modules that it replaces.

    Args:
        up (`list[nn.Module]`): First layer of each expert, with the gate in the same matrix where there is one.
        gate (`Callable`): What comes between the two layers.
        down (`list[nn.Linear]`): Second layer of each expert.
        after (`Callable`, *optional*): What comes after the second layer, before the routing weight.
    """

    def __init__(
        self,
        up: Sequence[nn.Module],
        gate: Callable[[Tensor], Tensor],
        down: list[nn.Linear],
        after: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.up = nn.ModuleList(up)
        self.down = nn.ModuleList(down)
        self._gate = gate
        self._after = after

    def expert(self, index: int, hidden_states: Tensor) -> Tensor:
        """One expert, `[tokens, hidden]` to `[tokens, hidden]`."""
        output = self.down[index](self._gate(self.up[index](hidden_states)))
        return output if self._after is None else self._after(output)

    def _added(self, total: Tensor, index: int, tokens: Tensor, weight: Tensor) -> Tensor:
        """`total` plus what one expert gives for the tokens with a `weight`, `[tokens]`, other than 0."""
        rows = weight.nonzero().squeeze(-1)
        # where products are in another dtype than sums
        return total.index_add(0, rows, (self.expert(index, tokens[rows]) * weight[rows, None]).to(total.dtype))

    def weighted_sum(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts.

        Args:
            hidden_states (`Tensor` of shape `[..., hidden]`): The tokens.
            top_k_index (`Tensor` of shape `[tokens, k]`, int64): The chosen experts.
            top_k_weights (`Tensor` of shape `[tokens, k]`): Their weights.

        Returns:
            `Tensor`: Of the shape of `hidden_states`.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        total = torch.zeros_like(tokens)
        for index in range(len(self.down)):
            weight = torch.where(top_k_index == index, top_k_weights, 0).sum(dim=-1)
            total = self._added(total, index, tokens, weight)
        return total.reshape(hidden_states.shape)


class SeparateExperts(_Experts):
    """The experts of transformers 5."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.weighted_sum(hidden_states, top_k_index, top_k_weights)


class _Pair(nn.Module):
    """Gate and first layer that are stored apart, side by side as [`SeparateExperts`] takes them."""

    def __init__(self, gate: nn.Linear, up: nn.Linear):
        super().__init__()
        self.gate = gate
        self.up = up

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.cat([self.gate(hidden_states), self.up(hidden_states)], dim=-1)


class _WithIdentityExperts(_Experts):
    """LongCat: the experts after the last one that has weights return their input."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = self.weighted_sum(hidden_states, top_k_index, top_k_weights)
        weight = torch.where(top_k_index >= len(self.down), top_k_weights, 0).sum(dim=-1, keepdim=True)
        return total + hidden_states * weight


class _DenselyRouted(_Experts):
    """GPT-OSS of transformers 4: the weights come as `[tokens, experts]`, 0 for the experts that were not chosen."""

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        total = torch.zeros_like(tokens)
        for index in range(len(self.down)):
            total = self._added(total, index, tokens, routing_weights[:, index])
        return total.reshape(hidden_states.shape)


class _WithRouterWeights(_Experts):
    """DBRX of transformers 4: one argument more, which is not used."""

    def forward(self, x: Tensor, weights: Tensor, top_weights: Tensor, top_experts: Tensor) -> Tensor:
        return self.weighted_sum(x, top_experts, top_weights)


class _PresortedExperts(_Experts):
    """Llama 4: all tokens, weighted already, come once for each expert, one expert after the other."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        parts = hidden_states.reshape(len(self.down), -1, hidden_states.shape[-1])
        return torch.cat([self.expert(i, parts[i]) for i in range(len(self.down))])


class _SizedExperts(nn.Module):
    """JetMoE, and Granite of transformers 4: tokens come sorted by expert, with the number of tokens of each."""

    def __init__(self, layers: list[nn.Linear]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:
        parts = inputs.split(expert_size)
        return torch.cat([layer(part) for layer, part in zip(self.layers, parts, strict=True)])


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that [`unrolled_experts`] replaces, by name."""
    return {name: module for name, module in model.named_modules() if _builder(module) is not None}


@contextmanager
def unrolled_experts(model: nn.Module) -> Iterator[None]:
    """Inside the block every module of fused experts is one of separate experts; no weight is copied.

    Args:
        model (`nn.Module`): Its modules are put back at the end.
    """
    originals = experts_modules(model)
    try:
        for name, module in originals.items():
            build = _builder(module)
            assert build is not None
            model.set_submodule(name, build(module))
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)


def _builder(module: nn.Module) -> Callable[[Any], nn.Module] | None:
    # every class that transformers.integrations.moe decorates has this attribute
    if hasattr(module, "_is_expert_parallel"):
        return _fused
    name = type(module).__name__
    return _sized if name.endswith("ParallelExperts") else _OTHER_BUILDERS.get(name)


def _fused(module) -> _Experts:
    transposed = module.is_transposed
    up = "gate_up_proj" if module.has_gate else "up_proj"
    biases = (getattr(module, f"{up}_bias"), module.down_proj_bias) if module.has_bias else (None, None)
    return SeparateExperts(
        _linears(getattr(module, up), biases[0], transposed),
        module._apply_gate if module.has_gate else module.act_fn,
        _linears(module.down_proj, biases[1], transposed),
        module.post_expert_norm if module.has_post_expert_norm else None,
    )


def _longcat_flash(module) -> _Experts:
    down = _linears(module.down_proj)
    return _WithIdentityExperts(_linears(module.gate_up_proj)[: len(down)], _gated(module.act_fn), down)


def _llama4(module) -> _Experts:
    return _PresortedExperts(
        _linears(module.gate_up_proj, None, True), _gated(module.act_fn), _linears(module.down_proj, None, True)
    )


def _sized(module) -> _SizedExperts:
    return _SizedExperts(_linears(module.weight))


def _dbrx(module) -> _Experts:
    mlp = module.mlp
    shape = (mlp.moe_num_experts, mlp.ffn_hidden_size, mlp.hidden_size)
    first, second = (weight.detach().view(shape) for weight in (mlp.w1, mlp.v1))
    layers = [_linears(weights) for weights in (first, second)]
    down = _linears(mlp.w2.detach().view(shape), None, True)
    kind = _WithRouterWeights if "top_experts" in inspect.signature(module.forward).parameters else SeparateExperts
    return kind([_Pair(*pair) for pair in zip(*layers, strict=True)], _gated(mlp.activation_fn), down)


def _gpt_oss4(module) -> _Experts:
    def gate(gate_up: Tensor) -> Tensor:
        first, second = gate_up[..., ::2].clamp(max=module.limit), gate_up[..., 1::2]
        return (second.clamp(-module.limit, module.limit) + 1) * first * torch.sigmoid(first * module.alpha)

    return _DenselyRouted(
        _linears(module.gate_up_proj, module.gate_up_proj_bias, True),
        gate,
        _linears(module.down_proj, module.down_proj_bias, True),
    )


# classes of fused experts that transformers.integrations.moe does not know
_OTHER_BUILDERS: dict[str, Callable[[Any], nn.Module]] = {
    "DbrxExperts": _dbrx,
    "GptOssExperts": _gpt_oss4,
    "Llama4TextExperts": _llama4,
    "LongcatFlashExperts": _longcat_flash,
}


def _gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def gate(gate_up: Tensor) -> Tensor:
        first, second = gate_up.chunk(2, dim=-1)
        return activation(first) * second

    return gate


def _linears(weights: Tensor, biases: Tensor | None = None, transposed: bool = False) -> list[nn.Linear]:
    """One layer for each expert; `weights` is `[experts, outputs, inputs]`, or `[experts, inputs, outputs]`."""
    layers = []
    for index, weight in enumerate(weights.detach()):
        outputs, inputs = weight.shape[::-1] if transposed else weight.shape
        with torch.device("meta"):
            layer = nn.Linear(inputs, outputs, bias=biases is not None)
        layer.weight = nn.Parameter(weight.t() if transposed else weight, requires_grad=False)
        if biases is not None:
            layer.bias = nn.Parameter(biases.detach()[index], requires_grad=False)
        layers.append(layer)
    return layers
