"""Writing checkpoints that both versions of transformers read alike, and checking what was written."""

import contextlib
import copy
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedModel

from ..architecture.containers import reader, text_type
from ..architecture.lookup import context_limit, text_config, within_context
from ..disk_room import room_for
from ..errors import CutError
from ..forward.hooks import at_rest, evaluation_mode, follows_length
from ..mapped_weights import MappedWeights
from ..model_files import read_model_file
from ..report.origin import copy_files, origin_folder
from .files import (
    COMPANION_FILES,
    TOKENIZER_CONFIG,
    make_config_portable,
    make_tokenizer_portable,
    write_json,
)
from .loading import transformers_quiet
from .processors import copy_processor

logger = logging.getLogger(__name__)

PROBE_LENGTH = 64
SHARD_SIZE = "5GB"
_ROOM = "Free some space, or write to a larger disk, and give the same command again: search and tuning go on where they were"

PROBE_TEXT = "Once upon  a time, 1234 of them\n\n\tate ten crêpes; they'd had 中文 🙂 too. "


@contextlib.contextmanager
def _config_copies(model: PreTrainedModel) -> Iterator[None]:
    """Let `save_pretrained` write its changes into copies of the model's configurations, which name no code of others."""
    config, generation_config = model.config, model.generation_config
    model.config, model.generation_config = copy.deepcopy(config), copy.deepcopy(generation_config)
    _forget_unused_code(model)
    try:
        yield
    finally:
        model.config, model.generation_config = config, generation_config


def _forget_unused_code(model: PreTrainedModel) -> None:
    """Leave out of `auto_map` what names code that came with the dense model and was not trusted: it is not copied."""
    code = getattr(model.config, "auto_map", None)
    if code is None:
        return
    runs = {"AutoConfig": model.config._auto_class is not None}
    kept = {name: source for name, source in code.items() if runs.get(name, model._auto_class is not None)}
    if kept:
        model.config.auto_map = kept
    else:
        del model.config.auto_map


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether the head's weight is the embedding's, in memory; `config.tie_word_embeddings` only asks for it."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head is None or head.weight.is_meta:
        return False
    return head.weight is embedding.weight or head.weight.data_ptr() == embedding.weight.data_ptr()


def save_checkpoint(
    model: PreTrainedModel, tokenizer, folder: str | os.PathLike, cache_dir: str | os.PathLike | None = None
) -> None:
    """Write an ordinary checkpoint: configuration, safetensors weights, tokenizer, generation settings; beside a model that
    reads images or sound, also the processor's files that lay beside the dense one.

    transformers 4.57 and 5 read the same model and the same token ids from it. No path of this machine is in it. The
    model is not changed, and may share its tensors with others.

    Args:
        model (`PreTrainedModel`): The model.
        tokenizer (`PreTrainedTokenizerBase` or `None`): Its tokenizer.
        folder (`str` or `os.PathLike`): An existing folder, or a new one; see [`~optimum_clp.checkpoint.output.staged_folder`].
        cache_dir (`str`, `os.PathLike` or `None`): The cache of the Hub's files, for what lies beside the dense model there.

    Raises:
        OutputError: If the disk has no room for the weights.
    """
    folder = Path(folder)
    with transformers_quiet(bars=True), _config_copies(model):
        settings = _unsavable_generation_config(model)
        # tensors are written one at a time, from where they lie
        with room_for("the checkpoint", folder, _weight_bytes(model), remedy=_ROOM):
            model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        if settings is not None:
            settings.to_json_file(folder / "generation_config.json")
    make_config_portable(folder, has_tied_head(model))
    save_tokenizer(tokenizer, folder, cache_dir)
    if text_type(model.config) is not None:
        copy_processor(model.name_or_path, folder, cache_dir)


def _weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights in a file, tied ones once."""
    return sum({tensor.data_ptr() or id(tensor): tensor.nbytes for tensor in model.state_dict().values()}.values())


def save_configs(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """Write `config.json` and `generation_config.json` as [`save_checkpoint`] does, without weights.

    Returns:
        `dict`: The content of `config.json`.
    """
    with transformers_quiet(bars=True), _config_copies(model):
        settings = _unsavable_generation_config(model) or model.generation_config
        model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
        model.config.save_pretrained(folder)
        if settings is not None:
            settings.to_json_file(folder / "generation_config.json")
    return make_config_portable(folder, has_tied_head(model))


def save_tokenizer(tokenizer, folder: Path, cache_dir: str | os.PathLike | None = None) -> None:
    """Write a tokenizer that transformers 4.57 and 5 read alike, beside a `config.json`; nothing for `None`.

    Warns if `AutoTokenizer` reads back another one: transformers 5 insists on Qwen2's own class for a `qwen2` model.
    """
    if tokenizer is None:
        return
    tokenizer.save_pretrained(folder)
    make_tokenizer_portable(folder)
    _write_chat_template(tokenizer, folder)
    _copy_tokenizer_files(tokenizer, folder, cache_dir)
    if getattr(tokenizer, "_auto_class", None) is not None:
        return
    probe = PROBE_TEXT + " ".join(tokenizer.all_special_tokens)
    with transformers_quiet(bars=False):
        reloaded = AutoTokenizer.from_pretrained(folder)
    if reloaded(probe)["input_ids"] != tokenizer(probe)["input_ids"]:
        logger.warning(
            f"AutoTokenizer makes a {type(reloaded).__name__} of the saved {type(tokenizer).__name__}, with other token "
            "ids, because of the model's type: load it with PreTrainedTokenizerFast.from_pretrained"
        )


def _write_chat_template(tokenizer: Any, folder: Path) -> None:
    """The chat template in `tokenizer_config.json` as well: transformers.js and llama.cpp look for it there.

    It is written as the tokenizer itself would without `chat_template.jinja`, which versions of transformers prefer.
    """
    if not getattr(tokenizer, "chat_template", None) or not (folder / TOKENIZER_CONFIG).is_file():
        return
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save_pretrained(place, save_jinja_files=False)
        file = Path(place) / TOKENIZER_CONFIG
        alone = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "chat_template" in alone:
        content = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
        write_json(folder / TOKENIZER_CONFIG, {**content, "chat_template": alone["chat_template"]})


def _copy_tokenizer_files(tokenizer: Any, folder: Path, cache_dir: str | os.PathLike | None) -> None:
    """What came with the tokenizer and transformers does not write again: llama.cpp needs `tokenizer.model` for some types."""
    source = origin_folder(getattr(tokenizer, "name_or_path", None), COMPANION_FILES, cache_dir=cache_dir)
    copy_files(source, folder, COMPANION_FILES)
    if source is None or source == folder:
        return
    # these speak of tokens, and would contradict a tokenizer that was changed after it was read
    for name, holds in (("special_tokens_map.json", _has_special_tokens), ("added_tokens.json", _has_added_tokens)):
        if (source / name).is_file():
            content = read_model_file(source / name, source)
            if holds(tokenizer, content):
                copy_files(source, folder, (name,))


def _has_special_tokens(tokenizer: Any, content: dict[str, Any]) -> bool:
    texts = [item for value in content.values() for item in (value if isinstance(value, list) else [value])]
    names = {item.get("content") if isinstance(item, dict) else item for item in texts}
    return names <= set(tokenizer.all_special_tokens)


def _has_added_tokens(tokenizer: Any, content: dict[str, Any]) -> bool:
    return all(tokenizer.convert_tokens_to_ids(token) == index for token, index in content.items())


def _unsavable_generation_config(model: PreTrainedModel) -> GenerationConfig | None:
    """Take away generation settings that transformers reads but refuses to write (a temperature without sampling)."""
    settings = model.generation_config
    if settings is None:
        return None
    try:
        settings.validate(strict=True)
    except ValueError:
        model.generation_config = GenerationConfig()
        return settings
    return None


def verify_checkpoint(folder: str | os.PathLike, model: PreTrainedModel) -> None:
    """Read a checkpoint back with transformers' own classes, and check that it is the model in memory.

    Every tensor must be equal, and, for a model on the CPU, so must the logits of a fixed random input of
    `PROBE_LENGTH` tokens, which depend on the configuration too (rotary base, layer types).

    Args:
        folder (`str` or `os.PathLike`): What [`save_checkpoint`] wrote.
        model (`PreTrainedModel`): The model that it should hold; not changed.

    Raises:
        CutError: Names the first thing that differs.
    """
    path = str(folder)
    with transformers_quiet(bars=True):
        try:
            loaded: Any = reader(model.config.model_type, type(model).__name__).from_pretrained(
                path,
                dtype="auto",
                use_safetensors=True,
                output_loading_info=True,
                attn_implementation=_attention_of(model),
                # the code that the model in memory runs, copied beside it
                trust_remote_code=model._auto_class is not None,
            )
        except Exception as error:
            raise _differs(path, f"transformers cannot read it ({' '.join(str(error).split())[:300]})") from error
    reloaded, info = loaded
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[key]:
            first = sorted(map(str, info[key]))[0]
            raise _differs(path, f"read back, it has {len(info[key])} {key.replace('_', ' ')}, the first is {first}")
    expected, actual = model.state_dict(), reloaded.state_dict()
    if expected.keys() != actual.keys():
        raise _differs(path, f"read back, it lacks or adds the tensor {sorted(expected.keys() ^ actual.keys())[0]}")
    mapped = MappedWeights()
    for key, tensor in expected.items():
        if tensor.dtype != actual[key].dtype or not torch.equal(tensor.detach().cpu(), actual[key]):
            raise _differs(path, f"read back, its tensor {key} differs from the one in memory")
        mapped.let_go([tensor, actual[key]])
    if all(tensor.device.type == "cpu" for tensor in expected.values()):
        _check_logits(path, model, reloaded.eval())


def _attention_of(model: PreTrainedModel) -> str | dict[str, str]:
    """The attention of a model, by the names of its parts where it has several."""
    own = model.config._attn_implementation
    parts = {name: getattr(model.config, name, None) for name in model.config.sub_configs}
    found = {name: part._attn_implementation for name, part in parts.items() if isinstance(part, PretrainedConfig)}
    return {"": own, **found} if found else own


def verify_config(folder: str | os.PathLike, model: PreTrainedModel) -> None:
    """Check that the configuration in a folder, read back, describes the model in memory: the looks of
    [`verify_checkpoint`] that need no second copy of the weights.

    Args:
        folder (`str` or `os.PathLike`): What [`save_configs`] wrote.
        model (`PreTrainedModel`): The model that it should describe, on the CPU; not changed.

    Raises:
        CutError: Names the first thing that differs.
    """
    path, trusted = str(folder), model._auto_class is not None
    with transformers_quiet(bars=True):
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trusted)
            build = reader(config.model_type, type(model).__name__).from_config
            options = {"dtype": model.dtype, "trust_remote_code": trusted, "attn_implementation": _attention_of(model)}
            reloaded = _built_without_weights(lambda: build(config, **options))
        except Exception as error:
            raise _differs(path, f"transformers cannot read it ({' '.join(str(error).split())[:300]})") from error
    for name, buffer in model.named_buffers():
        owner, _, attribute = name.rpartition(".")
        if reloaded.get_buffer(name).is_meta:
            setattr(reloaded.get_submodule(owner), attribute, buffer)
    expected, found = model.state_dict(), reloaded.state_dict()
    for key in sorted(expected.keys() | found.keys()):
        if key not in expected or key not in found or expected[key].shape != found[key].shape:
            raise _differs(path, f"read back, its configuration asks for another tensor {key}")
    _check_logits(path, model, reloaded.eval())


def _built_without_weights(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    for buffers_too in (False, True):
        try:
            with init_empty_weights(include_buffers=buffers_too):
                return build()
        except RuntimeError:
            # Mamba's kin exchange tensors while they are built (transformers 4.57): their buffers are not computed then
            if buffers_too:
                raise
    raise AssertionError("one of the two has returned or raised")


def _check_logits(path: str, model: PreTrainedModel, reloaded: PreTrainedModel) -> None:
    key = different_buffer(model, reloaded)
    if key:
        raise _differs(path, f"its tensors are equal, but read back its buffer {key} is another: config.json differs")
    # equal tensors, but from other addresses: kernels may round differently by alignment, so compare on the same ones
    reloaded.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():
        owner, _, attribute = name.rpartition(".")
        setattr(reloaded.get_submodule(owner), attribute, buffer)
    generator = torch.Generator().manual_seed(0)
    length = within_context(PROBE_LENGTH, model.config)
    ids = torch.randint(text_config(model.config).vocab_size, (1, length), generator=generator)
    rows: list[dict[str, Any]] = [{}]
    limit = context_limit(model.config)
    if limit is not None and follows_length(model):  # the last positions have other frequencies than the first
        rows.append({"position_ids": torch.arange(limit - length, limit)[None]})
    for options in rows:
        with torch.no_grad(), evaluation_mode(model):
            equal = torch.equal(*(m(ids, use_cache=False, **options).logits for m in (model, reloaded)))
        if not equal:
            raise _differs(path, "its tensors are equal, but read back it computes other logits: config.json differs")


def different_buffer(model: PreTrainedModel, reloaded: PreTrainedModel) -> str | None:
    """The first buffer (rotary frequencies) that a model read back computes differently, or `None`.

    A buffer of `model` may have a lower precision, as after `model.to(torch.bfloat16)`: files do not hold buffers, and
    what is read back has them in float32.
    """
    others = dict(reloaded.named_buffers())
    with at_rest(model):
        for name, buffer in model.named_buffers():
            if name not in others or not torch.equal(others[name].to(buffer.dtype), buffer.detach().cpu()):
                return name
    return None


def _differs(path: str, rule: str) -> CutError:
    remedy = "This is a fault of optimum-clp or transformers: please report it with the model's name"
    return CutError.of("checkpoint", path, rule, remedy)
