"""One dataclass for each stage."""

import dataclasses
from typing import Any

from .rules import (
    Rule,
    _between,
    _boolean,
    _integer,
    _is_number,
    _not_negative,
    _one_of,
    _or_none,
    _positive,
    _text,
)

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
