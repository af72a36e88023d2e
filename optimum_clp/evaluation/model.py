"""All figures of one model: on token rows, on tasks, or on both."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..configuration.clp_config import CLPConfig
from ..forward.dense_outputs import DenseOutputs
from ..forward.layer_major import Residence
from ..report.section import to_section
from .deployment import verdicts
from .generation import measure_generation
from .prompts import load_prompts
from .tasks import Task, evaluate_tasks
from .tokens import evaluate_tokens

if TYPE_CHECKING:
    from .named_tasks import NamedTask


def evaluate_model(
    model: Any,
    dense: PreTrainedModel | None,
    rows: Tensor | None,
    tasks: "Sequence[Task | NamedTask]",
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    batch_size: int = 8,
    task_limit: int | None = None,
    generation: CLPConfig | None = None,
    residence: Residence | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure a model, beside the dense one where there is one.

    Args:
        model: Called like a causal language model of transformers: one of PyTorch, or an [`OnnxCausalLM`].
        dense (`PreTrainedModel` or `None`): For KL, agreement and retention.
        rows (`Tensor` or `None`): int64 `[rows, length]` without padding; `None` measures tasks only.
        tasks (`Sequence[Task | NamedTask]`): With names of their own; may be empty.
        tokenizer (`PreTrainedTokenizerBase` or `None`): Needed for tasks.
        batch_size (`int`): Rows in one forward pass.
        task_limit (`int`, *optional*): Only so many examples of each task; at least 1.
        generation ([`CLPConfig`], *optional*): Also let the model answer, as this recipe's `evaluation` says.
        residence ([`Residence`], *optional*): For models that memory does not hold: rows and tasks go through them layer by layer,
            and all prompts are answered at once.
        quiet (`bool`): No progress bars.

    Returns:
        `dict`: What [`Evaluation`] says of the rows, if there are any; `tasks` as [`evaluate_tasks`] gives it, if there are
        any; `generation` as in [`GenerationOutcome`], and with a dense model a `verdict`, as in [`Verdict`].

    Raises:
        CalibrationError: If a task cannot be tokenized.
        ConfigurationError: If `task_limit` is below 1, or the prompts cannot be read or put to this model.
    """
    measured: dict[str, Any] = {}
    if rows is not None:
        passes: dict[str, Any] = {"batch_size": batch_size, "residence": residence, "quiet": quiet}
        outputs = None if dense is None else DenseOutputs(dense, rows, **passes)
        measured = evaluate_tokens(model, rows, reference=outputs, **passes).to_dict()
    if tasks:
        options: dict[str, Any] = {"batch_size": batch_size, "limit": task_limit, "quiet": quiet}
        options |= {"residence": residence}
        measured["tasks"] = evaluate_tasks(model, dense, tokenizer, tasks, **options)
    if generation is not None:
        at_once = residence is not None
        measured |= _generation(model, dense, rows, tokenizer, generation, measured.get("retention"), at_once, quiet)
    return measured


def _generation(
    model: Any,
    dense: PreTrainedModel | None,
    rows: Tensor | None,
    tokenizer: PreTrainedTokenizerBase | None,
    config: CLPConfig,
    retention: float | None,
    at_once: bool,
    quiet: bool,
) -> dict[str, Any]:
    settings = config.evaluation
    found = measure_generation(
        {} if model is dense else {"model": model},
        dense,
        tokenizer,
        None if settings.prompts is None else load_prompts(settings.prompts),
        text_rows=rows,
        num_prompts=settings.num_prompts,
        max_new_tokens=settings.max_new_tokens,
        seed=config.seed,
        # each token is a reading of weights that memory does not hold
        batch_size=settings.num_prompts if at_once else config.calibration.generation_batch_size,
        quiet=quiet,
    )
    judged = verdicts(found, {"model": retention})
    return {"generation": to_section(found)} | ({"verdict": to_section(judged[0])} if judged else {})
