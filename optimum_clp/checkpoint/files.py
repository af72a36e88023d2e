"""The files of a checkpoint folder: what they tell before any weight is read, and how they are made portable.

transformers checks little of this itself: a truncated file ends in a parser's message, and a checkpoint whose keys do
not fit is filled up with random weights.
"""

import json
import re
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..architecture.containers import container_class
from ..disk_room import write_whole
from ..model_files import read_model_file, safetensors_header
from .errors import model_error, quanto_error

CONFIG_FILE = "config.json"
SAFE_FILE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_FILE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
QUANTO_MAP_FILE = "quanto_qmap.json"
QUANTO_FILE = "quanto.safetensors"
# stands in the model_type of a quantized folder, so that the stock loader's error names the loader to use
QUANTO_MODEL_TYPE = "optimum_clp.quantization.load_quantized"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
)
TOKENIZER_CONFIG = "tokenizer_config.json"
# what may lie beside a tokenizer, and nothing writes anew
COMPANION_FILES = (
    "tokenizer*.model*",
    "spiece.model",
    "sentencepiece*.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.tiktoken",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
)
# what transformers 4 calls the rotary base of layers with full and with sliding attention, where these differ
_LEGACY_BASES = {
    "gemma3": ("rope_theta", "rope_local_base_freq"),
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
    "olmo3": ("rope_theta", None),
}
# fields that transformers 4 reads under another name; transformers 5 takes both
_LEGACY_NAMES = {"qwen3_moe": {"num_experts": "num_local_experts"}}
# types of which transformers 4 takes `rope_scaling` with these entries and no other
_LONG_ENTRIES, _SCALED_ENTRIES = ("type", "short_factor", "long_factor"), ("type", "factor")
_STRICT_SCALING = {"phi3": _LONG_ENTRIES, "olmo": _SCALED_ENTRIES, "olmo2": _SCALED_ENTRIES}
# ends of the names of classes with another head than a language model's
_OTHER_HEADS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "DoubleHeadsModel",
    "RewardModel",
)
_PLAIN = ("F16", "BF16", "F32", "F64")
# classes of transformers that load a quantized checkpoint in floating point
_DEQUANTIZED_BY = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
# masks and tables that older versions of a type kept in its checkpoints, and computed: transformers leaves them out
_ATTENTION_MASKS = r"\.(attn|attention)(\.attention)?\.(bias|masked_bias|causal_mask)$"
_COMPUTED_KEYS = {
    **dict.fromkeys(("gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "codegen", "openai-gpt"), _ATTENTION_MASKS),
    "opt": r"^(model\.)?decoder\.version$",
    "xglm": r"embed_positions\.weights$",
}
_LOCAL_ONLY_KEYS = ("is_local", "local_files_only", "name_or_path", "special_tokens_map_file", "tokenizer_file")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as indented, sorted JSON."""
    write_whole(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a local folder as a dictionary.

    Raises:
        ModelError: If there is none, if it is malformed, or if the folder holds something else than a checkpoint.
    """
    if (folder / QUANTO_MAP_FILE).is_file():
        raise quanto_error(folder)
    if not (folder / CONFIG_FILE).is_file():
        remedy = "Give the folder that save_pretrained wrote, with config.json, weights and tokenizer"
        raise model_error(folder, "the folder has no config.json", remedy)
    return read_model_file(folder / CONFIG_FILE, folder)


def check_config(name: Any, config: dict[str, Any], trust_remote_code: bool) -> None:
    """Check that `config.json` describes a dense causal language model that transformers can build.

    Args:
        name: The model, for messages.
        config (`dict`): Content of `config.json`.
        trust_remote_code (`bool`): Whether code that comes with the model may be run.

    Raises:
        ModelError: For a quantized model, an encoder, an encoder-decoder, any other class that is not a causal
            language model, a model type that needs remote code or is unknown.
    """
    model_type = config.get("model_type")
    if model_type == QUANTO_MODEL_TYPE:
        raise quanto_error(name)
    if config.get("quantization_config"):
        quantization = config["quantization_config"]
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        rule = f"its weights are quantized ({method or 'bitsandbytes'}); only dense weights can be cut and tuned"
        remedy = "Give the dense checkpoint that it was made from"
        if method in _DEQUANTIZED_BY:
            remedy += (
                f"; or dequantize it: AutoModelForCausalLM.from_pretrained({str(name)!r}, quantization_config="
                f"{_DEQUANTIZED_BY[method]}(dequantize=True)), and give that model"
            )
        raise model_error(name, rule, remedy)
    remote = "auto_map" in config
    if not isinstance(model_type, str) or not model_type:
        raise model_error(name, "its config.json has no model_type", "Fetch or save the model again")
    if model_type not in CONFIG_MAPPING and not (remote and trust_remote_code):
        if remote:
            rule = f"its type {model_type!r} needs code that comes with the model, and trust_remote_code is False"
            raise model_error(name, rule, "Read that code, and pass trust_remote_code=True if you trust it")
        rule = f"its type {model_type!r} is unknown to the installed transformers"
        raise model_error(name, rule, "Check config.json, or upgrade transformers")
    if not (remote and trust_remote_code):
        check_class(name, model_type, config.get("architectures") or [], bool(config.get("is_encoder_decoder")))


def check_class(name: Any, model_type: str, classes: list[str], is_encoder_decoder: bool) -> None:
    """Check that a model is a decoder with a language model head.

    Args:
        name: The model, for messages.
        model_type (`str`): As in `config.json`.
        classes (`list[str]`): Its `architectures`; may be empty.
        is_encoder_decoder (`bool`): As in `config.json`.

    Raises:
        ModelError: If it is not; the message names its class, and what to give instead.
    """
    shown = " / ".join(classes) or f"a model of type {model_type!r}"
    remedy = "Give a decoder-only model, such as one of the class LlamaForCausalLM"
    if is_encoder_decoder:
        raise model_error(name, f"{shown} is an encoder-decoder, not a causal language model", remedy)
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *_registered_classes(model_type)}
    known.add(container_class(model_type) or "")
    decoder = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or bool(_registered_classes(model_type))
    decoder = decoder or container_class(model_type) is not None
    # a name that this transformers does not have is an older one, or somebody's own: the type decides then
    if known.intersection(classes) or (decoder and all(map(_says_nothing, classes))):
        return
    if any(cls.endswith(_OTHER_HEADS) for cls in classes):
        remedy = "Give the causal language model that it was made from; cut that, and train the other head afterwards"
    elif decoder and all(cls.endswith("Model") for cls in classes):
        remedy = (
            "It has no head for the next token: load it with AutoModelForCausalLM, or give a folder saved from that"
        )
    raise model_error(name, f"{shown} is not a causal language model", remedy)


def _says_nothing(cls: str) -> bool:
    return not hasattr(transformers, cls) and not cls.endswith((*_OTHER_HEADS, "ForMaskedLM", "Model"))


def _registered_classes(model_type: str) -> set[str]:
    """Names of the causal language models of a type, those that were registered with transformers' Auto classes included."""
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return set()
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    return {cls.__name__ for cls in (found if isinstance(found, (list, tuple)) else (found,))}


def is_computed(model_type: str, key: str) -> bool:
    """Whether a tensor of a checkpoint is one that older versions of the model type saved although it was never trained."""
    return model_type in _COMPUTED_KEYS and re.search(_COMPUTED_KEYS[model_type], key) is not None


def has_weights(folder: Path) -> bool:
    """Whether a folder holds the weights of a model, in either format."""
    return any((folder / name).is_file() for name in (SAFE_FILE, SAFE_INDEX, PICKLE_FILE, PICKLE_INDEX))


def check_weight_files(folder: Path, use_safetensors: bool) -> None:
    """Check that the weight files of a local folder are there and whole, by their headers only.

    Args:
        folder (`Path`): A folder with `config.json`.
        use_safetensors (`bool`): Refuse a folder that has pickled weights only.

    Raises:
        ModelError: If there are no weights, only pickled ones, a shard is missing, or a file is truncated.
    """
    if (folder / SAFE_FILE).is_file():
        safetensors_header(folder / SAFE_FILE, folder)
    elif (folder / SAFE_INDEX).is_file():
        for shard in _shards(folder, SAFE_INDEX):
            safetensors_header(folder / shard, folder)
    elif (folder / PICKLE_FILE).is_file() or (folder / PICKLE_INDEX).is_file():
        if use_safetensors:
            rule = "it has pickled weights only (.bin), which can run code when they are read"
            remedy = "Pass use_safetensors=False if you trust the file, or convert it to safetensors"
            raise model_error(folder, rule, remedy)
        if not (folder / PICKLE_FILE).is_file():
            _shards(folder, PICKLE_INDEX)
    elif any(folder.glob("*.onnx")) or any(folder.glob("onnx/*.onnx")):
        remedy = "Give the folder of the PyTorch checkpoint that they were exported from"
        raise model_error(folder, "it has ONNX files, but no PyTorch weights", remedy)
    else:
        raise model_error(folder, "the folder has no weights (model.safetensors)", "Fetch or save the model again")


def are_plain(folder: Path) -> bool:
    """Whether a local folder's safetensors hold floating point numbers alone, whatever its `config.json` says of them."""
    if (folder / SAFE_FILE).is_file():
        files = [SAFE_FILE]
    elif (folder / SAFE_INDEX).is_file():
        files = _shards(folder, SAFE_INDEX)
    else:
        return False
    for name in files:
        if any(tensor["dtype"] not in _PLAIN for tensor in safetensors_header(folder / name, folder).values()):
            return False
    return True


def _shards(folder: Path, index: str) -> list[str]:
    weight_map = read_model_file(folder / index, folder).get("weight_map")
    if not weight_map:
        raise model_error(folder, f"its {index} has no weight_map", "Fetch or save the model again")
    shards = sorted(set(weight_map.values()))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        rule = f"its {index} names {outside[0]!r}, which is no file of this folder"
        raise model_error(folder, rule, "Fetch or save the model again")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        rule = f"{len(missing)} of its {len(shards)} weight files are missing, the first is {missing[0]}"
        raise model_error(folder, rule, "Fetch the model again")
    return shards


def legacy_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings as transformers 4 reads them, from the `rope_parameters` of transformers 5.

    transformers 4 ignores `rope_parameters` and takes its default base instead, without a word.

    Args:
        config (`dict`): Content of `config.json`.

    Returns:
        `dict`: `rope_theta`, `rope_scaling` and, where there is one, `partial_rotary_factor`, or the names that a type
        has for them; empty if `config` has no `rope_parameters`, or one set of them for each type of layer that
        transformers 4 cannot express.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or not rope:
        return {}
    if any(isinstance(value, dict) for value in rope.values()):
        return _legacy_rope_by_kind(str(config.get("model_type")), rope)
    alone = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    scaling = {key: value for key, value in rope.items() if key not in alone}
    if scaling.get("rope_type", "default") == "default":
        return {**alone, "rope_scaling": None}
    strict = _STRICT_SCALING.get(str(config.get("model_type")), ())
    # what it says beside these is said elsewhere in the file, or transformers 4 could not take it anyway
    original = scaling.get("original_max_position_embeddings")
    beside = {"rope_type": scaling["rope_type"], "type": scaling["rope_type"]}
    if original == config.get("original_max_position_embeddings", original):
        beside["original_max_position_embeddings"] = original
    entries = {"type": scaling["rope_type"], **scaling}
    if strict and all(name in entries for name in strict) and entries.keys() - set(strict) <= beside.keys():
        said = {} if original is None else {"original_max_position_embeddings": original}
        return {**alone, **said, "rope_scaling": {name: entries[name] for name in strict}}
    return {**alone, "rope_scaling": scaling}


def _legacy_rope_by_kind(model_type: str, rope: dict[str, Any]) -> dict[str, Any]:
    """As [`legacy_rope`], from one set of parameters for each kind of attention."""
    full, sliding = rope.get("full_attention"), rope.get("sliding_attention")
    if model_type not in _LEGACY_BASES or not full:
        return {}
    full_name, sliding_name = _LEGACY_BASES[model_type]
    legacy = legacy_rope({"rope_parameters": full})
    legacy[full_name] = legacy.pop("rope_theta")
    if sliding_name is not None and sliding:
        legacy[sliding_name] = sliding["rope_theta"]
    return legacy


def make_config_portable(folder: Path, tied: bool) -> dict[str, Any]:
    """Rewrite `config.json` so that transformers 4 and 5 read the same model from it, and no local path is left.

    Args:
        folder (`Path`): A folder that `save_pretrained` wrote.
        tied (`bool`): Whether the model's head really is its embedding. transformers 5 leaves them apart if the
            checkpoint that it reads holds two different tensors, whatever `config.json` says; transformers 4 does not.

    Returns:
        `dict`: The new content.
    """
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part.update(legacy_rope(part))
    legacy = _LEGACY_NAMES.get(str(config.get("model_type")), {})
    config.update({old: config[new] for old, new in legacy.items() if new in config}, tie_word_embeddings=tied)
    config.pop("_name_or_path", None)
    write_json(folder / CONFIG_FILE, config)
    return config


def make_tokenizer_portable(folder: Path) -> None:
    """Rewrite `tokenizer_config.json` so that transformers 4 and 5 give the same token ids, without local paths.

    Args:
        folder (`Path`): A folder that a tokenizer's `save_pretrained` wrote.
    """
    path, model = folder / TOKENIZER_CONFIG, folder / "tokenizer.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if model.is_file() and "auto_map" not in config:
        # the one class that takes tokenizer.json as it is in both; others rebuild parts of it, each version its own way
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        # transformers 4 overwrites the file's setting with False where the configuration does not repeat it
        prefix = (json.loads(model.read_text(encoding="utf-8")).get("pre_tokenizer") or {}).get("add_prefix_space")
        if prefix is not None:
            config["add_prefix_space"] = prefix
        # without it transformers 4 also gives token_type_ids, which decoders refuse
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    # a list in transformers 5; transformers 4 knows it by the older name, and expects a mapping under this one
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    for key in _LOCAL_ONLY_KEYS:
        config.pop(key, None)
    write_json(path, config)
