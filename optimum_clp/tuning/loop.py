"""The training loop of endpoint tuning, on accelerate: one process or several, sharded or not, resumable.

What `accelerate launch` or `accelerate config` has set (processes, mixed precision, FSDP, DeepSpeed) holds; DeepSpeed is
untested. A global batch is the same rows whatever the number of processes and of accumulation steps.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from ..configuration.stages import TuningConfig
from ..forward.head_window import drawn_window
from ..out_of_memory import Halving, device_memory_error, halves, is_out_of_memory
from ..processes import broadcast
from ..progress import progress_bar, say
from .accelerator import micro_batch_size, shards_weights
from .checkpoints import BestWeights, Checkpoints, TrainingState
from .losses import LOGITS, STATES, TEACHER_LOGITS, needs_of
from .master_adamw import MasterAdamW
from .overparametrization import Annealing
from .result import TuningStep, improves
from .rows import TuningRows
from .schedule import Stage, StageRecord, measured_learning_rate
from .student import EndpointStudent

_Found = TypeVar("_Found")


class TrainingLoop:
    """Steps of AdamW on an [`EndpointStudent`], with validation, early stopping, best weights and checkpoints on disk.

    Args:
        accelerator (`Accelerator`): From [`tuning_accelerator`].
        student ([`EndpointStudent`]): What is trained; all its parameters require gradients.
        train ([`TuningRows`]): Rows to train on.
        validation ([`TuningRows`]): Rows that choose the weights.
        config ([`TuningConfig`]): Batches, patience, checkpoints.
        stages (`Sequence[Stage]`): What is done, in this order; the loss of the last one judges the weights of all.
        seed (`int`): Of the order of the rows.
        folder (`Path`): For the best weights, and for checkpoints.
        checkpoints (`bool`): Write checkpoints, and go on from one that lies in the folder.
        annealing ([`Annealing`], *optional*): Of an activation that the student has until it is gone; patience begins then.
        in_parts (`bool`): The student takes the dense model's logits in parts, and as many rows at once as there are.
        start (`dict[str, float]`, *optional*): The untuned cut's validation loss on each kind of text, which the kept
            weights must not exceed.
        quiet (`bool`): No progress bar.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        student: EndpointStudent,
        train: TuningRows,
        validation: TuningRows,
        config: TuningConfig,
        *,
        stages: Sequence[Stage],
        seed: int,
        folder: Path,
        checkpoints: bool,
        annealing: Annealing | None = None,
        start: Mapping[str, float] | None = None,
        in_parts: bool = False,
        quiet: bool,
    ):
        self.accelerator, self.config, self.quiet = accelerator, config, quiet
        self.train, self.validation = train, validation
        self.stages, self.judge = stages, stages[-1].loss
        self.seed, self.folder, self.start = seed, folder, start
        self.annealing, self.in_parts = annealing, in_parts
        self.micro_batches = [self._micro_batch(stage) for stage in stages]
        self.total = sum(map(self._steps, stages))
        make = torch.optim.AdamW if shards_weights(accelerator) else MasterAdamW
        # the rate is set before each step
        optimizer = make(list(student.parameters()), lr=0.0, betas=(0.9, 0.99), weight_decay=config.weight_decay)
        self.student, self.optimizer = accelerator.prepare(student, optimizer)
        self.state = TrainingState()
        setting = "tuning.batch_size, or raise tuning.gradient_accumulation_steps"
        alone = accelerator.num_processes == 1
        self._halving = Halving("tuning", setting, allowed=alone, then=student.halve)
        self._updating = False
        self._order: tuple[int, Tensor] | None = None
        self._best = BestWeights(accelerator, folder)
        seconds = config.checkpoint_seconds
        self._checkpoints = Checkpoints(accelerator, folder, seconds, self._best) if checkpoints else None

    def run(self) -> TrainingState:
        """Train until the end, until patience runs out, or until a loss is not finite."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._start_trackers()
        if self._checkpoints is not None:
            self.state = self._checkpoints.resume() or self.state
        self._set_rates()
        with progress_bar(self.total, "Endpoint tuning", self.quiet or not self.accelerator.is_main_process) as bar:
            bar.update(self.state.step)
            if not self.state.history and not self._evaluate(0.0):
                self.state.stopped = "nan"
            while self.state.stopped is None and self.state.stage < len(self.stages):
                self._run_stage(self.stages[self.state.stage], bar)
        self.state.stopped = self.state.stopped or "finished"
        # not end_training(): it would also end the process group, which may be the caller's
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return self.state

    def _run_stage(self, stage: Stage, bar: Any) -> None:
        """Train to the end of a stage, or until its patience runs out."""
        state, steps = self.state, self._steps(stage)
        every = max(1, steps // stage.evaluations)
        while state.stopped is None and state.stage_step < steps:
            rate = self._set_rate(stage, steps)
            if self.annealing is not None:
                self.annealing.at(state.step / self.total)
            if not self._train_step():
                state.stopped = "nan"
                return
            bar.update(1)
            last = state.stage_step == steps
            if state.stage_step % every == 0 or last:
                if not self._evaluate(rate):
                    state.stopped = "nan"
                    return
                if state.stale >= self.config.patience and not last:
                    bar.update(steps - state.stage_step)
                    break
            if self._checkpoints is not None and not last and self._checkpoints.save_if_due(state):
                self._best.drop_others(state.best_step)
        self._end_stage(stage, steps)

    def _end_stage(self, stage: Stage, steps: int) -> None:
        state = self.state
        begun = state.step - state.stage_step
        if state.stopped is None and state.stage_step < steps and state.stage == len(self.stages) - 1:
            state.stopped = "patience"
        state.stage_steps.append(state.stage_step)
        state.stage += 1
        state.stage_step = state.stale = 0
        if state.stage < len(self.stages):
            tried = [step.validation_loss for step in state.history if step.step > begun]
            # one kind of text may be worse off, so that they are not kept, and the next stage may mend that
            if tried and state.best_step <= begun and min(tried) >= state.best_loss:
                self._go_back(stage)
            # moments of one loss say nothing about another
            self.optimizer.state.clear()
        if self._checkpoints is not None and self._checkpoints.save_if_due(state):
            self._best.drop_others(state.best_step)

    def _go_back(self, stage: Stage) -> None:
        """Go on from the best weights, where none of a stage's had a lower loss than those that it began with.

        Hidden states can be brought nearer in a measure that the layers above do not share: of Gemma 3's, one channel is nearly
        all of the length. Weights that an engine deals out, and products, stay as they are.
        """
        if shards_weights(self.accelerator) or self.config.overparametrization != "none":
            return
        best = self._best.load(self.state.best_step)
        if not self.quiet and self.accelerator.is_main_process:
            tried, before = self.state.history[-1].validation_loss, self.state.best_loss
            rate = f"{self.state.rates[self.state.stage - 1]:.2g}, half of that or less may do"
            say(f"tuning: a stage is undone, validation loss {before:.4f} -> {tried:.4f}; its rate was {rate}")
        with torch.no_grad():
            for name, parameter in self.accelerator.unwrap_model(self.student).named_parameters():
                kept: Tensor = parameter if best is None else best[name].to(parameter)
                parameter.copy_(broadcast(kept.detach().clone()))

    def _steps(self, stage: Stage) -> int:
        return stage.steps(len(self.train))

    def _micro_batch(self, stage: Stage) -> int:
        """Rows in one forward pass of one process."""
        rows = min(stage.batch_size, len(self.train))
        setting = "batch_size" if stage is self.stages[-1] else "hidden_batch_size"
        processes = self.accelerator.num_processes
        return micro_batch_size(f"tuning.{setting}", rows, self.config.gradient_accumulation_steps, processes)

    def _tokens(self, stage: Stage, steps: int) -> int:
        return steps * min(stage.batch_size, len(self.train)) * self.train.outputs.tokens.shape[1]

    def best_weights(self) -> dict[str, Tensor] | None:
        """The state dict of the student with the best validation loss, on the CPU; `None` in all processes but the first."""
        return self._best.load(self.state.best_step)

    @property
    def num_tokens(self) -> int:
        """Tokens that the steps so far have trained on, in all processes together, repeats counted."""
        state = self.state
        lost = state.stopped == "nan" and not math.isfinite(state.last_loss)
        tokens = sum(self._tokens(stage, steps) for stage, steps in self._done())
        return tokens - (self._tokens(self.stages[state.stage], 1) if lost and state.stage_step else 0)

    def records(self) -> tuple[StageRecord, ...]:
        """What each stage has done that was begun."""
        return tuple(
            StageRecord(dict(stage.loss), steps, rate, self._tokens(stage, steps))
            for (stage, steps), rate in zip(self._done(), self.state.rates, strict=False)
        )

    def _done(self) -> list[tuple[Stage, int]]:
        """The stages that were begun, and their steps."""
        done = [*self.state.stage_steps]
        if self.state.stage < len(self.stages):
            done.append(self.state.stage_step)
        return list(zip(self.stages, done, strict=False))

    def _set_rate(self, stage: Stage, steps: int) -> float:
        warmup, step = max(1, round(self.config.warmup_ratio * steps)), self.state.stage_step
        if step < warmup:
            share = (step + 1) / warmup
        else:
            share = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
        rate = self.state.rates[self.state.stage] * share
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _rows(self, step: int) -> Tensor:
        """The rows of a step of this stage, int64 `[batch]`; what does not fill the last one of an epoch is left out."""
        stage = self.stages[self.state.stage]
        epoch, place = divmod(step, stage.steps_per_epoch(len(self.train)))
        epoch += sum(earlier.epochs for earlier in self.stages[: self.state.stage])
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed)
            for _ in range(epoch + 1):
                order = torch.randperm(len(self.train), generator=generator)
            self._order = (epoch, order)
        return self._order[1].split(stage.batch_size)[place]

    def _train_step(self) -> bool:
        """One optimizer step; false if the loss or its gradient is not finite, and then no weight has changed.

        Where a device has no memory for a pass, the step begins again with passes of half as many rows, and so do all after it.
        """
        return self._within_memory(self._step, self._rows(self.state.stage_step))

    def _within_memory(self, step: Callable[[Tensor], _Found], rows: Tensor) -> _Found:
        """What a function of some rows finds, again with smaller passes where a device has no memory for its own."""
        self._updating = False
        try:
            return step(rows)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if self._updating:
                rule = "there is too little for the optimizer's numbers, and no smaller batch makes them fewer"
                raise device_memory_error(error, "tuning", rule, "Lower tuning.endpoint_width") from error
            self._halving.begin(self.micro_batches[self.state.stage], error)
        # gradients of the pass that failed are of a part of its rows
        for parameter in self.student.parameters():
            parameter.grad = None
        clear_device_cache(garbage_collection=True)
        self.accelerator.step = 0  # accelerate counts the passes of a step
        return self._within_memory(step, rows)

    def _backward(self, rows: Tensor) -> Iterator[float]:
        """The passes of a step in this process, forward and back: the loss of each, before what accelerate does behind it."""
        accelerator, stage = self.accelerator, self.stages[self.state.stage]
        parts = self._passes(rows.split(self.micro_batches[self.state.stage]))
        if self._halving.done:
            accelerator.gradient_accumulation_steps = len(parts)
        logits, window = TEACHER_LOGITS in needs_of(stage.loss), self._window()
        for part in parts[accelerator.process_index :: accelerator.num_processes]:
            with accelerator.accumulate(self.student):
                batch = self.train.batch(part, logits, window=window, in_parts=self.in_parts)
                # halves of an odd number of rows count by their rows; else it is 1
                share = len(part) * len(parts) / len(rows)
                loss = self.student(**batch, weights=stage.loss).mean()
                loss = loss if share == 1 else share * loss
                accelerator.backward(loss)
                yield loss.item()

    def _step(self, rows: Tensor) -> bool:
        accelerator = self.accelerator
        losses = []
        for loss in self._backward(rows):
            losses.append(loss)
            if accelerator.sync_gradients:
                self._updating = True
                norm = accelerator.clip_grad_norm_(self.student.parameters(), self.config.max_grad_norm)
                # in float16 a step that overflows is skipped, and the scale of the loss is lowered
                if accelerator.scaler is None and not math.isfinite(_number(norm)):
                    self._count_step()
                    self.state.last_loss = math.nan
                    self.optimizer.zero_grad(set_to_none=True)
                    return False
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self._count_step()
        self.state.last_loss = sum(losses) / len(losses)
        self.state.losses.append(self.state.last_loss)
        return True

    def _set_rates(self) -> None:
        """The peak rate of each stage: what the settings say, or what is measured before the first step."""
        if not self.state.rates:
            self.state.rates = [
                self._measured_rate(stage) if stage.learning_rate is None else stage.learning_rate
                for stage in self.stages
            ]

    def _measured_rate(self, stage: Stage) -> float:
        """By the loss and its slope over the rows of some steps; the last stage's where these say nothing."""
        count = stage.measuring_steps(len(self.train))
        found = [self._within_memory(self._loss_and_slope, self._rows(step)) for step in range(count)]
        loss, slope = (sum(values) / count for values in zip(*found, strict=True))
        rate = measured_learning_rate(loss, slope, self._steps(stage))
        if 0 < rate < math.inf:
            return rate
        last = self.stages[-1].learning_rate
        assert last is not None
        return last

    def _loss_and_slope(self, rows: Tensor) -> tuple[float, float]:
        """A step's loss, and the sum of its gradient's absolute values, without the step."""
        losses, scaler = list(self._backward(rows)), self.accelerator.scaler
        slope = self._slope()
        self.optimizer.zero_grad(set_to_none=True)
        if scaler is not None:
            scale = scaler.get_scale()
            if not math.isfinite(slope) and scale > 1:
                # float16 overflows: as in a step, but nothing else would lower the scale here
                scaler.update(scale / 16)
                return self._loss_and_slope(rows)
            slope /= scale
        mean = torch.tensor(sum(losses) / len(losses), device=self.accelerator.device)
        return self.accelerator.reduce(mean, "mean").item(), slope

    def _slope(self) -> float:
        """The sum of the gradient's absolute values; 0 where an engine keeps it to itself (DeepSpeed)."""
        gradients = (parameter.grad for parameter in self.student.parameters() if parameter.grad is not None)
        sums = [gradient.abs().sum(dtype=torch.float32) for gradient in gradients]
        parts = [part for part in sums if not hasattr(part, "full_tensor")]
        whole = sum(_number(part) for part in sums if hasattr(part, "full_tensor"))
        mine = torch.tensor(sum(map(float, parts)), device=self.accelerator.device)
        # of FSDP 1 these are this process's share, of all others everybody's
        return whole + (self.accelerator.reduce(mine, "sum") if shards_weights(self.accelerator) else mine).item()

    def _window(self) -> slice | None:
        """The positions whose logits the next step compares; `None` for all. Each window has the same chance."""
        needs = needs_of(self.stages[self.state.stage].loss)
        # of a masked row a window may have nothing that is to be learnt
        if STATES in needs or LOGITS not in needs or self.train.mask is not None:
            return None
        length, draw = self.train.outputs.tokens.shape[1], f"{self.seed}:{self.state.step}"
        return drawn_window(length, self.config.logit_share, draw)

    def _passes(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The rows of each pass: those of a micro-batch, or half of them."""
        return [half for part in parts for half in halves(part)] if self._halving.done else list(parts)

    def _count_step(self) -> None:
        self.state.step += 1
        self.state.stage_step += 1

    def _evaluate(self, rate: float) -> bool:
        """Take the validation loss and keep the weights if they are the best; false if it is not finite."""
        accelerator, state = self.accelerator, self.state
        losses = self._validation_losses()
        total = torch.tensor(sum(state.losses), dtype=torch.float64, device=accelerator.device)
        trained = accelerator.reduce(total, "mean").item() / len(state.losses) if state.losses else None
        stage = self.stages[state.stage].loss if state.step else self.judge
        trained = trained if stage == self.judge else None  # another loss is in another unit
        found = TuningStep.of_rows(losses, self.validation.kinds, state.step, trained, rate)
        loss = found.validation_loss
        better = not state.history or improves(found, state.history, self.start)
        state.last_loss = loss
        if math.isfinite(loss) or not state.history:
            state.history.append(found)
        state.losses = []
        if math.isfinite(loss):
            shown = {"validation_loss": loss, "learning_rate": rate, "train_loss": trained, **(found.by_kind or {})}
            accelerator.log({k: v for k, v in shown.items() if v is not None}, step=state.step)
        if better:
            self._best.save(self.student, state.step)
            state.best_step, state.stale = state.step, 0
        elif self.annealing is None or not self.annealing.share:
            state.stale += 1
        return math.isfinite(loss)

    def _validation_losses(self) -> Tensor:
        """The loss of every validation row, float64 `[rows]`, in every process."""
        accelerator = self.accelerator
        losses = torch.zeros(len(self.validation), dtype=torch.float64)
        parts = torch.arange(len(self.validation)).split(
            len(self.validation) if self.in_parts else self.micro_batches[-1]
        )
        logits = TEACHER_LOGITS in needs_of(self.judge)

        def losses_of(rows: Tensor) -> Tensor:
            batch = self.validation.batch(rows, logits, in_parts=self.in_parts)
            return self.student(**batch, weights=self.judge).double().cpu()

        with torch.no_grad():
            # a sharded student runs in all processes at once: those that have no rows left run the first ones for nothing
            for number in range(0, len(parts), accelerator.num_processes):
                mine = number + accelerator.process_index
                rows = parts[mine if mine < len(parts) else 0]
                found = self._halving.over(rows, losses_of)
                if mine < len(parts):
                    losses[rows] = torch.cat(found)
        return accelerator.reduce(losses.to(accelerator.device), "sum").cpu()

    def _start_trackers(self) -> None:
        if self.config.report_to:
            values = {k: v for k, v in asdict(self.config).items() if isinstance(v, (int, float, str))}
            self.accelerator.init_trackers("optimum_clp", config=values)


def _number(value: Any) -> float:
    """A sum over gradients as a number, also where they are sharded."""
    return float(value.full_tensor() if hasattr(value, "full_tensor") else value)
