"""What a runtime is that runs an exported folder: whether it can, and what it wants to find there."""

from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel

from ..result import ExportResult


class Runtime(Protocol):
    """Something that runs the ONNX files by a description beside them; a class that is made without arguments."""

    def obstacle(self, model: PreTrainedModel, result: ExportResult) -> str | None:
        """Why it cannot run the files, or `None`.

        Args:
            model ([`~transformers.PreTrainedModel`]): The model that was exported.
            result ([`~exporters.result.ExportResult`]): The files.
        """

    def write(self, folder: Path, model: PreTrainedModel, result: ExportResult) -> None:
        """Write what it reads, in files of its own or under a key of its own in `config.json`; not called with an obstacle.

        Args:
            folder (`Path`): With `config.json` and the files of `result`.
            model ([`~transformers.PreTrainedModel`]): The model that was exported.
            result ([`~exporters.result.ExportResult`]): The files.
        """
