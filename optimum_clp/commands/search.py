"""`search`: find the layers to remove, and remove nothing."""

import argparse
from typing import Any

from . import arguments
from .session import Answer, load_pruner, output_folder, read_config

HELP = "find the layers to remove, and remove nothing"
USAGE = "--model MODEL [options] [OUTPUT]"
EXAMPLE = "optimum-clp search --model Qwen/Qwen3-0.6B --pruning-ratio 0.2 --dataset wikitext2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `search`."""
    arguments.add_output(parser, "folder for clp_config.json and clp_report.json", required=False)
    arguments.add_pruning_ratio(parser)
    arguments.add_model(parser, "dense model: Hub id or local folder")
    arguments.add_recipe(parser)
    arguments.add_calibration(parser)
    arguments.add_search(parser)


def run(args: argparse.Namespace) -> Answer:
    """Run `search`; the answer is the report and the table of scored segments."""
    from ..output import staged_folder

    output = output_folder(args)
    config = read_config(args)
    pruner = load_pruner(args)
    pruner.search(config)
    text = scored_segments(pruner.report.search or {})
    if output is not None:
        with staged_folder(output, args.overwrite) as folder:
            config.save_pretrained(folder)
            pruner.report.save(folder)
        text += f"\nWritten to {args.output}."
    return pruner.report.to_dict(), text


def scored_segments(search: dict[str, Any]) -> str:
    """The scored segments of a report's `search` section as a table, best first, the chosen ones marked."""
    chosen = [list(bounds) for bounds in search["segments"]]
    flags = " ".join(f"--segment {start}:{stop}" for start, stop in chosen)
    lines = [f"{'layers':>9}  {'KL to dense':>11}  {'std. error':>10}"]
    unscored = float("inf")
    for entry in sorted(search["scored"], key=lambda e: unscored if e["kl"] is None else e["kl"]):
        mark = "  <- chosen" if [entry["start"], entry["stop"]] in chosen else ""
        layers = f"{entry['start']}:{entry['stop']}"
        lines.append(f"{layers:>9}  {_number(entry['kl']):>11}  {_number(entry.get('standard_error')):>10}{mark}")
    lines.append(
        f"{search['num_removed']} of {search['num_layers']} layers by strategy {search['strategy']}, "
        f"KL in nats per token over {search['num_tokens']:,} tokens: {flags}"
    )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"
