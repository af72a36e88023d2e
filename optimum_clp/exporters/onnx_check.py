"""Comparison of an ONNX file, run by a plain ONNX Runtime session, with the PyTorch model that it was made from."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..architecture import text_config
from ..errors import ExportError, Problem
from ..onnx_names import FUSED_ATTENTION, cache_names
from ..onnx_session import open_session
from .onnx_float import input_names

_DECODE_STEPS = (1, 1, 1, 3, 1)  # tokens in each cached step


@dataclass(frozen=True)
class ReferenceStep:
    """One call of the PyTorch model, and its answer.

    Args:
        input_ids (`torch.Tensor` of shape `[batch, length]`, int64): The tokens of this call.
        attention_mask (`torch.Tensor` of shape `[batch, past + length]`, int64): 0 on the left padding.
        position_ids (`torch.Tensor` of shape `[batch, length]`, int64): Counted from the first real token.
        logits (`torch.Tensor` of shape `[batch, length, vocabulary]`, float32): The model's answer.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    logits: torch.Tensor

    @property
    def is_real(self) -> np.ndarray:
        """`[batch, length]`, bool: where a token is no padding."""
        return self.attention_mask[:, -self.input_ids.shape[1] :].numpy() == 1


def reference_steps(model: PreTrainedModel, *, seed: int = 0) -> list[ReferenceStep]:
    """A prompt of three rows of different lengths, left-padded, with an empty past; then cached steps.

    The tokens are random, seeded. A prompt is longer than a short sliding window, so that the window is seen.

    Args:
        model ([`~transformers.PreTrainedModel`]): In float32 on the CPU, in evaluation mode.
        seed (`int`): Of the tokens.

    Returns:
        `list[ReferenceStep]`: The prompt, then steps of 1 or 3 tokens that continue it.
    """
    generator = torch.Generator().manual_seed(seed)
    config = text_config(model.config)
    window = getattr(config, "sliding_window", None) or 0
    limit = getattr(config, "max_position_embeddings", None) or 64
    length = max(2, min(max(16, window + 8 if window <= 256 else 0), limit - sum(_DECODE_STEPS)))
    padding = torch.tensor([0, length // 3, length - 1])
    attention_mask = (torch.arange(length)[None] >= padding[:, None]).long()
    cache = DynamicCache()
    names = input_names(model)
    steps: list[ReferenceStep] = []
    for size in (length, *_DECODE_STEPS):
        if steps:
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(padding), size)], dim=1)
        input_ids = torch.randint(config.vocab_size, (len(padding), size), generator=generator)
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -size:]
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        with torch.no_grad():
            # XGLM of transformers 4 adds to the positions in place, and takes no view of them
            given = {name: inputs[name].clone(memory_format=torch.contiguous_format) for name in names}
            output = model(**given, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(ReferenceStep(input_ids, attention_mask, position_ids, output.logits.float()))
    return steps


def relative_error(file: Path, steps: list[ReferenceStep]) -> float:
    """Run a file over the reference steps, with its own cache.

    Args:
        file (`Path`): The ONNX file.
        steps (`list[ReferenceStep]`): From [`reference_steps`].

    Returns:
        `float`: max|difference| / max|reference| over the logits of all real tokens of all steps; infinite if any
        logit, also of the padding, is not finite.

    Raises:
        ExportError: If ONNX Runtime cannot load or run the file.
    """
    try:
        return _compare(open_session(file), steps)
    except ExportError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise ExportError(
            Problem(
                file.name,
                str(error).strip().splitlines()[0][:300],
                f"ONNX Runtime {onnxruntime.__version__} cannot run it",
                "Update onnxruntime, or leave this file out of quantization.weights",
            )
        ) from error


def check_tolerance(file: Path, error: float, tolerance: float) -> None:
    """Check the relative error of a file.

    Raises:
        ExportError: If `error` is above `tolerance`, or not finite.
    """
    if not error <= tolerance:
        raise ExportError(
            Problem(
                file.name,
                error,
                f"its logits differ from PyTorch's by more than the tolerance, max|difference| / max|logit| <= {tolerance:g}"
                if np.isfinite(error)
                else "its logits are not all finite",
                "Keep the PyTorch checkpoint and report the model; a larger export.tolerance only hides the difference",
            )
        )


def _compare(session: onnxruntime.InferenceSession, steps: list[ReferenceStep]) -> float:
    shapes = {value.name: value.shape for value in session.get_inputs()}
    num_layers = sum(name.startswith("past_key_values.") for name in shapes) // 2
    past_names = cache_names("past_key_values", num_layers)
    outputs = ["logits", *cache_names("present", num_layers)]
    batch = steps[0].input_ids.shape[0]
    past = [np.zeros((batch, shapes[name][1], 0, shapes[name][3]), np.float32) for name in past_names]
    difference = largest = 0.0
    row_by_row = FUSED_ATTENTION in session.get_modelmeta().custom_metadata_map
    for step in steps:
        feeds = {name: getattr(step, name).numpy() for name in shapes if name not in past_names}
        feeds |= dict(zip(past_names, past, strict=True))
        if row_by_row and step.input_ids.shape[1] > 1 and past[0].shape[2] > 0:
            rows = [session.run(outputs, {n: v[i : i + 1] for n, v in feeds.items()}) for i in range(batch)]
            logits, *past = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        else:
            logits, *past = session.run(outputs, feeds)
        if not np.isfinite(logits).all():
            return float("inf")
        reference = step.logits.numpy()[step.is_real]
        difference = max(difference, float(np.abs(logits[step.is_real] - reference).max()))
        largest = max(largest, float(np.abs(reference).max()))
    return difference / largest
