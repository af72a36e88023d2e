"""`tune`: train the layers next to the cut."""

import argparse
from typing import Any

from ..errors import TuningError
from ..report.tables import cell
from . import arguments
from .running import Answer, exit_status, load_cut_pruner, read_config, required_output, written
from .tasks import read_named_tasks

HELP = "train the layers next to the cut"
USAGE = "--model MODEL [--segment START:STOP] [options] OUTPUT"
EXAMPLE = "optimum-clp tune --model Qwen/Qwen3-0.6B --segment 20:26 --dataset wikitext2 qwen3-0.6b-tuned"
MOST_USED = (
    "model",
    "output",
    "segment",
    "calibration.dataset",
    "budget",
    "evaluation.tasks",
    "config",
    "overwrite",
)
"""Options that `--help` shows in full, by their `dest`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `tune`."""
    arguments.add_output(parser, "folder to write")
    arguments.add_segment(parser)
    arguments.add_model(parser, "dense model, with --segment; or a folder that `prune` or `tune` wrote")
    arguments.add_recipe(parser)
    arguments.add_stage_switches(parser, tuning=False)
    arguments.add_calibration(parser)
    arguments.add_tuning(parser)
    arguments.add_evaluation(parser)


def run(args: argparse.Namespace) -> Answer:
    """Run `tune`; the answer is the report and the losses before and after."""
    output, given = required_output(args), read_config(args)
    if given.evaluation.tasks:  # else those of the folder's recipe
        read_named_tasks(given)
    pruner = load_cut_pruner(args)
    try:
        pruner.tune(pruner.config)
    except TuningError as error:
        if error.result is None:  # there are no weights to save
            raise
    pruner.save_pretrained(output, overwrite=args.overwrite)
    result = pruner.report.to_dict()
    text = f"{_outcome(result['tuning'])}\n{written(pruner.report, args.output)}"
    return result, text, exit_status(pruner.report)


def _outcome(tuning: dict[str, Any]) -> str:
    before, after = (cell(tuning[key], ".5f") for key in ("initial_validation_loss", "best_validation_loss"))
    verdict = "the tuned weights were kept" if tuning["improved"] else "the weights stay as they were"
    return (
        f"Validation loss {before} -> {after} nats per token in {tuning['steps']} steps "
        f"(stopped: {tuning['stopped']}); {verdict}."
    )
