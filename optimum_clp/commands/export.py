"""`export`: write the cut model as ONNX files."""

import argparse

from ..report.tables import format_bytes, text_table
from . import arguments
from .running import Answer, load_cut_pruner, required_output

HELP = "write the cut model as ONNX files: float, int8, int4"
USAGE = "--model MODEL [--segment START:STOP] [options] OUTPUT"
EXAMPLE = "optimum-clp export --model qwen3-0.6b-clp20 --weights int4 qwen3-0.6b-clp20-onnx"
MOST_USED = (
    "model",
    "output",
    "segment",
    "quantization.weights",
    "target",
    "config",
    "overwrite",
)
"""Options that `--help` shows in full, by their `dest`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `export`."""
    arguments.add_output(parser, "folder to write")
    arguments.add_segment(parser)
    arguments.add_model(parser, "dense model, with --segment; or a folder that `prune` or `tune` wrote")
    arguments.add_recipe(parser)
    arguments.add_quantization(parser)
    arguments.add_export(parser)


def run(args: argparse.Namespace) -> Answer:
    """Run `export`; the answer is the report and the sizes of the files."""
    output = required_output(args)
    pruner = load_cut_pruner(args)
    pruner.export(output, overwrite=args.overwrite)
    result = pruner.report.to_dict()
    rows = [(entry["file"], entry["weights"], format_bytes(entry["bytes"])) for entry in result["export"]["files"]]
    lines = [text_table(rows, "llr", widths=(0, 7, 9)), pruner.report.speed_reached(), f"Written to {args.output}."]
    return result, "\n".join(filter(None, lines))
