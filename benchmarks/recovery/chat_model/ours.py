"""Our own way, by the package's tuning as it is: one function, which changes when the package's stages do."""

import time
from pathlib import Path

from transformers import PreTrainedModel

from benchmarks.recovery.chat_model.training import Trained
from benchmarks.recovery.methods import Cell, solved
from optimum_clp import TuningConfig
from optimum_clp.tuning.endpoints import tune_layers

# of the rate of hidden states, which forgive larger steps than logits do
KD_RATE_SHARE = 0.125


def configurations() -> list[TuningConfig]:
    return [recipe(8e-3, epochs, 8, 4.0) for epochs in (1, 5)]


def recipe(rate: float, epochs: int, batch_size: int, memory: float) -> TuningConfig:
    """Hidden states in all passes but the last, which has KL; `rate` is that of the former."""
    return TuningConfig(
        hidden_epochs=epochs - 1,
        hidden_learning_rate=rate,
        epochs=1,
        learning_rate=KD_RATE_SHARE * rate,
        batch_size=batch_size,
        cache_memory_gib=memory,
    )


def ours(
    cell: Cell, rate: float, epochs: float, batch_size: int, folder: Path, memory: float, kinds: tuple[str, ...]
) -> tuple[PreTrainedModel, Trained]:
    """Hidden states alone, then one epoch of KL; as many tokens as the rivals get.

    Args:
        cell ([`Cell`]): The cut and the rows.
        rate (`float`): Of the first stage.
        epochs (`float`): Passes over the rows in all stages together, rounded; of a single one hidden states get none.
        batch_size (`int`): Rows in a step.
        folder (`Path`): For checkpoints; an interrupted run goes on.
        memory (`float`): GiB of the dense model's states in main memory.
        kinds (`tuple[str, ...]`): Of the validation rows.
    """
    model, begin = cell.cut(), time.process_time()
    result = tune_layers(
        model,
        cell.dense,
        cell.endpoints,
        cell.train,
        cell.validation,
        recipe(rate, max(1, round(epochs)), batch_size, memory),
        kept=cell.kept,
        validation_kinds=kinds,
        seed=cell.seed,
        folder=folder,
    )
    losses = [step.validation_loss for step in result.history]
    # of this process alone: the package does not say what an interrupted one has spent
    return model, Trained(result.num_trainable, result.num_tokens, losses, result.seconds, time.process_time() - begin)


def closed_form(cell: Cell) -> PreTrainedModel:
    """Our start alone."""
    return solved(cell, layers="endpoints", method="least_squares", attention=True).model
