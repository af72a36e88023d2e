"""Cutoff endpoint tuning: train only the layers next to the cut, in full, towards the dense model's logits.

Nothing below the first endpoint changes, so it is not run while training: the hidden states that enter the first
endpoint are taken once, from the dense model's own pass, together with the states that leave its last layer (the
teacher). Each step starts at the first endpoint, and only the endpoints have gradients and optimizer state.
"""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architecture import decoder_layers, text_config
from .configuration import TuningConfig
from .errors import ModelError, Problem, TuningError
from .gating import LayerStack, evaluation_mode
from .losses import kl_divergence, next_token_cross_entropy
from .progress import progress_bar
from .surgery import own_layers
from .teacher import DenseOutputs


@dataclass(frozen=True)
class TuningStep:
    """One evaluation: mean training loss since the one before, validation loss (both in nats) and learning rate."""

    step: int
    train_loss: float | None
    validation_loss: float
    learning_rate: float


@dataclass(frozen=True)
class TuningResult:
    """What tuning did.

    Args:
        layers (`tuple[int, ...]`): Trained layers, in the cut model's numbering.
        loss (`dict[str, float]`): Weights of the losses.
        num_trainable (`int`): Trained parameters.
        learning_rate (`float`): Peak rate.
        steps (`int`): Optimizer steps that were taken.
        best_step (`int`): Step of the weights that were kept; 0 for the untuned ones.
        initial_validation_loss (`float`): Before the first step.
        best_validation_loss (`float`): Of the weights that were kept.
        improved (`bool`): Whether tuned weights were kept.
        history (`tuple[TuningStep, ...]`): All evaluations; the first is the untuned model.
        stopped (`str`): `"finished"`, `"patience"` or `"nan"`.
        num_tokens (`int`): Tokens that were trained on, repeats counted.
        seconds (`float`): Wall-clock time, the dense model's pass included.
    """

    layers: tuple[int, ...]
    loss: dict[str, float]
    num_trainable: int
    learning_rate: float
    steps: int
    best_step: int
    initial_validation_loss: float
    best_validation_loss: float
    improved: bool
    history: tuple[TuningStep, ...]
    stopped: str
    num_tokens: int
    seconds: float = field(compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The `tuning` section of the report."""
        return {**asdict(self), "layers": list(self.layers), "history": [asdict(h) for h in self.history]}


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
    seed: int = 0,
    quiet: bool = False,
) -> TuningResult:
    """Train some layers of `model` towards `dense`, and keep the weights with the best validation loss.

    The trained layers get storage of their own first; every other tensor, and all of `dense`, stays as it is, also where
    the two share storage. Master weights, gradients and moments are float32 whatever the model's dtype. `requires_grad`
    and `training` are as before afterwards; dropout is off.

    Args:
        model (`PreTrainedModel`): The cut model.
        dense (`PreTrainedModel`): The teacher; may be the same architecture with more layers.
        layers (`Sequence[int]`): Layers of `model` to train.
        train (`Tensor`): int64 `[rows, length]`.
        validation (`Tensor`): int64 `[rows, length]`, disjoint from `train`.
        config ([`TuningConfig`]): Loss and schedule.
        seed (`int`): Of the order of the rows.
        quiet (`bool`): No progress bar.

    Returns:
        [`TuningResult`]

    Raises:
        TuningError: If the loss is not finite; the best weights before that are in the model, and the error carries the
            result as `error.result`.
    """
    begin = time.perf_counter()
    check_layers(layers, model)
    own_layers(model, layers)
    trainer = _EndpointTrainer(model, dense, sorted(layers), train, validation, config, seed, quiet)
    with _only_trainable(model, trainer.parameters):
        stopped = trainer.run()
    result = trainer.result(stopped, time.perf_counter() - begin)
    if stopped == "nan":
        raise TuningError(
            Problem(
                "tuning loss",
                trainer.last_loss,
                f"it must stay finite, and at step {result.steps} it did not; the weights of step {result.best_step} "
                f"(validation loss {result.best_validation_loss:.4f}) were kept",
                f"Lower tuning.learning_rate (now {result.learning_rate:.3g}), or check the text and the weights",
            ),
            result=result,
        )
    return result


class _EndpointTrainer:
    """The loop of [`tune_layers`]: caches, optimizer, schedule, best weights."""

    def __init__(
        self,
        model: PreTrainedModel,
        dense: PreTrainedModel,
        layers: list[int],
        train: Tensor,
        validation: Tensor,
        config: TuningConfig,
        seed: int,
        quiet: bool,
    ):
        self.model, self.config, self.quiet = model, config, quiet
        self.indices = layers
        self.first = layers[0]
        self.stack = LayerStack(model)
        self.parameters = [p for i in layers for p in self.stack.layers[i].parameters()]
        self.weights = config.loss_weights()
        self.teachers = {
            name: DenseOutputs(dense, rows, batch_size=config.batch_size, inputs_of=[self.first], quiet=quiet)
            for name, rows in (("train", train), ("validation", validation))
        }
        self.inputs = {name: outputs.hidden[self.first] for name, outputs in self.teachers.items()}
        if not _same_below(model, dense, self.first):
            # lower layers were tuned before: what enters the first endpoint is the model's own
            for name, rows in (("train", train), ("validation", validation)):
                own = DenseOutputs(model, rows, batch_size=config.batch_size, inputs_of=[self.first], quiet=quiet)
                self.inputs[name] = own.hidden[self.first]
        self.learning_rate = config.learning_rate or default_learning_rate(text_config(model.config).hidden_size)
        self.per_epoch = math.ceil(len(train) / config.batch_size)
        self.total = self.per_epoch * config.epochs
        self.order = torch.Generator().manual_seed(seed)
        self.best = [p.detach().to("cpu", copy=True) for p in self.parameters]
        self.best_step = self.step = self.num_tokens = 0
        self.last_loss = math.nan
        self.history: list[TuningStep] = []

    def run(self) -> str:
        """Train until the end, until patience runs out, or until a loss is not finite; the best weights are put back."""
        self.masters = _MasterWeights(self.parameters)
        optimizer = torch.optim.AdamW(
            self.masters.masters, lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=self.config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        stopped = "finished" if self._evaluate(None, 0.0) else "nan"
        evaluate_every = max(1, self.per_epoch // self.config.evaluations_per_epoch)
        losses: list[float] = []
        stale = 0
        if stopped == "finished":
            with progress_bar(self.total, "Endpoint tuning", self.quiet) as bar:
                for rows in self._batches():
                    rate = float(schedule.get_last_lr()[0])
                    losses.append(self._train_step(rows, optimizer))
                    if not math.isfinite(losses[-1]):
                        stopped = "nan"
                        break
                    schedule.step()
                    bar.update(1)
                    if self.step % evaluate_every and self.step != self.total:
                        continue
                    if not self._evaluate(sum(losses) / len(losses), rate):
                        stopped = "nan"
                        break
                    losses = []
                    stale = 0 if self.best_step == self.step else stale + 1
                    if stale >= self.config.patience:
                        stopped = "patience"
                        break
        with torch.no_grad():
            for parameter, best in zip(self.parameters, self.best, strict=True):
                parameter.copy_(best)
        return stopped

    def result(self, stopped: str, seconds: float) -> TuningResult:
        """The record of the run."""
        best = min((h for h in self.history if h.step == self.best_step), key=lambda h: h.validation_loss)
        return TuningResult(
            layers=tuple(self.indices),
            loss=self.weights,
            num_trainable=sum(p.numel() for p in self.parameters),
            learning_rate=self.learning_rate,
            steps=self.step,
            best_step=self.best_step,
            initial_validation_loss=self.history[0].validation_loss,
            best_validation_loss=best.validation_loss,
            improved=self.best_step > 0,
            history=tuple(self.history),
            stopped=stopped,
            num_tokens=self.num_tokens,
            seconds=seconds,
        )

    def _rate(self, step: int) -> float:
        warmup = max(1, round(self.config.warmup_ratio * self.total))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.total - warmup)))

    def _batches(self) -> Iterable[Tensor]:
        for _ in range(self.config.epochs):
            order = torch.randperm(len(self.teachers["train"].tokens), generator=self.order)
            yield from order.split(self.config.batch_size)

    def _train_step(self, rows: Tensor, optimizer: torch.optim.Optimizer) -> float:
        """One optimizer step; the loss before it. A loss or gradient that is not finite changes nothing."""
        loss = self._loss("train", rows).mean()
        self.last_loss = loss.item()
        self.step += 1
        if not math.isfinite(self.last_loss):
            return self.last_loss
        loss.backward()
        norm = self.masters.take_gradients(self.config.max_grad_norm)
        if not math.isfinite(norm):
            self.last_loss = math.nan
            return math.nan
        optimizer.step()
        self.masters.write_back()
        self.num_tokens += rows.numel() * self.teachers["train"].tokens.shape[1]
        return self.last_loss

    def _evaluate(self, train_loss: float | None, rate: float) -> bool:
        """Take the validation loss and remember the best weights; false if it is not finite."""
        total = 0.0
        tokens = self.teachers["validation"].tokens
        with torch.no_grad():
            for rows in torch.arange(len(tokens)).split(self.config.batch_size):
                total += self._loss("validation", rows).double().sum().item()
        loss = total / len(tokens)
        if not math.isfinite(loss):
            self.last_loss = loss
            if not self.history:
                self.history.append(TuningStep(self.step, train_loss, loss, rate))
            return False
        if not self.history or loss < min(h.validation_loss for h in self.history):
            self.best_step = self.step
            for best, parameter in zip(self.best, self.parameters, strict=True):
                best.copy_(parameter.detach())
        self.history.append(TuningStep(self.step, train_loss, loss, rate))
        return True

    def _loss(self, split: str, rows: Tensor) -> Tensor:
        """Weighted loss of each row, float32 `[batch]`."""
        teacher = self.teachers[split]
        tokens = teacher.tokens[rows].to(self.model.device)
        with self.stack.resumed(self.first, self.inputs[split][rows].to(self.model.device)):
            logits = self.model(input_ids=tokens, use_cache=False).logits
        losses = torch.zeros(len(rows), device=logits.device)
        if self.weights.get("kd"):
            losses = losses + self.weights["kd"] * kl_divergence(teacher.logits(rows), logits).mean(-1)
        if self.weights.get("ce"):
            losses = losses + self.weights["ce"] * next_token_cross_entropy(logits, tokens).mean(-1)
        return losses


def _same_below(model: PreTrainedModel, dense: PreTrainedModel, first: int) -> bool:
    """Whether the embedding and the layers below `first` are the dense model's."""
    pairs = [(model.get_input_embeddings(), dense.get_input_embeddings())]
    pairs += list(zip(decoder_layers(model)[:first], decoder_layers(dense)[:first], strict=True))
    return all(
        a.data_ptr() == b.data_ptr() or torch.equal(a, b.to(a.device))
        for ours, theirs in pairs
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


class _MasterWeights:
    """float32 copies that the optimizer updates; a parameter that is float32 already is its own master."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        self.masters = [
            p if p.dtype == torch.float32 else nn.Parameter(p.detach().to(torch.float32, copy=True))
            for p in parameters
        ]

    def take_gradients(self, max_norm: float) -> float:
        """Move the gradients to the masters, clip them together, and give their norm before clipping."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter and parameter.grad is not None:
                master.grad = parameter.grad.float()
                parameter.grad = None
        return float(nn.utils.clip_grad_norm_(self.masters, max_norm))

    def write_back(self) -> None:
        """Round the masters into the parameters, and drop the gradients."""
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
                master.grad = None


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


def check_layers(layers: Sequence[int], model: PreTrainedModel) -> None:
    """Refuse layers that the model does not have.

    Raises:
        ModelError: Names them.
    """
    count = len(decoder_layers(model))
    outside = [i for i in layers if not 0 <= i < count]
    if outside or not layers:
        raise ModelError(
            Problem("layers", list(layers), f"the model has layers 0 to {count - 1}", "Choose at least one of these")
        )
