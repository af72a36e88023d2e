"""Reading dense models and tokenizers with errors that help, and writing checkpoints that are checked."""

import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from packaging import version
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import logging as transformers_logging

from ..architecture.lookup import text_config
from ..errors import CLPError, CutError, Problem
from ..forward.layer_stack import evaluation_mode
from .errors import load_error, model_error, quanto_error
from .files import (
    TOKENIZER_FILES,
    check_class,
    check_config,
    check_weight_files,
    legacy_rope,
    make_config_portable,
    make_tokenizer_portable,
    read_config,
)

PROBE_LENGTH = 64
PROBE_TEXT = "Once upon  a time, 1234 of them\n\n\tate ten crêpes; they'd had 中文 🙂 too. "


def load_model(
    model_or_path: PreTrainedModel | str | os.PathLike,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    use_safetensors: bool = True,
    accept: Callable[[Any], Any] | None = None,
    quiet: bool = False,
) -> PreTrainedModel:
    """Load a dense causal language model, in eval mode, and check that every weight came from the checkpoint.

    Args:
        model_or_path (`PreTrainedModel`, `str` or `os.PathLike`): A model, which is checked and returned as it is; a
            local folder; or a Hub id such as `"Qwen/Qwen3-0.6B"`.
        dtype (`str` or `torch.dtype`): Of the weights; `"auto"` takes the checkpoint's own.
        device_map: As in transformers. Weights that it offloads from memory are refused.
        revision (`str` or `None`): Branch, tag or commit on the Hub.
        token (`str`, `bool` or `None`): For private or gated models on the Hub.
        trust_remote_code (`bool`): Allow code that comes with the model to run.
        use_safetensors (`bool`): `False` also allows pickled weights, where there are no others; reading them can run
            code.
        accept (`Callable`, *optional*): Called with the model's config before any weight is read; raises to refuse it.
        quiet (`bool`): Show no progress bars.

    Returns:
        `PreTrainedModel`: The model.

    Raises:
        ModelError: If there is no such model, it cannot be reached, its files are missing, malformed, truncated or
            quantized, it is not a causal language model, it needs code that may not be run, its weights do not fit
            its `config.json`, or one of them has values that are not finite.
    """
    if isinstance(model_or_path, PreTrainedModel):
        if accept is not None:
            accept(model_or_path.config)
        _check_in_memory(model_or_path)
        return model_or_path
    if not isinstance(model_or_path, (str, os.PathLike)):
        remedy = "Give a PreTrainedModel, a local folder, or a Hub id"
        raise model_error(repr(model_or_path), f"a {type(model_or_path).__name__} is not a model", remedy)
    path, hub = os.fspath(model_or_path), {"revision": revision, "token": token}
    config = load_config(path, revision=revision, token=token, trust_remote_code=trust_remote_code)
    if accept is not None:
        accept(config)
    if os.path.isdir(path):
        check_weight_files(Path(path), use_safetensors)
    with _transformers_quiet(bars=quiet):
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                device_map=device_map,
                trust_remote_code=trust_remote_code,
                use_safetensors=True if use_safetensors else None,
                output_loading_info=True,
                **hub,
            )
        except CLPError:
            raise
        # whatever a library says about a bad file, the user gets one message with the model's name
        except Exception as error:
            raise load_error(path, error) from error
    model, info = loaded
    _check_keys(path, info)
    check_finite(path, model)
    return model.eval()


def load_config(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> PretrainedConfig:
    """The config of a dense causal language model; no weights need lie beside it.

    Args:
        path (`str` or `os.PathLike`): A local folder, or a Hub id.
        revision (`str` or `None`): Branch, tag or commit on the Hub.
        token (`str`, `bool` or `None`): For private or gated models on the Hub.
        trust_remote_code (`bool`): Allow code that comes with the model to run.

    Raises:
        ModelError: If there is none, it cannot be read, or it is not a dense causal language model's.
    """
    name, hub = os.fspath(path), {"revision": revision, "token": token}
    if os.path.isdir(name):
        raw = read_config(Path(name))
    else:
        _refuse_local_looking(name)
        raw = _hub_config(name, hub)
    check_config(name, raw, trust_remote_code)
    # transformers 4 does not know rope_parameters
    rope = legacy_rope(raw) if version.parse(transformers_version).major < 5 else {}
    with _transformers_quiet(bars=False):
        try:
            return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **hub, **rope)
        except Exception as error:
            raise load_error(name, error) from error


def _check_in_memory(model: PreTrainedModel) -> None:
    name, config = type(model).__name__, model.config
    if any(type(module).__module__.startswith("optimum.quanto") for module in model.modules()):
        raise quanto_error(name)
    if getattr(model, "hf_quantizer", None) is not None:
        raise model_error(name, "its weights are quantized", "Give the dense model that it was made from")
    if getattr(model, "_auto_class", None) is None:
        check_class(name, config.model_type, [name], bool(config.is_encoder_decoder))
    check_finite(name, model)


def _refuse_local_looking(path: str) -> None:
    remedy = "Check the path, or give a Hub id such as 'Qwen/Qwen3-0.6B'"
    if os.path.exists(path):
        raise model_error(path, "it is a file, not a folder", "Give the folder that holds config.json and the weights")
    looks_local = path.startswith((".", "/", "~")) or path.endswith("/") or "\\" in path or path.count("/") > 1
    if looks_local or not path.strip():
        raise model_error(path, "there is no such folder", remedy)


def _hub_config(repository: str, hub: dict[str, Any]) -> dict[str, Any]:
    try:
        return PretrainedConfig.get_config_dict(repository, **hub)[0]
    except Exception as error:
        raise load_error(repository, error) from error


def _check_keys(name: str, info: dict[str, Any]) -> None:
    """Refuse a model that transformers has filled up with random weights, or of which it has left weights out."""
    found = [
        (len(info[key]), what, sorted(map(str, info[key]))[0])
        for key, what in (
            ("missing_keys", "missing from the checkpoint"),
            ("unexpected_keys", "in the checkpoint but not in the model"),
            ("mismatched_keys", "of another shape than config.json says"),
        )
        if info.get(key)
    ]
    if any(".weight._data" in str(key) for key in info.get("unexpected_keys") or ()):
        raise quanto_error(name)
    if found:
        rule = "; ".join(f"{count} weights are {what}, the first is {first}" for count, what, first in found)
        remedy = "Its config.json and weights do not belong together: check num_hidden_layers, or fetch it again"
        raise model_error(name, rule, remedy)


def check_finite(name: str, model: torch.nn.Module) -> None:
    """Check that every weight is in memory, and finite.

    Args:
        name (`str`): The model, for the message.
        model (`torch.nn.Module`): Any model; its tensors are read one at a time, without a copy.

    Raises:
        ModelError: Names the first tensor that has NaN or infinite values, or that is not in memory.
    """
    for key, tensor in model.state_dict().items():
        if tensor.is_meta:
            remedy = "Use a device with more memory, a smaller dtype, or device_map=None"
            raise model_error(name, f"its tensor {key} was offloaded and is not in memory", remedy)
        # aminmax passes NaN on and needs no memory of its own, unlike isfinite().all()
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            count = int((~torch.isfinite(tensor)).sum())
            rule = f"its tensor {key} has {count} values that are NaN or infinite"
            raise model_error(name, rule, "Fetch the model again, or choose another one")


def load_tokenizer(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
):
    """Load the tokenizer of a model.

    Args:
        path (`str` or `os.PathLike`): A local folder, or a Hub id.
        revision (`str` or `None`): Branch, tag or commit on the Hub.
        token (`str`, `bool` or `None`): For private or gated models on the Hub.
        trust_remote_code (`bool`): Allow code that comes with the tokenizer to run.

    Returns:
        `PreTrainedTokenizerBase`: The tokenizer.

    Raises:
        ModelError: If there is none, it is empty, or it cannot be read.
    """
    name, remedy = (
        os.fspath(path),
        "Pass the tokenizer, or the folder or Hub id of one, as tokenizer= (--tokenizer on the command line)",
    )
    if not os.path.isdir(name):
        _refuse_local_looking(name)
    elif not any(any(Path(name).glob(pattern)) for pattern in TOKENIZER_FILES):
        raise model_error(name, "the folder has no tokenizer (tokenizer.json)", remedy)
    with _transformers_quiet(bars=False):
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=revision, token=token, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            problem = load_error(name, error).problems[0]
            rule = problem.rule.replace("it could not be read", "its tokenizer could not be read")
            raise model_error(name, rule, f"{problem.remedy}. {remedy}") from error
    # transformers 5 makes an empty tokenizer for some types where a model has none
    if len(tokenizer) < 2:
        raise model_error(name, "it has no tokenizer, or an empty one", remedy)
    return tokenizer


@contextlib.contextmanager
def _transformers_quiet(bars: bool) -> Iterator[None]:
    """Hold back transformers' warnings, and with `bars` its progress bars; what it would warn of is checked here."""
    verbosity, active = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars and active:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _config_copies(model: PreTrainedModel) -> Iterator[None]:
    """Let `save_pretrained` write its changes into copies of the model's configurations."""
    config, generation_config = model.config, model.generation_config
    model.config, model.generation_config = copy.deepcopy(config), copy.deepcopy(generation_config)
    try:
        yield
    finally:
        model.config, model.generation_config = config, generation_config


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether the head's weight is the embedding's, in memory; `config.tie_word_embeddings` only asks for it."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head is None or head.weight.is_meta:
        return False
    return head.weight is embedding.weight or head.weight.data_ptr() == embedding.weight.data_ptr()


def save_checkpoint(model: PreTrainedModel, tokenizer, folder: str | os.PathLike) -> None:
    """Write an ordinary checkpoint: configuration, safetensors weights, tokenizer, generation settings.

    transformers 4.57 and 5 read the same model and the same token ids from it. No path of this machine is in it. The
    model is not changed, and may share its tensors with others.

    Args:
        model (`PreTrainedModel`): The model.
        tokenizer (`PreTrainedTokenizerBase` or `None`): Its tokenizer.
        folder (`str` or `os.PathLike`): An existing folder, or a new one; see [`~optimum_clp.checkpoint.output.staged_folder`].
    """
    folder = Path(folder)
    with _transformers_quiet(bars=True), _config_copies(model):
        settings = _unsavable_generation_config(model)
        model.save_pretrained(folder)
        if settings is not None:
            settings.to_json_file(folder / "generation_config.json")
    make_config_portable(folder, has_tied_head(model))
    save_tokenizer(tokenizer, folder)


def save_configs(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """Write `config.json` and `generation_config.json` as [`save_checkpoint`] does, without weights.

    Returns:
        `dict`: The content of `config.json`.
    """
    with _transformers_quiet(bars=True), _config_copies(model):
        settings = _unsavable_generation_config(model) or model.generation_config
        model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
        model.config.save_pretrained(folder)
        if settings is not None:
            settings.to_json_file(folder / "generation_config.json")
    return make_config_portable(folder, has_tied_head(model))


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write a tokenizer that transformers 4.57 and 5 read alike, beside a `config.json`; nothing for `None`.

    Warns if `AutoTokenizer` reads back another one: transformers 5 insists on Qwen2's own class for a `qwen2` model.
    """
    if tokenizer is None:
        return
    tokenizer.save_pretrained(folder)
    make_tokenizer_portable(folder)
    if getattr(tokenizer, "_auto_class", None) is not None:
        return
    probe = PROBE_TEXT + " ".join(tokenizer.all_special_tokens)
    with _transformers_quiet(bars=False):
        reloaded = AutoTokenizer.from_pretrained(folder)
    if reloaded(probe)["input_ids"] != tokenizer(probe)["input_ids"]:
        warnings.warn(
            f"AutoTokenizer makes a {type(reloaded).__name__} of the saved {type(tokenizer).__name__}, with other token "
            "ids, because of the model's type: load it with PreTrainedTokenizerFast.from_pretrained",
            stacklevel=3,
        )


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
    with _transformers_quiet(bars=True):
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype="auto",
                use_safetensors=True,
                output_loading_info=True,
                attn_implementation=model.config._attn_implementation,
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
    for key, tensor in expected.items():
        if tensor.dtype != actual[key].dtype or not torch.equal(tensor.detach().cpu(), actual[key]):
            raise _differs(path, f"read back, its tensor {key} differs from the one in memory")
    if all(tensor.device.type == "cpu" for tensor in expected.values()):
        _check_logits(path, model, reloaded.eval())


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
    config = text_config(model.config)
    length = min(PROBE_LENGTH, getattr(config, "max_position_embeddings", None) or PROBE_LENGTH)
    ids = torch.randint(config.vocab_size, (1, length), generator=generator)
    with torch.no_grad(), evaluation_mode(model):
        equal = torch.equal(*(m(ids, use_cache=False).logits for m in (model, reloaded)))
    if not equal:
        raise _differs(path, "its tensors are equal, but read back it computes other logits: config.json differs")


def different_buffer(model: PreTrainedModel, reloaded: PreTrainedModel) -> str | None:
    """The first buffer (rotary frequencies) that a model read back computes differently, or `None`.

    A buffer of `model` may have a lower precision, as after `model.to(torch.bfloat16)`: files do not hold buffers, and
    what is read back has them in float32.
    """
    others = dict(reloaded.named_buffers())
    for name, buffer in model.named_buffers():
        if name not in others or not torch.equal(others[name].to(buffer.dtype), buffer.detach().cpu()):
            return name
    return None


def _differs(path: str, rule: str) -> CutError:
    remedy = "This is a fault of optimum-clp or transformers: please report it with the model's name"
    return CutError(Problem("checkpoint", path, rule, remedy))
