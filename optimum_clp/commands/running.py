"""What every command does around its own work: read the recipe, load the model, print the answer or the error."""

import argparse
import contextlib
import errno
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..argument_types import check_argument
from ..configuration.recipe_files import read_recipe
from ..configuration.sizes import accelerator_memory
from ..configuration.validation import checked_values
from ..errors import CLPError, ConfigurationError, OutputError, Problem, shortened
from . import arguments
from .log_level import hides_progress, logged, own_level

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ..configuration.clp_config import CLPConfig
    from ..pruner import CLPPruner
    from ..report.report import CLPReport

Answer = tuple[dict[str, Any], str] | tuple[dict[str, Any], str, int]
"""What a command returns: the result as JSON-ready values, and as text; and an exit status that is not 0."""
INCOMPLETE, FELL_SHORT = 3, 4
# what libraries say where memory or address space is used up
_OUT_OF_MEMORY = re.compile(
    r"not enough memory|out of memory|can.?t allocate memory|cannot allocate memory|bad_alloc|bad allocation"
    r"|failed to map segment|unable to mmap|failed to allocate|can't start new thread",
    re.IGNORECASE,
)


def execute(run: Callable[[argparse.Namespace], Answer], args: argparse.Namespace) -> int:
    """Run a command and print its answer on standard output; everything else goes to standard error.

    Args:
        run (`Callable`): The command.
        args (`argparse.Namespace`): Its arguments, with `json`, `quiet`, `log_level` and `debug`.

    Returns:
        `int`: Exit status: the command's own (0; 3 if it wrote a folder in which a stage has failed; 4 if the model falls short of what was required), 1 after an error (one message, no traceback unless `debug`), 130 after Ctrl-C.

    Raises:
        SystemExit: With status 2, if the output folder is missing and the command needs one.
    """
    needs_output = getattr(args, "output_required", False) and not getattr(args, "dry_run", False)
    if needs_output and getattr(args, "output", None) is None:
        args.usage_error("the following arguments are required: OUTPUT")
    try:
        with _only_errors() if args.quiet else _told(own_level(args.log_level)):
            _check_current_folder()
            result, text, *status = run(args)
        from ..processes import leave_group, was_launched_first

        leave_group()
        if not was_launched_first():
            return max(status, default=0)  # one of several processes: the first one answers
        _print(json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False) if args.json else text)
        return max(status, default=0)
    except KeyboardInterrupt:
        print("optimum-clp: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        token = getattr(args, "token", None)
        if args.debug:
            print(arguments.without_secret(traceback.format_exc(), token), end="", file=sys.stderr)
        _print(f"optimum-clp: error: {arguments.without_secret(_message(error), token)}", sys.stderr)
        return 1


def _print(text: str, stream: TextIO | None = None) -> None:
    """Print a text on standard output, or elsewhere; of a character that cannot be written there, its number in JSON's way."""
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def exit_status(report: "CLPReport") -> int:
    """3 if a stage has failed after the weights were there; 4 if the model falls short of what the recipe requires; else 0."""
    if report.failures:
        return INCOMPLETE
    required = (report.evaluation or {}).get("requirements", ())
    return 0 if all(entry["met"] for entry in required) else FELL_SHORT


def written(report: "CLPReport", output: str) -> str:
    """What a command says last: what has failed, and where all that is there was written."""
    from ..report.failures import failure_lines

    return "\n".join(filter(None, [failure_lines(report.failures, output), f"Written to {output}."]))


@contextlib.contextmanager
def _told(level: str) -> Iterator[None]:
    """What libraries print goes to standard error, and so does what this package logs, from a level on."""
    with contextlib.redirect_stdout(sys.stderr), logged(level):
        yield


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    """Drop what the libraries print, log and draw, until an error is reported."""
    disabled = logging.root.manager.disable
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def _message(error: Exception) -> str:
    shortage = _shortage(error)
    if shortage is not None:
        advice = "Free some, raise the limit (ulimit -v), or take a smaller model, dtype or batch size"
        return f"memory is used up: this process may have no more ({shortage}). {advice}."
    if isinstance(error, CLPError):
        return str(error)
    detail = str(error).strip() or "no message"
    if isinstance(error, OSError):
        full = "Free some space, or choose an output folder on another disk"
        advice = f". {full}." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return f"{shortened(str(error), 1000)}{advice}"
    detail = shortened(str(error).strip()) or "no message"
    return f"unexpected {type(error).__name__}: {detail}\nThe option --debug shows where it came from."


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        rule = "it was deleted, and the libraries cannot be loaded in a folder that is not there"
        raise OutputError.of("current folder", None, rule, "Change to one that exists (cd)") from error


def _shortage(error: BaseException | None) -> str | None:
    """What a library has said of memory that it could not have, here or below; `None` if it is something else."""
    while error is not None:
        detail = str(error).strip() or "no message"
        if isinstance(error, MemoryError) or (not isinstance(error, CLPError) and _OUT_OF_MEMORY.search(detail)):
            return detail.splitlines()[0][:200]
        error = error.__cause__
    return None


def output_folder(args: argparse.Namespace) -> Path | None:
    """The output folder, checked before any work is done.

    Raises:
        OutputError: If it cannot be used, or if writing it would delete the model that is read.
    """
    from ..checkpoint.output import check_output

    output = getattr(args, "output", None)
    if output is None:
        return None
    check_argument("output folder", output, str | os.PathLike)
    target = check_output(output, args.overwrite)
    for option in ("model", "reference"):
        source = getattr(args, option, None)
        if source and Path(source).exists() and Path(source).resolve().is_relative_to(target):
            rule = f"--{option} is read from there, and the output folder is replaced as a whole"
            raise OutputError.of("output folder", output, rule, "Choose a new folder")
    return target


def required_output(args: argparse.Namespace) -> Path:
    """As [`output_folder`], for the commands that `execute` does not run without one."""
    target = output_folder(args)
    assert target is not None
    return target


def read_config(args: argparse.Namespace, base: "CLPConfig | None" = None) -> "CLPConfig":
    """The recipe: `--config`, or else `base`, or else the defaults; overridden by the options.

    Raises:
        ConfigurationError: Lists every value that is out of range; or the file of `--config` cannot be read.
    """
    values = base.to_dict() if base is not None else {}
    if args.config is not None:
        values = read_recipe(args.config, "--config")
    values = arguments.configuration_values(args, values)
    checked_values(values)  # a mistake is told before `CLPConfig` loads torch and transformers
    from ..configuration.clp_config import CLPConfig

    return CLPConfig.from_dict(values)


def load_dense_config(args: argparse.Namespace) -> "PretrainedConfig":
    """The config of the dense model of `--model`; no weights and no tokenizer are needed beside it.

    Raises:
        ModelError: If there is none, it cannot be read, or is no causal language model's.
    """
    from ..checkpoint.loading import load_config

    check_argument("--model", args.model, str | os.PathLike)
    hub = {"revision": args.revision, "token": args.token, "cache_dir": args.model_cache_dir}
    return load_config(args.model, trust_remote_code=args.trust_remote_code, **hub)


def check_size_target(args: argparse.Namespace, config: "CLPConfig") -> None:
    """Say before any weight is read that no file has the size that a recipe asks for.

    Raises:
        ConfigurationError: With the nearest size that can be reached.
    """
    # how fast a file is, is measured when the model is there, before anything else is done
    if config.target_size_mb is not None:
        from ..planning.plan import planned_size

        planned_size(load_dense_config(args), config)


def load_pruner(args: argparse.Namespace, file_name: str | None = None) -> "CLPPruner":
    """The model of `--model`, or one ONNX file of that folder."""
    from ..processes import join_group, own_device_map
    from ..pruner import CLPPruner

    join_group()
    # what a bound of an accelerator does not hold stays where it is mapped to, and is placed once the recipe is known
    bounded = hasattr(args, "max_memory") and accelerator_memory(read_config(args).max_memory)
    return CLPPruner.from_pretrained(
        args.model,
        file_name,
        tokenizer=args.tokenizer,
        dtype=args.dtype,
        device_map=args.device or args.device_map or (None if bounded else own_device_map()),
        revision=args.revision,
        token=args.token,
        trust_remote_code=args.trust_remote_code,
        use_safetensors=not args.no_safetensors,
        attn_implementation=args.attn_implementation,
        cache_dir=args.model_cache_dir,
        quiet=hides_progress(args),
    )


def load_cut_pruner(args: argparse.Namespace) -> "CLPPruner":
    """The model of `--model`, cut at `--segment` or a folder that was cut before; its recipe is the command's.

    Raises:
        ConfigurationError: If the model is dense and no segment is given, or the other way round.
    """
    from ..segments import LayerSegment

    read_config(args)  # a mistake in the options is reported before the model is loaded
    segments = [LayerSegment(start, stop) for start, stop in args.segment or []]
    pruner = load_pruner(args)
    pruner.config = read_config(args, pruner.config)
    if bool(segments) == bool(pruner.segments):
        shown = ", ".join(map(str, segments)) or None
        raise ConfigurationError(
            Problem("--segment", shown, f"{args.model} is already cut", "Leave it out, or give the dense model")
            if segments
            else Problem(
                "--segment",
                shown,
                f"{args.model} is a dense model, and this command works on a cut one",
                "Give START:STOP (`optimum-clp search` finds it), or a folder that `optimum-clp prune` wrote",
            )
        )
    if segments:
        pruner.cut(segments)
    return pruner
