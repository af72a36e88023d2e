"""`search`: find the layers to remove, and remove nothing."""

import argparse
import math
from typing import TYPE_CHECKING, Any

from ..report.legend import legend
from ..report.tables import cell, is_known, text_table
from . import arguments
from .running import Answer, check_size_target, load_pruner, output_folder, read_config

HELP = "find the layers to remove, and remove nothing"
USAGE = "--model MODEL [options] [OUTPUT]"
EXAMPLE = "optimum-clp search --model Qwen/Qwen3-0.6B --pruning-ratio 0.2 --dataset wikitext2"
if TYPE_CHECKING:
    from ..configuration.clp_config import CLPConfig

_LONG, _SHOWN = 25, 20  # a list longer than the one shows the best of the other
MOST_USED = (
    "model",
    "pruning_ratio",
    "num_segments",
    "search.strategy",
    "calibration.dataset",
    "config",
    "json",
)
"""Options that `--help` shows in full, by their `dest`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `search`."""
    arguments.add_output(parser, "folder for clp_config.json and clp_report.json", required=False)
    arguments.add_pruning_ratio(parser)
    arguments.add_model(parser, "dense model: Hub id or local folder")
    arguments.add_recipe(parser)
    arguments.add_calibration(parser)
    arguments.add_search(parser)


def run(args: argparse.Namespace) -> Answer:
    """Run `search`; the answer is the report and the table of scored cuts."""
    from ..checkpoint.output import staged_folder

    output = output_folder(args)
    config = read_config(args)
    check_size_target(args, config)
    pruner = load_pruner(args)
    pruner.search(_without_test_rows(config))
    text = scored_segments(pruner.report.search or {})
    if output is not None:
        with staged_folder(output, args.overwrite) as folder:
            config.save_pretrained(folder)
            pruner.report.save(folder)
        text += f"\nWritten to {args.output}."
    return pruner.report.to_dict(), text


def _without_test_rows(config: "CLPConfig") -> "CLPConfig":
    """The recipe without the rows that figures are taken on at the end of a run."""
    used = type(config).from_dict(config.to_dict())
    used.calibration.test_sequences = 1
    return used


def scored_segments(search: dict[str, Any]) -> str:
    """The scored cuts of a report's `search` section as a table, best first, the chosen one marked.

    Cuts are ranked by how far they are behind the chosen one on the rows that both were measured on. Of a long list only
    the best are shown.
    """
    from ..report.plots import segments_of, strategy_name

    chosen = [list(bounds) for bounds in search["segments"]]
    ranked = sorted(search["scored"], key=lambda entry: _distance(entry, search["score"]))
    shown = ranked if len(ranked) <= _LONG else ranked[:_SHOWN]
    shown += [entry for entry in ranked[len(shown) :] if segments_of(entry) == chosen]
    cells = [["layers", "KL to dense", "std. error", "rows", "behind"]]
    for entry in shown:
        segments = segments_of(entry)
        cells.append(
            [
                ",".join(f"{start}:{stop}" for start, stop in segments),
                cell(entry["kl"], ".5f"),
                cell(entry.get("standard_error"), ".5f"),
                cell(entry.get("num_rows"), ","),
                "<- chosen" if segments == chosen else _behind(entry),
            ]
        )
    lines = [text_table(cells, "rrrrl")]
    left = len(search["scored"]) - len(shown)
    if left:
        lines.append(f"{left:,} more in the report (--json, or an output folder)")
    lines.append(legend(cells[0]))
    tried = search.get("lengths") or []
    if tried:
        shown_lengths = (
            f"{entry['num_removed']} ({cell(entry['perplexity_increase'], '+.1%')}{'' if entry['fits'] else ', too much'})"
            for entry in tried
        )
        lines.append(f"numbers of layers tried, and what they add to the perplexity: {', '.join(shown_lengths)}")
    work = search.get("forward_equivalents")
    spent = f", {work:.1f} forward-equivalents of work" if is_known(work) else ""
    flags = " ".join(f"--segment {start}:{stop}" for start, stop in chosen)
    lines.append(
        f"{search['num_removed']} of {search['num_layers']} layers by strategy {strategy_name(search)}, "
        f"{search['num_tokens']:,} tokens in all rows{spent}: {flags}"
    )
    return "\n".join(lines)


def _distance(entry: dict[str, Any], score: float | None) -> tuple[float, float]:
    kl = entry["kl"] if is_known(entry["kl"]) else math.inf
    behind = entry.get("behind")
    return (behind if is_known(behind) else kl - (score or 0.0), kl)


def _behind(entry: dict[str, Any]) -> str:
    behind, error = entry.get("behind"), entry.get("behind_error")
    return cell(behind, "+.5f") + (f" ± {error:.5f}" if is_known(behind) and is_known(error) else "")
