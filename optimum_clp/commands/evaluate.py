"""`evaluate`: measure a model or one of its ONNX files on a text, on tasks, or on both."""

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from ..report.generation import generation_text
from ..report.legend import legend
from ..report.recognition import harness_cells
from ..report.report import REPORT_NAME
from ..report.tables import Column, record_cells, text_table
from . import arguments
from .running import Answer, load_pruner, read_config
from .tasks import check_tasks

if TYPE_CHECKING:
    from ..configuration.clp_config import CLPConfig

HELP = "measure perplexity, generation and task accuracy, and with --reference the distance to the dense model"
USAGE = "--model MODEL [--file ONNX] [--reference DENSE] [--dataset TEXT] [--tasks NAME[=FILE] ...] [options]"
EXAMPLE = (
    "optimum-clp evaluate --model qwen3-0.6b-clp20 --file onnx/model_q4.onnx --dataset test.txt "
    "--reference Qwen/Qwen3-0.6B"
)
MOST_USED = (
    "model",
    "file",
    "reference",
    "calibration.dataset",
    "evaluation.tasks",
    "evaluation.task_limit",
    "evaluation.generation",
    "json",
)
"""Options that `--help` shows in full, by their `dest`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate`."""
    parser.add_argument("--file", metavar="ONNX", help="measure this file of the folder, such as onnx/model_q4.onnx")
    parser.add_argument("--reference", metavar="DENSE", help="dense model, for KL and top-1 agreement")
    arguments.add_printing(parser)
    arguments.add_model(parser, "any causal language model, or a folder that optimum-clp wrote")
    arguments.add_recipe(parser)
    arguments.add_calibration(parser)
    arguments.add_measures(parser)


def run(args: argparse.Namespace) -> Answer:
    """Run `evaluate`; the answer is what was measured."""
    # a mistake in the options is reported, and data that is not to be had, before the model is loaded; what a folder's
    # recipe measured when it was written is not asked for here
    tasks = _read_tasks(read_config(args))
    pruner = load_pruner(args, args.file)
    pruner.config = read_config(args, pruner.config)
    text = getattr(args, "calibration.dataset")
    if text is None and args.config is not None:
        text = pruner.config.calibration.dataset
    if text is None and not tasks and not pruner.report.calibration:
        rule = f"{args.model} has no {REPORT_NAME} that says which text it was measured on"
        raise ConfigurationError.of("--dataset", text, rule, "Name the text to measure on, or give --tasks")
    result = pruner.evaluate(
        text,
        # what a recipe says is of its own text
        num_sequences=getattr(args, "calibration.test_sequences"),
        reference=args.reference,
        tasks=tasks or None,
        task_limit=pruner.config.evaluation.task_limit if tasks else None,
        generation=getattr(args, "evaluation.generation"),
    )
    result = {key: value for key, value in result.items() if value is not None}
    figures = {key: value for key, value in result.items() if key not in ("tasks", "generation", "verdict")}
    parts = [
        _figures(figures),
        task_table(result.get("tasks", {})),
        generation_text(result.get("generation"), [result["verdict"]] if "verdict" in result else []),
    ]
    return result, "\n\n".join(filter(None, parts))


def task_table(tasks: dict[str, dict[str, Any]]) -> str:
    """One line for each task; a column without any value is left out.

    Args:
        tasks (`dict[str, dict]`): As [`CLPPruner.evaluate`] gives them.

    Returns:
        `str`: Empty without tasks.
    """
    records = [{**task, **harness_cells(task, task.get("lm_eval"))} for task in tasks.values()]
    if not records:
        return ""
    cells = record_cells(records, _COLUMNS)
    words = legend(title for title in cells[0] if title != "perplexity")  # a task's is of a word
    return "\n".join(filter(None, (text_table(cells), words)))


def _figures(figures: dict[str, Any]) -> str:
    """A figure a line, and what they mean."""
    table = text_table([(key, _figure(value)) for key, value in figures.items()], "l")
    words = legend({"kl": "KL to dense"}.get(key, key) for key in figures)
    return "\n".join(filter(None, (table, words)))


def _read_tasks(config: "CLPConfig") -> list[Any]:
    """All tasks; prompts are read once as well, so that a bad one is reported before the model is loaded."""
    evaluation = config.evaluation
    check_tasks(config)
    if evaluation.prompts is not None:
        from ..evaluation.prompts import load_prompts

        load_prompts(evaluation.prompts)
    if not evaluation.tasks:
        return []
    from ..evaluation.tasks import load_tasks

    return list(load_tasks(evaluation.tasks, evaluation))


def _figure(value: object) -> str:
    return format(value, ".6g" if isinstance(value, float) else "," if isinstance(value, int) else "")


def _of_task(value: float) -> str:
    return f"{value:.4f}" if value < 1000 else f"{value:.5g}"


_COLUMNS = (
    Column("name", "task"),
    Column("metric", "metric"),
    Column("num_fewshot", "shots"),
    Column("num_examples", "examples", ","),
    Column("accuracy", "accuracy", _of_task),
    Column("accuracy_stderr", "std. error", _of_task),
    Column("plain_accuracy", "plain", _of_task),
    Column("chance", "chance", _of_task),
    Column("perplexity", "perplexity", _of_task),
    Column("value", "value", _of_task),
    Column("dense_accuracy", "dense", _of_task),
    Column("retention", "retention", _of_task),
)
