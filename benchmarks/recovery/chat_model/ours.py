"""Our own way, by the package's tuning as it is: one function, which changes when the package's stages do."""

import time
from pathlib import Path

from transformers import PreTrainedModel

from benchmarks.recovery.chat_model.training import Trained
from benchmarks.recovery.methods import Cell, solved
from optimum_clp import TuningConfig
from optimum_clp.tuning.endpoints import tune_layers
from optimum_clp.tuning.result import TuningResult

# of the rate of the stage before: hidden states forgive larger steps than logits do
KD_RATE_SHARE = 0.4


def configurations() -> list[TuningConfig]:
    return [recipe(stage, 5e-4, 2, 8, 4.0, starts) for stage in ("hidden", "kd") for starts in (True, False)]


def recipe(stage: str, rate: float, epochs: int, batch_size: int, memory: float, starts: bool) -> TuningConfig:
    """A stage's settings; the first one starts from the closed form."""
    return TuningConfig(
        init="least_squares" if starts else "none",
        loss=stage,
        learning_rate=rate if stage == "hidden" else KD_RATE_SHARE * rate,
        epochs=epochs,
        batch_size=batch_size,
        evaluations_per_epoch=1,
        cache_memory_gib=memory,
    )


def ours(
    cell: Cell, rate: float, epochs: float, batch_size: int, folder: Path, memory: float, kinds: tuple[str, ...]
) -> tuple[PreTrainedModel, Trained]:
    """Closed form, then hidden states alone, then one epoch of KL; as many tokens as the rivals get.

    Args:
        cell ([`Cell`]): The cut and the rows.
        rate (`float`): Of the first stage.
        epochs (`float`): Passes over the rows in all stages together, rounded; of a single one hidden states get none.
        batch_size (`int`): Rows in a step.
        folder (`Path`): For checkpoints; an interrupted stage goes on.
        memory (`float`): GiB of the dense model's states in main memory.
        kinds (`tuple[str, ...]`): Of the validation rows.
    """
    model, begin = cell.cut(), time.process_time()
    stages = [("hidden", max(1, round(epochs)) - 1), ("kd", 1)]
    results = []
    for name, passes in stages:
        if passes:
            config = recipe(name, rate, passes, batch_size, memory, starts=not results)
            results.append(_stage(model, cell, config, folder / name, kinds))
    seconds = sum(result.seconds for result in results)
    losses = [step.validation_loss for result in results for step in result.history]
    tokens = sum(result.num_tokens for result in results)
    # of this process alone: the package does not say what an interrupted one has spent
    return model, Trained(results[-1].num_trainable, tokens, losses, seconds, time.process_time() - begin)


def _stage(
    model: PreTrainedModel, cell: Cell, config: TuningConfig, folder: Path, kinds: tuple[str, ...]
) -> TuningResult:
    return tune_layers(
        model,
        cell.dense,
        cell.endpoints,
        cell.train,
        cell.validation,
        config,
        kept=cell.kept,
        validation_kinds=kinds,
        seed=cell.seed,
        folder=folder,
    )


def closed_form(cell: Cell) -> PreTrainedModel:
    """Our start alone."""
    return solved(cell, layers="endpoints", method="least_squares", attention=True).model
