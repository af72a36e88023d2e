import json
import re
from pathlib import Path

import pytest
from tiny_models import tiny_config
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from optimum_clp.errors import ModelError
from optimum_clp.model_files import check_folder, check_model_file, read_model_file, safetensors_header

PUBLISHED = Path(__file__).parents[1] / "docs/published_shapes.json"


@pytest.mark.parametrize("model_type", sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES).intersection(CONFIG_MAPPING)))
def test_the_default_config_of_every_decoder_keeps_to_the_schema(model_type):
    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception as error:  # Gemma 4's assistant has no default config
        pytest.skip(f"no default config: {error}")
    check_model_file("config.json", json.loads(config.to_json_string(use_diff=False)), model_type)


def test_published_shapes_keep_to_the_schema():
    shapes = json.loads(PUBLISHED.read_text())
    assert len(shapes) > 5
    for name, shape in shapes.items():
        check_model_file("config.json", shape["config"], name)


@pytest.mark.parametrize(
    ("name", "key", "value", "rule"),
    [
        ("config.json", "num_hidden_layers", 10**9, "must be at most 1024"),
        ("config.json", "num_hidden_layers", 0, "must be at least 1"),
        ("config.json", "num_hidden_layers", 6.0, "must be a whole number or null"),
        ("config.json", "num_hidden_layers", "6", "must be a whole number or null"),
        ("config.json", "max_position_embeddings", -1, "must be at least 1"),
        ("config.json", "vocab_size", 10**12, "must be at most 16777216"),
        ("config.json", "hidden_size", 2**40, "must be at most 1048576"),
        ("config.json", "architectures", [1], "must be a string"),
        ("config.json", "text_config", {"num_hidden_layers": 10**9}, "must be at most 1024"),
        ("generation_config.json", "temperature", "hot", "must be a number or null"),
        ("generation_config.json", "top_k", [1], "must be a whole number or null"),
        ("generation_config.json", "eos_token_id", {"a": 1}, "must be a whole number or an array or null"),
        ("model.safetensors.index.json", "weight_map", [], "must be an object"),
        ("model.safetensors.index.json", "weight_map", {"a": 5}, "must be a string"),
        ("quanto_qmap.json", "a", 5, "must be an object"),
    ],
)
def test_values_that_cannot_be_are_named(name, key, value, rule, tmp_path):
    (tmp_path / name).write_text(json.dumps({key: value}))
    with pytest.raises(ModelError, match=rf"model is 'm': its {re.escape(name)} has {key}.* = .*, which {rule}"):
        read_model_file(tmp_path / name, "m")


def test_files_that_transformers_reads_by_itself_are_looked_at_before(tmp_path):
    check_folder(tmp_path, "m")
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match=r"its tokenizer_config.json is malformed \(it is nested more than 64 deep\)"):
        check_folder(tmp_path, "m")


@pytest.mark.parametrize(
    "header",
    [
        {"a": 5},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, -4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}},
        [1],
        "nested",
    ],
)
def test_safetensors_headers_are_checked(header, tmp_path):
    text = ("[" * 9000 if header == "nested" else json.dumps(header)).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    with pytest.raises(ModelError, match="its model.safetensors is truncated or is no safetensors file"):
        safetensors_header(tmp_path / "model.safetensors", "m")
    (tmp_path / "model.safetensors").write_bytes((2**63).to_bytes(8, "little") + text)
    with pytest.raises(ModelError, match="no header in its"):
        safetensors_header(tmp_path / "model.safetensors", "m")


def test_a_plain_config_is_read_as_it_is(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    expected = json.loads((tmp_path / "config.json").read_text())
    assert read_model_file(tmp_path / "config.json", "m") == expected
