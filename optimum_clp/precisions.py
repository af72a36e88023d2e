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
        quanto (`str` or `None`): optimum-quanto's `qtype`; `None` where it has none.
        floats (`int`): Bits of what is no integer: scales and norms, activations and the cache; 32 or 16.
    """

    name: str
    bits: int
    onnx_file: str
    row_name: str
    transformers_js: str
    quanto: str | None = None
    floats: int = 32

    @property
    def is_rounded(self) -> bool:
        """Whether weights are integers in it."""
        return self.bits < self.floats

    @property
    def quanto_folder(self) -> str:
        """Where the optimum-quanto checkpoint lies in the output folder."""
        return f"quanto-{self.name}"


FLOAT32 = Precision("float32", 32, "model.onnx", "onnx", "fp32")
FLOAT16 = Precision("float16", 16, "model_fp16.onnx", "onnx float16", "fp16", floats=16)
INT8 = Precision("int8", 8, "model_quantized.onnx", "onnx int8", "q8", "qint8")
INT4 = Precision("int4", 4, "model_q4.onnx", "onnx int4", "q4", "qint4")
INT4_FLOAT16 = Precision("int4_float16", 4, "model_q4f16.onnx", "onnx int4 float16", "q4f16", floats=16)
PRECISIONS = {precision.name: precision for precision in (FLOAT32, FLOAT16, INT8, INT4, INT4_FLOAT16)}
# what `quantization.weights` may name: the files beside the float32 one
BESIDE_FLOAT32 = tuple(name for name in PRECISIONS if name != FLOAT32.name)
# of these the ones that optimum-quanto has too; both are what is made if nothing is said
QUANTIZED = tuple(name for name, precision in PRECISIONS.items() if precision.quanto is not None)
