"""Cutoff endpoint tuning: train only the layers next to the cut, in full, towards the dense model's logits.

Nothing below the first endpoint changes, so it is not run while training: the hidden states that enter the first
endpoint are taken once, from the dense model's own pass, together with the states that leave its last layer (the
teacher). Each step starts at the first endpoint, and only the endpoints have gradients and optimizer state.
"""

import copy
import math
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architecture.lookup import decoder_layers, find_architecture, text_config
from ..configuration.stages import TuningConfig
from ..doors import STARTS
from ..errors import ConfigurationError, TuningError
from ..forward.dense_outputs import StateStore
from ..forward.hooks import evaluation_mode, only_trainable
from ..forward.layer_major import Residence
from ..out_of_memory import Halving
from ..processes import world_size
from ..segments import target_state
from .accelerator import tuning_accelerator
from .layer_major_student import LayerMajorStudent
from .loop import TrainingLoop
from .losses import STATES, TEACHER_LOGITS, needs_of, weighted_losses
from .result import TuningResult, TuningStep, improves
from .rows import TuningRows, cached_rows, compared_layers
from .schedule import stages_of
from .sharded_layers import sharded
from .starts import Start, StartProblem
from .student import EndpointStudent
from .trained_modules import TrainedModules, check_layers


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
    masks: tuple[Tensor | None, Tensor | None] = (None, None),
    seed: int = 0,
    folder: Path | None = None,
    residence: Residence | None = None,
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
        kept (`Sequence[int]`, *optional*): The dense model's index of each layer of `model`; needed for a start
            or a loss that compares hidden states.
        validation_kinds (`Sequence[str]`): What kind of text each validation row is. Weights are kept only if no kind is
            worse off than with the untuned cut.
        masks (`tuple[Tensor | None, Tensor | None]`): Of train and validation rows: bool `[rows, length]`, the tokens that are
            to be learnt; `None` for all. The closed-form start solves for all of them.
        seed (`int`): Of the order of the rows.
        folder (`Path`, *optional*): For checkpoints, best weights and hidden states that memory does not hold; a run that
            was interrupted goes on from the last checkpoint there. It belongs to these arguments alone. Without it
            nothing can be resumed, and files are temporary.
        residence ([`Residence`], *optional*): For a dense model that memory does not hold: its one pass over the rows goes layer by
            layer, and so do the steps of the training, but in a group of processes.
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
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        found = sorted(layers), kept, config, len(train)
        tuning = _Tuning(model, dense, *found, seed, Path(place), folder is not None, residence, quiet)
        result = tuning.run(train, validation, validation_kinds, masks, begin)
    if result.stopped == "nan":
        raise TuningError.of(
            "tuning loss",
            float("nan"),
            f"it must stay finite, and at step {result.steps} it did not; the weights of step {result.best_step} "
            f"(validation loss {result.best_validation_loss:.4f}) were kept",
            f"Lower {tuning.rate_of(result)}, or check the text and the weights",
            result=result,
        )
    return result


class _Tuning:
    """One call of [`tune_layers`], stage by stage: the caches, the start, the training."""

    def __init__(
        self,
        model: PreTrainedModel,
        dense: PreTrainedModel,
        layers: list[int],
        kept: Sequence[int] | None,
        config: TuningConfig,
        num_rows: int,
        seed: int,
        folder: Path,
        resumable: bool,
        residence: Residence | None,
        quiet: bool,
    ):
        self.model, self.dense, self.layers, self.kept, self.config = model, dense, layers, kept, config
        self.seed, self.folder, self.resumable, self.quiet = seed, folder, resumable, quiet
        self.residence = residence
        self.by_layers = not find_architecture(model.config).threads_state
        self.trained = TrainedModules(model, layers, config)
        self.start: Start = STARTS.get(config.init)()
        self.stages = stages_of(config, text_config(model.config).hidden_size, num_rows, world_size())
        self.weights = dict(self.stages[-1].loss)
        self.start_targets, self.loss_targets = self._targets(len(decoder_layers(dense)))

    def _targets(self, depth: int) -> tuple[dict[int, int], dict[int, int]]:
        """The dense layers whose inputs the start and the losses compare some layers' outputs with."""
        kept = range(depth) if self.kept is None else self.kept
        for_start = self.start.targets(kept, self.layers, depth)
        losses = {name: loss for stage in self.stages for name, (_, loss) in weighted_losses(stage.loss).items()}
        needing = [name for name, loss in losses.items() if STATES in loss.needs]
        compared = compared_layers(self.layers) if needing else []
        for_losses = {i: target_state(kept, i, depth) for i in compared}
        needing += [self.config.init] if for_start else []
        if needing and self.kept is None:
            rule = f"{needing[0]!r} compares with the dense model's layers, and which they are is not given"
            raise ConfigurationError.of("kept", None, rule, "Give the dense model's index of each layer of the model")
        return for_start, for_losses

    def rate_of(self, result: TuningResult) -> str:
        """The setting of the stage that was run last, with its value."""
        assert result.stages is not None
        setting = "learning_rate" if len(result.stages) == len(self.stages) else "hidden_learning_rate"
        return f"tuning.{setting} (now {result.stages[-1].learning_rate:.3g})"

    def run(
        self,
        train: Tensor,
        validation: Tensor,
        kinds: Sequence[str],
        masks: tuple[Tensor | None, Tensor | None],
        begin: float,
    ) -> TuningResult:
        """Cache, start, train, and put the best weights into the model."""
        trained = self.trained
        trained.own_storage()
        with (
            evaluation_mode(self.model),
            only_trainable(self.model, trained.parameters),
            tuning_accelerator(self.config, self.model.device, trained.modules) as accelerator,
        ):
            start = time.perf_counter()
            limit = math.inf if self.residence is None else self.residence.state_memory
            store = StateStore(self.folder, min(limit, self.config.cache_memory_gib * 2**30))
            rows = self._rows(train, (), masks[0], store), self._rows(validation, kinds, masks[1], store)
            cache_seconds = time.perf_counter() - start
            init, by_kind = self._started(rows, store)
            with trained.handed_to(accelerator) as modules:
                student = self._student(modules, rows[0])
                loop = self._loop(accelerator, student, rows, by_kind)
                try:
                    with sharded(self._frozen()):
                        loop.run()
                except BaseException:
                    # alone, the model is left as good as it was; in a group the others may not come this far
                    if accelerator.num_processes == 1 and loop.state.history:
                        trained.take_over(loop.best_weights())
                    raise
                best = loop.best_weights()
            trained.take_over(best)
            return self._result(loop, init, begin, cache_seconds)

    def _frozen(self) -> list[nn.Module]:
        """The layers that run in a step and are not trained."""
        return [
            layer
            for index, layer in enumerate(decoder_layers(self.model))
            if index > self.layers[0] and index not in self.layers
        ]

    def _rows(self, tokens: Tensor, kinds: Sequence[str], mask: Tensor | None, store: StateStore) -> TuningRows:
        """Some rows, with all states of the dense model that are compared with; those of the losses are its targets."""
        rows = cached_rows(
            self.model,
            self.dense,
            tokens,
            self.layers[0],
            {*self.start_targets.values(), *self.loss_targets.values()},
            batch_size=self.config.batch_size,
            store=store,
            kinds=kinds,
            mask=mask,
            residence=self.residence,
            quiet=self.quiet,
        )
        return rows.with_targets(self.loss_targets)

    def _started(
        self, rows: tuple[TuningRows, TuningRows], store: StateStore
    ) -> tuple[dict[str, Any] | None, dict[str, float] | None]:
        """Apply the start, which stays if it lowers the validation loss and harms no kind of text.

        Returns:
            `tuple`: For the report, what the start did; and the untuned cut's loss on each kind of text. Both `None` if it
            did nothing.
        """
        layers = [decoder_layers(self.model)[i] for i in self.layers]
        before = _weights(layers)
        train, validation = (split.with_targets(self.start_targets) for split in rows)
        size = self.config.batch_size
        problem = StartProblem(self.model, self.layers, self.kept, train, validation, size, store, self.quiet)
        result = self.start.apply(problem)
        if result is None:
            return None, None
        student = self._student(layers, rows[0])
        logits = TEACHER_LOGITS in needs_of(self.weights)
        size = len(rows[1]) if self.layer_major else size
        found = _evaluated(student, rows[1], size, logits)
        after = _weights(layers)
        _load(layers, before)
        untuned = _evaluated(student, rows[1], size, logits)
        kept = improves(found, [untuned], untuned.by_kind)
        if kept:
            _load(layers, after)
        losses = {"loss_before": untuned.validation_loss, "loss_after": found.validation_loss}
        return {**result.to_dict(), "kept": kept, **losses}, untuned.by_kind

    @property
    def layer_major(self) -> bool:
        """Whether a step's rows go through one layer after the other, forward and back."""
        # FSDP and DDP count on seeing a module's one forward and one backward pass
        return self.residence is not None and self.by_layers and world_size() == 1

    def _student(self, modules: Iterable[nn.Module], rows: TuningRows) -> EndpointStudent:
        found = self.model, modules, self.layers[0], self.weights, self.loss_targets
        if self.layer_major:
            assert self.residence is not None
            student: EndpointStudent = LayerMajorStudent(*found, residence=self.residence)
        else:
            student = EndpointStudent(*found)
        # the beginning of a row shows what reads such states
        student.compare_behind_norms({index: states[:1, :2] for index, states in rows.targets.items()})
        return student

    def _loop(
        self,
        accelerator: Accelerator,
        student: EndpointStudent,
        rows: tuple[TuningRows, TuningRows],
        by_kind: dict[str, float] | None,
    ) -> TrainingLoop:
        return TrainingLoop(
            accelerator,
            student,
            *rows,
            self.config,
            stages=self.stages,
            seed=self.seed,
            folder=self.folder,
            checkpoints=self.resumable,
            annealing=self.trained.annealing,
            start=by_kind,
            in_parts=self.layer_major,
            quiet=self.quiet,
        )

    def _result(
        self, loop: TrainingLoop, init: dict[str, Any] | None, begin: float, cache_seconds: float
    ) -> TuningResult:
        state = loop.state
        initial = init["loss_before"] if init else state.history[0].validation_loss
        return TuningResult(
            layers=tuple(self.layers),
            modules=tuple(self.trained.extra),
            loss=self.weights,
            init=init,
            num_trainable=sum(p.numel() for p in self.trained.parameters),
            learning_rate=state.rates[-1],
            stages=loop.records(),
            steps=state.step,
            best_step=state.best_step,
            initial_validation_loss=initial,
            best_validation_loss=state.best_loss,
            improved=state.best_loss < initial,
            history=tuple(state.history),
            stopped=state.stopped or "finished",
            num_tokens=loop.num_tokens,
            num_processes=loop.accelerator.num_processes,
            seconds=time.perf_counter() - begin,
            cache_seconds=cache_seconds,
        )


@torch.no_grad()
def _evaluated(student: EndpointStudent, rows: TuningRows, batch_size: int, logits: bool) -> TuningStep:
    """The loss over all rows."""
    parts = torch.arange(len(rows)).split(batch_size)
    in_parts = isinstance(student, LayerMajorStudent)
    halving = Halving("tuning", "tuning.batch_size", then=student.halve)

    def losses_of(part: Tensor) -> Tensor:
        return student(**rows.batch(part, logits, in_parts=in_parts)).double().cpu()

    losses = [loss for part in parts for loss in halving.over(part, losses_of)]
    return TuningStep.of_rows(torch.cat(losses), rows.kinds)


def _weights(layers: Sequence[nn.Module]) -> list[dict[str, Tensor]]:
    """Copies of the layers' state dicts."""
    return copy.deepcopy([layer.state_dict() for layer in layers])


def _load(layers: Sequence[nn.Module], weights: Sequence[dict[str, Tensor]]) -> None:
    for layer, state in zip(layers, weights, strict=True):
        layer.load_state_dict(state)
