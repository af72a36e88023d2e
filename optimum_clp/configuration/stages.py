"""The settings: one dataclass for each stage, and one for those of all stages.

What is chosen by name from `doors` may be another package's; names that are listed here are all that there are.
"""

import dataclasses

from ..doors import LOSSES, ROUNDINGS, STARTS, STRATEGIES
from ..model_files import MAX_LAYERS
from ..precisions import BESIDE_FLOAT32, QUANTIZED
from .durations import duration
from .rules import (
    between,
    boolean,
    integer,
    name_or_weights,
    names_or_files,
    not_negative,
    one_of,
    or_auto,
    or_none,
    positive,
    several_of,
    some_names,
    source_of_text,
    text,
)
from .settings import Setting, documented, setting, settings_of
from .sizes import memory_size

# what a count cannot exceed whatever the model: rows are counted in 32 bits, and take memory long before; more is a slip
_ROWS, _BATCH, _TIMES = 2**31 - 1, 2**16, 10_000
_FLOAT = 1e38  # of a float32, which it becomes


@documented
@dataclasses.dataclass
class PlainSettings:
    """What belongs to no single stage: keys of `CLPConfig` itself.

    Args:
        {settings}
    """

    pruning_ratio: float | str | None = setting(
        0.2,
        or_none(or_auto(between(0, 1, open_ends=True))),
        "share of the decoder layers to remove, in (0, 1), or auto: as many as a quality budget lets go",
        more="Of `L` layers `floor(pruning_ratio * L + 0.5)` go; the budget of `auto` is `max_perplexity_increase` or "
        "`min_retention`. With `target_size_mb` or `target_tokens_per_second` it is `None`.",
        metavar="RATIO",
    )
    target_size_mb: float | None = setting(
        None,
        or_none(positive(1e7)),
        "size of the int4 file, in MB of 1,000,000 bytes, instead of a ratio: layers and bits are chosen for it",
        more="Layers go until the rest fits in plain 4 bits, at least one; what is left of the size raises the bits of what rounding costs most "
        "(`docs/how_to/size_target.md`).",
        metavar="MB",
        unset="the ratio decides",
    )
    target_tokens_per_second: float | None = setting(
        None,
        or_none(positive(1e7)),
        "tokens that the int4 file is to decode in a second on this machine, instead of a ratio: layers are chosen for it",
        more="Found from the speeds of the dense model's file and of one with half of the layers, which are measured before the run "
        "(`docs/how_to/speed_target.md`). With `target_size_mb` too, the one for which more layers must go decides.",
        metavar="N",
        unset="the ratio decides",
    )
    num_segments: int = setting(
        1,
        integer(1, MAX_LAYERS),
        "runs of neighbouring layers that go, at most",
        more="Rules that rank single layers (`block_influence`, `taylor`, `perplexity_greedy`, `random`) take as many "
        "runs as they get.",
    )
    max_perplexity_increase: float | None = setting(
        None,
        or_none(positive()),
        "quality budget of the ratio auto: 0.1 lets the perplexity rise by a tenth, before tuning",
        more="The cut model's perplexity on validation rows is at most `1 + max_perplexity_increase` times the dense "
        "model's.",
        metavar="SHARE",
    )
    min_retention: float | None = setting(
        None,
        or_none(between(0, 1, open_ends=True)),
        "the same budget as dense perplexity over the cut model's, such as 0.9",
        metavar="SHARE",
    )
    budget: str | float | None = setting(
        None,
        or_none(duration()),
        "time for search, text and tuning together: 90 (seconds), 20min, 1h30min",
        more="Short pilots say how long healing takes here, and how much text the rest of the time buys; `tuning.forecast` "
        "of the report says what more would bring.",
        metavar="TIME",
        unset="as long as `calibration.train_sequences` rows take",
    )
    max_memory: str | int | dict[str | int, str | int] | None = setting(
        None,
        or_none(memory_size()),
        "memory that this process may hold, such as 24GiB or 500MB, weights included; with an accelerator for each device, "
        "0=20GiB,cpu=64GiB",
        more="Where the weights do not fit, they stay in their files and are read one layer after the other "
        "(`docs/larger_than_memory.md`). A device that is named by its number runs the model, however small it is. In Python "
        "also a dictionary. No figure of the search depends on it.",
        metavar="SIZE",
        unset="what is free",
    )
    seed: int = setting(0, integer(0, 2**64 - 1), "seed of everything random")


@documented
@dataclasses.dataclass
class CalibrationConfig:
    """Where the text comes from, and how many tokens each stage gets.

    Args:
        {settings}
    """

    dataset: str | list[str] | None = setting(
        None,
        or_none(source_of_text()),
        "the text: a .txt, .json, .jsonl, .csv, .tsv, .parquet or .arrow file, also compressed (.gz, .zst, ...), a dataset as "
        "id[:config[:split]], wikitext2 or c4",
        more="In Python also a `Path`, and a list, tuple, column or generator of strings. Rows without `text_column` may be conversations (`messages`, ShareGPT, Alpaca, "
        "`prompt` and `completion`), or a `prompt` alone, which the dense model answers.",
        metavar="TEXT",
        unset="the dense model writes its own",
    )
    self_written_share: float = setting(
        0.5,
        between(0, 1),
        "with a text: share of the rows to tune on that the dense model writes itself",
        more="Of the train and validation rows, so that healing on one kind of text does not harm the others. Test rows "
        "are the dataset's.",
    )
    conversation_share: float = setting(
        0.5,
        between(0, 1),
        "share of the self-written rows that are conversations, where the tokenizer has a chat template",
        more="0 writes plain text alone.",
    )
    openings_share: float = setting(
        0.5,
        between(0, 1),
        "share of the self-written conversations that begin with first words of many kinds",
        more="The model goes on from them. Left alone it asks for advice nearly always.",
    )
    mask: str = setting(
        "all",
        one_of({"all": "every one", "assistant": "in conversations the assistant's alone"}),
        "tokens that tuning learns from",
    )
    text_column: str = setting("text", text(), "column that holds the text, where the source has columns")
    sequence_length: int = setting(
        256, integer(8, 2**24), "tokens in a row", more="Limited by the model's own context."
    )
    train_sequences: int = setting(1024, integer(1, _ROWS), "rows for search and tuning")
    validation_sequences: int = setting(24, integer(1, _ROWS), "rows for early stopping")
    test_sequences: int = setting(
        24, integer(1, _ROWS), "rows for the figures in the report", more="They are never tuned on."
    )
    temperature: float = setting(
        1.0,
        between(1e-3, 1e3),
        "temperature at which self-written text is sampled",
        more="1 is the model's own distribution.",
    )
    generation_batch_size: int = setting(64, integer(1, 4096), "rows of self-written text that are written at once")
    cache_dir: str | None = setting(
        None,
        or_none(text()),
        "where self-written text is kept, and what an interrupted run goes on from",
        flag="--text-cache-dir",
        metavar="FOLDER",
        unset="the user's cache folder",
    )


@documented
@dataclasses.dataclass
class SearchConfig:
    """How the segment is found.

    Args:
        {settings}
    """

    strategy: str = setting(
        "auto",
        one_of(STRATEGIES),
        "how the layers to remove are found",
        more="`gate`, `exhaustive` and `halving` go by the KL to the dense model (`docs/search.md`); the others are rules of "
        "the field.",
    )
    num_sequences: int = setting(
        32, integer(1, _ROWS), "rows of the train split that the search looks at", flag="--search-sequences"
    )
    batch_size: int = setting(
        8, integer(1, _BATCH), "rows in one forward pass of the search", flag="--search-batch-size"
    )
    initial_steepness: float = setting(
        16.0,
        positive(1e6),
        "steepness of the gate at its first look along the stack, in units of 1 / segment length",
        more="So the valley has the same shape whatever its width. It doubles as the search closes in.",
    )
    num_rescored: int = setting(5, integer(1, 5), "integer segments scored exactly at the end of the gate search")
    repair: str = setting(
        "none",
        one_of(
            {
                "none": "as it is",
                "linear_map": "with a ridge map across the gap",
                "closed_form": "solved for as tuning starts",
            }
        ),
        "what is done to a cut before it is scored",
        more="Only to the best `num_rescored` cuts by their untouched KL. It is fitted on some of the rows, and cuts are judged on "
        "others. The rules of the field do not look at it.",
        flag="--search-repair",
    )
    budget: float = setting(
        4.0,
        positive(1e6),
        "work that gate and halving may do, in dense forward passes over all search rows",
        more="For each parameter that is looked for: one for a single segment, `2k - 1` for `k` segments.",
        flag="--search-budget",
    )


@documented
@dataclasses.dataclass
class TuningConfig:
    """How the layers next to the cut are trained.

    Args:
        {settings}
    """

    enabled: bool = setting(
        True, boolean(), "train the layers next to the cut, or keep the cut as it is", flag="--tune"
    )
    init: str = setting(
        "none",
        one_of(STARTS),
        "what the layers next to the cut start from",
        more="Closed forms solve for their output projections (attention's and the MLP's), and are kept if they lower "
        "the validation loss.",
    )
    loss: str | dict[str, float] = setting(
        "kd",
        name_or_weights(LOSSES, "kd=0.9,ce=0.1"),
        "what tuning lowers, or weights such as kd=0.9,ce=0.1",
        more='In Python weights are a `dict`: `{"kd": 0.9, "ce": 0.1}`.',
    )
    endpoint_width: int = setting(1, integer(1, MAX_LAYERS), "layers trained on each side of the cut")
    overparametrization: str = setting(
        "none",
        one_of(
            {
                "none": "the layers' own",
                "linear": "D (P + W) for each linear projection P (OverRep)",
                "annealed": "the same, with an activation that is gone before the end",
            }
        ),
        "parameters of the trained layers while they are trained, one plain weight afterwards",
    )
    train_final_norm: bool = setting(False, boolean(), "also train the norm behind the last layer")
    train_head: bool = setting(False, boolean(), "also train the head, if it is not tied to the embedding")
    learning_rate: float | None = setting(
        None, or_none(positive(_FLOAT)), "peak rate of AdamW", unset="0.1 / hidden size"
    )
    tokens: int | None = setting(
        None,
        or_none(integer(1, 2**40)),
        "tokens of text to tune on, each one fresh, instead of calibration.train_sequences rows",
        more="A time budget decides itself.",
        flag="--tuning-tokens",
        unset="`calibration.train_sequences` rows",
    )
    epochs: int = setting(1, integer(1, _TIMES), "passes over the train split with the loss")
    hidden_epochs: int = setting(
        6,
        integer(0, _TIMES),
        "passes over the train split before these, in which only hidden states are compared",
        more="Nothing above the cut runs in them, so they are several times cheaper.",
    )
    hidden_learning_rate: float | None = setting(
        None,
        or_none(positive(_FLOAT)),
        "peak rate of AdamW in these passes",
        unset="measured: three times the loss over its slope, less for few steps",
    )
    hidden_batch_size: int | None = setting(
        None,
        or_none(integer(1, _BATCH)),
        "rows in one optimizer step of these passes, over all processes",
        unset="half of `batch_size`, where that can be dealt out",
    )
    on_policy_rounds: int = setting(
        0,
        integer(0, _TIMES),
        "rounds, after all that, in which the cut model learns from what it writes itself",
        more="Rounds end when one does not help.",
    )
    on_policy_sequences: int = setting(
        256,
        integer(1, _ROWS),
        "rows that it writes in each round",
        more="As many of the given rows are learnt beside them, and an eighth as many are written to judge it.",
    )
    batch_size: int = setting(
        8,
        integer(1, _BATCH),
        "rows in one optimizer step, over all processes",
        more="The last rows of an epoch that do not fill a step are left out of it.",
    )
    logit_share: float = setting(
        1.0,
        between(0.01, 1),
        "share of the positions of each row whose logits a training step compares",
        more="Below 1 a run of neighbours, another one in each step: for large vocabularies, where head and loss are most of a step. "
        "Validation compares all, and so do steps on rows with a mask, and losses that also look at hidden states.",
    )
    gradient_accumulation_steps: int = setting(
        1, integer(1, _BATCH), "forward and backward passes in one step of one process: more take less memory"
    )
    mixed_precision: str | None = setting(
        None, or_none(one_of(("no", "bf16", "fp16"))), "precision of tuning", unset="what accelerate is set to"
    )
    warmup_ratio: float = setting(
        0.05,
        between(0, 1),
        "share of the steps over which the rate rises",
        more="A cosine takes it to 0 after that.",
    )
    weight_decay: float = setting(0.0, not_negative(1e3), "weight decay of AdamW")
    max_grad_norm: float = setting(1.0, positive(_FLOAT), "norm that the gradient is clipped to")
    evaluations_per_epoch: int = setting(2, integer(1, _TIMES), "how often the validation loss is taken in an epoch")
    patience: int = setting(4, integer(1, 10**6), "evaluations without a better validation loss before tuning stops")
    checkpoint_seconds: float = setting(
        60.0,
        not_negative(1e9),
        "seconds of work that an interruption may cost",
        more="0 saves a checkpoint after every step.",
    )
    cache_memory_gib: float = setting(
        4.0,
        not_negative(2**20),
        "hidden states of the tuning text that are held in main memory, in GiB",
        more="The rest lies in `calibration.cache_dir`.",
    )
    report_to: list[str] = setting(
        [],
        some_names("loggers' names", "tensorboard"),
        "loggers by accelerate's names, such as tensorboard,wandb",
        metavar="NAMES",
        unset="none",
    )
    logging_dir: str | None = setting(
        None, or_none(text()), "where loggers write", more="Needed by those that write files.", unset="nowhere"
    )

    def loss_weights(self) -> dict[str, float]:
        """The loss as `{name: weight}`."""
        return {self.loss: 1.0} if isinstance(self.loss, str) else dict(self.loss)


@documented
@dataclasses.dataclass
class QuantizationConfig:
    """Which weight-only quantized files are made.

    Args:
        {settings}
    """

    weights: list[str] = setting(
        list(QUANTIZED),
        several_of(*BESIDE_FLOAT32),
        "precisions that get an ONNX file, beside float32",
        more="In `float16` and `int4_float16` activations and cache take 16 bits too: for graphics processors, and browsers with WebGPU.",
    )
    method: str = setting(
        "auto",
        one_of(ROUNDINGS),
        "how the weights of the ONNX files are rounded",
        more="`gptq` and `hqq` round to nearest in 8 bits, and `hqq` the embedding too. With `quanto` the file says what "
        "`quanto-int8` and `quanto-int4` say: groups are quanto's, products are in float32, and the embedding and a tied "
        "head stay float.",
    )
    bits_per_weight: float | None = setting(
        None,
        or_none(between(4, 10)),
        "size budget of the int4 file, scales included: what costs most gets 8 bits",
        more="Of all matrices, those whose rounding costs most, as long as the mean over all quantized weights stays "
        "within it.",
        unset="4 bits for all",
    )
    six_bits: bool = setting(
        False,
        boolean(),
        "let a size budget give matrices 6 bits too, as a sum of two products",
        more="Two to three fifths less divergence than with 4 and 8 alone at the same size; prompts take longer. ONNX Runtime has fast products of this kind "
        'from 1.30 on, on CPUs (`docs/onnx.md`). For `export.format="contrib"` and `accuracy_level` 4.',
    )
    calibration_sequences: int = setting(
        128,
        integer(1, _ROWS),
        "rows of the train split that gptq and the size budget look at",
        more="Where scales are trained on all of them, gptq looks at a quarter (at least 32).",
    )
    scale_epochs: int = setting(
        1,
        integer(0, 1000),
        "passes over these rows in which the scales of the int4 file are trained towards the dense model",
        more="By KL; integers stay. Kept if better on rows that were left out, and left out where the rows are under 8. After `gptq` alone; where the "
        "dense model is not at hand (`export` of a folder), towards the exported one.",
    )
    group_size: int = setting(32, one_of((16, 32, 64, 128, 256)), "weights that share one scale")
    accuracy_level: int = setting(
        4,
        one_of({0: "its own choice", 1: "in float32", 4: "with int8 activations, fast"}),
        "how ONNX Runtime multiplies",
        more='A file of `export.format="qdq"` has it in its metadata, and a session must be told.',
    )
    head_bits: int | None = setting(
        None,
        or_none(one_of((4, 8))),
        "bits of the head in the int4 file, and of an embedding that it shares",
        more="8 costs size, and is faster or slower as a processor has it.",
        unset="4, unless a size budget gives it 8",
    )
    tune_for: str = setting(
        "size",
        one_of(
            {
                "size": "as they are set",
                "speed": "what is fastest on this machine, measured before the run",
            }
        ),
        "group size, accuracy level and head bits of the int4 file",
        more="What was measured is in the report (`export.speed_choice`), and the recipe of the output folder has the settings "
        "that were chosen, so that it measures nothing. With a `target` other than `cpu` they come from a table "
        "(`docs/how_to/speed_target.md`).",
    )
    quantize_embeddings: bool = setting(
        True, boolean(), "also quantize the embedding", more="A tied head is quantized with it."
    )
    quanto: bool = setting(
        False,
        boolean(),
        "also write optimum-quanto checkpoints",
        more="One for int8 and int4 if `weights` has them, in folders `quanto-int8` and `quanto-int4` of the output.",
    )


@documented
@dataclasses.dataclass
class ExportConfig:
    """How the ONNX files are made.

    Args:
        {settings}
    """

    enabled: bool = setting(True, boolean(), "write ONNX files", flag="--export")
    format: str = setting(
        "contrib",
        one_of(
            {
                "contrib": "ONNX Runtime's, fused where they can be",
                "qdq": "standard ones only",
                "unpacked": "as contrib, quantized weights made floats at load",
            }
        ),
        "operators of the ONNX files",
        more="`contrib` fuses attention, rotary embedding and norms where the architecture allows it; quantized weights of "
        "`qdq` lie behind `DequantizeLinear`. `unpacked` is for WebAssembly, which multiplies by integers slowly.",
    )
    float_file: bool = setting(
        True, boolean(), "keep the float32 file", more="It is made and checked in any case: the others are made of it."
    )
    opset: int = setting(21, one_of((21, 22, 23)), "ONNX opset")
    tolerance: float = setting(
        1e-4,
        positive(),
        "largest relative error against PyTorch in float32; above it the export fails",
        more="It is max|difference| / max|logit| between ONNX Runtime and PyTorch.",
    )
    logits_to_keep: int = setting(
        0,
        one_of({0: "all", 1: "the last"}),
        "positions of a text that get logits in a runtime that does not say how many",
        more="`OnnxCausalLM` does say. 1 saves onnxruntime-genai, transformers.js and Optimum most of the head's work on a "
        "prompt, and is wrong for rows that are padded on the right.",
    )


@documented
@dataclasses.dataclass
class EvaluationConfig:
    """What is measured of the models and files that a run leaves, beside perplexity, KL and speed on the test rows.

    Args:
        {settings}
    """

    generation: bool = setting(
        True,
        boolean(),
        "measure what the models say: answers to prompts, or text that goes on",
        more="Needed for a verdict (`docs/generation.md`).",
    )
    prompts: str | None = setting(
        None,
        or_none(text()),
        "what a chat model is asked: JSON lines with messages or prompt, and kind and answer if they are to be checked",
        metavar="FILE",
        unset="64 short ones that come with the package",
    )
    num_prompts: int = setting(32, integer(1, _ROWS), "prompts that are answered, as many of each kind as can be")
    max_new_tokens: int = setting(
        128,
        integer(1, 2**24),
        "tokens of an answer, at most",
        more="An answer of fewer than 64 tokens cannot be seen to loop.",
    )
    texts: list[str] = setting(
        [],
        some_names("texts", "c4"),
        "other held-out texts, each measured apart: files or datasets, such as c4,wikitext2",
        more="As many rows of each as there are test rows.",
        metavar="TEXTS",
        unset="none",
    )
    tasks: list[str] = setting(
        [],
        names_or_files("tasks of lm-eval", "arc_easy", "piqa=piqa.jsonl"),
        "accuracy on tasks: names of lm-eval's, such as piqa,arc_easy, or JSON lines files, such as piqa=piqa.jsonl",
        more="Names need lm-eval (`pip install 'optimum-clp[tasks]'`) and the Hub, files neither; files are measured zero-shot.",
        metavar="NAME[=FILE]",
        unset="none",
    )
    task_limit: int | None = setting(
        None,
        or_none(integer(1, _ROWS)),
        "only the first N examples of each task",
        flag="--limit",
        unset="all of them",
    )
    num_fewshot: int | None = setting(
        None,
        or_none(integer(0, 1000)),
        "examples in front of each question of a task of lm-eval",
        unset="as many as the task says, mostly none",
    )
    apply_chat_template: bool = setting(
        False,
        boolean(),
        "put the questions of lm-eval's tasks through the tokenizer's chat template, examples as turns",
    )
    tasks_dir: str | None = setting(
        None,
        or_none(text()),
        "folder with definitions of tasks of your own, lm-eval's YAML files; Python in it is run",
        metavar="FOLDER",
        unset="only those that lm-eval has",
    )
    memory_context: int = setting(
        512,
        integer(2, 2**24),
        "tokens of context that the memory of each ONNX file is measured with",
        more="No more than the model takes.",
    )
    require_retention: float | None = setting(
        None,
        or_none(between(0, 1)),
        "exit with status 4 if dense perplexity over the smaller model's is below this, such as 0.9",
        more="Holds for the model and each of its ONNX files; the folder is kept, and report and card say it.",
        metavar="SHARE",
        unset="none",
    )
    require_generation: float | None = setting(
        None,
        or_none(between(0, 1)),
        "the same for the share of generation that is kept, such as 0.8",
        metavar="SHARE",
        unset="none",
    )

    def task_files(self) -> dict[str, str]:
        """For the name of each task in a file its file."""
        return {name: file for name, is_file, file in (word.partition("=") for word in self.tasks) if is_file}

    def named_tasks(self) -> list[str]:
        """The tasks of lm-eval."""
        return [word for word in self.tasks if "=" not in word]


STAGES: dict[str, type] = {
    "calibration": CalibrationConfig,
    "search": SearchConfig,
    "tuning": TuningConfig,
    "quantization": QuantizationConfig,
    "export": ExportConfig,
    "evaluation": EvaluationConfig,
}


def all_settings() -> dict[str, Setting]:
    """Every setting by its name (`"seed"`, `"tuning.epochs"`), in the order in which they are checked."""
    found = [*settings_of(PlainSettings)]
    for stage, cls in STAGES.items():
        found += settings_of(cls, stage)
    return {setting.name: setting for setting in found}
