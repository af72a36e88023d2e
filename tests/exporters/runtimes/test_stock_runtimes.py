"""The exported folder in other people's runtimes: the same greedy tokens as in `OnnxCausalLM`.

onnxruntime-genai is tried where it is installed. The others are told where they are: CLP_NODE_MODULES names a node_modules
folder with @huggingface/transformers 4, and CLP_OPTIMUM_PYTHON an interpreter with the extra `onnx`.
"""

import functools
import http.server
import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_onnx import onnx_test_model, small_zoo_model
from zoo import ZOO

from optimum_clp import CLPConfig, OnnxCausalLM
from optimum_clp.checkpoint.loading import load_model, load_tokenizer
from optimum_clp.checkpoint.saving import save_configs, save_tokenizer
from optimum_clp.configuration.stages import ExportConfig, QuantizationConfig
from optimum_clp.exporters.export import export_onnx, write_runtime_configs
from optimum_clp.precisions import PRECISIONS

DENSE = Path(__file__).parents[3] / "benchmarks" / "models" / "stories-llama-16l"
PROMPTS = ["Once upon a time", "The dog", "Tim and Sue went to the park"]
FILES = {"fp32": "model.onnx", "q8": "model_quantized.onnx", "q4": "model_q4.onnx"}
HALVES = {"fp16": "model_fp16.onnx", "q4f16": "model_q4f16.onnx"}
NEW_TOKENS = 30
NODE_MODULES = os.environ.get("CLP_NODE_MODULES")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NODE = """
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
const [modules, folder, dtype, length, ...prompts] = process.argv.slice(2);
const entry = createRequire(modules + "/index.js").resolve("@huggingface/transformers");
const { AutoModelForCausalLM, AutoTokenizer, env } = (await import(pathToFileURL(entry))).default;
env.allowRemoteModels = false;
env.localModelPath = "";
const tokenizer = await AutoTokenizer.from_pretrained(folder);
const model = await AutoModelForCausalLM.from_pretrained(folder, dtype === "default" ? {} : { dtype });
const found = [];
for (const prompt of prompts) {
  const output = await model.generate({ ...(await tokenizer(prompt)), max_new_tokens: +length, do_sample: false });
  found.push(output.tolist()[0].map(Number));
}
console.log(JSON.stringify(found));
"""
# the build of ONNX Runtime that transformers.js takes by default, BUILD is ".asyncify", has GatherBlockQuantized for WebGPU alone
PAGE = """<!doctype html>
<script type="module">
let found = {};
try {
  const { AutoModelForCausalLM, AutoTokenizer, env } =
    await import("/node_modules/@huggingface/transformers/dist/transformers.js");
  Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, localModelPath: "/", useBrowserCache: false });
  const runtime = "/node_modules/onnxruntime-web/dist/ort-wasm-simd-threadedBUILD";
  env.backends.onnx.wasm.wasmPaths = { mjs: runtime + ".mjs", wasm: runtime + ".wasm" };
  const tokenizer = await AutoTokenizer.from_pretrained("model");
  for (const dtype of DTYPES) {
    const model = await AutoModelForCausalLM.from_pretrained("model", { dtype, device: "wasm" });
    const inputs = await tokenizer("PROMPT");
    const output = await model.generate({ ...inputs, max_new_tokens: LENGTH, do_sample: false });
    found[dtype] = output.tolist()[0].map(Number);
  }
} catch (error) {
  found = { error: String(error) };
}
await fetch("/result", { method: "POST", body: JSON.stringify(found) });
</script>"""
OPTIMUM = """
import json, sys
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer
folder, length, files, prompts = sys.argv[1], int(sys.argv[2]), *map(json.loads, sys.argv[3:])
tokenizer, found = AutoTokenizer.from_pretrained(folder), {}
for name in files:
    model = ORTModelForCausalLM.from_pretrained(folder, subfolder="onnx", file_name=name, use_cache=True)
    inputs = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
    found[name] = [model.generate(**i, max_new_tokens=length, do_sample=False)[0].tolist() for i in inputs]
print(json.dumps(found))
"""


def write_folder(model, tokenizer, folder, format="contrib", logits_to_keep=0, **quantization):
    """The folder of `CLPPruner.export`, without its records."""
    save_configs(model, folder)
    save_tokenizer(tokenizer, folder)
    export = ExportConfig(format=format, logits_to_keep=logits_to_keep)
    settings = export, QuantizationConfig(method="rtn", **quantization)
    result = export_onnx(model, folder, *settings, quiet=True)
    assert set(write_runtime_configs(folder, model, result).values()) == {None}


@functools.cache
def stories(logits_to_keep=0):
    """The folder of stories-llama-16l, and for each of its files what `OnnxCausalLM` makes of the prompts."""
    temporary = tempfile.TemporaryDirectory()
    folder, tokenizer = Path(temporary.name), load_tokenizer(DENSE)
    weights = ["int8", "int4", "int4_float16", "float16"]
    write_folder(load_model(DENSE, quiet=True), tokenizer, folder, logits_to_keep=logits_to_keep, weights=weights)
    tokens = {}
    for dtype, name in (FILES | HALVES).items():
        model = OnnxCausalLM.from_pretrained(folder, f"onnx/{name}")
        tokens[dtype] = [greedy(model, tokenizer(prompt).input_ids) for prompt in PROMPTS]
    return folder, tokens, temporary


def greedy(model, ids, length=NEW_TOKENS):
    mask = torch.ones(1, len(ids), dtype=torch.long)
    output = model.generate(torch.tensor([ids]), attention_mask=mask, max_new_tokens=length, do_sample=False)
    return output[0].tolist()


def genai_tokens(genai, folder, ids, length=NEW_TOKENS):
    """Greedy continuation by onnxruntime-genai; `ids` is one row, or rows of equal length."""
    rows = np.atleast_2d(np.array(ids, dtype=np.int32))
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=rows.shape[1] + length, batch_size=len(rows), do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(rows)
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(token) for token in generator.get_sequence(row)] for row in range(len(rows))]


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma", "mistral", "bloom", "gpt2"])
def test_genai_says_what_our_class_says(model_type, tmp_path):
    genai = pytest.importorskip("onnxruntime_genai")
    if model_type in ("gemma", "bloom", "gpt2"):
        model = small_zoo_model(next(tiny for tiny in ZOO if tiny.name == model_type))
    else:
        model = onnx_test_model(model_type, tied=True, num_layers=2, initializer_range=0.3)
    # a model that ends would leave little to compare
    model.config.eos_token_id = model.generation_config.eos_token_id = 96
    write_folder(model, None, tmp_path, weights=["int4"])
    ours = OnnxCausalLM.from_pretrained(tmp_path, "onnx/model_q4.onnx")
    generator = torch.Generator().manual_seed(0)
    for length in (1, 5, 19):
        ids = torch.randint(3, 96, (length,), generator=generator).tolist()
        expected = greedy(ours, ids, 20)
        # onnxruntime-genai keeps the token that ends a text to itself
        assert genai_tokens(genai, tmp_path, ids, 20)[0] in (expected, expected[:-1])


@pytest.mark.parametrize("accuracy_level", [1, 4])
def test_genai_runs_standard_operators_at_their_accuracy_level(accuracy_level, tmp_path):
    genai = pytest.importorskip("onnxruntime_genai")
    model = onnx_test_model("llama", tied=True, num_layers=2, initializer_range=0.3)
    write_folder(model, None, tmp_path, "qdq", weights=["int4"], accuracy_level=accuracy_level)
    ours = OnnxCausalLM.from_pretrained(tmp_path, "onnx/model_q4.onnx")
    ids = [3, 9, 27, 81, 5]
    generator = genai.Generator(loaded := genai.Model(str(tmp_path)), genai.GeneratorParams(loaded))
    generator.append_tokens(np.array([ids], dtype=np.int32))
    expected = ours(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(generator.get_logits().reshape(-1), expected[0, -1], atol=1e-5)


@pytest.mark.parametrize("weights", ["float16", "int4_float16"])
def test_genai_runs_files_with_a_cache_of_16_bits(weights, tmp_path):
    genai = pytest.importorskip("onnxruntime_genai")
    model = onnx_test_model("llama", tied=True, num_layers=2, initializer_range=0.3)
    model.config.eos_token_id = model.generation_config.eos_token_id = 96
    write_folder(model, None, tmp_path, weights=[weights])
    ours = OnnxCausalLM.from_pretrained(tmp_path, f"onnx/{PRECISIONS[weights].onnx_file}")
    ids = torch.randint(3, 96, (9,), generator=torch.Generator().manual_seed(0)).tolist()
    assert genai_tokens(genai, tmp_path, ids, 20)[0] in (expected := greedy(ours, ids, 20), expected[:-1])


def test_genai_takes_files_that_give_the_last_logits_alone(tmp_path):
    genai = pytest.importorskip("onnxruntime_genai")
    model = onnx_test_model("llama", tied=True, num_layers=2, initializer_range=0.3)
    model.config.eos_token_id = model.generation_config.eos_token_id = 96
    write_folder(model, None, tmp_path, logits_to_keep=1, weights=["int4"])
    ours = OnnxCausalLM.from_pretrained(tmp_path, "onnx/model_q4.onnx")
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0)).tolist()
    for row, found in zip(ids, genai_tokens(genai, tmp_path, ids, 20), strict=True):
        assert found[:27] in (expected := greedy(ours, row, 20), expected[:-1])


def test_genai_takes_rows_of_different_lengths(tmp_path):
    genai = pytest.importorskip("onnxruntime_genai")
    model = onnx_test_model("llama", tied=True, num_layers=2, initializer_range=0.3)
    model.config.eos_token_id = model.generation_config.eos_token_id = 96
    write_folder(model, None, tmp_path, weights=[])
    ours = OnnxCausalLM.from_pretrained(tmp_path)
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    # its own padding is on the right, and continuations follow it
    found = genai_tokens(genai, tmp_path, [rows[0], rows[1] + [0] * 3], 8)
    for row, tokens in zip(rows, found, strict=True):
        assert tokens[6:14] == greedy(ours, row, 8)[len(row) :]


@pytest.mark.slow
@pytest.mark.skipif(not NODE_MODULES or not shutil.which("node"), reason="needs node and CLP_NODE_MODULES")
@pytest.mark.parametrize(
    ("dtype", "logits_to_keep"), [*((dtype, 0) for dtype in FILES | HALVES), ("default", 0), ("q4", 1)]
)
def test_transformers_js_says_what_our_class_says(dtype, logits_to_keep, tmp_path):
    folder, expected, _ = stories(logits_to_keep)
    script = tmp_path / "run.mjs"
    script.write_text(NODE)
    command = ["node", str(script), NODE_MODULES, str(folder), dtype, str(NEW_TOKENS), *PROMPTS]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert json.loads(output) == expected["q4" if dtype == "default" else dtype]


def on_a_page(folder, build, dtypes, tmp_path):
    """What transformers.js on a page makes of the first prompt, for each dtype."""
    results = queue.Queue()

    class Handler(http.server.SimpleHTTPRequestHandler):
        extensions_map = {".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript"}
        extensions_map |= {".wasm": "application/wasm", "": "application/octet-stream"}

        def translate_path(self, path):
            root, _, rest = path.partition("?")[0].lstrip("/").partition("/")
            return str({"model": folder, "node_modules": Path(NODE_MODULES)}.get(root, tmp_path / root) / rest)

        def do_POST(self):
            results.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    page = PAGE.replace("PROMPT", PROMPTS[0]).replace("LENGTH", str(NEW_TOKENS))
    (tmp_path / "page.html").write_text(page.replace("BUILD", build).replace("DTYPES", json.dumps(list(dtypes))))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    address = f"http://127.0.0.1:{server.server_port}/page.html"
    browser = subprocess.Popen([CHROMIUM, *options, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        found = results.get(timeout=200)
    finally:
        browser.kill()
        browser.wait()
        server.shutdown()
    assert found.keys() == set(dtypes), found
    return found


needs_a_page = pytest.mark.skipif(not NODE_MODULES or not CHROMIUM, reason="needs Chromium and CLP_NODE_MODULES")


@pytest.mark.slow
@needs_a_page
def test_a_page_says_what_our_class_says(tmp_path):
    folder, expected, _ = stories()
    found = on_a_page(folder, "", FILES, tmp_path)
    assert found["fp32"] == expected["fp32"][0]
    # WebAssembly has other kernels for the quantized weights, whose rounding may tip a close decision
    prompt = len(load_tokenizer(DENSE)(PROMPTS[0]).input_ids)
    for dtype in ("q8", "q4"):
        assert len(found[dtype]) == prompt + NEW_TOKENS and len(set(found[dtype])) > 10


@pytest.mark.slow
@needs_a_page
def test_the_stock_build_on_a_page_runs_files_for_browsers(tmp_path):
    tokenizer = load_tokenizer(DENSE)
    model = load_model(DENSE, quiet=True)
    save_configs(model, tmp_path / "model")
    save_tokenizer(tokenizer, tmp_path / "model")
    config = CLPConfig(target="web", quantization={"method": "rtn"})
    result = export_onnx(model, tmp_path / "model", config.export, config.quantization, quiet=True)
    write_runtime_configs(tmp_path / "model", model, result)
    ours = OnnxCausalLM.from_pretrained(tmp_path / "model", "onnx/model_q4.onnx")
    found = on_a_page(tmp_path / "model", ".asyncify", ["q4"], tmp_path)
    # products in float32, as here
    assert found["q4"] == greedy(ours, tokenizer(PROMPTS[0]).input_ids)


@pytest.mark.slow
@pytest.mark.skipif("CLP_OPTIMUM_PYTHON" not in os.environ, reason="needs CLP_OPTIMUM_PYTHON")
@pytest.mark.parametrize("logits_to_keep", [0, 1])
def test_optimum_says_what_our_class_says(logits_to_keep, tmp_path):
    folder, expected, _ = stories(logits_to_keep)
    files = list(FILES.values())
    arguments = [str(folder), str(NEW_TOKENS), json.dumps(files), json.dumps(PROMPTS)]
    output = subprocess.run(
        [os.environ["CLP_OPTIMUM_PYTHON"], "-c", OPTIMUM, *arguments],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    ).stdout
    assert json.loads(output.splitlines()[-1]) == {name: expected[dtype] for dtype, name in FILES.items()}
