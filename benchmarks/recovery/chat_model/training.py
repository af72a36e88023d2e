"""Gradient steps for every rival alike: AdamW, warm-up and cosine, the same rows in the same order.

A run that was interrupted goes on from its last checkpoint.
"""

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.recovery.chat_model.rivals import Healing, TopLogits
from benchmarks.recovery.methods import Cell
from optimum_clp.forward.dense_outputs import StateStore
from optimum_clp.forward.hooks import evaluation_mode, only_trainable
from optimum_clp.progress import progress_bar
from optimum_clp.tuning.losses import TEACHER_LOGITS
from optimum_clp.tuning.master_adamw import MasterAdamW
from optimum_clp.tuning.rows import TuningRows, cached_rows
from optimum_clp.tuning.student import EndpointStudent

WARM_UP, LARGEST_NORM, SAVE_SECONDS = 0.05, 1.0, 120.0


@dataclass
class Trained:
    """What some steps took.

    Args:
        num_trained (`int`): Parameters that were trained.
        num_tokens (`int`): Tokens that steps have seen, repeats counted.
        losses (`list[float]`): The training loss of each step.
        seconds (`float`): Wall-clock time, the dense model's pass included.
        cpu_seconds (`float`): Of this process.
    """

    num_trained: int
    num_tokens: int
    losses: list[float]
    seconds: float
    cpu_seconds: float


def train(
    healing: Healing, cell: Cell, rate: float, epochs: float, batch_size: int, folder: Path, store: StateStore
) -> Trained:
    """Take all steps of a healing, and finish it.

    Args:
        healing ([`Healing`]): What is trained.
        cell ([`Cell`]): The rows, and the seed of their order.
        rate (`float`): Largest learning rate.
        epochs (`float`): Passes over the rows, which need not be whole.
        batch_size (`int`): Rows in a step.
        folder (`Path`): For the checkpoint of this run alone.
        store ([`StateStore`]): Where the dense model's states lie.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    model = healing.model
    parameters = [p for module in healing.trained for p in module.parameters() if p.requires_grad]
    with evaluation_mode(model), only_trainable(model, parameters):
        rows = _rows(healing, cell, batch_size, store)
        student = _student(healing, rows)
        logits = any(TEACHER_LOGITS in loss.needs for _, loss in student.losses)
        optimizer = MasterAdamW(parameters, lr=rate, weight_decay=healing.weight_decay)
        steps = Steps(parameters, optimizer, folder / "training.pt")
        total = max(1, round(epochs * (len(rows) // batch_size)))
        with progress_bar(total, "Training") as bar:
            bar.update(len(steps.losses))
            for step in range(len(steps.losses), total):
                healing.at(step / total)
                _set_rate(optimizer, rate, step, total)
                batch = rows.batch(row_order(len(rows), batch_size, cell.seed, step), logits)
                steps.take(student(**batch).mean())
                bar.update(1)
    healing.at(1.0)
    healing.finish()
    count, tokens = sum(p.numel() for p in parameters), total * batch_size * cell.train.shape[1]
    spent = steps.before[0] + time.perf_counter() - wall, steps.before[1] + time.process_time() - cpu
    return Trained(count, tokens, steps.losses, *spent)


class Steps:
    """Optimizer steps, with a checkpoint every two minutes.

    Args:
        parameters (`list[nn.Parameter]`): What is trained; set to what the checkpoint has, if there is one.
        optimizer (`MasterAdamW`): Likewise.
        file (`Path`): The checkpoint.

    Attributes:
        losses (`list[float]`): Of the steps so far.
        before (`tuple[float, float]`): Wall-clock and CPU seconds of the processes before this one.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], optimizer: MasterAdamW, file: Path):
        self.parameters, self.optimizer, self.file = parameters, optimizer, file
        self.losses: list[float] = []
        self.before = (0.0, 0.0)
        self._begin = time.perf_counter(), time.process_time()
        self._saved = time.monotonic()
        if file.is_file():
            state = torch.load(file, map_location="cpu", weights_only=True)
            for parameter, weight in zip(parameters, state["weights"], strict=True):
                parameter.data.copy_(weight)
            optimizer.load_state_dict(state["optimizer"])
            self.losses, self.before = state["losses"], tuple(state["seconds"])

    def take(self, loss: Tensor) -> None:
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, LARGEST_NORM)
        # a rate that diverges ends where it was: the figures show it
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self._save()

    def _save(self) -> None:
        now = time.perf_counter(), time.process_time()
        seconds = [b + n - s for b, n, s in zip(self.before, now, self._begin, strict=True)]
        weights = [p.detach() for p in self.parameters]
        state = {"weights": weights, "optimizer": self.optimizer.state_dict(), "losses": self.losses}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**state, "seconds": seconds}, f"{self.file}.tmp")
        os.replace(f"{self.file}.tmp", self.file)
        self._saved = time.monotonic()


def row_order(num_rows: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The rows of a step, int64 `[batch]`, as the package's own loop takes them."""
    epoch, place = divmod(step, num_rows // batch_size)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epoch + 1):
        order = torch.randperm(num_rows, generator=generator)
    return order[place * batch_size : (place + 1) * batch_size]


def _rows(healing: Healing, cell: Cell, batch_size: int, store: StateStore) -> TuningRows:
    targets = {}
    if healing.compared is not None:
        # what enters the next layer in the dense model
        targets[healing.compared] = [*cell.kept, cell.depth][healing.compared + 1]
    states = targets.values()
    rows = cached_rows(
        healing.model, cell.dense, cell.train, healing.first, states, batch_size=batch_size, store=store
    )
    return rows.with_targets(targets)


def _student(healing: Healing, rows: TuningRows) -> EndpointStudent:
    name = "hidden" if healing.loss == "hidden" else "kd"
    student = EndpointStudent(healing.model, healing.trained, healing.first, {name: 1.0}, rows.targets)
    if healing.loss == "top":
        student.losses = ((1.0, TopLogits()),)
    return student


def _set_rate(optimizer: MasterAdamW, rate: float, step: int, total: int) -> None:
    warm_up = max(1, round(WARM_UP * total))
    share = (step + 1) / warm_up
    if step >= warm_up:
        share = 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))
    for group in optimizer.param_groups:
        group["lr"] = rate * share
