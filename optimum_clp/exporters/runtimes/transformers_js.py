"""What transformers.js wants to be told about an exported folder, in its `config.json`."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ...checkpoint.files import write_json
from ...precisions import PRECISIONS
from ..result import ExportResult

_KEY = "transformers.js_config"


class TransformersJs:
    """transformers.js; a [`~exporters.runtimes.runtime.Runtime`]. It takes one file by itself, here the one with the fewest bits."""

    def obstacle(self, model: PreTrainedModel, result: ExportResult) -> str | None:
        if (least := result.smallest.least_onnxruntime) is None:
            return None
        return f"{result.smallest.file} has products of 2 bits, which are for ONNX Runtime {least} on CPUs: transformers.js has others"

    def write(self, folder: Path, model: PreTrainedModel, result: ExportResult) -> None:
        """Write `transformers.js_config` to `config.json`: which file to take by default, and which have a data file.

        Without it a browser asks for the int8 file, and Node for the float file, whether they are there or not. Caches are
        float32, which transformers.js takes for granted. Python's transformers keeps the entry and makes nothing of it;
        what the dense model's `config.json` says of the dense model's files is replaced.
        """
        content: dict[str, Any] = {"dtype": PRECISIONS[result.smallest.weights].transformers_js}
        split = [path.name.removesuffix("_data") for path in sorted((folder / "onnx").glob("*.onnx_data"))]
        if split:
            content["use_external_data_format"] = dict.fromkeys(split, 1)
        file = folder / "config.json"
        write_json(file, {**json.loads(file.read_text(encoding="utf-8")), _KEY: content})
