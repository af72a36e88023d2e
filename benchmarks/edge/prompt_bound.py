"""How much of a prompt is matrix products, and so how much faster than PyTorch eager a file can be at most.

    OMP_NUM_THREADS=1 python -m benchmarks.edge.prompt_bound [--rounds 7]

Times, in turns: PyTorch's forward pass over a prompt of 256 tokens of `speed100m`; its linear layers alone, each called
once on its input; our files' whole graph; and the products of the same file alone, in one session, with nothing between
them. Needs the files that `speed.py` has made. One thread.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from transformers import AutoModelForCausalLM

from benchmarks import markdown
from benchmarks.folders import CACHE
from optimum_clp import OnnxCausalLM
from optimum_clp.precisions import PRECISIONS

FOLDER = CACHE / "edge" / "dense-ours"
FILES = {name: precision.onnx_file for name, precision in PRECISIONS.items()}
PROMPT = 256


def products_alone(file: Path) -> Callable[[], object]:
    """All products of a file with a stored matrix, each on an input of its own width, as one session."""
    graph = onnx.load(file).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    nodes: dict[str, onnx.NodeProto] = {}
    kept: dict[str, onnx.TensorProto] = {}
    inputs: dict[str, np.ndarray] = {}
    outputs: list[str] = []

    def is_constant(name: str) -> bool:
        return name in stored or name in maker and all(is_constant(other) for other in maker[name].input if other)

    def keep(name: str) -> None:
        if name in stored:
            kept[name] = stored[name]
        elif name in maker:
            for other in maker[name].input:
                keep(other)
            nodes.setdefault(name, maker[name])

    for node in graph.node:
        if node.op_type not in ("MatMul", "MatMulNBits") or not is_constant(node.input[1]):
            continue
        width = next((a.i for a in node.attribute if a.name == "K"), None) or width_of(node.input[1], stored, maker)
        for name in node.input[1:]:
            keep(name)
        given = f"x{width}"
        inputs[given] = np.random.default_rng(0).standard_normal((1, PROMPT, width)).astype(np.float32)
        product = onnx.NodeProto()
        product.CopyFrom(node)
        product.input[0], product.output[0] = given, f"product{len(outputs)}"
        nodes[product.output[0]] = product
        outputs.append(product.output[0])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name, x in inputs.items()]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    part = helper.make_graph(list(nodes.values()), "products", values, results, list(kept.values()))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(part, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, inputs)


def width_of(name: str, stored: dict, maker: dict) -> int:
    """Inputs of a float matrix, which may be a table that is transposed."""
    if name in stored:
        return stored[name].dims[0]
    node = maker[name]
    assert node.op_type == "Transpose", node.op_type
    return stored[node.input[0]].dims[1]


def linear_layers(model: torch.nn.Module) -> Callable[[], object]:
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {layer.in_features: torch.randn(1, PROMPT, layer.in_features) for layer in layers}
    return lambda: [layer(inputs[layer.in_features]) for layer in layers]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(CACHE / "speed100m").eval()
    ids = torch.randint(32000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    work: dict[str, Callable[[], object]] = {
        "PyTorch, whole": lambda: model(input_ids=ids, use_cache=True),
        "PyTorch, linear layers": linear_layers(model),
    }
    for weights, name in FILES.items():
        ours = OnnxCausalLM.from_pretrained(FOLDER, f"onnx/{name}", num_threads=1)
        work[f"{weights}, whole"] = lambda ours=ours: ours(input_ids=ids, use_cache=True)
        work[f"{weights}, products"] = products_alone(FOLDER / "onnx" / name)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(args.rounds + 1):
        for name, call in work.items():
            started = time.perf_counter()
            call()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    eager = seconds["PyTorch, whole"]
    rows = [["", "ms", "PyTorch eager / it"]]
    for name, found in seconds.items():
        ratios = [whole / own for whole, own in zip(eager, found, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append([name, f"{1000 * statistics.median(found):.0f}", spread])
    print(markdown.table(rows))


if __name__ == "__main__":
    main()
