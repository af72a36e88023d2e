"""The rows of the report's table: what each model or file weighs, says and takes."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..architecture.lookup import context_limit, num_layers
from ..attempts import Attempts
from ..calibration.rows import CalibrationData
from ..forward.dense_outputs import DenseOutputs
from ..forward.layer_major import Residence
from ..precisions import FLOAT32, PRECISIONS
from ..progress import progress_bar
from ..report.section import Key, to_section
from ..runtime.apart import FileApart
from ..runtime.causal_lm import OnnxCausalLM
from ..runtime.session import in_place_options
from ..segments import LayerSegment
from ..surgery.cut import cut_model
from ..surgery.sizes import count_bytes, count_parameters
from .deployment import (
    Deployment,
    DeploymentChecks,
    Requirement,
    TaskFigures,
    TextFigures,
    requirements,
    verdicts,
)
from .generation import GenerationOutcome
from .memory import FileMemory, measure_memory, memory_is_told
from .speed import measure_speed
from .tokens import evaluate_tokens
from .verdict import Verdict

PROMPT_TOKENS = 128
NEW_TOKENS = 32
# bytes that a session of a quantized file holds for each of the file's
_HELD = 2


@dataclass(frozen=True)
class MeasuredRow:
    """A model or a file, and what was measured on it; a figure is `None` if it was not."""

    name: Annotated[
        str, Key(choices=("dense", "cut", "tuned", *(precision.row_name for precision in PRECISIONS.values())))
    ]
    runtime: Annotated[str, Key(choices=("PyTorch", "ONNX Runtime"))]
    num_layers: Annotated[int, Key(minimum=1)]
    num_parameters: Annotated[int, Key(minimum=0)]
    bytes: Annotated[int, Key(minimum=0)]
    perplexity: Annotated[float, Key(minimum=0)]
    kl: Annotated[float | None, Key("KL(dense || this), nats per token.")]
    top1_agreement: Annotated[
        float | None, Key("Share of tokens with the dense model's most likely next token.", minimum=0, maximum=1)
    ]
    num_tokens: Annotated[int, Key(minimum=1)]
    loss: Annotated[
        float | None, Key("Cross-entropy, nats per token: the logarithm of the perplexity.", sparse=True)
    ] = None
    retention: Annotated[
        float | None, Key("Perplexity of the dense model over this one's.", minimum=0, sparse=True)
    ] = None
    prefill_tokens_per_second: Annotated[float | None, Key(minimum=0)] = None
    decode_tokens_per_second: Annotated[float | None, Key(minimum=0)] = None
    memory: Annotated[FileMemory | None, Key("What an ONNX file needs to run.", sparse=True)] = None


@dataclass(frozen=True)
class Outcome:
    """The `evaluation` section of the report."""

    text: Annotated[str, Key("What was measured on.")]
    rows: tuple[MeasuredRow, ...]
    texts: Annotated[tuple[TextFigures, ...], Key("Other texts, and kinds of the test rows apart.", sparse=True)] = ()
    tasks: Annotated[tuple[TaskFigures, ...], Key("Zero-shot tasks.", sparse=True)] = ()
    generation: Annotated[GenerationOutcome | None, Key("What the models say.", sparse=True)] = None
    verdicts: Annotated[tuple[Verdict, ...], Key("What each model or file is good for.", sparse=True)] = ()
    requirements: Annotated[tuple[Requirement, ...], Key("What had to be reached.", sparse=True)] = ()


def measure_outcome(
    data: CalibrationData,
    text: str,
    *,
    checks: DeploymentChecks,
    dense: PreTrainedModel | None,
    pruned: PreTrainedModel,
    source: PreTrainedModel | None = None,
    segments: Iterable[LayerSegment],
    tuned: bool,
    folder: Path,
    export: dict[str, Any] | None,
    attempts: Attempts | None = None,
    batch_size: int = 8,
    residence: Residence | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure everything that a run leaves: dense, cut and tuned model, and each ONNX file.

    Args:
        data ([`CalibrationData`]): The text; its test rows are measured on.
        text (`str`): What they are, in a few words.
        checks ([`DeploymentChecks`]): What else is measured.
        dense (`PreTrainedModel` or `None`): The dense model; without it there are no rows `dense` and `cut`, and no KL.
        pruned (`PreTrainedModel`): The cut model, tuned or not.
        source (`PreTrainedModel`, *optional*): What they were cut from, if that is not the dense model.
        segments (`Iterable[LayerSegment]`): What was cut.
        tuned (`bool`): Whether `pruned` was tuned; the untuned cut is then made again over the dense model's tensors.
        folder (`Path`): Where the ONNX files are.
        export (`dict` or `None`): The `export` section of the report.
        attempts ([`Attempts`], *optional*): What cannot be measured is noted there; otherwise its error is raised.
        batch_size (`int`): Rows in one forward pass.
        residence ([`Residence`], *optional*): For models that memory does not hold: test rows go through them layer by layer.
        quiet (`bool`): No progress bars.

    Returns:
        `dict`: The `evaluation` section of the report.
    """
    attempts = attempts or Attempts(strict=True)
    context = context_limit(pruned.config)
    passes: dict[str, Any] = {"batch_size": batch_size, "residence": residence, "quiet": quiet}
    measurements = Measurements(data.test, text, dense, context=context, **passes)
    models: dict[str, PreTrainedModel] = {}
    if dense is not None:
        models["dense"] = dense
        if tuned:
            models["cut"] = cut_model(source or dense, segments)
    models["tuned" if tuned else "cut"] = pruned
    makers: dict[str, Callable[[], Any]] = {}
    files: dict[str, Path] = {}
    apart: set[str] = set()
    for name, model in models.items():
        with attempts.stage(f"evaluation of {name}"):
            measurements.add_model(name, model)
            makers[name] = partial(_given, model)
    for entry in export["files"] if export else ():
        name = PRECISIONS[entry["weights"]].row_name
        with attempts.stage(f"evaluation of {name}"):
            # of what memory does not hold, weights in floats stay in their file
            in_place = residence is not None and name == FLOAT32.row_name
            options = in_place_options() if in_place else None
            makers[name] = partial(OnnxCausalLM.from_pretrained, folder, entry["file"], session_options=options)
            files[name] = folder / entry["file"]
            if residence is not None and not in_place and _HELD * entry["bytes"] > residence.work_memory:
                apart.add(name)
                with FileApart(folder / entry["file"]) as file:
                    measurements.add_file(name, _Answering(file, pruned.config), entry["bytes"], pruned)
            else:
                measurements.add_file(name, makers[name](), entry["bytes"], pruned)
    with attempts.stage("speeds"):
        # under a bound on memory such a model is as fast as its disk; and this process does not hold the larger files
        in_files = {*models, FLOAT32.row_name, *apart}
        timed = {name: make for name, make in makers.items() if residence is None or name not in in_files}
        if timed:
            measurements.add_speed(timed)
    with attempts.stage("memory"):
        measurements.add_memory(
            {name: file for name, file in files.items() if residence is None or name not in in_files},
            checks.config.evaluation.memory_context,
        )
    found = checks.measure(makers, dense, data, attempts, residence)
    retention = measurements.retention()
    judged = verdicts(found.generation, retention)
    return measurements.to_dict(
        replace(found, verdicts=judged, requirements=requirements(checks.config, judged, retention))
    )


class Measurements:
    """Collects the `evaluation` section of the report.

    Args:
        tokens (`Tensor`): int64 `[rows, length]`, the test rows.
        text (`str`): What they are, in a few words.
        dense (`PreTrainedModel` or `None`): For KL and agreement; `None` leaves these out.
        context (`int` or `None`): Longest text that the models take, in tokens, at least 4.
        batch_size (`int`): Rows in one forward pass.
        residence ([`Residence`], *optional*): As in [`measure_outcome`].
        quiet (`bool`): No progress bars.
    """

    def __init__(
        self,
        tokens: Tensor,
        text: str,
        dense: PreTrainedModel | None,
        *,
        context: int | None = None,
        batch_size: int = 8,
        residence: Residence | None = None,
        quiet: bool,
    ):
        self.tokens, self.text, self.quiet = tokens, text, quiet
        self.context = context
        self._passes: dict[str, Any] = {"batch_size": batch_size, "residence": residence, "quiet": quiet}
        self.reference = (
            None
            if dense is None
            else DenseOutputs(dense, tokens, description="Dense model on the test rows", **self._passes)
        )
        self.rows: list[MeasuredRow] = []

    def add_model(self, name: str, model: PreTrainedModel) -> None:
        """Measure what a PyTorch model says."""
        self._add(name, "PyTorch", model, num_layers(model.config), count_parameters(model), count_bytes(model))

    def add_file(self, name: str, session: "OnnxCausalLM | _Answering", size: int, model: PreTrainedModel) -> None:
        """Measure what an ONNX file of so many bytes says; `model` is the one that it was made from."""
        self._add(name, "ONNX Runtime", session, num_layers(model.config), count_parameters(model), size)

    def add_speed(self, models: dict[str, Callable[[], Any]]) -> None:
        """Measure the speed of rows, interleaved; `models` gives each one's model when it is called."""
        new, length = NEW_TOKENS, PROMPT_TOKENS
        if self.context is not None and self.context < length + new - 1:  # the last new token is not read again
            new = max(2, min(new, self.context // 2))
            length = self.context + 1 - new
        speeds = measure_speed(models, self.tokens[:1, :length], new_tokens=new, quiet=self.quiet)
        self.rows = [
            replace(
                row,
                prefill_tokens_per_second=speeds[row.name].prefill_tokens_per_second,
                decode_tokens_per_second=speeds[row.name].decode_tokens_per_second,
            )
            if row.name in speeds
            else row
            for row in self.rows
        ]

    def add_memory(self, files: dict[str, Path], num_tokens: int) -> None:
        """Measure what rows' ONNX files need to run, with so many tokens of context, or as many as the models take; where the
        system does not say that, nothing."""
        if not memory_is_told():
            return
        length = num_tokens if self.context is None else min(num_tokens, self.context)
        with progress_bar(len(files), "Memory of the ONNX files", self.quiet) as bar:
            for index, row in enumerate(self.rows):
                if row.name in files:
                    self.rows[index] = replace(row, memory=measure_memory(files[row.name], length))
                    bar.update(1)

    def retention(self) -> dict[str, float | None]:
        """For each row's name dense perplexity over its own; `None` without a dense model."""
        dense = next((row.perplexity for row in self.rows if row.name == "dense"), None)
        if dense is None:
            return {row.name: None for row in self.rows}
        shares = {row.name: dense / row.perplexity for row in self.rows}
        # a perplexity beyond all numbers, or none at all, keeps nothing
        return {name: share if math.isfinite(share) else 0.0 for name, share in shares.items()}

    def to_dict(self, found: Deployment | None = None) -> dict[str, Any]:
        """The `evaluation` section of the report, with what else was found."""
        return to_section(Outcome(self.text, tuple(self.rows), **vars(found or Deployment())))

    def _add(self, name: str, runtime: str, model: Any, layers: int, parameters: int, size: int) -> None:
        found = evaluate_tokens(
            model, self.tokens, reference=self.reference, name=f"{name} on the test rows", **self._passes
        )
        self.rows.append(
            MeasuredRow(
                name=name,
                runtime=runtime,
                num_layers=layers,
                num_parameters=parameters,
                bytes=size,
                perplexity=found.perplexity,
                kl=found.kl,
                top1_agreement=found.top1_agreement,
                num_tokens=found.num_tokens,
            )
        )


class _Answering:
    """A file in a process of its own, called like a causal language model of transformers."""

    def __init__(self, file: FileApart, config: PretrainedConfig):
        self.file, self.config, self.device = file, config, torch.device("cpu")

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> CausalLMOutputWithPast:
        logits = self.file.logits(input_ids.numpy(), attention_mask.numpy())
        return CausalLMOutputWithPast(logits=cast(Any, torch.from_numpy(logits)))


def _given(model: PreTrainedModel) -> PreTrainedModel:
    return model
