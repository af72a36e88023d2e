"""Cutoff endpoint tuning: train only the layers next to the cut, in full, towards the dense model's logits.

Nothing below the first endpoint changes, so it is not run while training: the hidden states that enter the first
endpoint are taken once, from the dense model's own pass, together with the states that leave its last layer (the
teacher). Each step starts at the first endpoint, and only the endpoints have gradients and optimizer state.
"""

import copy
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architecture.lookup import decoder_layers, decoder_path, text_config
from ..configuration.stages import TuningConfig
from ..errors import ConfigurationError, ModelError, TuningError
from ..forward.dense_outputs import DenseOutputs, StateStore
from ..forward.hooks import evaluation_mode
from ..forward.layer_stack import LayerStack
from ..surgery.cut import own_storage
from .closed_form import solve_endpoints, target_state
from .loop import TrainingLoop, TrainingState, tuning_accelerator
from .result import TuningResult, TuningStep, improves
from .student import EndpointStudent, TuningRows


def default_learning_rate(hidden_size: int) -> float:
    """`0.1 / hidden_size`: 8e-4 at width 128, 2.4e-5 at 4096; wider layers take smaller steps."""
    return 0.1 / hidden_size


def tune_layers(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    layers: Sequence[int],
    train: Tensor,
    validation: Tensor,
    config: TuningConfig,
    *,
    kept: Sequence[int] | None = None,
    validation_kinds: Sequence[str] = (),
    seed: int = 0,
    folder: Path | None = None,
    quiet: bool = False,
) -> TuningResult:
    """Train some layers of `model` towards `dense`, and keep the weights with the best validation loss.

    The trained layers get storage of their own first; every other tensor, and all of `dense`, stays as it is, also where
    the two share storage. Master weights, gradients and moments are float32 whatever the model's dtype. `requires_grad`
    and `training` are as before afterwards; dropout is off. Under `accelerate launch` all processes make this call with
    the same arguments, and all get the same weights.

    Args:
        model (`PreTrainedModel`): The cut model.
        dense (`PreTrainedModel`): The teacher; may be the same architecture with more layers.
        layers (`Sequence[int]`): Layers of `model` to train.
        train (`Tensor`): int64 `[rows, length]`.
        validation (`Tensor`): int64 `[rows, length]`, disjoint from `train`.
        config ([`TuningConfig`]): Loss, start and schedule.
        kept (`Sequence[int]`, *optional*): The dense model's index of each layer of `model`; needed for a closed-form
            start and for the loss `hidden`.
        validation_kinds (`Sequence[str]`): What kind of text each validation row is. Weights are kept only if no kind is
            worse off than with the untuned cut.
        seed (`int`): Of the order of the rows.
        folder (`Path`, *optional*): For checkpoints, best weights and hidden states that memory does not hold; a run that
            was interrupted goes on from the last checkpoint there. It belongs to these arguments alone. Without it
            nothing can be resumed, and files are temporary.
        quiet (`bool`): No progress bar.

    Returns:
        [`TuningResult`]

    Raises:
        ConfigurationError: If the loss or the start needs `kept` and it is not given; if the head is to be trained and is
            tied to the embedding; if a step's rows cannot be dealt out to the processes.
        TuningError: If the loss is not finite; the best weights before that are in the model, and the error carries the
            result as `error.result`. If the disk has no room for the hidden states.
    """
    begin = time.perf_counter()
    check_layers(layers, model)
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            run = _Run(model, dense, sorted(layers), kept, config, seed, Path(temporary), False, quiet)
            result = run.go(train, validation, validation_kinds, begin)
    else:
        result = _Run(model, dense, sorted(layers), kept, config, seed, folder, True, quiet).go(
            train, validation, validation_kinds, begin
        )
    if result.stopped == "nan":
        raise TuningError.of(
            "tuning loss",
            float("nan"),
            f"it must stay finite, and at step {result.steps} it did not; the weights of step {result.best_step} "
            f"(validation loss {result.best_validation_loss:.4f}) were kept",
            f"Lower tuning.learning_rate (now {result.learning_rate:.3g}), or check the text and the weights",
            result=result,
        )
    return result


class _Run:
    """One call of [`tune_layers`]."""

    def __init__(
        self,
        model: PreTrainedModel,
        dense: PreTrainedModel,
        layers: list[int],
        kept: Sequence[int] | None,
        config: TuningConfig,
        seed: int,
        folder: Path,
        resumable: bool,
        quiet: bool,
    ):
        self.model, self.dense, self.layers, self.kept, self.config = model, dense, layers, kept, config
        self.seed, self.folder, self.resumable, self.quiet = seed, folder, resumable, quiet
        self.names = [f"{decoder_path(model)}.{i}" for i in layers]
        self.extra = _extra_modules(model, config)
        self.weights = {name: weight for name, weight in config.loss_weights().items() if weight}
        self.compared = _targets(layers, kept, len(decoder_layers(dense)), config)
        self.learning_rate = config.learning_rate or default_learning_rate(text_config(model.config).hidden_size)

    def go(self, train: Tensor, validation: Tensor, kinds: Sequence[str], begin: float) -> TuningResult:
        """Cache, start, train, and put the best weights into the model."""
        modules = nn.ModuleList(self.model.get_submodule(name) for name in (*self.names, *self.extra))
        own_storage(modules)
        parameters = list({id(p): p for p in modules.parameters()}.values())
        with (
            _only_trainable(self.model, parameters),
            tuning_accelerator(self.config, self.model.device, modules) as accelerator,
        ):
            processes = accelerator.num_processes
            start = time.perf_counter()
            store = StateStore(self.folder, self.config.cache_memory_gib * 2**30)
            data = {"train": self._rows(train, (), store), "validation": self._rows(validation, kinds, store)}
            cache_seconds = time.perf_counter() - start
            init, by_kind = self._start(data, store)
            with self._trained(modules, accelerator) as trained:
                loop = TrainingLoop(
                    accelerator,
                    self._student(trained, data["train"]),
                    data["train"],
                    data["validation"],
                    self.config,
                    learning_rate=self.learning_rate,
                    seed=self.seed,
                    folder=self.folder,
                    checkpoints=self.resumable,
                    start=by_kind,
                    quiet=self.quiet,
                )
                try:
                    state = loop.run()
                except BaseException:
                    # alone, the model is left as good as it was; in a group the others may not come this far
                    if processes == 1 and loop.state.history:
                        _put_back(modules, loop.best_weights(), self.model.device)
                    raise
                best = loop.best_weights()
            _put_back(modules, best, self.model.device)
        initial = init["loss_before"] if init else state.history[0].validation_loss
        return TuningResult(
            layers=tuple(self.layers),
            modules=tuple(self.extra),
            loss=self.weights,
            init=init,
            num_trainable=sum(p.numel() for p in parameters),
            learning_rate=self.learning_rate,
            steps=state.step,
            best_step=state.best_step,
            initial_validation_loss=initial,
            best_validation_loss=_best_loss(state),
            improved=_best_loss(state) < initial,
            history=tuple(state.history),
            stopped=state.stopped or "finished",
            num_tokens=loop.num_tokens,
            num_processes=processes,
            seconds=time.perf_counter() - begin,
            cache_seconds=cache_seconds,
        )

    def _rows(self, tokens: Tensor, kinds: Sequence[str], store: StateStore) -> TuningRows:
        """The dense model's states for some rows, and what enters the first trained layer."""
        first = self.layers[0]
        options: dict[str, Any] = {"batch_size": self.config.batch_size, "store": store, "quiet": self.quiet}
        with evaluation_mode(self.dense):
            same = _same_below(self.model, self.dense, first)
            wanted = {*self.compared.values(), *([first] if same else [])}
            outputs = DenseOutputs(self.dense, tokens, inputs_of=sorted(wanted), dealt=True, **options)
            if same:
                inputs = outputs.hidden[first]
            else:
                # lower layers are not the dense model's: what enters the first endpoint is the model's own
                own = DenseOutputs(self.model, tokens, inputs_of=[first], dealt=True, **options)
                inputs = own.hidden[first]
        targets = {i: outputs.hidden[source] for i, source in self.compared.items()}
        return TuningRows(outputs, inputs, targets, kinds)

    def _student(self, trained: Iterable[nn.Module], rows: TuningRows) -> EndpointStudent:
        """The loss over the trained modules."""
        scales = {}
        if "hidden" in self.weights:
            scales = {i: _deviation(states) for i, states in rows.targets.items()}
        return EndpointStudent(self.model, trained, self.layers[0], self.weights, scales)

    def _start(
        self, data: dict[str, TuningRows], store: StateStore
    ) -> tuple[dict[str, Any] | None, dict[str, float] | None]:
        """The closed-form start, which stays if it lowers the validation loss; and the cut's loss on each kind of text."""
        if self.config.init == "none":
            return None, None
        assert self.kept is not None
        layers = [self.model.get_submodule(name) for name in self.names]
        student = self._student(layers, data["train"])
        initial = _look(student, data["validation"], self.config.batch_size)
        before = [copy.deepcopy(layer.state_dict()) for layer in layers]
        result = solve_endpoints(
            self.model,
            self.layers,
            self.kept,
            data["train"].outputs,
            data["validation"].outputs,
            (data["train"].inputs, data["validation"].inputs),
            method=self.config.init,
            batch_size=self.config.batch_size,
            store=store,
            quiet=self.quiet,
        )
        solved = _look(student, data["validation"], self.config.batch_size)
        kept = improves(solved, [initial], initial.by_kind)
        if not kept:
            for layer, state in zip(layers, before, strict=True):
                layer.load_state_dict(state)
        losses = {"loss_before": initial.validation_loss, "loss_after": solved.validation_loss}
        return {**result.to_dict(), "kept": kept, **losses}, initial.by_kind

    @contextmanager
    def _trained(self, modules: nn.ModuleList, accelerator: Accelerator) -> Iterator[nn.ModuleList]:
        """The modules that are trained: the model's own, or copies in their place where an engine would change them."""
        if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            yield modules
            return
        copies = copy.deepcopy(modules)
        names = (*self.names, *self.extra)
        try:
            for name, module in zip(names, copies, strict=True):
                self.model.set_submodule(name, module)
            yield copies
        finally:
            for name, module in zip(names, modules, strict=True):
                self.model.set_submodule(name, module)


def closing_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules with weights between the last decoder layer and the head: the final norm, as a rule."""
    stack, found = LayerStack(model), []
    head = model.get_output_embeddings()
    names = {
        module: name
        for name, module in model.named_modules()
        if module is not head and next(module.parameters(recurse=False), None) is not None
    }
    after: list[bool] = []

    def last_layer(module: nn.Module, args: tuple, output: Any) -> None:
        after.append(True)

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        if after and names[module] not in found:
            found.append(names[module])

    handles = [module.register_forward_hook(hook) for module in names]
    handles.append(stack.layers[-1].register_forward_hook(last_layer))
    try:
        with torch.no_grad(), stack.head(model) as logits:
            width = text_config(model.config).hidden_size
            logits(torch.zeros(1, 1, width, dtype=model.dtype, device=model.device))
    finally:
        for handle in handles:
            handle.remove()
    return found


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
    names = closing_modules(model) if config.train_final_norm else []
    if config.train_head:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if head is None or head.weight is embedding.weight:
            rule = "the head is tied to the embedding, which is below the layers that are trained"
            raise ConfigurationError.of("tuning.train_head", True, rule, "Leave it out, or untie the model")
        names.append(next(name for name, module in model.named_modules() if module is head))
    return names


def _targets(layers: list[int], kept: Sequence[int] | None, depth: int, config: TuningConfig) -> dict[int, int]:
    """For each trained layer whose output is compared, the dense layer that its target enters (`depth`: leaves the last)."""
    needing = [
        name
        for name, used in (("hidden", "hidden" in config.loss_weights()), (config.init, config.init != "none"))
        if used
    ]
    if not needing:
        return {}
    if kept is None:
        rule = f"{needing[0]!r} compares with the dense model's layers, and which they are is not given"
        raise ConfigurationError.of("kept", None, rule, "Give the dense model's index of each layer of the model")
    return {i: target_state(kept, i, depth) for i in layers}


def _deviation(states: Tensor) -> float:
    """Mean squared deviation of `[rows, length, hidden]` states from their mean over the tokens."""
    total = square = torch.zeros(states.shape[-1], dtype=torch.float64)
    for row in states:
        total = total + row.double().sum(0)
        square = square + row.double().square().sum(0)
    count = states.shape[0] * states.shape[1]
    return float((square / count - (total / count).square()).mean())


@torch.no_grad()
def _look(student: EndpointStudent, rows: TuningRows, batch_size: int) -> TuningStep:
    """The loss over all rows."""
    parts = torch.arange(len(rows)).split(batch_size)
    losses = [student(**rows.batch(part, student.needs_teacher_logits)).double().cpu() for part in parts]
    return TuningStep.of_rows(torch.cat(losses), rows.kinds)


def _best_loss(state: TrainingState) -> float:
    return min(
        (h for h in state.history if h.step == state.best_step), key=lambda h: h.validation_loss
    ).validation_loss


@torch.no_grad()
def _put_back(modules: nn.ModuleList, best: dict[str, Tensor] | None, device: torch.device) -> None:
    """Copy a state dict of [`EndpointStudent`] into the modules, in every process; only the first one has it."""
    for name, tensor in modules.state_dict().items():
        if dist.is_initialized() and dist.get_world_size() > 1:
            sent = torch.empty_like(tensor, device=device) if best is None else best[f"trained.{name}"].to(device)
            dist.broadcast(sent.contiguous(), src=0)
        else:
            assert best is not None
            sent = best[f"trained.{name}"]
        tensor.copy_(sent)


def _same_below(model: PreTrainedModel, dense: PreTrainedModel, first: int) -> bool:
    """Whether the embedding and the layers below `first` are the dense model's."""
    pairs = [(model.get_input_embeddings(), dense.get_input_embeddings())]
    pairs += list(zip(decoder_layers(model)[:first], decoder_layers(dense)[:first], strict=True))
    return all(
        a.data_ptr() == b.data_ptr() or torch.equal(a, b.to(a.device))
        for ours, theirs in pairs
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


@contextmanager
def _only_trainable(model: PreTrainedModel, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Only the given parameters require gradients, and the model is in eval mode, until the block ends."""
    chosen = {id(p) for p in parameters}
    before = [(p, p.requires_grad) for p in model.parameters()]
    with evaluation_mode(model):
        try:
            for parameter, _ in before:
                parameter.requires_grad_(id(parameter) in chosen)
            yield
        finally:
            for parameter, required in before:
                parameter.requires_grad_(required)
                parameter.grad = None
