"""`prune`: all stages, from a dense model to the output folder; or, with `--dry-run`, what they would give."""

import argparse
import logging
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import CLPError, ConfigurationError, TuningError
from ..report.tables import form_line, format_bytes, format_count, text_table, threads
from . import arguments
from .log_level import hides_progress
from .running import (
    INCOMPLETE,
    Answer,
    check_size_target,
    exit_status,
    load_dense_config,
    load_pruner,
    output_folder,
    read_config,
    required_output,
    written,
)
from .tasks import read_named_tasks

logger = logging.getLogger(__name__)

HELP = "search, cut, tune, quantize and export: a dense model in, a smaller one out"
USAGE = "--model MODEL [options] OUTPUT"
EXAMPLE = "optimum-clp prune --model Qwen/Qwen3-0.6B --pruning-ratio 0.2 --dataset wikitext2 qwen3-0.6b-clp20"
_TRAINED = ("endpoints", "masters", "gradients", "moments")
MOST_USED = (
    "model",
    "output",
    "pruning_ratio",
    "target_size_mb",
    "budget",
    "calibration.dataset",
    "target",
    "evaluation.tasks",
    "config",
    "dry_run",
    "push_to_hub",
    "overwrite",
)
"""Options that `--help` shows in full, by their `dest`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `prune`."""
    arguments.add_output(parser, "folder to write")
    arguments.add_pruning_ratio(parser)
    arguments.add_dry_run(parser)
    parser.add_argument("--push-to-hub", metavar="REPO_ID", help="also upload the output folder to the Hub")
    parser.add_argument("--private", action="store_true", help="to a private repository, if it is made for that")
    arguments.add_model(parser, "dense model: Hub id or local folder")
    arguments.add_whole_recipe(parser)


def run(args: argparse.Namespace) -> Answer:
    """Run `prune`; the answer is the report and its table, or the plan and its table."""
    if args.dry_run:
        return _dry_run(args)
    output = required_output(args)
    config = read_config(args)
    if args.private and args.push_to_hub is None:
        raise ConfigurationError.of("--private", None, "nothing is uploaded", "Give --push-to-hub as well")
    if args.push_to_hub is not None:
        from ..report.hub_access import check_upload

        check_upload(args.push_to_hub, token=args.token or None, private=args.private or None)
    read_named_tasks(config)
    check_size_target(args, config)
    pruner = load_pruner(args)
    try:
        pruner.prune(config, output, overwrite=args.overwrite)
    except TuningError:
        if not pruner.report.failures:  # nothing was written
            raise
    where, status = written(pruner.report, args.output), exit_status(pruner.report)
    if args.push_to_hub and status:
        why = "a stage has failed" if status == INCOMPLETE else "it falls short of what was required"
        where += f" Not uploaded: {why}."
    elif args.push_to_hub:
        chosen = {"token": args.token or None, "private": args.private or None}
        try:
            pruner.push_to_hub(args.push_to_hub, **{name: value for name, value in chosen.items() if value})
            where += f" Uploaded to {args.push_to_hub}."
        except CLPError as error:  # the folder is whole, and what was measured is still to be told
            logger.error(f"not uploaded: {error}")
            where, status = f"{where} Not uploaded: {error}", INCOMPLETE
    return pruner.report.to_dict(), f"{pruner.report.to_table()}\n{where}".lstrip(), status


def _dry_run(args: argparse.Namespace) -> Answer:
    output_folder(args)  # a folder that the real run would refuse
    config = read_config(args)
    from ..planning.plan import plan_pruning

    quiet = hides_progress(args)
    plan = plan_pruning(load_dense_config(args), config, dtype=args.dtype, quiet=quiet).to_dict()
    return plan, planned(plan)


def planned(plan: dict[str, Any]) -> str:
    """A plan as a table: sizes before and after, and what tuning takes; a range where the segments differ."""
    base, cuts = plan["base_model"], plan["cuts"]
    left = base["num_layers"] - plan["num_removed"]
    rows = [
        ("", "layers", "parameters", "size"),
        ("dense", base["num_layers"], format_count(base["num_parameters"]), format_bytes(base["bytes"])),
        (
            "a layer",
            1,
            *(_range(base[f"layer_{k}"], f) for k, f in (("parameters", format_count), ("bytes", format_bytes))),
        ),
        ("cut", left, *(_range((c[k] for c in cuts), f) for k, f in _COUNTS)),
    ]
    rows += [
        (f"ONNX {kind}", left, "", _range((c["onnx"][kind] for c in cuts), format_bytes)) for kind in cuts[0]["onnx"]
    ]
    lines = [
        f"{base['class']} in {base['dtype']}: {plan['num_removed']} of {base['num_layers']} layers would go. "
        f"{len(cuts)} segments can: {_segments(cuts)}",
        text_table(rows),
    ]
    if not all(cut["follows_type_rule"] for cut in cuts):
        lines += ["", _type_rule(cuts, base["layer_period"])]
    if plan["size_target"] is not None:
        lines += ["", _size(plan["size_target"])]
    if plan["speed_target"] is not None:
        lines += ["", _speed(plan["speed_target"])]
    if plan["size_target"] is not None and plan["speed_target"] is not None:
        tighter = max(("size_target", "speed_target"), key=lambda name: plan[name]["num_removed"])
        lines += [f"The {tighter.partition('_')[0]} decides."]
    if plan["speed_choice"] is not None:
        lines += ["", f"Fastest on this machine: {form_line(plan['speed_choice'])}."]
    if cuts[0]["tuning"] is not None:
        lines += ["", "Endpoint tuning holds at its peak", text_table(_tuning_rows([c["tuning"] for c in cuts]))]
    if plan["memory"]["max_memory"] is not None:
        lines += ["", _streaming(plan["memory"], base)]
    measured = plan["speed_target"] is not None or plan["speed_choice"] is not None
    how = " Speeds are of files with drawn weights." if measured else ""
    return "\n".join([*lines, f"No weight was read, and nothing was written.{how}"])


def _type_rule(cuts: list[dict[str, Any]], period: int) -> str:
    """What other runtimes would make of the kinds of the layers that are left, in two sentences."""
    following = [cut for cut in cuts if cut["follows_type_rule"]]
    which = f"only after {_segments(following).removesuffix('.')}" if following else "after none of these cuts"
    return (
        f"Kinds of layers alternate. By the rule of the model type they do so {which}; a cut of {period} layers, or of a multiple, always leaves them so. "
        "After others, runtimes that compute the kinds from a layer's number, as llama.cpp and mlx-lm do for many types, are wrong without a word."
    )


def _size(target: dict[str, Any]) -> str:
    """What is chosen for a size target, in a sentence."""
    bits = target["bits_per_weight"]
    chosen = "its bits are given" if bits is None else f"the rest has {bits:.2f} bits per weight, scales included"
    return (
        f"For {target['target_size_mb']:g} MB {_layers(target['num_removed'])} and {chosen}: an int4 file of at most "
        f"{format_bytes(target['bytes'])}, its graph included."
    )


def _speed(target: dict[str, Any]) -> str:
    """What is chosen for a speed target, in a sentence."""
    return (
        f"For {target['target_tokens_per_second']:g} tokens per second {_layers(target['num_removed'])}: the int4 file will decode about "
        f"{target['tokens_per_second']:.4g} on this machine with {threads(target['threads'])}, the whole model's "
        f"{target['dense_tokens_per_second']:.4g}."
    )


def _layers(count: int) -> str:
    """`1 layer goes`, `9 layers go`."""
    if not count:
        return "no layer need go"
    return "1 layer goes" if count == 1 else f"{count} layers go"


def _streaming(memory: dict[str, Any], base: dict[str, Any]) -> str:
    """How a bound on memory is kept, in a sentence."""
    limit, smallest = (format_bytes(memory[key]) for key in ("max_memory", "smallest"))
    if memory["layers_at_once"] == base["num_layers"]:
        return f"Within {limit} all weights may stay in memory; the smallest bound that would do is about {smallest}."
    hours = memory["seconds_read"] / 3600
    return (
        f"Within {limit} the weights are read layer by layer, {memory['layers_at_once']} of {base['num_layers']} in memory at a time: "
        f"{round(sum(memory['readings'].values())):,} times at most, {format_bytes(memory['bytes_read'])} or {hours:.1f} hours at 3 GB/s. "
        f"The smallest bound that would do is about {smallest}."
    )


_COUNTS: tuple[tuple[str, Callable[[float], str]], ...] = (("num_parameters", format_count), ("bytes", format_bytes))


def _tuning_rows(parts: list[dict[str, int]]) -> list[tuple]:
    rows = [
        ("the dense model", _range((p["weights"] for p in parts), format_bytes)),
        ("the trained layers", _range((sum(p[key] for key in _TRAINED) for p in parts), format_bytes)),
        ("the closed-form start, before", f"about {_range((p['closed_form'] for p in parts), format_bytes)}"),
        ("cached hidden states", _range((p["caches"] for p in parts), format_bytes)),
        ("activations and logits", f"about {_range((p['activations'] + p['logits'] for p in parts), format_bytes)}"),
        ("together", f"about {_range((p['total'] for p in parts), format_bytes)}"),
    ]
    if not any(p["closed_form"] for p in parts):
        del rows[2]  # there is no closed-form start
    return rows


def _range(values: Iterable[float], show: Callable[[float], str]) -> str:
    found = list(values)
    low, high = show(min(found)), show(max(found))
    return low if low == high else f"{low} to {high}"


def _segments(cuts: list[dict[str, Any]]) -> str:
    """Runs of neighbouring segments: `0:16 to 64:80`, or `0:2, 4:6 to 6:8`."""
    runs: list[list[dict[str, Any]]] = []
    for cut in cuts:
        if runs and cut["start"] == runs[-1][-1]["start"] + 1:
            runs[-1].append(cut)
        else:
            runs.append([cut])
    ends = [dict.fromkeys(f"{c['start']}:{c['stop']}" for c in (run[0], run[-1])) for run in runs]
    return ", ".join(" to ".join(run) for run in ends) + "."
