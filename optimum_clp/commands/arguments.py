"""Options that the commands share, as plain functions on an argparse parser.

An option that sets a value of the configuration has that value's path as its `dest` (`tuning.endpoints.learning_rate`) and
defaults to `None`, which leaves the value as it is.
"""

import argparse
from typing import Any

WEIGHTS = ("int8", "int4")
PLAIN_KEYS = ("pruning_ratio", "num_segments", "max_perplexity_increase", "min_retention", "seed")


class WeightsAction(argparse.Action):
    """`--weights int8 int4 OUTPUT` and `--weights int8,int4 OUTPUT`.

    argparse gives everything that follows to the option; a last word that names no weights is the output folder.
    """

    def __call__(self, parser, namespace, values, option_string=None):
        words: list[str] = list(values)
        chosen: list[str] = []
        while words and set(words[0].split(",")) <= set(WEIGHTS):
            chosen += words.pop(0).split(",")
        if not chosen or len(words) > 1 or (words and getattr(namespace, "output", None)):
            unknown = words[-1] if chosen and getattr(namespace, "output", None) else words[0]
            raise argparse.ArgumentError(self, f"invalid choice: {unknown!r} (choose from {', '.join(WEIGHTS)})")
        setattr(namespace, self.dest, chosen)
        if words:
            namespace.output = words[0]


def segment(text: str) -> tuple[int, int]:
    """`START:STOP` as two integers."""
    try:
        start, stop = map(int, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not START:STOP, such as 4:8 for the layers 4, 5, 6 and 7"
        ) from None
    return start, stop


def ratio(text: str) -> float | str:
    """A number, or `auto`."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def loss(text: str) -> str | dict[str, float]:
    """`kd`, or weights such as `kd=0.9,ce=0.1`."""
    if "=" not in text:
        return text
    try:
        return {name: float(weight) for name, weight in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a loss nor weights such as kd=0.9,ce=0.1") from None


def _names(text: str) -> list[str]:
    return text.split(",")


def add_model(parser: argparse.ArgumentParser, help_text: str) -> None:
    """`--model` and how it is loaded."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="MODEL", help=help_text)
    group.add_argument("--tokenizer", help="folder or Hub id of the tokenizer, if it does not lie beside the model")
    group.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    group.add_argument("--dtype", default="auto", help="float32, bfloat16, ...; auto is what the checkpoint says")
    group.add_argument("--device-map", help="where the model goes: cpu, cuda, auto, ...")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    group.add_argument(
        "--no-safetensors", action="store_true", help="also read pickled weights (.bin), which can run any code"
    )


def add_output(parser: argparse.ArgumentParser, help_text: str, required: bool = True) -> None:
    """The output folder, `--overwrite`, and what is printed."""
    # a suppressed default: the empty match of "?" must not undo what WeightsAction has set
    parser.add_argument("output", nargs="?", default=argparse.SUPPRESS, metavar="OUTPUT", help=help_text)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an output folder that is not empty, with all that is in it"
    )
    parser.set_defaults(output_required=required, usage_error=parser.error)
    add_printing(parser)


def add_printing(parser: argparse.ArgumentParser) -> None:
    """`--json`, `--quiet` and `--debug`."""
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on standard output")
    parser.add_argument("--quiet", action="store_true", help="nothing but errors on standard error")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """`--config` and `--seed`."""
    group = parser.add_argument_group("recipe")
    group.add_argument("--config", metavar="FILE", help="a clp_config.json; the options given here override it")
    group.add_argument("--seed", type=int, metavar="N", help="of everything random (default: 0)")


def add_pruning_ratio(parser: argparse.ArgumentParser) -> None:
    """How many layers go: `--pruning-ratio`, or a quality budget; and in how many runs."""
    parser.add_argument(
        "--pruning-ratio",
        type=ratio,
        metavar="RATIO",
        help="share of the layers to remove, in (0, 1), or auto: as many as a quality budget lets go (default: 0.2)",
    )
    parser.add_argument(
        "--max-perplexity-increase",
        type=float,
        metavar="SHARE",
        help="quality budget for --pruning-ratio auto: 0.1 lets the perplexity rise by a tenth, before tuning",
    )
    parser.add_argument(
        "--min-retention",
        type=float,
        metavar="SHARE",
        help="the same as dense perplexity over the cut model's, such as 0.9",
    )
    parser.add_argument(
        "--num-segments", type=int, metavar="N", help="runs of neighbouring layers that go, at most (default: 1)"
    )


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
    group = parser.add_argument_group("text")
    group.add_argument(
        "--dataset",
        dest="calibration.dataset",
        metavar="TEXT",
        help="a .txt, .json, .jsonl or .parquet file, a dataset as id[:config[:split]], wikitext2 or c4 "
        "(default: the dense model writes its own text)",
    )
    _add(
        group,
        "calibration",
        "--self-written-share",
        type=float,
        help="with a text: share of the rows that the dense model writes itself (default: 0.5)",
    )
    _add(group, "calibration", "--text-column", help="column that holds the text (default: text)")
    _add(group, "calibration", "--sequence-length", type=int, help="tokens in a row (default: 256)")
    _add(group, "calibration", "--train-sequences", type=int, help="rows for search and tuning (default: 192)")
    _add(group, "calibration", "--validation-sequences", type=int, help="rows for early stopping (default: 24)")
    _add(group, "calibration", "--test-sequences", type=int, help="rows for the report (default: 24)")
    _add(group, "calibration", "--temperature", type=float, help="of self-written text (default: 1)")
    _add(group, "calibration", "--generation-batch-size", type=int, help="rows written at once (default: 32)")
    _add(group, "calibration", "--cache-dir", help="where self-written text is kept")


def add_search(parser: argparse.ArgumentParser) -> None:
    """Options of `SearchConfig`."""
    group = parser.add_argument_group("search")
    _add(group, "search", "--strategy", help="auto, gate, exhaustive, halving, block_influence, angular, "
         "cosine_block, taylor, perplexity_greedy, tail or random (default: auto)")  # fmt: skip
    _add(
        group,
        "search",
        "--search-budget",
        "budget",
        type=float,
        help="dense forward passes over all rows (default: 4)",
    )
    _add(group, "search", "--search-sequences", "num_sequences", type=int, help="rows it looks at (default: 32)")
    _add(group, "search", "--search-batch-size", "batch_size", type=int, help="rows in one pass (default: 8)")
    _add(group, "search", "--num-rescored", type=int, help="segments scored exactly after the gate (default: 5)")


def add_tuning(parser: argparse.ArgumentParser) -> None:
    """Options of `TuningConfig`."""
    group = parser.add_argument_group("endpoint tuning")
    group.add_argument(
        "--loss",
        dest="tuning.loss",
        type=loss,
        metavar="LOSS",
        help="kd (KL to the dense model), ce (cross-entropy), hidden (its hidden states behind the trained layers), or "
        "weights such as kd=0.9,ce=0.1 (default: kd)",
    )
    _add(group, "tuning", "--init", help="closed-form start: none, fold or least_squares (default: least_squares)")
    _switch(group, "tuning.train_final_norm", "--train-final-norm", True, "also train the norm behind the last layer")
    _switch(
        group, "tuning.train_head", "--train-head", True, "also train the head, if it is not tied to the embedding"
    )
    _add(group, "tuning", "--endpoint-width", type=int, help="layers on each side of the cut (default: 1)")
    _add(group, "tuning", "--learning-rate", type=float, help="peak rate (default: 0.1 / hidden size)")
    _add(group, "tuning", "--epochs", type=int, help="passes over the train rows (default: 4)")
    _add(group, "tuning", "--batch-size", type=int, help="rows in one optimizer step (default: 8)")
    _add(
        group,
        "tuning",
        "--gradient-accumulation-steps",
        type=int,
        help="passes in one step: more take less memory (default: 1)",
    )
    _add(group, "tuning", "--mixed-precision", help="no, bf16 or fp16 (default: what accelerate is set to)")
    _add(group, "tuning", "--checkpoint-seconds", type=float, help="work an interruption may cost (default: 60)")
    _add(
        group,
        "tuning",
        "--cache-memory-gib",
        type=float,
        help="hidden states in memory, the rest on disk (default: 4)",
    )
    _add(group, "tuning", "--report-to", type=_names, help="loggers, such as tensorboard,wandb")
    _add(group, "tuning", "--logging-dir", help="where loggers write")
    _add(group, "tuning", "--patience", type=int, help="evaluations without a better loss (default: 4)")


def add_quantization(parser: argparse.ArgumentParser, weights: bool = True) -> None:
    """Options of `QuantizationConfig`, for ONNX files."""
    group = parser.add_argument_group("quantization")
    if weights:
        group.add_argument(
            "--weights",
            dest="quantization.weights",
            nargs="+",
            action=WeightsAction,
            metavar="WEIGHTS",
            help="int8, int4: one ONNX file each, beside the float one (default: both)",
        )
    _add(
        group, "quantization", "--method", help="rounding: auto, rtn, hqq, gptq, or quanto's integers (default: auto)"
    )
    _add(
        group,
        "quantization",
        "--bits-per-weight",
        type=float,
        help="size budget of the int4 file, scales included: what costs most gets 8 bits",
    )
    _add(
        group,
        "quantization",
        "--calibration-sequences",
        type=int,
        help="train rows that the rounding looks at (default: 128)",
    )
    _add(group, "quantization", "--group-size", type=int, help="weights that share a scale (default: 32)")
    _add(group, "quantization", "--accuracy-level", type=int, help="ONNX Runtime's, 0, 1 or 4 (default: 4)")
    _switch(
        group, "quantization.quantize_embeddings", "--no-quantize-embeddings", False, "keep the embedding in float"
    )


def add_export(parser: argparse.ArgumentParser) -> None:
    """Options of `ExportConfig`."""
    group = parser.add_argument_group("ONNX export")
    _add(
        group, "export", "--format", help="contrib (ONNX Runtime's operators) or qdq (standard ones; default: contrib)"
    )
    _add(group, "export", "--opset", type=int, help="21, 22 or 23 (default: 21)")
    _add(group, "export", "--tolerance", type=float, help="largest relative error against PyTorch (default: 1e-4)")
    _add(
        group,
        "export",
        "--logits-to-keep",
        type=int,
        help="positions that get logits where a runtime does not say: 0 (all, the default) or 1 (the last)",
    )


def add_stage_switches(parser: argparse.ArgumentParser, tuning: bool = True) -> None:
    """Which stages run; `tuning=False` leaves out `--no-tune`."""
    group = parser.add_argument_group("stages")
    if tuning:
        _switch(group, "tuning.enabled", "--no-tune", False, "keep the cut as it is")
    _switch(group, "export.enabled", "--no-export", False, "write no ONNX file")
    _switch(group, "quantization.quanto", "--quanto", True, "also write optimum-quanto checkpoints")


def configuration_values(args: argparse.Namespace, base: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values that were given as options; `base` is not changed."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    for name, value in vars(args).items():
        stage, dot, key = name.partition(".")
        if value is None or not (dot or name in PLAIN_KEYS):
            continue
        if not dot:
            merged[name] = value
        elif isinstance(merged.setdefault(stage, {}), dict):
            merged[stage][key] = value
        if name == "calibration.dataset":
            merged.pop("calibration_dataset", None)
    return merged


def _add(group, stage: str, flag: str, key: str | None = None, **options: Any) -> None:
    key = key or flag.removeprefix("--").replace("-", "_")
    options.setdefault("metavar", key.upper() if options.get("type") is None else "N")
    group.add_argument(flag, dest=f"{stage}.{key}", **options)


def _switch(group, dest: str, flag: str, value: bool, help_text: str) -> None:
    group.add_argument(flag, dest=dest, action="store_const", const=value, help=help_text)
