"""Peak resident memory of an export to ONNX, as a multiple of the model's size in float32, the model itself included.

    OMP_NUM_THREADS=1 python -m benchmarks.edge.export_memory FOLDER --heads untied --dtype float32 --weights int8 int4

The model is a LLaMA of about 620 million random weights (2.5 GB in float32), made in code, of few and wide layers or
("narrow") of many narrow ones. Prints one line of JSON; the files and `reference.npz`, logits of the model on tokens of
another seed than the check's, are left in FOLDER. The processes in which the files are compared with PyTorch are not counted. Needs Linux.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, LlamaConfig

from optimum_clp import QuantizationConfig
from optimum_clp.exporters.check import reference_steps
from optimum_clp.exporters.export import export_onnx
from optimum_clp.exporters.float32_copy import float32_copy
from optimum_clp.runtime.comparison import write_steps

# layers, hidden size, intermediate size, vocabulary; "narrow" is Qwen3-0.6B's shape
SHAPES = {
    "untied": (2, 4096, 9216, 32000),
    "tied": (3, 4096, 8192, 32000),
    "narrow": (28, 1024, 3072, 151936),
}
METHODS = ("rtn", "gptq", "quanto")


def build(heads: str, dtype: torch.dtype):
    """A model whose weights are made one by one, in `dtype`: no other copy was ever in memory."""
    layers, hidden, intermediate, vocabulary = SHAPES[heads]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=4096,
        tie_word_embeddings=heads != "untied",
    )
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        module, _, leaf = name.rpartition(".")
        values = torch.empty(parameter.shape, dtype=dtype)
        values = values.fill_(1) if parameter.ndim == 1 else values.uniform_(-0.03, 0.03)
        setattr(model.get_submodule(module), leaf, torch.nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    return model.eval()


def configurations() -> list[QuantizationConfig]:
    return [rounding(["int8", "int4"], method) for method in METHODS]


def rounding(weights: list[str], method: str) -> QuantizationConfig:
    return QuantizationConfig(weights=weights, method=method)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--heads", choices=SHAPES, default="untied")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--weights", nargs="*", default=["int8", "int4"])
    parser.add_argument("--method", default="rtn", choices=METHODS)
    args = parser.parse_args()
    model = build(args.heads, getattr(torch, args.dtype))
    float_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    started = time.perf_counter()
    quantization = rounding(args.weights, args.method)
    # the memory does not depend on how many batches of 8 rows there are
    calibration = torch.randint(32000, (16, 128), generator=torch.Generator().manual_seed(0))
    result = export_onnx(model, args.folder, quantization=quantization, calibration=calibration, quiet=True)
    seconds = time.perf_counter() - started
    # not getrusage, which also has the peak of the process that started this one
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    write_steps(reference_steps(float32_copy(model), seed=1), args.folder / "reference.npz")
    found = {
        "float_bytes": float_bytes,
        "export": peak / float_bytes,
        "seconds": seconds,
        "context": result.context,
        "errors": {file.weights: file.max_relative_error for file in result.files},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
