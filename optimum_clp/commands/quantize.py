"""`quantize`: write an optimum-quanto checkpoint of the cut model."""

import argparse

from ..precisions import QUANTIZED
from ..report.tables import format_bytes
from . import arguments
from .running import Answer, load_cut_pruner, required_output

HELP = "write an optimum-quanto checkpoint of the cut model (ONNX files are made by `export`)"
USAGE = "--model MODEL [--segment START:STOP] [options] OUTPUT"
EXAMPLE = "optimum-clp quantize --model qwen3-0.6b-clp20 --weights int8 qwen3-0.6b-clp20-quanto"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `quantize`."""
    arguments.add_output(parser, "folder to write; read it with optimum-clp, not with AutoModel")
    parser.add_argument("--weights", choices=QUANTIZED, default="int8", help="default: int8")
    arguments.add_segment(parser)
    arguments.add_model(parser, "dense model, with --segment; or a folder that `prune` or `tune` wrote")
    arguments.add_recipe(parser)


def run(args: argparse.Namespace) -> Answer:
    """Run `quantize`; the answer is the report and the size of the folder."""
    output = required_output(args)
    pruner = load_cut_pruner(args)
    pruner.quantize(output, weights=args.weights, overwrite=args.overwrite)
    result = pruner.report.to_dict()
    made = result["quantization"][-1]
    text = f"{args.weights}: {made['num_quantized']} modules quantized, {format_bytes(made['bytes'])}."
    return result, f"{text}\nWritten to {args.output}."
