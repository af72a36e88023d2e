"""Other people's ways to heal a cut, behind one protocol: a `Healing` says what is trained, towards what, and how it ends.

All of them were written anew from their descriptions; LoRA is peft's. What differs from the papers is in the README.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.recovery.chat_model.overrep import OverRep
from benchmarks.recovery.methods import BEFORE, Cell, linear_patch, solved
from optimum_clp.architecture.lookup import decoder_layers
from optimum_clp.forward.dense_outputs import DenseOutputs
from optimum_clp.forward.hooks import layer_hidden
from optimum_clp.surgery.cut import own_storage
from optimum_clp.tuning.losses import LOGITS, TEACHER_LOGITS, LossBatch

PATCH = "linear_patch"
# rows that a solution without gradient steps is fitted on: more change it little
FITTED_ROWS = 192


@dataclass
class Healing:
    """A cut model that is about to be trained.

    Args:
        model (`PreTrainedModel`): The cut model, prepared: what it computes is what is trained.
        trained (`Sequence[nn.Module]`): What is trained: their parameters that require gradients.
        first (`int`): The first layer that a step runs, in the cut model's numbering.
        loss (`str`): `"kd"`: KL to the dense model at every token; `"top"`: on its 100 most likely tokens alone;
            `"hidden"`: mean squared error of `compared`, a layer's output, to the dense model's state there.
        compared (`int` or `None`): That layer.
        weight_decay (`float`): Of AdamW.
        at (`Callable`): Called before each step with the share of the steps that are done.
        finish (`Callable`): Called at the end: leaves a model that needs none of what is above.
    """

    model: PreTrainedModel
    trained: Sequence[nn.Module]
    first: int
    loss: str = "kd"
    compared: int | None = None
    weight_decay: float = 0.0
    at: Callable[[float], None] = field(default=lambda share: None)
    finish: Callable[[], None] = field(default=lambda: None)


@dataclass(frozen=True)
class Rival:
    """A way to heal.

    Args:
        label (`str`): In tables.
        prepare (`Callable`): Of a [`Cell`]: a [`Healing`] for each of its variants, of which validation rows choose; for a
            way without gradient steps the healed model itself.
        trains (`bool`): Whether there are gradient steps.
        between (`bool`): Whether it needs a layer on either side of the cut.
    """

    label: str
    prepare: Callable[[Cell], Any]
    trains: bool = True
    between: bool = False


class TopLogits:
    """LinearPatch's loss: KL between both models' distributions over the dense model's 100 most likely tokens."""

    needs = frozenset({LOGITS, TEACHER_LOGITS})
    count = 100

    def __call__(self, batch: LossBatch) -> Tensor:
        assert batch.logits is not None and batch.teacher_logits is not None
        dense, indices = batch.teacher_logits.topk(min(self.count, batch.logits.shape[-1]))
        target = dense.float().log_softmax(-1)
        found = batch.logits.gather(-1, indices).float().log_softmax(-1)
        return (target.exp() * (target - found)).sum(-1).mean(-1)


class LinearPatch(nn.Module):
    """A matrix between two layers, which no plain checkpoint holds: hidden states `h` become `h @ weight`."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def hook(self, module: nn.Module, args: tuple, output: Any) -> Any:
        hidden = layer_hidden(output)
        hidden = (hidden.to(self.weight.dtype) @ self.weight).to(hidden.dtype)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


def install_patch(layer: nn.Module, weight: Tensor) -> LinearPatch:
    """Let a layer's output go through a matrix, which is a module of the layer."""
    patch = LinearPatch(weight)
    layer.add_module(PATCH, patch)
    layer.register_forward_hook(patch.hook)
    return patch


def overrep(cell: Cell) -> list[Healing]:
    model = cell.cut()
    blocks = OverRep(model, cell.dense, cell.segment)
    first, behind = cell.segment.start - 1, cell.segment.start
    return [Healing(model, blocks.blocks, first, "hidden", behind, 1e-2, blocks.at, blocks.merge)]


def overrep_kd(cell: Cell) -> list[Healing]:
    (healing,) = overrep(cell)
    healing.loss, healing.compared = "kd", None
    return [healing]


def xmerge(cell: Cell) -> list[Healing]:
    """One block is refitted: the one behind the cut, or the one before it."""
    healings = []
    for index in reversed(cell.endpoints):
        model = cell.cut()
        block = decoder_layers(model)[index]
        own_storage(block)
        healings.append(Healing(model, [block], index, "hidden", index))
    return healings


def layers_in_full(cell: Cell, layers: str, norm: bool = False) -> list[Healing]:
    model = cell.cut()
    indices = getattr(cell, layers)
    modules = [decoder_layers(model)[i] for i in indices]
    if norm:
        # behind the layers, before the head
        modules += [m for m in model.base_model.children() if hasattr(m, "weight") and m.weight.dim() == 1]
    own_storage(nn.ModuleList(modules))
    return [Healing(model, modules, indices[0])]


def lora(cell: Cell) -> list[Healing]:
    """LoRA on all linear modules of all layers, as large as the two layers next to the cut; merged at the end."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    model = cell.cut()
    # merging writes into the weights
    own_storage(decoder_layers(model))
    linear = [m for layer in decoder_layers(model) for m in layer.modules() if isinstance(m, nn.Linear)]
    rank = max(1, round(cell.num_endpoint_parameters() / sum(m.in_features + m.out_features for m in linear)))
    with torch.random.fork_rng():
        torch.manual_seed(cell.seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"), model)
    adapters = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]

    def merge() -> None:
        for name, module in adapters:
            module.merge()
            model.set_submodule(name, module.get_base_layer())

    parts = [part["default"] for _, layer in adapters for part in (layer.lora_A, layer.lora_B)]
    return [Healing(model, parts, 0, finish=merge)]


def patched(cell: Cell) -> tuple[PreTrainedModel, LinearPatch]:
    """LinearPatch before any step: in Hadamard's basis each channel scaled to the size that it has behind the cut."""
    model, ends = cell.cut(), (cell.segment.start, cell.segment.stop)
    outputs = DenseOutputs(cell.dense, cell.train[:FITTED_ROWS], inputs_of=ends)
    matrix = linear_patch(*(outputs.hidden[i].double() for i in ends))
    layer = decoder_layers(model)[cell.segment.start - 1]
    return model, install_patch(layer, matrix.float().to(model.device))


def linear_patch_tuned(cell: Cell) -> list[Healing]:
    model, patch = patched(cell)
    return [Healing(model, [patch], cell.segment.start - 1, "top", weight_decay=1e-4)]


def replaceme(cell: Cell) -> PreTrainedModel:
    few = Cell(cell.dense, cell.segment, cell.train[:FITTED_ROWS], cell.validation, cell.seed)
    return solved(few, method="fold", **BEFORE).model


RIVALS = {
    "cut": Rival("cut, untouched", lambda cell: cell.cut(), trains=False),
    "replaceme": Rival("ReplaceMe", replaceme, trains=False, between=True),
    "linear_patch_free": Rival("LinearPatch, untrained *", lambda cell: patched(cell)[0], trains=False, between=True),
    "overrep": Rival("OverRep", overrep, between=True),
    "overrep_kd": Rival("OverRep-KD", overrep_kd, between=True),
    "xmerge": Rival("XMerge", xmerge),
    "last3": Rival("last 3 layers + norm, KL", lambda cell: layers_in_full(cell, "last_three", norm=True)),
    "lora": Rival("LoRA, our size, KL", lora),
    "all_layers": Rival("all layers, KL", lambda cell: layers_in_full(cell, "all_layers")),
    "linear_patch": Rival("LinearPatch, top 100 *", linear_patch_tuned, between=True),
}
