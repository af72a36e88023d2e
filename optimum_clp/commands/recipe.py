"""`recipe`: write a recipe for a model, with comments, from its config alone."""

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..argument_types import check_argument
from ..errors import OutputError
from ..report.tables import format_bytes, format_count
from ..version import __version__
from . import arguments
from .running import Answer, load_dense_config, read_config

if TYPE_CHECKING:
    from ..configuration.clp_config import CLPConfig

HELP = "write a recipe in YAML, with comments, from the model's config.json alone"
USAGE = "MODEL [options] [-o FILE]"
EXAMPLE = "optimum-clp recipe Qwen/Qwen3-0.6B --target-size-mb 300 -o recipe.yaml"
MOST_USED = (
    "folder",
    "model",
    "output",
    "target_size_mb",
    "pruning_ratio",
    "budget",
    "overwrite",
)
"""Options that `--help` shows in full, by their `dest`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `recipe`."""
    parser.add_argument("folder", nargs="?", metavar="MODEL", help="dense model: Hub id or local folder")
    parser.add_argument("-m", "--model", metavar="MODEL", help="the same")
    parser.add_argument("-o", "--output", metavar="FILE", help="file to write (default: standard output)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    parser.add_argument("--token", metavar="TOKEN", help="access token for gated and private models, never printed")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--dtype", default="auto", help="of the weights; auto is what the checkpoint says")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    arguments.add_model_cache(parser)
    arguments.add_printing(parser)
    arguments.add_pruning_ratio(parser)
    arguments.add_whole_recipe(parser)
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> Answer:
    """Run `recipe`; the answer is the recipe, or where it was written."""
    named = [name for name in (args.folder, args.model) if name is not None]
    if len(named) != 1:
        args.usage_error("give one MODEL, alone or behind --model")
    args.model = named[0]
    file = None if args.output is None else _new_file(args.output, args.overwrite)
    config = read_config(args)
    from ..configuration.recipe_text import recipe_yaml

    plan = _plan(args, config)
    text = recipe_yaml(config, _head(args, config, plan))
    result = {"recipe": config.to_dict(), "plan": plan, "file": args.output}
    if file is None:
        return result, text.rstrip()
    _write(file, text)
    return result, f"Written to {file}. It is run by\n{_command(args)}"


def _plan(args: argparse.Namespace, config: "CLPConfig") -> dict[str, Any] | None:
    """What the recipe gives; `None` where the search has to say how many layers go."""
    from ..architecture.lookup import find_architecture
    from ..planning.plan import plan_pruning

    dense = load_dense_config(args)
    find_architecture(dense)
    return None if config.perplexity_bound() is not None else plan_pruning(dense, config, dtype=args.dtype).to_dict()


def _head(args: argparse.Namespace, config: "CLPConfig", plan: dict[str, Any] | None) -> list[str]:
    lines = [
        f"Recipe for {args.model}, written by `optimum-clp recipe` {__version__} from its config.json. Run it with",
        "",
    ]
    lines += [f"    {_command(args)}", ""]
    if plan is None:
        return [*lines, "How many layers go is found by the search."]
    base, cuts = plan["base_model"], plan["cuts"]
    left = base["num_layers"] - plan["num_removed"]
    lines += [
        f"Dense: {base['num_layers']} layers, {format_count(base['num_parameters'])} parameters, "
        f"{format_bytes(base['bytes'])} in {base['dtype']}.",
        f"It gives: {left} layers, {format_count(max(cut['num_parameters'] for cut in cuts))} parameters, "
        f"{format_bytes(max(cut['bytes'] for cut in cuts))}.",
    ]
    if sizes := cuts[0]["onnx"]:
        files = (f"{kind} {format_bytes(max(cut['onnx'][kind] for cut in cuts))}" for kind in sizes)
        lines.append(f"ONNX files: {', '.join(files)}, and a graph of less than 20 kB for each layer.")
    size = plan["size_target"]
    if size is not None and size["bits_per_weight"] is not None:
        lines.append(f"The int4 file has {size['bits_per_weight']:.2f} bits for each weight, scales included.")
    if cuts[0]["tuning"] is not None:
        most = max(cut["tuning"]["total"] for cut in cuts)
        lines.append(f"Tuning holds about {format_bytes(most)} at its peak; --max-memory keeps a bound.")
    return [
        *lines,
        "",
        "What has `#` in front is left at its default, and shows a value to try: take the `#` away. All settings: docs/configuration.md.",
    ]


def _command(args: argparse.Namespace) -> str:
    model, file = shlex.quote(args.model), shlex.quote(args.output or "recipe.yaml")
    return f"optimum-clp prune --model {model} --config {file} OUTPUT"


def _new_file(name: str, overwrite: bool) -> Path:
    """The file that is to be written, looked at before any work.

    Raises:
        ConfigurationError: If no file can have this name.
        OutputError: If it is a folder, is there already, or lies in a folder that is not there.
    """
    check_argument("FILE", name, str | os.PathLike)
    file = Path(name)
    if file.is_dir():
        raise OutputError.of("FILE", name, "it is a folder", "Give the name of a file, such as recipe.yaml")
    if file.suffix.lower() not in (".yaml", ".yml"):
        rule = "a recipe is written as YAML, and its name says so"
        raise OutputError.of("FILE", name, rule, "Let it end in .yaml")
    if file.exists() and not overwrite:
        raise OutputError.of("FILE", name, "it is there already", "Give another name, or --overwrite")
    if not file.parent.is_dir():
        raise OutputError.of("FILE", name, "its folder is not there", "Make it first")
    return file


def _write(file: Path, text: str) -> None:
    # beside it first: a recipe that was there stays whole if this cannot be written
    part = file.with_name(f".{file.name}.part")
    try:
        # not through a link that somebody has put there
        part.unlink(missing_ok=True)
        with part.open("x", encoding="utf-8") as written:
            written.write(text)
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        rule = f"it cannot be written ({error.strerror or error})"
        raise OutputError.of("FILE", str(file), rule, "Give a file in a folder of yours") from error
