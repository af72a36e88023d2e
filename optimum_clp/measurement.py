"""The rows of the report's table: what each model or file weighs, says and takes."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from .architecture import num_layers
from .evaluation import evaluate_tokens, measure_speed
from .runtime import OnnxCausalLM
from .surgery import count_bytes, count_parameters
from .teacher import DenseOutputs

ROW_NAMES = {"float32": "onnx", "int8": "onnx int8", "int4": "onnx int4"}
PROMPT_TOKENS = 128
NEW_TOKENS = 32


class Measurements:
    """Collects the `evaluation` section of the report.

    Args:
        tokens (`Tensor`): int64 `[rows, length]`, the test rows.
        text (`str`): What they are, in a few words.
        dense (`PreTrainedModel` or `None`): For KL and agreement; `None` leaves these out.
        batch_size (`int`): Rows in one forward pass.
        quiet (`bool`): No progress bars.
    """

    def __init__(self, tokens: Tensor, text: str, dense: PreTrainedModel | None, *, batch_size: int = 8, quiet: bool):
        self.tokens, self.text, self.batch_size, self.quiet = tokens, text, batch_size, quiet
        self.reference = None if dense is None else DenseOutputs(dense, tokens, batch_size=batch_size, quiet=quiet)
        self.rows: list[dict[str, Any]] = []

    def add_model(self, name: str, model: PreTrainedModel) -> None:
        """Measure what a PyTorch model says."""
        self._add(name, "PyTorch", model, num_layers(model.config), count_parameters(model), count_bytes(model))

    def add_files(self, folder: Path, export: dict[str, Any], model: PreTrainedModel) -> None:
        """Measure what the ONNX files of `folder` say; `model` is the one that they were made from."""
        for entry in export["files"]:
            session = OnnxCausalLM.from_pretrained(folder, entry["file"])
            layers, parameters = num_layers(model.config), count_parameters(model)
            self._add(ROW_NAMES[entry["weights"]], "ONNX Runtime", session, layers, parameters, entry["bytes"])

    def add_speed(self, models: dict[str, Callable[[], Any]]) -> None:
        """Measure the speed of rows that are there, interleaved; `models` gives each row's model when it is called."""
        prompt = self.tokens[:1, :PROMPT_TOKENS]
        speeds = measure_speed(models, prompt, new_tokens=NEW_TOKENS, quiet=self.quiet)
        for row in self.rows:
            if row["name"] in speeds:
                row["prefill_tokens_per_second"] = speeds[row["name"]].prefill_tokens_per_second
                row["decode_tokens_per_second"] = speeds[row["name"]].decode_tokens_per_second
        gc.collect()

    def to_dict(self) -> dict[str, Any]:
        """The `evaluation` section of the report."""
        return {"text": self.text, "rows": self.rows}

    def _add(self, name: str, runtime: str, model: Any, layers: int, parameters: int, size: int) -> None:
        found = evaluate_tokens(
            model, self.tokens, reference=self.reference, batch_size=self.batch_size, quiet=self.quiet
        )
        self.rows = [row for row in self.rows if row["name"] != name]
        self.rows.append(
            {
                "name": name,
                "runtime": runtime,
                "num_layers": layers,
                "num_parameters": parameters,
                "bytes": size,
                "perplexity": found.perplexity,
                "kl": found.kl,
                "top1_agreement": found.top1_agreement,
                "num_tokens": found.num_tokens,
                "prefill_tokens_per_second": None,
                "decode_tokens_per_second": None,
            }
        )
