"""Comparison of an ONNX file, run by a plain ONNX Runtime session, with logits that were computed before.

It needs numpy and ONNX Runtime alone, so that a large file can be compared in a process without torch and the model:

    python -m optimum_clp.runtime.comparison FILE REFERENCE RESULT [in_place]
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import onnxruntime

from ..errors import ExportError
from .names import CACHE_KINDS, FUSED_ATTENTION, LOGITS_TO_KEEP, cache_names
from .session import chooses_positions, in_place_options, open_session


@dataclass(frozen=True)
class ReferenceStep:
    """One call of the PyTorch model, and its answer.

    Args:
        input_ids (`np.ndarray` of shape `[batch, length]`, int64): The tokens of this call.
        attention_mask (`np.ndarray` of shape `[batch, past + length]`, int64): 0 on the left padding.
        position_ids (`np.ndarray` of shape `[batch, length]`, int64): Positions of the tokens, 0 on padding.
        logits (`np.ndarray` of shape `[batch, kept, vocabulary]`, float32): The model's answer for the last `kept` tokens.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    position_ids: np.ndarray
    logits: np.ndarray

    @property
    def begins_text(self) -> bool:
        """Whether there is no past: the cache of an earlier step belongs to another text."""
        return self.attention_mask.shape[1] == self.input_ids.shape[1]

    @property
    def is_real(self) -> np.ndarray:
        """`[batch, kept]`, bool: where a token with kept logits is no padding."""
        return self.attention_mask[:, -self.logits.shape[1] :] == 1


def relative_error(file: Path, steps: Iterable[ReferenceStep], *, in_place: bool = False) -> float:
    """Run a file over reference steps, with its own cache.

    Args:
        file (`Path`): The ONNX file.
        steps (`Iterable[ReferenceStep]`): Texts one after the other, each in one step or several.
        in_place (`bool`): Leave the weights of a float file where they lie, see [`~runtime.session.in_place_options`].

    Returns:
        `float`: max|difference| / max|reference| over the kept logits of all real tokens of all steps; infinite if any
        logit, also of the padding, is not finite.

    Raises:
        ExportError: If ONNX Runtime cannot load or run the file, or it gives logits of other positions than it is asked for.
    """
    try:
        return _compare(open_session(file, in_place_options() if in_place else None, mapped=True), steps)
    except ExportError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise ExportError.of(
            file.name,
            str(error).strip().splitlines()[0][:300],
            f"ONNX Runtime {onnxruntime.__version__} cannot run it",
            "Update onnxruntime, or leave this file out of quantization.weights",
        ) from error


def write_steps(steps: Iterable[ReferenceStep], file: Path) -> None:
    """Write reference steps for another process.

    Args:
        steps (`Iterable[ReferenceStep]`): The steps.
        file (`Path`): Target, `*.npz`.
    """
    np.savez(file, **{f"{i}.{field.name}": getattr(s, field.name) for i, s in enumerate(steps) for field in fields(s)})


def read_steps(file: Path) -> Iterator[ReferenceStep]:
    """The steps that [`write_steps`] has written, read one at a time.

    Args:
        file (`Path`): From [`write_steps`].
    """
    names = [field.name for field in fields(ReferenceStep)]
    with np.load(file) as arrays:
        for index in range(len(arrays.files) // len(names)):
            yield ReferenceStep(**{name: arrays[f"{index}.{name}"] for name in names})


def write_result(file: Path, reference: Path, result: Path, *, in_place: bool = False) -> None:
    """Compare a file and write what came out: `{"error": ...}`, or `{"problem": {...}}` where there is an `ExportError`.

    Args:
        file (`Path`): The ONNX file.
        reference (`Path`): From [`write_steps`].
        result (`Path`): Target, JSON; made at the very end.
        in_place (`bool`): As in [`relative_error`].
    """
    found: dict
    steps = list(read_steps(reference))
    try:
        found = {"error": relative_error(file, steps, in_place=in_place)}
    except ExportError as error:
        found = {"problem": asdict(error.problems[0])}
    result.write_text(json.dumps(found), encoding="utf-8")


def read_result(result: Path) -> float:
    """What [`write_result`] has written.

    Returns:
        `float`: As from [`relative_error`].

    Raises:
        ExportError: The one that the other process met.
    """
    found = json.loads(result.read_text(encoding="utf-8"))
    if "problem" in found:
        raise ExportError.of(**found["problem"])
    return found["error"]


def empty_past(session: onnxruntime.InferenceSession, batch: int) -> list[np.ndarray]:
    """The cache's tensors of so many rows at the beginning of a text, in the graph's order: `[batch, heads, 0, size]`."""
    given = {value.name: value for value in session.get_inputs()}
    count = sum(name.startswith("past_key_values.") for name in given) // 2
    cache = [given[name] for name in cache_names("past_key_values", count)]
    return [np.zeros((batch, each.shape[1], 0, each.shape[3]), CACHE_KINDS.get(each.type)) for each in cache]


def _compare(session: onnxruntime.InferenceSession, steps: Iterable[ReferenceStep]) -> float:
    shapes = {value.name: value.shape for value in session.get_inputs()}
    num_layers = sum(name.startswith("past_key_values.") for name in shapes) // 2
    past_names = cache_names("past_key_values", num_layers)
    outputs = ["logits", *cache_names("present", num_layers)]
    past: list[np.ndarray] = []
    difference = largest = 0.0
    row_by_row = FUSED_ATTENTION in session.get_modelmeta().custom_metadata_map
    can_choose = chooses_positions(session)
    for index, step in enumerate(steps):
        batch, length = step.input_ids.shape
        kept = step.logits.shape[1]
        if step.begins_text:
            past = empty_past(session, batch)
        feeds = {name: getattr(step, name) for name in shapes if name not in past_names}
        feeds |= dict(zip(past_names, past, strict=True))
        chosen = {LOGITS_TO_KEEP: np.array(0 if kept == length else kept)} if can_choose else {}
        if row_by_row and length > 1 and not step.begins_text:
            rows = [session.run(outputs, {n: v[i : i + 1] for n, v in feeds.items()} | chosen) for i in range(batch)]
            logits, *past = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        else:
            logits, *past = session.run(outputs, feeds | chosen)
        answers = {kept: logits[:, -kept:]}
        if chosen and index == 0:
            (answers[1],) = session.run(["logits"], feeds | {LOGITS_TO_KEEP: np.array(1)})
        for count, answer in answers.items():
            if answer.shape[1] != count:
                raise ExportError.of(
                    "logits",
                    answer.shape,
                    f"the file was asked for the last {count} of {length} positions",
                    "Keep the PyTorch checkpoint and report the model",
                )
            if not np.isfinite(answer).all():
                return float("inf")
            is_real = step.is_real[:, -count:]
            reference = step.logits[:, -count:][is_real]
            difference = max(difference, float(np.abs(answer[is_real] - reference).max()))
            largest = max(largest, float(np.abs(reference).max()))
    return difference / largest


if __name__ == "__main__":
    write_result(*map(Path, sys.argv[1:4]), in_place=sys.argv[4:] == ["in_place"])
