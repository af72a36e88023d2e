"""All figures of one model: on token rows, on tasks, or on both."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..forward.dense_outputs import DenseOutputs
from .tasks import Task, evaluate_tasks
from .tokens import evaluate_tokens


def evaluate_model(
    model: Any,
    dense: PreTrainedModel | None,
    rows: Tensor | None,
    tasks: list[Task],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    batch_size: int = 8,
    task_limit: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure a model, beside the dense one where there is one.

    Args:
        model: Called like a causal language model of transformers: one of PyTorch, or an [`OnnxCausalLM`].
        dense (`PreTrainedModel` or `None`): For KL, agreement and retention.
        rows (`Tensor` or `None`): int64 `[rows, length]` without padding; `None` measures tasks only.
        tasks (`list[Task]`): With names of their own; may be empty.
        tokenizer (`PreTrainedTokenizerBase` or `None`): Needed for tasks.
        batch_size (`int`): Rows in one forward pass.
        task_limit (`int`, *optional*): Only so many examples of each task; at least 1.
        quiet (`bool`): No progress bars.

    Returns:
        `dict`: What [`Evaluation`] says of the rows, if there are any; `tasks` as [`evaluate_tasks`] gives it, if there are
        any.

    Raises:
        CalibrationError: If a task cannot be tokenized.
        ConfigurationError: If `task_limit` is below 1.
    """
    measured: dict[str, Any] = {}
    if rows is not None:
        outputs = None if dense is None else DenseOutputs(dense, rows, batch_size=batch_size, quiet=quiet)
        measured = evaluate_tokens(model, rows, reference=outputs, batch_size=batch_size, quiet=quiet).to_dict()
    if tasks:
        options: dict[str, Any] = {"batch_size": batch_size, "limit": task_limit, "quiet": quiet}
        measured["tasks"] = evaluate_tasks(model, dense, tokenizer, tasks, **options)
    return measured
