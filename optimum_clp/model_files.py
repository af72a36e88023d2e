"""The JSON files of a model's folder, each with the schema that it is checked against before anything is built from it.

A schema says what would hang, overflow or be taken silently: counts have upper limits far above every published model's, and a
key that no schema names is transformers' own business. Values may be null wherever transformers writes null.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ModelError, shown
from .json_files import JsonProblem, check, parse, read_object

CONFIG, GENERATION_CONFIG, REMEDY = "config.json", "generation_config.json", "Fetch or save the model again"


def _or_null(kind: str, **bounds: Any) -> dict[str, Any]:
    return {"type": [kind, "null"], **bounds}


def _count(most: int, least: int = 0) -> dict[str, Any]:
    """A whole number; some models have one for each layer, in a list."""
    number = {"minimum": least, "maximum": most}
    return {"type": ["integer", "array", "null"], **number, "items": {"type": ["integer", "null"], **number}}


_TEXTS = {"type": ["array", "null"], "items": {"type": "string"}, "maxItems": 10_000}
_TOKEN = {"type": ["integer", "array", "null"], "items": {"type": "integer"}, "maxItems": 10_000, "maximum": 2**31}
# deep enough for every published model (DeepNet has 1000 layers), and built within seconds
MAX_LAYERS = 1024
_LAYERS = {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_LAYERS}
_WIDTH, _HEADS, _POSITIONS = _count(2**20), _count(2**14), _or_null("integer", minimum=1, maximum=2**31)
_TEXT_CONFIG: dict[str, Any] = {
    "model_type": _or_null("string", maxLength=200),
    "architectures": _TEXTS,
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), _LAYERS),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "ffn_dim", "head_dim"), _WIDTH
    ),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_kv_heads"), _HEADS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), _count(2**16)),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), _POSITIONS),
    "vocab_size": _or_null("integer", minimum=1, maximum=2**24),
    "sliding_window": _or_null("integer", minimum=-1, maximum=2**31),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _TOKEN),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), _or_null("number", exclusiveMinimum=0)),
    "rope_theta": _or_null("number", exclusiveMinimum=0),
    "initializer_range": _or_null("number", minimum=0),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "dropout"), _or_null("number", minimum=0, maximum=1)),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "auto_map", "quantization_config"), _or_null("object")),
    **dict.fromkeys(("torch_dtype", "dtype"), _or_null("string", maxLength=40)),
    "tie_word_embeddings": _or_null("boolean"),
    "is_encoder_decoder": _or_null("boolean"),
    "layer_types": {**_TEXTS, "maxItems": MAX_LAYERS},
}
_NUMBER, _WHOLE = _or_null("number"), _or_null("integer", minimum=-1, maximum=2**31)
_GENERATION: dict[str, Any] = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"), _NUMBER),
    **dict.fromkeys(("repetition_penalty", "length_penalty", "diversity_penalty", "guidance_scale"), _NUMBER),
    **dict.fromkeys(("top_k", "max_length", "max_new_tokens", "min_length", "min_new_tokens"), _WHOLE),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "no_repeat_ngram_size"), _WHOLE),
    **dict.fromkeys(("do_sample", "use_cache", "output_scores", "output_attentions"), _or_null("boolean")),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"), _TOKEN),
    "cache_implementation": _or_null("string", maxLength=200),
}
_NAMES = {"type": "string", "minLength": 1, "maxLength": 1000}
_TENSOR = {
    "type": "object",
    "required": ["dtype", "shape", "data_offsets"],
    "properties": {
        "dtype": {"type": "string", "maxLength": 20},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 16},
        "data_offsets": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2},
    },
}
_SCHEMAS: dict[str, dict[str, Any]] = {
    CONFIG: {
        "properties": _TEXT_CONFIG,
        "patternProperties": {"^(text|language|llm)_config$": {"properties": _TEXT_CONFIG}},
    },
    GENERATION_CONFIG: {"properties": _GENERATION},
    "model.safetensors.index.json": {
        "properties": {"weight_map": {"type": "object", "minProperties": 1, "additionalProperties": _NAMES}},
    },
    "quanto_qmap.json": {
        "additionalProperties": {"type": "object", "properties": {"weights": {"type": "string", "maxLength": 20}}},
    },
}
_SCHEMAS["pytorch_model.bin.index.json"] = _SCHEMAS["model.safetensors.index.json"]
HEADER_SCHEMA = {"properties": {"__metadata__": {"type": "object"}}, "additionalProperties": _TENSOR}
# safetensors' own limit
_MAX_HEADER = 10**8


def read_model_file(path: Path, model: Any) -> dict[str, Any]:
    """The JSON object in a file of the model called `model`, checked against the schema of files of that name.

    Raises:
        ModelError: If it cannot be read, is no JSON object, or has a value that cannot be.
    """
    try:
        return read_object(path, _SCHEMAS.get(path.name))
    except JsonProblem as problem:
        raise _error(path.name, model, problem) from problem


def check_model_file(name: str, content: Mapping[str, Any], model: Any) -> None:
    """Check content that was read elsewhere (on the Hub), as [`read_model_file`] does.

    Args:
        name (`str`): Of the file: `"config.json"`.
        content (`Mapping`): What it holds.
        model: What the model is called in the error.

    Raises:
        ModelError: Names the key, its value and its rule.
    """
    try:
        check(content, _SCHEMAS[name])
    except JsonProblem as problem:
        raise _error(name, model, problem) from problem


def check_folder(folder: Path, model: Any) -> None:
    """Check the files of a local folder that transformers reads by itself later: generation settings, tokenizer's settings.

    Raises:
        ModelError: As [`read_model_file`].
    """
    for name in (GENERATION_CONFIG, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            read_model_file(folder / name, model)


def safetensors_header(path: Path, model: Any) -> dict[str, dict[str, Any]]:
    """What a safetensors file says of its tensors: for each name `dtype`, `shape` and `data_offsets`.

    Raises:
        ModelError: If the file is truncated, or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= min(size - 8, _MAX_HEADER) else b""
    try:
        header = parse(text)
        if not isinstance(header, dict):
            raise JsonProblem("holds no JSON object")
        check(header, HEADER_SCHEMA)
    except JsonProblem as error:
        rule = (
            f"its {path.name} is truncated or is no safetensors file (no header in its {size} bytes: it {error.rule})"
        )
        raise ModelError.of("model", str(model), rule, "Fetch the model again") from error
    tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
    expected = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    if size != expected:
        rule = f"its {path.name} is truncated or damaged ({size} bytes, its header asks for {expected})"
        raise ModelError.of("model", str(model), rule, "Fetch the model again")
    return tensors


def _error(name: str, model: Any, problem: JsonProblem) -> ModelError:
    if problem.name:
        rule = f"its {name} has {problem.name} = {shown(problem.value, 60)}, which {problem.rule}"
        return ModelError.of("model", str(model), rule, "Correct that file, or fetch the model again")
    whole = problem.rule.startswith("holds")
    rule = f"its {name} {problem.rule}" if whole else f"its {name} is malformed (it {problem.rule})"
    return ModelError.of("model", str(model), rule, REMEDY)
