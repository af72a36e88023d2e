"""The kinds of weights that a model is written with, and what each is called in files, runtimes and the report."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """One kind of weights.

    Args:
        name (`str`): In a configuration and in the report.
        bits (`int`): That a weight takes, without its share of a scale.
        onnx_file (`str`): Name of the ONNX file, the one that Optimum and transformers.js look for.
        row_name (`str`): Of the ONNX file's row in the report's table.
        transformers_js (`str`): transformers.js's `dtype`.
        quanto (`str` or `None`): optimum-quanto's `qtype`; `None` for weights that are not rounded.
    """

    name: str
    bits: int
    onnx_file: str
    row_name: str
    transformers_js: str
    quanto: str | None = None

    @property
    def quanto_folder(self) -> str:
        """Where the optimum-quanto checkpoint lies in the output folder."""
        return f"quanto-{self.name}"


FLOAT32 = Precision("float32", 32, "model.onnx", "onnx", "fp32")
INT8 = Precision("int8", 8, "model_quantized.onnx", "onnx int8", "q8", "qint8")
INT4 = Precision("int4", 4, "model_q4.onnx", "onnx int4", "q4", "qint4")
PRECISIONS = {precision.name: precision for precision in (FLOAT32, INT8, INT4)}
# the ones that weights are rounded to: what `quantization.weights` may name
QUANTIZED = tuple(name for name, precision in PRECISIONS.items() if precision.quanto is not None)
