"""A runtime."""

import json
from pathlib import Path

from transformers import PreTrainedModel

from optimum_clp.exporters.result import ExportResult


class Reader:
    """It reads `toy.json`."""

    def obstacle(self, model: PreTrainedModel, result: ExportResult) -> str | None:
        return None if any(file.weights == "int4" for file in result.files) else "it runs int4 files alone"

    def write(self, folder: Path, model: PreTrainedModel, result: ExportResult) -> None:
        content = {"file": result.smallest.file, "layers": model.config.num_hidden_layers}
        (folder / "toy.json").write_text(json.dumps(content), encoding="utf-8")
