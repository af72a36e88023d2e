"""`evaluate`: measure a model or one of its ONNX files on a text, on tasks, or on both."""

import argparse
from typing import Any

from ..errors import ConfigurationError
from ..report.report import REPORT_NAME
from . import arguments
from .session import Answer, load_pruner, read_config

HELP = "measure perplexity and task accuracy, and with --reference the KL to the dense model"
USAGE = "--model MODEL [--file ONNX] [--reference DENSE] [--dataset TEXT] [--tasks NAME=FILE ...] [options]"
EXAMPLE = (
    "optimum-clp evaluate --model qwen3-0.6b-clp20 --file onnx/model_q4.onnx --dataset test.txt "
    "--reference Qwen/Qwen3-0.6B"
)

_COLUMNS = (
    ("name", "task"),
    ("num_examples", "examples"),
    ("accuracy", "accuracy"),
    ("accuracy_stderr", "std. error"),
    ("plain_accuracy", "plain"),
    ("chance", "chance"),
    ("perplexity", "perplexity"),
    ("dense_accuracy", "dense"),
    ("retention", "retention"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate`."""
    parser.add_argument("--file", metavar="ONNX", help="measure this file of the folder, such as onnx/model_q4.onnx")
    parser.add_argument("--reference", metavar="DENSE", help="dense model, for KL and top-1 agreement")
    parser.add_argument(
        "--tasks",
        nargs="+",
        type=task_file,
        metavar="NAME=FILE",
        help="zero-shot accuracy on JSON lines files, such as piqa=piqa.jsonl; without --dataset only that is measured",
    )
    parser.add_argument("--task-limit", type=int, metavar="N", help="only the first N examples of each task")
    arguments.add_printing(parser)
    arguments.add_model(parser, "any causal language model, or a folder that optimum-clp wrote")
    arguments.add_recipe(parser)
    arguments.add_calibration(parser)


def task_file(text: str) -> tuple[str, str]:
    """`NAME=FILE` as two strings."""
    name, _, file = text.partition("=")
    if not name or not file:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE, such as piqa=piqa.jsonl")
    return name, file


def run(args: argparse.Namespace) -> Answer:
    """Run `evaluate`; the answer is what was measured."""
    read_config(args)  # a mistake in the options is reported before the model is loaded
    tasks = _checked_tasks(args.tasks or [], args.task_limit)
    pruner = load_pruner(args, args.file)
    pruner.config = read_config(args, pruner.config)
    text = getattr(args, "calibration.dataset")
    if text is None and args.config is not None:
        text = pruner.config.calibration.dataset
    if text is None and not tasks and not pruner.report.calibration:
        rule = f"{args.model} has no {REPORT_NAME} that says which text it was measured on"
        raise ConfigurationError.of("--dataset", text, rule, "Name the text to measure on, or give --tasks")
    result = pruner.evaluate(text, reference=args.reference, tasks=tasks or None, task_limit=args.task_limit)
    result = {key: value for key, value in result.items() if value is not None}
    figures = {key: value for key, value in result.items() if key != "tasks"}
    width = max(map(len, figures), default=0)
    parts = ["\n".join(f"{key:<{width}}  {_shown(value)}" for key, value in figures.items())]
    parts.append(task_table(result.get("tasks", {})))
    return result, "\n\n".join(filter(None, parts))


def task_table(tasks: dict[str, dict[str, Any]]) -> str:
    """One line for each task; a column without any value is left out.

    Args:
        tasks (`dict[str, dict]`): As [`CLPPruner.evaluate`] gives them.

    Returns:
        `str`: Empty without tasks.
    """
    if not tasks:
        return ""
    columns = [(key, head) for key, head in _COLUMNS if any(task.get(key) is not None for task in tasks.values())]
    rows = [[head for _, head in columns], *([_cell(task.get(key)) for key, _ in columns] for task in tasks.values())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([f"{first:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(cells, widths[1:], strict=True))])
        for first, *cells in rows
    )


def _checked_tasks(given: list[tuple[str, str]], limit: int | None) -> dict[str, str]:
    """Each task's file; all of them are read once, so that a bad one is reported before the model is loaded."""
    tasks = dict(given)
    if limit is not None and limit < 1:
        raise ConfigurationError.of("--task-limit", limit, "it must be at least 1", "Leave it out to measure all")
    if limit is not None and not tasks:
        raise ConfigurationError.of("--task-limit", limit, "there is no task to limit", "Give --tasks")
    if len(tasks) < len(given):
        shown = " ".join(name for name, _ in given)
        raise ConfigurationError.of("--tasks", shown, "a name is given twice", "Give each task its own name")
    if tasks:
        from ..evaluation.tasks import load_task

        for name, file in tasks.items():
            load_task(name, file)
    return tasks


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if value < 1000 else f"{value:.5g}"
    return "-" if value is None else _shown(value)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
