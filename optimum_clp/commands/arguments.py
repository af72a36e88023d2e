"""Options that the commands share, as plain functions on an argparse parser.

Those that set a value of the configuration are made from its [`Setting`]s: `dest` is the setting's name
(`tuning.learning_rate`), and the default is `None`, which leaves the value as it is.
"""

import argparse
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from ..configuration.rules import name_or_file
from ..configuration.settings import Setting
from ..configuration.stages import all_settings
from ..configuration.targets import TARGETS_SAY, with_speed_of, with_target
from ..doors import ARCHITECTURES, RUNTIMES
from ..errors import shortened
from ..registry import Registry
from .log_level import add_log_level

# which stages run: options of their own, beside those of the stages
TASK = "the name of a task, or NAME=FILE, such as piqa=piqa.jsonl"
STAGE_SWITCHES = ("tuning.enabled", "export.enabled", "quantization.quanto")


class SeveralAction(argparse.Action):
    """`--weights int8 int4 OUTPUT`, `--weights int8,int4 OUTPUT` and `--tasks piqa,arc_easy mine=mine.jsonl OUTPUT`.

    argparse gives everything that follows to the option; a last word that is none of its values is the output folder, and so is a
    last name without a file, where there is none yet.

    Args:
        names (`Iterable[str]`): What there is to choose from; without any, values are names or `NAME=FILE`.
    """

    def __init__(self, *args, names: Iterable[str] = (), **options):
        super().__init__(*args, **options)
        self.names = tuple(names)

    def __call__(self, parser, namespace, values, option_string=None):
        words: list[str] = list(values)
        chosen: list[str] = []
        has_output = getattr(namespace, "output", None) or not hasattr(namespace, "output_required")
        # any word may be a task's name
        open_end = not self.names and not has_output and len(words) > 1 and self._values(words[-1]) == [words[-1]]
        last = words.pop() if open_end and "=" not in words[-1] else None
        while words and (parts := self._values(words[0])):
            chosen += parts
            del words[0]
        words += [last] if last else []
        if not chosen or len(words) > 1 or (words and has_output):
            unknown = words[-1] if chosen and has_output else words[0]
            said = f"invalid choice: {unknown!r} (choose from {', '.join(self.names)})"
            raise argparse.ArgumentError(self, said if self.names else f"{unknown!r} is not {TASK}")
        setattr(namespace, self.dest, chosen)
        if words:
            namespace.output = words[0]

    def _values(self, word: str) -> list[str]:
        """What a word stands for; nothing if it is none of the option's."""
        if not self.names:
            return name_or_file(word)
        parts = word.split(",")
        return parts if set(parts) <= set(self.names) else []


class OutputAction(argparse.Action):
    """The output folder, which stands alone or behind `-o`: one of them."""

    def __call__(self, parser, namespace, values, option_string=None):
        known = getattr(namespace, "output", None)
        if known is not None:
            raise argparse.ArgumentError(self, f"{values!r} is a second output folder, beside {known!r}")
        namespace.output = values


class RenamedAction(argparse.Action):
    """An option that was called otherwise before: using it is an error that names the new ones.

    Args:
        now (`str`): What to use instead, and for what.
    """

    def __init__(self, *args, now: str, **options):
        super().__init__(*args, **{**options, "nargs": "?", "help": argparse.SUPPRESS})
        self.now = now

    def __call__(self, parser, namespace, values, option_string=None):
        raise argparse.ArgumentError(self, f"there is no such option any more: {self.now}")


def accept_underscores(parser: argparse.ArgumentParser) -> None:
    """Let `--pruning_ratio` stand for `--pruning-ratio`, as in transformers' own scripts; the help has dashes alone."""
    plain = parser.parse_known_args

    def parse(words: list[str], namespace: argparse.Namespace | None = None) -> Any:
        return plain([_with_dashes(word) for word in words], namespace)

    setattr(parser, "parse_known_args", parse)  # noqa: B010  # as below


def _with_dashes(word: str) -> str:
    option, equals, value = word.partition("=")
    return f"{option.replace('_', '-')}{equals}{value}" if option.startswith("--") else word


def strict(parser: argparse.ArgumentParser) -> None:
    """Let a parser take no abbreviation of an option, and say what is wrong without repeating long values or secrets.

    `--token SECRET` was once taken as an abbreviation of `--tokenizer`, and printed.
    """
    parser.allow_abbrev = False
    told = parser.error

    def error(message: str) -> NoReturn:
        told(shortened(_without_unknown_values(without_secret(message))))

    setattr(parser, "error", error)  # noqa: B010  # mypy takes a plain assignment for a mistake


def without_secret(text: str, secret: str | None = None) -> str:
    """A text without a token: the one that was given, or what looks like one of the Hugging Face Hub's."""
    text = text.replace(secret, "***") if secret else text
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_***", text)


def _without_unknown_values(message: str) -> str:
    """argparse's list of words that it cannot place, without those that are the values of unknown options."""
    head, found, words = message.partition("unrecognized arguments: ")
    if not found:
        return message
    kept, after_option = [], False
    for word in words.split(" "):
        is_option = word.startswith("-")
        kept.append(word.split("=")[0] if is_option else "..." if after_option else word)
        after_option = is_option
    return f"{head}{found}{' '.join(kept)}"


def segment(text: str) -> tuple[int, int]:
    """`START:STOP` as two integers."""
    try:
        start, stop = map(int, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not START:STOP, such as 4:8 for the layers 4, 5, 6 and 7"
        ) from None
    return start, stop


def add_model(parser: argparse.ArgumentParser, help_text: str) -> None:
    """`--model` and how it is loaded."""
    added = f"Also models of the type {_listed(ARCHITECTURES)}." if len(ARCHITECTURES) else None
    group = parser.add_argument_group("model", added)
    group.add_argument("-m", "--model", required=True, metavar="MODEL", help=help_text)
    group.add_argument("--tokenizer", help="folder or Hub id of the tokenizer, if it does not lie beside the model")
    group.add_argument(
        "--token",
        metavar="TOKEN",
        help="access token for gated and private models, never printed; other processes see it, so prefer `hf auth login` "
        "or the variable HF_TOKEN",
    )
    group.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    group.add_argument("--dtype", default="auto", help="float32, bfloat16, ...; auto is what the checkpoint says")
    add_attention_and_cache(group)
    place = group.add_mutually_exclusive_group()
    place.add_argument("--device", help="where the whole model goes: cpu, cuda, cuda:1, mps, ...")
    place.add_argument("--device-map", help="how it is spread over devices: auto, balanced, ...")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    group.add_argument(
        "--no-safetensors", action="store_true", help="also read pickled weights (.bin), which can run any code"
    )


def add_attention_and_cache(group: argparse._ActionsContainer) -> None:
    """`--attn-implementation`, and what [`add_model_cache`] adds."""
    group.add_argument(
        "--attn-implementation",
        metavar="NAME",
        help="how attention is computed, by transformers' names: eager, sdpa, flash_attention_2, ... (default: its own choice)",
    )
    add_model_cache(group)


def add_model_cache(group: argparse._ActionsContainer) -> None:
    """`--model-cache-dir`, and what is said of `--cache-dir`."""
    group.add_argument(
        "--model-cache-dir",
        metavar="FOLDER",
        help="where models from the Hub are kept (default: the Hub's cache); transformers' cache_dir",
    )
    now = "models from the Hub are kept in --model-cache-dir, self-written text in --text-cache-dir (the former --cache-dir)"
    group.add_argument("--cache-dir", action=RenamedAction, dest=argparse.SUPPRESS, now=now)


def add_output(parser: argparse.ArgumentParser, help_text: str, required: bool = True) -> None:
    """The output folder, `--overwrite`, and what is printed."""
    # a suppressed default: the empty match of "?" must not undo what SeveralAction has set
    output: dict[str, Any] = {"action": OutputAction, "default": argparse.SUPPRESS, "help": help_text}
    parser.add_argument("output", nargs="?", metavar="OUTPUT", **output)
    parser.add_argument("-o", "--output", dest="output", metavar="OUTPUT", **{**output, "help": "the same"})
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an output folder that is not empty, with all that is in it"
    )
    parser.set_defaults(output_required=required, usage_error=parser.error)
    add_printing(parser)


def add_printing(parser: argparse.ArgumentParser) -> None:
    """`--json`, `--quiet` or `--log-level`, and `--debug`."""
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on standard output")
    told = parser.add_mutually_exclusive_group()
    told.add_argument(
        "--quiet", action="store_true", help="nothing on standard error but the error that ends the command"
    )
    add_log_level(told)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """`--config`, `--budget`, `--max-memory` and `--seed`."""
    group = parser.add_argument_group("recipe")
    group.add_argument(
        "--config", metavar="FILE", help="a clp_config.json, or a recipe in YAML; the options given here override it"
    )
    _add(group, "budget", "max_memory", "seed")


def add_whole_recipe(parser: argparse.ArgumentParser) -> None:
    """A recipe, which stages run, and the settings of all of them."""
    add_recipe(parser)
    add_stage_switches(parser)
    add_calibration(parser)
    add_search(parser)
    add_tuning(parser)
    add_quantization(parser)
    add_export(parser)
    add_evaluation(parser)


def add_pruning_ratio(parser: argparse.ArgumentParser) -> None:
    """How many layers go: `--pruning-ratio`, a size, a speed, or a quality budget; and in how many runs."""
    names = "pruning_ratio", "target_size_mb", "target_tokens_per_second", "num_segments"
    _add(parser, *names, "max_perplexity_increase", "min_retention")


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """`--dry-run`, which needs no output folder."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only predict layers, sizes and memory from the model's config.json; nothing is loaded or written, "
        "and OUTPUT may be left out",
    )


def add_segment(parser: argparse.ArgumentParser) -> None:
    """`--segment`, for stages that start from a dense model."""
    parser.add_argument(
        "--segment",
        type=segment,
        action="append",
        metavar="START:STOP",
        help="remove the layers START to STOP - 1 of a dense model; may be given again for a second run of layers",
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Options of `CalibrationConfig`."""
    _add_stage(parser.add_argument_group("text"), "calibration")


def add_search(parser: argparse.ArgumentParser) -> None:
    """Options of `SearchConfig`."""
    _add_stage(parser.add_argument_group("search"), "search")


def add_tuning(parser: argparse.ArgumentParser) -> None:
    """Options of `TuningConfig`."""
    _add_stage(parser.add_argument_group("endpoint tuning"), "tuning")


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """Options of `QuantizationConfig`, for ONNX files."""
    _add_stage(parser.add_argument_group("quantization"), "quantization")


def add_export(parser: argparse.ArgumentParser) -> None:
    """Options of `ExportConfig`."""
    beside = f"Beside the files is written what runtimes read, {_listed(RUNTIMES)}."
    group = parser.add_argument_group("ONNX export", beside)
    said = "; ".join(f"{name}: {what}" for name, what in TARGETS_SAY.items())
    group.add_argument(
        "--target", choices=TARGETS_SAY, help=f"where the files will run, which sets what is not given: {said}"
    )
    _add_stage(group, "export")


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """Options of `EvaluationConfig`, for commands that write a whole folder."""
    _add_stage(parser.add_argument_group("evaluation"), "evaluation")


def add_measures(parser: argparse.ArgumentParser) -> None:
    """Those of them that measure one model."""
    left_out = ("texts", "memory_context", "require_retention", "require_generation")
    names = (name for name in all_settings() if name.startswith("evaluation."))
    group = parser.add_argument_group("evaluation")
    _add(group, *(name for name in names if name.partition(".")[2] not in left_out))
    says = "rows, and examples of tasks, in one forward pass (default: 8)"
    group.add_argument("--batch-size", dest="search.batch_size", type=int, metavar="N", help=says)


def add_stage_switches(parser: argparse.ArgumentParser, tuning: bool = True) -> None:
    """Which stages run; `tuning=False` leaves out `--no-tune`."""
    _add(parser.add_argument_group("stages"), *STAGE_SWITCHES[not tuning :])


def configuration_values(args: argparse.Namespace, base: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values that were given as options; `base` is not changed."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    target = getattr(args, "target", None)
    merged = with_target(merged, target, over=True)
    settings = all_settings()
    for name, value in vars(args).items():
        if value is None or name not in settings:
            continue
        stage, dot, key = name.partition(".")
        if not dot:
            merged[name] = value
        elif isinstance(merged.setdefault(stage, {}), dict):
            merged[stage][key] = value
        if name == "calibration.dataset":
            merged.pop("calibration_dataset", None)
    # what is said now takes the place of what a recipe says; both said now is a mistake
    merged = with_speed_of(merged, target)
    targets = "target_size_mb", "target_tokens_per_second"
    replaced: tuple[str, ...] = ()
    if any(getattr(args, name, None) is not None for name in targets):
        replaced = ("pruning_ratio", "max_perplexity_increase", "min_retention")
    elif getattr(args, "pruning_ratio", None) is not None:
        replaced = targets
    return merged | {name: None for name in replaced if name in merged and getattr(args, name, None) is None}


def _add_stage(group, stage: str) -> None:
    names = (name for name in all_settings() if name.startswith(f"{stage}."))
    _add(group, *(name for name in names if name not in STAGE_SWITCHES))


def _add(group, *names: str) -> None:
    """Options for settings."""
    settings = all_settings()
    for setting in (settings[name] for name in names):
        rule = setting.rule
        options: dict[str, Any] = {"type": rule.parse, "metavar": setting.metavar}
        if rule.parse is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif rule.several:
            options = {"action": SeveralAction, "names": rule.choices, "nargs": "+", "metavar": setting.metavar}
        group.add_argument(setting.flag, dest=setting.name, help=_help(setting), **options)


def _listed(registry: Registry) -> str:
    """What a registry has: `name: what it says; ...`."""
    return "; ".join(f"{name}: {registry.says(name)}" for name in registry)


def _help(setting: Setting) -> str:
    """What a setting is, what there is to choose from, and what holds if it is left out."""
    default = f" (default: {setting.default_in_words})" if setting.default_in_words else ""
    return f"{setting.rule.with_choices(setting.help)}{default}".replace("%", "%%")
