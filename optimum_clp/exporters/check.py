"""The check of every exported file against the PyTorch model that it was made from: on what, in which process, how close."""

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..architecture.lookup import declared_context_length, text_config
from ..errors import ExportError
from ..forward.decoding import cache_keyword, cache_of
from ..runtime import comparison as onnx_comparison
from ..runtime.comparison import ReferenceStep, read_result, relative_error, write_steps
from ..runtime.own_process import last_words, run_to_its_end
from .graph.float_graph import input_names
from .result import CheckedContext

# Float weights above which a file is checked in a process of its own: a session holds a file's weights up to three
# times while it loads, and a process takes about 0.2 seconds to start.
IN_PROCESS_BYTES = 250_000_000
# What a pass over the longest context may cost: operations, and bytes of attention scores and logits.
WHOLE_CONTEXT_OPERATIONS = 2e10
WHOLE_CONTEXT_BYTES = 2**28

_DECODE_STEPS = (1, 1, 1, 3, 1)  # tokens in each cached step
_LAST_TOKENS = 16  # of the longest context, before the cached one at its very end


class FileCheck:
    """Compares files with PyTorch, in this process or, for a large model, in one of their own.

    Args:
        model ([`~transformers.PreTrainedModel`]): In float32 on the CPU, in evaluation mode; asked once, here.
        folder (`Path`): A temporary folder, for what is handed to another process.
        seed (`int`): Of the tokens.
    """

    def __init__(self, model: PreTrainedModel, folder: Path, *, seed: int = 0):
        self.context = checked_context(model)
        self.reference: Path | None = None
        self.steps = reference_steps(model, seed=seed)
        if 4 * sum(parameter.numel() for parameter in model.parameters()) > IN_PROCESS_BYTES:
            self.reference = folder / "reference.npz"
            write_steps(self.steps, self.reference)
            self.steps.clear()

    def error(self, file: Path, *, in_float: bool = False) -> float:
        """[`~runtime.comparison.relative_error`] of a file.

        Args:
            file (`Path`): The file.
            in_float (`bool`): Its weights are floats: a process of its own leaves them where they lie.

        Raises:
            ExportError: If ONNX Runtime cannot load or run the file.
        """
        if self.reference is None:
            return relative_error(file, self.steps)
        return relative_error_apart(file, self.reference, in_place=in_float)


def checked_context(model: PreTrainedModel) -> CheckedContext:
    """How [`reference_steps`] looks at the longest context that the configuration declares.

    Returns:
        [`CheckedContext`]: `length` (`int` or `None`), and `checked`: `"whole"` where a text of that length is run, which is done as
        long as the pass is cheap; `"last positions"` where a short text is given the positions at its end; `"none"` for a
        model without positions as an input, or without a declared length.
    """
    length = declared_context_length(model.config)
    if length is None or length < 2:
        checked = "none"
    elif _whole_is_cheap(model, length):
        checked = "whole"
    else:
        checked = "last positions" if "position_ids" in input_names(model) else "none"
    return {"length": length, "checked": checked}


def reference_steps(model: PreTrainedModel, *, seed: int = 0) -> list[ReferenceStep]:
    """What every file is run on, and the model's answers.

    First a prompt of three rows of different lengths, left-padded, with an empty past, and cached steps of 1 or 3 tokens
    that continue it; the prompt is longer than a short sliding window, so that the window is seen. Then one row at the
    end of the longest context ([`checked_context`]), whose last token is a cached step at the very last position.
    The tokens are random, seeded.

    Args:
        model ([`~transformers.PreTrainedModel`]): In float32 on the CPU, in evaluation mode.
        seed (`int`): Of the tokens.

    Returns:
        `list[ReferenceStep]`
    """
    generator = torch.Generator().manual_seed(seed)
    window = getattr(text_config(model.config), "sliding_window", None) or 0
    context = checked_context(model)
    limit = context["length"] or 64
    length = max(2, min(max(16, window + 8 if window <= 256 else 0), limit - sum(_DECODE_STEPS)))
    padding = torch.tensor([0, length // 3, length - 1])
    mask = (torch.arange(length + sum(_DECODE_STEPS))[None] >= padding[:, None]).long()
    steps = _text_steps(model, mask, (length, *_DECODE_STEPS), generator)
    if context["checked"] != "none":
        tokens = limit if context["checked"] == "whole" else min(limit, _LAST_TOKENS + 1)
        # a mask of ones, given: without one, transformers may take positions that do not start at 0 for packed texts
        mask = torch.ones(1, tokens, dtype=torch.long)
        # the last logits are enough: what is wrong at a position is wrong for all that see it
        sizes, kept = (tokens - 1, 1), _LAST_TOKENS
        steps += _text_steps(model, mask, sizes, generator, first_position=limit - tokens, kept=kept)
    return steps


def relative_error_apart(file: Path, reference: Path, *, in_place: bool = False) -> float:
    """[`~runtime.comparison.relative_error`] from a process that holds nothing but the file and the reference.

    Args:
        file (`Path`): The ONNX file.
        reference (`Path`): From [`~runtime.comparison.write_steps`]; the result is written beside it.
        in_place (`bool`): As in [`~runtime.comparison.relative_error`].

    Raises:
        ExportError: If ONNX Runtime cannot load or run the file, or the process ends before there is a result.
    """
    result = reference.with_suffix(".json")
    arguments = [str(file), str(reference), str(result), *(["in_place"] if in_place else [])]
    process = run_to_its_end(onnx_comparison.__name__, *arguments)
    if process.returncode == 0:
        return read_result(result)
    raise ExportError.of(
        file.name,
        f"exit status {process.returncode}",
        f"the process that runs it in ONNX Runtime ended without a result ({last_words(process)})",
        "Free memory for it, up to three times the file's size; or set export.enabled to False",
    )


def check_tolerance(file: Path, error: float, tolerance: float) -> None:
    """Check the relative error of a file.

    Raises:
        ExportError: If `error` is above `tolerance`, or not finite.
    """
    if not error <= tolerance:
        raise ExportError.of(
            file.name,
            error,
            f"its logits differ from PyTorch's by more than the tolerance, max|difference| / max|logit| <= {tolerance:g}"
            if np.isfinite(error)
            else "its logits are not all finite",
            "Keep the PyTorch checkpoint and report the model; a larger export.tolerance only hides the difference",
        )


def _whole_is_cheap(model: PreTrainedModel, length: int) -> bool:
    config = text_config(model.config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    operations = 2 * parameters * length + 4 * config.num_hidden_layers * config.hidden_size * length**2
    memory = 4 * length * (config.num_attention_heads * length + config.vocab_size)
    return operations <= WHOLE_CONTEXT_OPERATIONS and memory <= WHOLE_CONTEXT_BYTES


def _text_steps(
    model: PreTrainedModel,
    mask: torch.Tensor,
    sizes: tuple[int, ...],
    generator: torch.Generator,
    *,
    first_position: int = 0,
    kept: int | None = None,
) -> list[ReferenceStep]:
    """The model's answers on a batch of random texts, in calls of so many tokens with one cache; the last `kept` of each call."""
    vocabulary = text_config(model.config).vocab_size
    cache = DynamicCache()
    names = input_names(model)
    steps: list[ReferenceStep] = []
    end = 0
    for size in sizes:
        end += size
        attention_mask = mask[:, :end]
        input_ids = torch.randint(vocabulary, (len(mask), size), generator=generator)
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -size:] + first_position
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        with torch.no_grad():
            # XGLM of transformers 4 adds to the positions in place, and takes no view of them
            given = {name: inputs[name].clone(memory_format=torch.contiguous_format) for name in names}
            output = model(**given, **{cache_keyword(model): cache}, use_cache=True)
        cache = cache_of(output)
        arrays = {name: np.ascontiguousarray(value.numpy()) for name, value in inputs.items()}
        steps.append(ReferenceStep(**arrays, logits=output.logits[:, -(kept or size) :].float().numpy().copy()))
    return steps
