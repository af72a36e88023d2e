"""`evaluate`: measure a model or one of its ONNX files on a text."""

import argparse

from ..errors import ConfigurationError, Problem
from ..report import REPORT_NAME
from . import arguments
from .session import Answer, load_pruner, read_config

HELP = "measure perplexity, and with --reference the KL to the dense model"
USAGE = "--model MODEL [--file ONNX] [--reference DENSE] --dataset TEXT [options]"
EXAMPLE = (
    "optimum-clp evaluate --model qwen3-0.6b-clp20 --file onnx/model_q4.onnx --dataset test.txt "
    "--reference Qwen/Qwen3-0.6B"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate`."""
    parser.add_argument("--file", metavar="ONNX", help="measure this file of the folder, such as onnx/model_q4.onnx")
    parser.add_argument("--reference", metavar="DENSE", help="dense model, for KL and top-1 agreement")
    arguments.add_printing(parser)
    arguments.add_model(parser, "any causal language model, or a folder that optimum-clp wrote")
    arguments.add_recipe(parser)
    arguments.add_calibration(parser)


def run(args: argparse.Namespace) -> Answer:
    """Run `evaluate`; the answer is what was measured."""
    read_config(args)  # a mistake in the options is reported before the model is loaded
    pruner = load_pruner(args, args.file)
    pruner.config = read_config(args, pruner.config)
    text = getattr(args, "calibration.dataset")
    if text is None and args.config is not None:
        text = pruner.config.calibration.dataset
    if text is None and not pruner.report.calibration:
        rule = f"{args.model} has no {REPORT_NAME} that says which text it was measured on"
        raise ConfigurationError(Problem("--dataset", text, rule, "Name the text to measure on"))
    result = pruner.evaluate(text, reference=args.reference)
    result = {key: value for key, value in result.items() if value is not None}
    width = max(map(len, result))
    return result, "\n".join(f"{key:<{width}}  {_shown(value)}" for key, value in result.items())


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
