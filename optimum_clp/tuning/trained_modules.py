"""Which modules of a cut model are trained, and how their weights get in and out of it."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architecture.lookup import decoder_layers, decoder_path, text_config
from ..configuration.stages import TuningConfig
from ..errors import ConfigurationError, ModelError
from ..forward.hooks import AfterForward, hooked
from ..forward.layer_stack import LayerStack
from ..processes import broadcast
from ..surgery.cut import own_storage
from .accelerator import shards_weights
from .overparametrization import Annealing, merge, overparametrized


class TrainedModules:
    """The modules of one tuning: decoder layers, and what else the settings ask for.

    Args:
        model (`PreTrainedModel`): The cut model.
        layers (`Sequence[int]`): Layers to train, ascending.
        config ([`TuningConfig`]): Whether the final norm and the head are trained too, and whether the layers have more
            parameters meanwhile.

    Attributes:
        extra (`list[str]`): Names of the modules beyond the layers.
        annealing ([`Annealing`] or `None`): Of the activation that the layers have while they are trained, if they have one.

    Raises:
        ConfigurationError: If the head is to be trained and is tied to the embedding.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], config: TuningConfig):
        self.model = model
        self.extra = _extra_modules(model, config)
        self.names = [*(f"{decoder_path(model)}.{i}" for i in layers), *self.extra]
        self.modules = nn.ModuleList(model.get_submodule(name) for name in self.names)
        self.annealing = Annealing() if config.overparametrization == "annealed" else None
        self._more = config.overparametrization != "none"

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Each of them once."""
        return list({id(p): p for p in self.modules.parameters()}.values())

    def own_storage(self) -> None:
        """Part them from the model that they came from."""
        own_storage(self.modules)

    @contextmanager
    def handed_to(self, accelerator: Accelerator) -> Iterator[nn.ModuleList]:
        """The modules for a training engine: the model's own, or copies in their place where it would change them.

        The layers have more parameters until the block ends, if the settings say so.
        """
        if not shards_weights(accelerator):
            with self._overparametrized(self.modules):
                yield self.modules
            return
        copies = copy.deepcopy(self.modules)
        try:
            for name, module in zip(self.names, copies, strict=True):
                self.model.set_submodule(name, module)
            with self._overparametrized(copies, keep=False):
                yield copies
        finally:
            for name, module in zip(self.names, self.modules, strict=True):
                self.model.set_submodule(name, module)

    @torch.no_grad()
    def take_over(self, weights: Mapping[str, Tensor] | None) -> None:
        """Copy weights into the modules, in every process of a group; they are plain ones from then on.

        Args:
            weights (`dict[str, Tensor]` or `None`): Of [`BestWeights`]; `None` in all processes but the first.
        """
        merge(self.modules)
        device = self.model.device
        for name, tensor in self.modules.state_dict().items():
            sent = torch.empty_like(tensor, device=device) if weights is None else weights[f"trained.{name}"]
            tensor.copy_(broadcast(sent.to(device)))

    def _overparametrized(self, modules: nn.ModuleList, keep: bool = True) -> AbstractContextManager[None]:
        if not self._more:
            return nullcontext()
        # not what is beyond the layers: of a head, D would be as wide as the vocabulary
        layers = list(modules)[: len(modules) - len(self.extra)]
        return overparametrized(self.model, layers, self.annealing, keep=keep)


def check_layers(layers: Sequence[int], model: PreTrainedModel) -> None:
    """Refuse layers that the model does not have.

    Raises:
        ModelError: Names them.
    """
    count = len(decoder_layers(model))
    outside = [i for i in layers if not 0 <= i < count]
    if outside or not layers:
        raise ModelError.of(
            "layers", list(layers), f"the model has layers 0 to {count - 1}", "Choose at least one of these"
        )


def _extra_modules(model: PreTrainedModel, config: TuningConfig) -> list[str]:
    """Names of the modules beyond the layers that are trained."""
    names = _closing_modules(model) if config.train_final_norm else []
    if config.train_head:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if head is None or head.weight is embedding.weight:
            rule = "the head is tied to the embedding, which is below the layers that are trained"
            raise ConfigurationError.of("tuning.train_head", True, rule, "Leave it out, or untie the model")
        names.append(next(name for name, module in model.named_modules() if module is head))
    return names


def _closing_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules with weights between the last decoder layer and the head: the final norm, as a rule."""
    stack, head = LayerStack(model), model.get_output_embeddings()
    weighted = {
        name: module
        for name, module in model.named_modules()
        if module is not head and next(module.parameters(recurse=False), None) is not None
    }
    called: list[str] = []

    def noting(name: str) -> AfterForward:
        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if name not in called:
                called.append(name)

        return note

    def last(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        called.clear()

    hooks = [(module, noting(name)) for name, module in weighted.items()]
    with hooked(after=[*hooks, (stack.layers[-1], last)]), torch.no_grad(), stack.head(model) as logits:
        width = text_config(model.config).hidden_size
        logits(torch.zeros(1, 1, width, dtype=model.dtype, device=model.device))
    return called
