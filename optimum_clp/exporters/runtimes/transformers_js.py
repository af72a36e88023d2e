"""What transformers.js wants to be told about an exported folder, in its `config.json`."""

import json
from pathlib import Path
from typing import Any

from ...checkpoint.files import write_json

_KEY = "transformers.js_config"
_DTYPES = {"float32": "fp32", "int8": "q8", "int4": "q4"}


def write_transformers_js_config(folder: Path, weights: str) -> None:
    """Write `transformers.js_config` to `config.json`: which file to take by default, and which have a data file.

    Without it a browser asks for the int8 file, and Node for the float file, whether they are there or not. Caches are
    float32, which transformers.js takes for granted. Python's transformers keeps the entry and makes nothing of it;
    what the dense model's `config.json` says of the dense model's files is replaced.

    Args:
        folder (`Path`): With `config.json` and `onnx/`.
        weights (`str`): Of the file to take by default: `"float32"`, `"int8"` or `"int4"`.
    """
    content: dict[str, Any] = {"dtype": _DTYPES[weights]}
    split = [path.name.removesuffix("_data") for path in sorted((folder / "onnx").glob("*.onnx_data"))]
    if split:
        content["use_external_data_format"] = dict.fromkeys(split, 1)
    file = folder / "config.json"
    write_json(file, {**json.loads(file.read_text(encoding="utf-8")), _KEY: content})
