"""`CLPConfig`: one dial, and one dataclass for each stage.

Validation collects every mistake, unknown keys included, and reports them in one [`ConfigurationError`].
"""

import dataclasses
import difflib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optimum.configuration_utils import BaseConfig
from optimum.version import __version__ as optimum_version
from packaging import version as package_version
from transformers import __version__ as transformers_version

from ..errors import ConfigurationError, Problem
from ..version import __version__

STRATEGIES = (
    "auto",
    "gate",
    "exhaustive",
    "halving",
    "block_influence",
    "angular",
    "cosine_block",
    "taylor",
    "perplexity_greedy",
    "tail",
    "random",
)
LOSSES = ("kd", "ce", "hidden")
INITS = ("none", "fold", "least_squares")
MIXED_PRECISIONS = ("no", "bf16", "fp16")
WEIGHTS = ("int8", "int4")
QUANTIZATION_METHODS = ("auto", "rtn", "hqq", "gptq", "quanto")
GROUP_SIZES = (16, 32, 64, 128, 256)
ACCURACY_LEVELS = (0, 1, 4)
OPSETS = (21, 22, 23)
FORMATS = ("contrib", "qdq")


@dataclasses.dataclass
class CalibrationConfig:
    """Where the text comes from, and how many tokens each stage gets.

    Args:
        dataset (`str`, `list[str]` or `None`): A `.txt`, `.json`, `.jsonl` or `.parquet` file; a `datasets` name as
            `id[:config[:split]]`; `"wikitext2"` or `"c4"`; a list of strings; or `None`: the dense model writes its
            own text.
        self_written_share (`float`): With a dataset: share of the train and validation rows that the dense model writes
            itself, in [0, 1], so that healing on one kind of text does not harm the others. Test rows are the dataset's.
        text_column (`str`): Column that holds the text, where the source has columns.
        sequence_length (`int`): Tokens in a row, at least 8; limited by the model's own context.
        train_sequences (`int`): Rows for the search and for tuning.
        validation_sequences (`int`): Rows for early stopping.
        test_sequences (`int`): Rows for the figures in the report; never tuned on.
        temperature (`float`): Of the sampling, for self-written text; 1 is the model's own distribution.
        generation_batch_size (`int`): Rows that are written at once, for self-written text.
        cache_dir (`str` or `None`): Where self-written text is kept; `None` for the user's cache folder.
    """

    dataset: str | list[str] | None = None
    self_written_share: float = 0.5
    text_column: str = "text"
    sequence_length: int = 256
    train_sequences: int = 192
    validation_sequences: int = 24
    test_sequences: int = 24
    temperature: float = 1.0
    generation_batch_size: int = 32
    cache_dir: str | None = None


@dataclasses.dataclass
class SearchConfig:
    """How the segment is found.

    Args:
        strategy (`str`): By the KL to the dense model: `"gate"` (gradient descent on the concave gate's position),
            `"exhaustive"` (every cut on every row), `"halving"` (a race of every cut), or `"auto"`: whichever of them is
            best for the model's depth (`docs/search.md`). By the rules of the field: `"block_influence"`, `"angular"`,
            `"cosine_block"`, `"taylor"`, `"perplexity_greedy"`, `"tail"`, `"random"`.
        num_sequences (`int`): Rows of the train split that the search looks at.
        batch_size (`int`): Rows in one forward pass.
        initial_steepness (`float`): Steepness of the gate at its first look along the stack, in units of 1 / segment
            length, so that the valley has the same shape whatever its width. It doubles as the search closes in.
        num_rescored (`int`): Integer segments scored exactly at the end of the gate search, 1 to 5.
        budget (`float`): Work that `"gate"` and `"halving"` may do, in dense forward passes over all search rows, for
            each parameter that is looked for: one for a single segment, `2k - 1` for `k` segments.
    """

    strategy: str = "auto"
    num_sequences: int = 32
    batch_size: int = 8
    initial_steepness: float = 16.0
    num_rescored: int = 5
    budget: float = 4.0


@dataclasses.dataclass
class TuningConfig:
    """How the layers next to the cut are trained.

    Args:
        enabled (`bool`): `False` keeps the cut as it is.
        init (`str`): What the endpoints start from: `"none"` (the cut as it is), or a closed-form solution for their output
            projections (attention's and the MLP's), `"fold"` (a linear map folded into each) or `"least_squares"` (all of
            it refitted); it is kept if it lowers the validation loss.
        loss (`str` or `dict[str, float]`): `"kd"` (KL to the dense model's logits), `"ce"` (next-token
            cross-entropy), `"hidden"` (the dense model's hidden states behind each trained layer), or weights such as
            `{"kd": 0.9, "ce": 0.1}`.
        endpoint_width (`int`): Layers trained on each side of the cut.
        train_final_norm (`bool`): Also train the norm behind the last layer.
        train_head (`bool`): Also train the head, if it is not tied to the embedding.
        learning_rate (`float` or `None`): Peak rate of AdamW. `None` takes 0.1 / hidden size.
        epochs (`int`): Passes over the train split.
        batch_size (`int`): Rows in one optimizer step, over all processes; the last rows of an epoch that do not fill a
            step are left out of it.
        gradient_accumulation_steps (`int`): Forward and backward passes in one step of one process: more take less memory.
        mixed_precision (`str` or `None`): `"no"`, `"bf16"` or `"fp16"`; `None` for what `accelerate` is set to.
        warmup_ratio (`float`): Share of the steps over which the rate rises; a cosine takes it to 0 after that.
        weight_decay (`float`): Of AdamW.
        max_grad_norm (`float`): The gradient is clipped to this norm.
        evaluations_per_epoch (`int`): How often the validation loss is taken.
        patience (`int`): Evaluations without a better validation loss before tuning stops.
        checkpoint_seconds (`float`): How much work an interruption may cost; 0 saves a checkpoint after every step.
        cache_memory_gib (`float`): Hidden states of the tuning text that are held in main memory, in GiB; the rest lies
            in `calibration.rows.cache_dir`.
        report_to (`list[str]`): Loggers by accelerate's names, such as `"tensorboard"` or `"wandb"`.
        logging_dir (`str` or `None`): Where loggers write; needed by those that write files.
    """

    enabled: bool = True
    init: str = "least_squares"
    loss: str | dict[str, float] = "kd"
    endpoint_width: int = 1
    train_final_norm: bool = False
    train_head: bool = False
    learning_rate: float | None = None
    epochs: int = 4
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    mixed_precision: str | None = None
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    evaluations_per_epoch: int = 2
    patience: int = 4
    checkpoint_seconds: float = 60.0
    cache_memory_gib: float = 4.0
    report_to: list[str] = dataclasses.field(default_factory=list)
    logging_dir: str | None = None

    def loss_weights(self) -> dict[str, float]:
        """The loss as `{name: weight}`."""
        return {self.loss: 1.0} if isinstance(self.loss, str) else dict(self.loss)


@dataclasses.dataclass
class QuantizationConfig:
    """Which weight-only quantized files are made.

    Args:
        weights (`list[str]`): Any of `"int8"` and `"int4"`: one ONNX file each, beside the float one.
        method (`str`): How the weights of the ONNX files are rounded: `"rtn"` (to nearest), `"gptq"` (with error feedback
            on calibration text; in 8 bits to nearest), `"hqq"` (with a zero point for each group, fitted without data; in 8
            bits to nearest, and so is the embedding), `"auto"` (`"gptq"` where there is such text, else `"rtn"`), or
            `"quanto"` (optimum-quanto's own integers: the file says what `quanto-int8` and `quanto-int4` say; groups are
            quanto's, products are in float32, and the embedding and a tied head stay float).
        bits_per_weight (`float` or `None`): Size budget of the int4 file, scales included: the matrices whose rounding
            costs most get 8 bits as long as the mean over all quantized weights stays within it. `None`: 4 bits for all.
        calibration_sequences (`int`): Rows of the train split that `"gptq"` and `bits_per_weight` look at.
        group_size (`int`): Weights that share one scale: 16, 32, 64, 128 or 256.
        accuracy_level (`int`): How ONNX Runtime multiplies: 4 with int8 activations (fast), 1 in float32, 0 its own
            choice. A file of `export.format="qdq"` has it in its metadata, and a session must be told.
        quantize_embeddings (`bool`): Also the embedding; a tied head is quantized with it.
        quanto (`bool`): Also write an optimum-quanto checkpoint for each of `weights`, in folders `quanto-int8` and
            `quanto-int4` of the output.
    """

    weights: list[str] = dataclasses.field(default_factory=lambda: ["int8", "int4"])
    method: str = "auto"
    bits_per_weight: float | None = None
    calibration_sequences: int = 128
    group_size: int = 32
    accuracy_level: int = 4
    quantize_embeddings: bool = True
    quanto: bool = False


@dataclasses.dataclass
class ExportConfig:
    """How the ONNX files are made.

    Args:
        enabled (`bool`): `False` writes no ONNX file.
        format (`str`): `"contrib"`: with ONNX Runtime's operators, fused (attention, rotary embedding, norms) where the
            architecture allows it, and for quantized weights; `"qdq"`: standard operators only, quantized weights behind
            `DequantizeLinear`.
        opset (`int`): ONNX opset: 21, 22 or 23.
        tolerance (`float`): Largest allowed max|difference| / max|logit| between ONNX Runtime and PyTorch in float32;
            above it the export fails.
        logits_to_keep (`int`): Positions of a text that get logits in a runtime that does not say how many (`OnnxCausalLM`
            does): 0 for all, or 1, the last. 1 saves onnxruntime-genai, transformers.js and Optimum most of the head's
            work on a prompt, and is wrong for rows that are padded on the right.
    """

    enabled: bool = True
    format: str = "contrib"
    opset: int = 21
    tolerance: float = 1e-4
    logits_to_keep: int = 0


STAGES: dict[str, type] = {
    "calibration": CalibrationConfig,
    "search": SearchConfig,
    "tuning": TuningConfig,
    "quantization": QuantizationConfig,
    "export": ExportConfig,
}
_PLAIN_KEYS = ("pruning_ratio", "num_segments", "max_perplexity_increase", "min_retention", "seed")
_HOUSEKEEPING = {"model_type", "clp_version", "transformers_version", "optimum_version"}


class CLPConfig(BaseConfig):
    """Configuration of continuous layer pruning, saved as `clp_config.json`.

    Args:
        pruning_ratio (`float` or `"auto"`): Share of the decoder layers to remove, in (0, 1); of `L` layers
            `floor(pruning_ratio * L + 0.5)` go. `"auto"`: as many as `max_perplexity_increase` or `min_retention` lets go.
        num_segments (`int`): Runs of neighbouring layers that go, at most. Rules that rank single layers
            (`block_influence`, `taylor`, `perplexity_greedy`, `random`) take as many runs as they get.
        max_perplexity_increase (`float`, *optional*): With `pruning_ratio="auto"`: the cut model's perplexity on
            validation rows, before tuning, is at most `1 + max_perplexity_increase` times the dense model's. Above 0.
        min_retention (`float`, *optional*): The same bound as dense perplexity over the cut model's, in (0, 1).
        seed (`int`): Seed of everything random.
        calibration ([`CalibrationConfig`] or `dict`): The text.
        search ([`SearchConfig`] or `dict`): The search for the segment.
        tuning ([`TuningConfig`] or `dict`): Cutoff endpoint tuning.
        quantization ([`QuantizationConfig`] or `dict`): int8 and int4 files.
        export ([`ExportConfig`] or `dict`): ONNX.
        calibration_dataset: Short for `calibration.rows.dataset`.

    Raises:
        ConfigurationError: Lists every value that is out of range and every key that is unknown.

    Example:
        >>> CLPConfig(pruning_ratio=0.25, calibration_dataset="corpus.txt", tuning={"epochs": 2})
    """

    CONFIG_NAME = "clp_config.json"
    FULL_CONFIGURATION_FILE = "clp_config.json"
    model_type = "clp"

    def __init__(
        self,
        pruning_ratio: float | str = 0.2,
        *,
        num_segments: int = 1,
        max_perplexity_increase: float | None = None,
        min_retention: float | None = None,
        seed: int = 0,
        calibration: CalibrationConfig | dict | None = None,
        search: SearchConfig | dict | None = None,
        tuning: TuningConfig | dict | None = None,
        quantization: QuantizationConfig | dict | None = None,
        export: ExportConfig | dict | None = None,
        calibration_dataset: str | list[str] | None = None,
        **unknown: Any,
    ):
        newer = _newer_version(unknown)
        problems = _unknown_keys(unknown, newer)
        self.pruning_ratio = pruning_ratio
        self.num_segments = num_segments
        self.max_perplexity_increase = max_perplexity_increase
        self.min_retention = min_retention
        self.seed = seed
        given = {
            "calibration": calibration,
            "search": search,
            "tuning": tuning,
            "quantization": quantization,
            "export": export,
        }
        stages = {name: _stage(name, value, problems, newer) for name, value in given.items()}
        self.calibration: CalibrationConfig = stages["calibration"]
        self.search: SearchConfig = stages["search"]
        self.tuning: TuningConfig = stages["tuning"]
        self.quantization: QuantizationConfig = stages["quantization"]
        self.export: ExportConfig = stages["export"]
        if calibration_dataset is not None:
            self.calibration.dataset = calibration_dataset
        problems += self._problems()
        if problems:
            raise ConfigurationError(*problems)

    def validate(self) -> None:
        """Check every value again, for a configuration that was changed after it was made.

        Raises:
            ConfigurationError: Lists every value that is out of range.
        """
        problems = self._problems()
        if problems:
            raise ConfigurationError(*problems)

    def _problems(self) -> list[Problem]:
        share = _between(0, 1, open_ends=True)
        ratio = (lambda v: v == "auto" or share[0](v), f'{share[1]}, or "auto"', f'{share[2]}, or "auto"')
        problems = _check("pruning_ratio", self.pruning_ratio, ratio)
        problems += _check("num_segments", self.num_segments, _integer(1))
        problems += _check("max_perplexity_increase", self.max_perplexity_increase, _or_none(_positive()))
        problems += _check("min_retention", self.min_retention, _or_none(share))
        problems += _check("seed", self.seed, _integer(0))
        problems += self._quality_problems()
        unplanned = {
            "quanto": "quanto's integers are taken as they are, so there is nothing to choose",
            "hqq": "sizes and errors are planned for groups without zero points, which HQQ has",
        }
        if self.quantization.method in unplanned and self.quantization.bits_per_weight is not None:
            problems.append(
                Problem(
                    "quantization.bits_per_weight",
                    self.quantization.bits_per_weight,
                    unplanned[self.quantization.method],
                    'Leave it out, or choose the method "rtn" or "gptq"',
                )
            )
        for name in STAGES:
            stage = getattr(self, name)
            for key, rule in _RULES[name].items():
                problems += _check(f"{name}.{key}", getattr(stage, key), rule)
        return problems

    def _quality_problems(self) -> list[Problem]:
        """A quality budget belongs to `pruning_ratio="auto"`, and there is one of it."""
        bounds = {"max_perplexity_increase": self.max_perplexity_increase, "min_retention": self.min_retention}
        given = [name for name, value in bounds.items() if value is not None]
        if self.pruning_ratio == "auto" and len(given) != 1:
            rule = f"it needs one quality budget, and {' and '.join(given) + ' are' if given else 'none is'} given"
            remedy = "Give max_perplexity_increase (such as 0.1) or min_retention (such as 0.9)"
            return [Problem("pruning_ratio", "auto", rule, remedy)]
        if self.pruning_ratio != "auto" and given:
            rule = f"the ratio is fixed to {self.pruning_ratio}, so there is nothing to bound"
            return [Problem(name, bounds[name], rule, 'Leave it out, or set pruning_ratio="auto"') for name in given]
        return []

    def perplexity_bound(self) -> float | None:
        """The quality budget as the largest allowed relative increase of the perplexity, or `None`."""
        if self.min_retention is not None:
            return 1 / self.min_retention - 1
        return self.max_perplexity_increase

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values, with the versions that wrote it."""
        output: dict[str, Any] = {
            "model_type": self.model_type,
            "pruning_ratio": self.pruning_ratio,
            "num_segments": self.num_segments,
            "max_perplexity_increase": self.max_perplexity_increase,
            "min_retention": self.min_retention,
            "seed": self.seed,
        }
        for name in STAGES:
            output[name] = dataclasses.asdict(getattr(self, name))
        output["clp_version"] = __version__
        output["transformers_version"] = transformers_version
        output["optimum_version"] = optimum_version
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """Same as [`~CLPConfig.to_dict`]: a recipe states its defaults, which may change between versions."""
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """Make a configuration from a dictionary, as read from `clp_config.json`.

        Args:
            config_dict (`dict`): Keys of the constructor; the version keys that `to_dict` adds are allowed.
            kwargs: Override keys of `config_dict`.

        Raises:
            ConfigurationError: For an unknown key, with the nearest valid name; if the file was written by a newer
                version of this package, with the advice to upgrade.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        for internal in ("_from_auto", "_from_pipeline", "_commit_hash"):
            kwargs.pop(internal, None)
        merged = {**config_dict, **kwargs}
        merged.pop("_commit_hash", None)
        config = cls(**merged)
        return (config, {}) if return_unused else config

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs: Any):
        """Write `clp_config.json`, and upload it if asked.

        Args:
            save_directory (`str` or `os.PathLike`): Folder, made if missing.
            push_to_hub (`bool`): Also upload, to `repo_id` in `kwargs` or else to the folder's name.
            kwargs: Passed to `push_to_hub` (`repo_id`, `private`, `token`, `commit_message`, ...).
        """
        # optimum's own push path calls _create_repo, which transformers 5 has removed
        super().save_pretrained(str(save_directory))
        if push_to_hub:
            return self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CLPConfig) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"CLPConfig {self.to_json_string(use_diff=False)}"


Rule = tuple[Callable[[Any], bool], str, str]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _between(low: float, high: float, open_ends: bool = False) -> Rule:
    def holds(value: Any) -> bool:
        return _is_number(value) and (low < value < high if open_ends else low <= value <= high)

    shown = f"between {low} and {high}" + (", both excluded" if open_ends else "")
    return holds, f"it must be a number {shown}", f"Choose a number {shown}"


def _positive() -> Rule:
    return lambda v: _is_number(v) and v > 0, "it must be a number above 0", "Choose a number above 0"


def _not_negative() -> Rule:
    return lambda v: _is_number(v) and v >= 0, "it must be a number of at least 0", "Choose 0 or more"


def _integer(low: int, high: int | None = None) -> Rule:
    shown = f"at least {low}" if high is None else f"from {low} to {high}"

    def holds(value: Any) -> bool:
        return (
            isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
        )

    return holds, f"it must be a whole number {shown}", f"Choose a whole number {shown}"


def _one_of(*values: Any) -> Rule:
    shown = ", ".join(repr(v) for v in values)
    return (
        lambda v: any(type(v) is type(x) and v == x for x in values),
        f"it must be one of {shown}",
        f"Choose one of {shown}",
    )


def _boolean() -> Rule:
    return lambda v: isinstance(v, bool), "it must be True or False", "Choose True or False"


def _text() -> Rule:
    return lambda v: isinstance(v, str) and v != "", "it must be a string that is not empty", "Give a string"


def _or_none(rule: Rule) -> Rule:
    return lambda v: v is None or rule[0](v), f"{rule[1]}, or None", f"{rule[2]}, or None"


def _is_dataset(value: Any) -> bool:
    return (isinstance(value, str) and value != "") or (
        isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(v, str) for v in value)
    )


def _is_loss(value: Any) -> bool:
    if isinstance(value, dict):
        weights = list(value.values())
        return set(value) <= set(LOSSES) and all(_is_number(w) and w >= 0 for w in weights) and sum(weights) > 0
    return value in LOSSES


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(v, str) and v for v in value)


def _is_weights(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(v in WEIGHTS for v in value) and len(set(value)) == len(value)


_RULES: dict[str, dict[str, Rule]] = {
    "calibration": {
        "dataset": _or_none(
            (_is_dataset, "it must be a file, a dataset name or a list of strings", "Give one of them")
        ),
        "self_written_share": _between(0, 1),
        "text_column": _text(),
        "sequence_length": _integer(8),
        "train_sequences": _integer(1),
        "validation_sequences": _integer(1),
        "test_sequences": _integer(1),
        "temperature": _positive(),
        "generation_batch_size": _integer(1),
        "cache_dir": _or_none(_text()),
    },
    "search": {
        "strategy": _one_of(*STRATEGIES),
        "num_sequences": _integer(1),
        "batch_size": _integer(1),
        "initial_steepness": _positive(),
        "num_rescored": _integer(1, 5),
        "budget": _positive(),
    },
    "tuning": {
        "enabled": _boolean(),
        "init": _one_of(*INITS),
        "loss": (
            _is_loss,
            "it must be 'kd', 'ce', 'hidden', or weights of at least 0 for these, not all 0",
            "Choose for example 'kd' or {'kd': 0.9, 'ce': 0.1}",
        ),
        "endpoint_width": _integer(1),
        "train_final_norm": _boolean(),
        "train_head": _boolean(),
        "learning_rate": _or_none(_positive()),
        "epochs": _integer(1),
        "batch_size": _integer(1),
        "gradient_accumulation_steps": _integer(1),
        "mixed_precision": _or_none(_one_of(*MIXED_PRECISIONS)),
        "warmup_ratio": _between(0, 1),
        "weight_decay": _not_negative(),
        "max_grad_norm": _positive(),
        "evaluations_per_epoch": _integer(1),
        "patience": _integer(1),
        "checkpoint_seconds": _not_negative(),
        "cache_memory_gib": _not_negative(),
        "report_to": (_is_names, "it must be a list of loggers' names", "Give for example ['tensorboard']"),
        "logging_dir": _or_none(_text()),
    },
    "quantization": {
        "weights": (
            _is_weights,
            "it must be a list of 'int8', 'int4', each at most once",
            "Choose for example ['int4']",
        ),
        "method": _one_of(*QUANTIZATION_METHODS),
        "bits_per_weight": _or_none(_between(4, 10)),
        "calibration_sequences": _integer(1),
        "group_size": _one_of(*GROUP_SIZES),
        "accuracy_level": _one_of(*ACCURACY_LEVELS),
        "quantize_embeddings": _boolean(),
        "quanto": _boolean(),
    },
    "export": {
        "enabled": _boolean(),
        "format": _one_of(*FORMATS),
        "opset": _one_of(*OPSETS),
        "tolerance": _positive(),
        "logits_to_keep": _one_of(0, 1),
    },
}


def _check(name: str, value: Any, rule: Rule) -> list[Problem]:
    holds, text, remedy = rule
    return [] if holds(value) else [Problem(name, value, text, remedy)]


def _nearest(key: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Valid keys are {', '.join(valid)}."


def _newer_version(extra: dict[str, Any]) -> str:
    """Advice to upgrade, if a newer version of this package wrote the configuration; else empty."""
    written_by = str(extra.get("clp_version") or __version__)
    if package_version.parse(written_by) > package_version.parse(__version__):
        return f" The file was written by optimum-clp {written_by}, this is {__version__}: upgrade optimum-clp"
    return ""


def _unknown_keys(extra: dict[str, Any], newer: str) -> list[Problem]:
    """Problems for the constructor's extra keys; the version keys of a saved file are not extra."""
    valid = [*_PLAIN_KEYS, *STAGES, "calibration_dataset"]
    return [
        Problem(key, value, "this version of CLPConfig has no such key", _nearest(key, valid) + newer)
        for key, value in extra.items()
        if key not in _HOUSEKEEPING
    ]


def _stage(name: str, value: Any, problems: list[Problem], newer: str) -> Any:
    """`value` as the stage's dataclass; what is wrong with it is added to `problems`."""
    cls: Any = STAGES[name]
    if value is None:
        return cls()
    if isinstance(value, cls):
        return dataclasses.replace(value)
    if not isinstance(value, dict):
        problems.append(Problem(name, value, f"it must be a {cls.__name__} or a dict", f"Give {cls.__name__}(...)"))
        return cls()
    valid = [f.name for f in dataclasses.fields(cls)]
    for key in value:
        if key not in valid:
            rule = f"{cls.__name__} has no such key"
            problems.append(Problem(f"{name}.{key}", value[key], rule, _nearest(key, valid) + newer))
    return cls(**{k: v for k, v in value.items() if k in valid})
