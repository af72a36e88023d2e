"""`genai_config.json`, from which onnxruntime-genai runs an exported folder as it is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from ...architecture.lookup import declared_context_length, text_config
from ...checkpoint.files import write_json
from ..result import ExportResult

GENAI_FILE = "genai_config.json"
# onnxruntime-genai's name for any decoder-only model; names of single model types switch on rules of their own
_DECODER = "decoder"
_PAST, _PRESENT = "past_key_values.%d", "present.%d"
_DEFAULT_CONTEXT_LENGTH = 2048
# onnxruntime-genai sets a shared cache aside for all of `max_length` at once
_MAX_SHARED_CACHE_BYTES = 2**30
# transformers' own defaults: its generation configuration may leave any of them open
_SEARCH = {
    "diversity_penalty": 0.0,
    "do_sample": False,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}


class Genai:
    """onnxruntime-genai; a [`~exporters.runtimes.runtime.Runtime`]. It takes one file by itself, the one with the fewest bits."""

    def obstacle(self, model: PreTrainedModel, result: ExportResult) -> str | None:
        return genai_obstacle(result.inputs)

    def write(self, folder: Path, model: PreTrainedModel, result: ExportResult) -> None:
        content = genai_config(
            model.config,
            model.generation_config,
            result.inputs,
            result.smallest.file,
            result.appends_in_place,
            result.session_entries,
        )
        write_json(folder / GENAI_FILE, content)


def genai_obstacle(inputs: Mapping[str, Sequence[Any]]) -> str | None:
    """Why onnxruntime-genai cannot run a file, or `None`.

    It reads the shape of each layer's keys from the file (layers may differ), and takes values to have the same.

    Args:
        inputs (`Mapping[str, Sequence]`): Name and shape of each input of the file.
    """
    for layer in range(_num_layers(inputs)):
        name = _PAST % layer
        keys, values = (tuple(inputs[f"{name}.{kind}"])[1::2] for kind in ("key", "value"))
        if keys != values:
            return (
                f"its cache has keys of {keys[0]} x {keys[1]} and values of {values[0]} x {values[1]} "
                f"(heads x size, entry {layer}), and onnxruntime-genai gives both the shape of the keys"
            )
    return None


def genai_config(
    config: PretrainedConfig,
    generation_config: GenerationConfig | None,
    inputs: Mapping[str, Sequence[Any]],
    file_name: str,
    appends_in_place: bool,
    session_entries: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The content of `genai_config.json`.

    Args:
        config ([`~transformers.PretrainedConfig`]): The model's configuration.
        generation_config ([`~transformers.GenerationConfig`], *optional*): Token ids and defaults of the search; made
            from `config` if not given.
        inputs (`Mapping[str, Sequence]`): Name and shape of each input of the file, without a [`genai_obstacle`].
        file_name (`str`): The ONNX file, relative to the folder: `"onnx/model_q4.onnx"`.
        appends_in_place (`bool`): Whether the file takes a cache with room for `max_length` tokens and writes into it;
            otherwise it hands out a longer cache at each step. Made use of where a cache of the whole context for one
            row has at most 1 GiB.
        session_entries (`Mapping[str, str]`, *optional*): Configuration entries of the session.

    Returns:
        `dict`: JSON-ready.
    """
    text = text_config(config)
    generation = generation_config or GenerationConfig.from_model_config(config)
    _, heads, _, head_size = inputs[f"{_PAST % 0}.key"]
    context_length = declared_context_length(config) or _DEFAULT_CONTEXT_LENGTH
    tokens = {name: _token(name, generation, text) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if tokens["pad_token_id"] is None:
        eos = tokens["eos_token_id"]
        tokens["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    named = {name: name for name in inputs if not name.startswith("past_key_values.")}
    search = {name: getattr(generation, name, None) for name in _SEARCH}
    numbers = sum(shape[1] * shape[3] for name, shape in inputs.items() if name.startswith("past_key_values."))
    fits = 4 * numbers * context_length <= _MAX_SHARED_CACHE_BYTES
    return {
        "model": {
            "type": _DECODER,
            **{name: value for name, value in tokens.items() if value is not None},
            "vocab_size": text.vocab_size,
            "context_length": context_length,
            "decoder": {
                "filename": file_name,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": [], **(session_entries or {})},
                "hidden_size": text.hidden_size,
                "num_attention_heads": text.num_attention_heads,
                "num_key_value_heads": heads,
                "head_size": head_size,
                "num_hidden_layers": _num_layers(inputs),
                "inputs": {**named, "past_key_names": f"{_PAST}.key", "past_value_names": f"{_PAST}.value"},
                "outputs": {
                    "logits": "logits",
                    "present_key_names": f"{_PRESENT}.key",
                    "present_value_names": f"{_PRESENT}.value",
                },
            },
        },
        "search": {
            **{name: _SEARCH[name] if value is None else value for name, value in search.items()},
            "early_stopping": bool(getattr(generation, "early_stopping", None)),
            "max_length": context_length,
            "past_present_share_buffer": appends_in_place and fits,
        },
    }


def _num_layers(inputs: Mapping[str, Any]) -> int:
    return sum(name.startswith("past_key_values.") for name in inputs) // 2


def _token(name: str, *sources: Any) -> int | list[int] | None:
    return next((value for source in sources if (value := getattr(source, name, None)) is not None), None)
