import json
from types import SimpleNamespace

import pytest
from transformers import BloomConfig, GenerationConfig, LlamaConfig

from optimum_clp.doors import RUNTIMES
from optimum_clp.exporters.export import write_runtime_configs
from optimum_clp.exporters.result import ExportedFile, ExportResult
from optimum_clp.exporters.runtimes.genai import Genai, genai_config, genai_obstacle
from optimum_clp.exporters.runtimes.transformers_js import TransformersJs
from optimum_clp.precisions import PRECISIONS

TOKENS = {"input_ids": ("batch", "length"), "attention_mask": ("batch", "total"), "position_ids": ("batch", "length")}
FILE = "onnx/model_q4.onnx"


def inputs(*layers, tokens=tuple(TOKENS)):
    """Layers as `(heads, size of keys, size of values)`."""
    cache = {}
    for i, (heads, key, value) in enumerate(layers):
        cache[f"past_key_values.{i}.key"] = ("batch", heads, "past", key)
        cache[f"past_key_values.{i}.value"] = ("batch", heads, "past", value)
    return {**{name: TOKENS[name] for name in tokens}, **cache}


def llama(**settings):
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 7, "vocab_size": 97}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    return LlamaConfig(**{**shape, **tokens, "max_position_embeddings": 64, **settings})


def result(*weights, inputs=None, **settings):
    """An export of files of these kinds."""
    files = [
        ExportedFile(f"onnx/{PRECISIONS[name].onnx_file}", name, 1, 0, 0, PRECISIONS[name].bits, 0.0, 0.0)
        for name in weights
    ]
    return ExportResult(21, tuple(files), {}, inputs or {}, **settings)


def model(config, generation_config=None):
    return SimpleNamespace(config=config, generation_config=generation_config)


def test_what_the_file_has_comes_from_the_file():
    made = genai_config(llama(), None, inputs((2, 8, 8), (2, 8, 8), (2, 8, 8)), FILE, False)["model"]
    decoder = made["decoder"]
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (3, 2, 8)
    assert (decoder["hidden_size"], decoder["num_attention_heads"], decoder["filename"]) == (32, 4, FILE)
    assert (made["type"], made["vocab_size"], made["context_length"]) == ("decoder", 97, 64)
    assert set(decoder["inputs"]) == {*TOKENS, "past_key_names", "past_value_names"}
    assert decoder["inputs"]["past_key_names"] % 2 == "past_key_values.2.key"
    assert decoder["outputs"]["present_value_names"] % 0 == "present.0.value"


def test_position_ids_are_named_only_if_the_file_takes_them():
    config = BloomConfig(hidden_size=32, n_head=4, vocab_size=97)
    made = genai_config(config, None, inputs((4, 8, 8), tokens=("input_ids", "attention_mask")), FILE, False)["model"]
    assert "position_ids" not in made["decoder"]["inputs"]
    assert made["context_length"] == 2048


def test_tokens_and_search_are_the_generation_configuration():
    generation = GenerationConfig(eos_token_id=[2, 5], do_sample=True, temperature=0.7, top_k=20, top_p=0.8)
    made = genai_config(llama(), generation, inputs((2, 8, 8)), FILE, False)
    model, search = made["model"], made["search"]
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, [2, 5], 2)
    assert (search["do_sample"], search["temperature"], search["top_k"], search["top_p"]) == (True, 0.7, 20, 0.8)
    assert (search["max_length"], search["num_beams"], search["repetition_penalty"]) == (64, 1, 1.0)
    assert search["past_present_share_buffer"] is False
    greedy = genai_config(llama(pad_token_id=0), None, inputs((2, 8, 8)), FILE, False)
    assert greedy["model"]["pad_token_id"] == 0 and greedy["search"]["do_sample"] is False


def test_entries_of_the_session_are_handed_on():
    entries = {"session.qdq_matmulnbits_accuracy_level": "1"}
    decoder = genai_config(llama(), None, inputs((2, 8, 8)), FILE, False, entries)["model"]["decoder"]
    assert decoder["session_options"] == {"log_id": "onnxruntime-genai", "provider_options": [], **entries}


@pytest.mark.parametrize(("context_length", "expected"), [(2**20, True), (2**20 + 1, False)])
def test_a_shared_cache_is_used_up_to_a_gibibyte(context_length, expected):
    config = llama(max_position_embeddings=context_length)
    shapes = inputs(*[(2, 32, 32)] * 2)  # 1 KiB for each token
    assert genai_config(config, None, shapes, FILE, True)["search"]["past_present_share_buffer"] is expected
    assert genai_config(config, None, shapes, FILE, False)["search"]["past_present_share_buffer"] is False


def test_layers_may_differ_but_keys_and_values_may_not(tmp_path):
    different = inputs((4, 8, 8), (2, 16, 16))
    assert genai_obstacle(different) is None
    exported = result("float32", "int4", "int8", inputs=different, appends_in_place=True, session_entries={"a": "b"})
    assert Genai().obstacle(model(llama()), exported) is None
    Genai().write(tmp_path, model(llama()), exported)
    assert json.loads((tmp_path / "genai_config.json").read_text()) == genai_config(
        llama(), None, different, FILE, True, {"a": "b"}
    )


@pytest.mark.parametrize("values", [(2, 16, 8), (2, 8, 16)])
def test_values_of_another_size_than_keys_get_no_file(tmp_path, values):
    exported = result("int4", inputs=inputs((2, 8, 8), values))
    assert "entry 1" in Genai().obstacle(model(llama()), exported)
    (tmp_path / "config.json").write_text("{}")
    obstacles = write_runtime_configs(tmp_path, model(llama()), exported)
    assert obstacles == {name: RUNTIMES.get(name)().obstacle(model(llama()), exported) for name in RUNTIMES}
    assert obstacles["transformers_js"] is None
    assert not (tmp_path / "genai_config.json").exists()


def test_transformers_js_is_told_the_default_file_and_the_data_files(tmp_path):
    (tmp_path / "onnx").mkdir()
    stale = {"use_external_data_format": True, "kv_cache_dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "transformers.js_config": stale}))
    TransformersJs().write(tmp_path, model(llama()), result("float32", "int8", "int4"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"model_type": "llama", "transformers.js_config": {"dtype": "q4"}}
    (tmp_path / "onnx" / "model.onnx_data").touch()
    TransformersJs().write(tmp_path, model(llama()), result("float32"))
    config = json.loads((tmp_path / "config.json").read_text())["transformers.js_config"]
    assert config == {"dtype": "fp32", "use_external_data_format": {"model.onnx": 1}}
