"""Who answers: the dense model, the cut one, and one of its ONNX files, as far as they can be had."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..architecture.lookup import context_limit
from ..argument_types import check_arguments
from ..checkpoint.loading import load_model, load_tokenizer
from ..errors import ConfigurationError, ModelError
from ..evaluation.prompts import Prompt
from ..evaluation.rendering import rendered_prompts, template_obstacle
from ..own_state import in_own_state
from ..precisions import PRECISIONS
from ..report.hub import written_file
from ..report.origin import base_name
from ..report.report import REPORT_NAME, CLPReport
from ..runtime.causal_lm import OnnxCausalLM

# the first of these that a folder has is what a device would run
_PREFERRED = ("int4", "int8", "float32", "int4_float16", "float16")


@dataclass(frozen=True)
class Speaker:
    """A model that answers.

    Args:
        name (`str`): As in the rows of a report: `"dense"`, `"cut"`, `"tuned"`, `"onnx int4"`; `"model"` for a folder
            without a report.
        model: Called like a causal language model of transformers: one of PyTorch, or an [`OnnxCausalLM`].
        source (`str`): Where it is from, for a reader.
    """

    name: str
    model: Any
    source: str


@dataclass(frozen=True)
class Speakers:
    """All that answer, with the tokenizer that they share.

    Args:
        all (`tuple[Speaker, ...]`): At least one.
        tokenizer (`PreTrainedTokenizerBase`): Of the folder.
        left_out (`tuple[str, ...]`): Who is not there, and why: a sentence each.
    """

    all: tuple[Speaker, ...]
    tokenizer: PreTrainedTokenizerBase
    left_out: tuple[str, ...] = ()

    @property
    def continues(self) -> str | None:
        """Why texts are gone on with instead of questions answered; `None` for a chat model."""
        return template_obstacle(self.tokenizer)

    def named(self, name: str) -> Speaker:
        """One of them.

        Raises:
            ConfigurationError: If there is none of this name.
        """
        for speaker in self.all:
            if speaker.name == name:
                return speaker
        known = ", ".join(speaker.name for speaker in self.all)
        raise ConfigurationError.of("speaker", name, f"there is none of this name, only {known}", "Name one of these")

    def tokens_of(self, prompt: Prompt, speaker: Speaker, new_tokens: int = 1) -> tuple[int, ...]:
        """What a speaker is given: a conversation through the chat template; of a base model the last words, as they are.

        Args:
            prompt ([`Prompt`]): The turns so far.
            speaker ([`Speaker`]): Whose context must hold them.
            new_tokens (`int`): Room that is left for the answer.

        Raises:
            ConfigurationError: If they are longer than the model's context leaves room for, or the template refuses them.
        """
        limit = context_limit(speaker.model.config)
        longest = None if limit is None else max(1, limit - new_tokens)
        if self.continues is None:
            (asked,) = rendered_prompts([prompt], self.tokenizer, longest)
            return asked.ids
        ids = tuple(self.tokenizer(prompt.last_words, verbose=False)["input_ids"])
        if not ids or (longest is not None and len(ids) > longest):
            rule = f"it has {len(ids)} tokens; the model takes 1 to {longest}, and its answer {new_tokens} more"
            raise ConfigurationError.of("text", prompt.last_words, rule, "Give a shorter text")
        return ids


@check_arguments
@in_own_state
def open_speakers(
    folder: str | os.PathLike,
    *,
    dense: str | os.PathLike | None = None,
    file_name: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    token: str | bool | None = None,
    dtype: str = "auto",
    device: str | None = None,
    attn_implementation: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    quiet: bool = False,
) -> Speakers:
    """Load all that can answer for an output folder; whoever is missing is left out with a word.

    Args:
        folder (`str` or `os.PathLike`): A folder that this package wrote, or a Hub id of one; also a plain checkpoint.
        dense (`str` or `os.PathLike`, *optional*): The dense model; by default the one that the report names.
        file_name (`str`, *optional*): The ONNX file that answers; by default the int4 one, else int8, else float.
        tokenizer (`str` or `os.PathLike`, *optional*): If it does not lie in the folder.
        token (`str` or `bool`, *optional*): For private or gated repositories.
        dtype (`str`): Of the PyTorch models.
        device (`str`, *optional*): Of the PyTorch models.
        attn_implementation (`str`, *optional*): Of the PyTorch models, as in transformers.
        cache_dir (`str` or `os.PathLike`, *optional*): Where files of the Hub are kept; by default transformers' cache.
        quiet (`bool`): No progress bars.

    Raises:
        ModelError: If the tokenizer, or what was named (`dense`, `file_name`), cannot be read; or nobody is there.
    """
    name = os.fspath(folder)
    record = written_file(name, REPORT_NAME, None, token, cache_dir)
    report = CLPReport.load(record) if record else CLPReport()
    hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir}
    reading = {"dtype": dtype, "device_map": device, "attn_implementation": attn_implementation, "quiet": quiet}
    found = _Found(hub, reading)
    words = load_tokenizer(name if tokenizer is None else tokenizer, **hub)
    base = report.base_model or {}
    if dense is not None:
        found.checkpoint("dense", os.fspath(dense), None, required=True)
    elif report.cut is not None:
        found.dense_of(base)
    own = "model" if report.cut is None else "tuned" if report.tuning else "cut"
    files = _files(name, report)
    chosen = file_name or next((files[kind] for kind in _PREFERRED if kind in files), None)
    found.checkpoint(own, name, None, required=chosen is None)
    if chosen is not None:
        kind = next((kind for kind, file in files.items() if file == chosen), None)
        row = "onnx" if kind is None else PRECISIONS[kind].row_name
        found.file(row, name, chosen, required=file_name is not None)
    else:
        found.left_out.append("There is no ONNX file in the folder: `optimum-clp export` writes them.")
    if not found.speakers:
        rule = f"nobody in it can answer ({' '.join(found.left_out)})"
        raise ModelError.of("folder", name, rule, "Give a folder that optimum-clp wrote")
    return Speakers(tuple(found.speakers), words, tuple(found.left_out))


class _Found:
    """Who is there so far, and who is not."""

    def __init__(self, hub: dict[str, Any], reading: dict[str, Any]):
        self.hub, self.reading = hub, reading
        self.speakers: list[Speaker] = []
        self.left_out: list[str] = []

    def dense_of(self, base: dict[str, Any]) -> None:
        if base.get("name_or_path"):
            path, revision = base["name_or_path"], base.get("revision")
            self.checkpoint("dense", path, revision, required=False, source=base_name(base))
        else:
            self.left_out.append("The report does not name the dense model: --dense does.")

    def checkpoint(
        self, name: str, path: str, revision: str | None, *, required: bool, source: str | None = None
    ) -> None:
        try:
            model = load_model(path, revision=revision, **self.hub, **self.reading)
        except ModelError as error:
            self._missed(name, error, required)
        else:
            self.speakers.append(Speaker(name, model, source or Path(path).name))

    def file(self, name: str, folder: str, file_name: str, *, required: bool) -> None:
        try:
            model = OnnxCausalLM.from_pretrained(folder, file_name, **self.hub)
        except ModelError as error:
            self._missed(name, error, required)
        else:
            self.speakers.append(Speaker(name, model, file_name))

    def _missed(self, name: str, error: ModelError, required: bool) -> None:
        if required:
            raise error
        self.left_out.append(f"{name} is left out: {error.problems[0].rule}.")


def _files(folder: str, report: CLPReport) -> dict[str, str]:
    """The ONNX files by their weights: those of the report, or those that lie there under their usual names."""
    entries: Sequence[dict[str, Any]] = (report.export or {}).get("files", ())
    if entries:
        return {entry["weights"]: entry["file"] for entry in entries if entry["weights"] in PRECISIONS}
    usual = {kind: f"onnx/{precision.onnx_file}" for kind, precision in PRECISIONS.items()}
    return {kind: file for kind, file in usual.items() if (Path(folder) / file).is_file()}
