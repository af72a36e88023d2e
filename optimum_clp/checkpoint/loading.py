"""Reading dense models and tokenizers with errors that help, and writing checkpoints that are checked."""

import contextlib
import copy
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from packaging import version
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import logging as transformers_logging

from ..architecture.containers import reader
from ..doors import ARCHITECTURES
from ..errors import CLPError, ModelError
from ..mapped_weights import MappedWeights
from ..model_files import check_folder, check_model_file
from ..progress import draws_bars
from .adapters import adapter_base, merged
from .errors import load_error, model_error, quanto_error
from .files import (
    CONFIG_FILE,
    TOKENIZER_FILES,
    are_plain,
    check_config,
    check_weight_files,
    is_computed,
    legacy_rope,
    read_config,
)
from .in_memory import check_in_memory, model_or_name
from .offloaded import read_in_place
from .placement import check_device_map, check_revision, floating_dtype

logger = logging.getLogger(__name__)


def load_model(
    model_or_path: PreTrainedModel | str | os.PathLike,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | os.PathLike | None = None,
    use_safetensors: bool = True,
    attn_implementation: str | None = None,
    accept: Callable[[Any], Any] | None = None,
    quiet: bool = False,
) -> PreTrainedModel:
    """Load a dense causal language model, in eval mode, and check that every weight came from the checkpoint.

    Args:
        model_or_path (`PreTrainedModel`, `str` or `os.PathLike`): A model, which is checked and returned without wrappers
            such as `torch.compile`'s; a local folder, also of an adapter if `peft` is installed, which is merged into its
            base model; or a Hub id such as `"Qwen/Qwen3-0.6B"`.
        dtype (`str` or `torch.dtype`): Of the weights; `"auto"` takes the checkpoint's own.
        device_map: As in transformers. Weights that it offloads are read in place; if they ran on an accelerator, its layers run there on copies.
        revision (`str` or `None`): Branch, tag or commit on the Hub.
        token (`str`, `bool` or `None`): For private or gated models on the Hub.
        trust_remote_code (`bool`): Allow code that comes with the model to run.
        cache_dir (`str`, `os.PathLike` or `None`): Where files of the Hub are kept; `None` for transformers' own cache.
        use_safetensors (`bool`): `False` also allows pickled weights, where there are no others; reading them can run
            code.
        attn_implementation (`str` or `None`): How attention is computed, as in transformers: `"eager"`, `"sdpa"`,
            `"flash_attention_2"`, ...; `None` for transformers' choice. A model in memory keeps its own: another one is refused.
        accept (`Callable`, *optional*): Called with the model's config before any weight is read; raises to refuse it.
        quiet (`bool`): Show no progress bars.

    Returns:
        `PreTrainedModel`: The model.

    Raises:
        ModelError: If there is no such model, it cannot be reached, its files are missing, malformed, truncated or
            quantized, it is not a causal language model, it needs code that may not be run, its weights do not fit
            its `config.json`, or one of them has values that are not finite; or transformers has no such attention for it, or
            it is a model in memory that computes another one.
        ConfigurationError: If there is no such dtype, device or name of a revision.
    """
    path: Any = model_or_name(model_or_path)
    check_device_map(device_map)
    if dtype != "auto":
        dtype = floating_dtype(dtype)
    hub: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    if isinstance(path, PreTrainedModel):
        if accept is not None:
            accept(path.config)
        check_in_memory(path)
        _check_own_attention(path, attn_implementation)
        path = read_in_place(path)
        check_finite(type(path).__name__, path)
        return path
    base = adapter_base(Path(path))
    if base is not None:
        reading: dict[str, Any] = {"dtype": dtype, "device_map": device_map, "use_safetensors": use_safetensors}
        reading |= {"token": token, "trust_remote_code": trust_remote_code, "accept": accept, "quiet": quiet}
        reading |= {"cache_dir": cache_dir, "attn_implementation": attn_implementation}
        return merged(load_model(base, **reading), Path(path))
    config = load_config(path, trust_remote_code=trust_remote_code, **hub)
    if accept is not None:
        accept(config)
    if attn_implementation is not None:
        check_attention(config, attn_implementation, trust_remote_code)
    if os.path.isdir(path):
        check_weight_files(Path(path), use_safetensors)
    with transformers_quiet(bars=quiet or not draws_bars()), tempfile.TemporaryDirectory() as offloaded:
        try:
            loaded: Any = reader(config.model_type, *(config.architectures or ())[:1]).from_pretrained(
                path,
                config=config,
                dtype=dtype,
                device_map=device_map,
                trust_remote_code=trust_remote_code,
                use_safetensors=True if use_safetensors else None,
                attn_implementation=attn_implementation,
                output_loading_info=True,
                # for what is no safetensors file; nothing lies there unless the map names the disk, and the names go with the block
                **({} if device_map is None else {"offload_folder": offloaded}),
                **hub,
            )
            model, info = read_in_place(loaded[0]), loaded[1]
        except CLPError:
            raise
        # whatever a library says about a bad file, the user gets one message with the model's name
        except Exception as error:
            raise load_error(path, error) from error
    attention = getattr(model.config, "_attn_implementation", None)
    logger.debug(
        f"model: {path} is a {type(model).__name__} in {model.dtype} on {model.device}, attention {attention}"
    )
    _check_keys(path, info, model.config.model_type)
    check_finite(path, model)
    return model.eval()


def load_config(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | os.PathLike | None = None,
) -> PretrainedConfig:
    """The config of a dense causal language model; no weights need lie beside it.

    Args:
        path (`str` or `os.PathLike`): A local folder, or a Hub id.
        revision (`str` or `None`): Branch, tag or commit on the Hub.
        token (`str`, `bool` or `None`): For private or gated models on the Hub.
        trust_remote_code (`bool`): Allow code that comes with the model to run.
        cache_dir (`str`, `os.PathLike` or `None`): Where files of the Hub are kept; `None` for transformers' own cache.

    Raises:
        ModelError: If there is none, it cannot be read, or it is not a dense causal language model's.
        ConfigurationError: If another package adds this model type and cannot be imported, or no revision has this name.
    """
    check_revision(revision)
    name, hub = os.fspath(path), {"revision": revision, "token": token, "cache_dir": cache_dir}
    base = adapter_base(Path(name))
    if base is not None:
        return load_config(base, token=token, trust_remote_code=trust_remote_code, cache_dir=cache_dir)
    if os.path.isdir(name):
        raw = read_config(Path(name))
        check_folder(Path(name), name)
    else:
        _refuse_local_looking(name)
        raw = _hub_config(name, hub)
        check_model_file(CONFIG_FILE, raw, name)
    if raw.get("model_type") in ARCHITECTURES:
        # the package that adds a model type tells transformers of its classes when it is imported
        ARCHITECTURES.get(raw["model_type"])
    stray = "quantization_config" in raw and os.path.isdir(name) and are_plain(Path(name))
    if stray:  # somebody dequantized the weights and left it in the file
        raw = {key: value for key, value in raw.items() if key != "quantization_config"}
    check_config(name, raw, trust_remote_code)
    # transformers 4 does not know rope_parameters
    rope = legacy_rope(raw) if version.parse(transformers_version).major < 5 else {}
    with transformers_quiet(bars=False):
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **hub, **rope)
        except Exception as error:
            raise load_error(name, error) from error
    if stray:
        vars(config).pop("quantization_config", None)
    return config


def check_attention(config: PretrainedConfig, implementation: str, trust_remote_code: bool = False) -> None:
    """Check that transformers has an attention for a model, before weights are fetched or read.

    Args:
        config (`PretrainedConfig`): The model's; not changed.
        implementation (`str`): As in transformers.
        trust_remote_code (`bool`): Allow code that comes with the model to run, and kernels of the Hub, which are code too.

    Raises:
        ModelError: With transformers' own reason.
    """
    names = "Give eager, sdpa, flash_attention_2 or another one that transformers has for this model, or leave it out"
    if "/" in implementation and not trust_remote_code:
        rule = "it names a kernel on the Hugging Face Hub, which is code that would run here"
        remedy = "Pass trust_remote_code=True (--trust-remote-code) if you trust it. Else give eager or sdpa"
        raise ModelError.of("attn_implementation", implementation, rule, remedy)
    build = reader(config.model_type, *(config.architectures or ())[:1]).from_config

    def refusal(**chosen: str) -> Exception | None:
        try:
            with torch.device("meta"):
                build(copy.deepcopy(config), trust_remote_code=trust_remote_code, **chosen)
        except Exception as error:
            return error
        return None

    with transformers_quiet(bars=False):
        error = refusal(attn_implementation=implementation)
        if error is None or refusal() is not None:  # where it cannot be built at all, reading it says why
            return
    said = " ".join(str(error).split())[:500].rstrip(".")
    raise ModelError.of("attn_implementation", implementation, f"transformers refuses it ({said})", names) from error


def _check_own_attention(model: PreTrainedModel, wanted: str | None) -> None:
    """Refuse to let the caller's model compute attention otherwise than it does: it is not ours to change."""
    own = getattr(model.config, "_attn_implementation", None)
    if wanted is not None and wanted != own:
        rule = f"the model that was given is in memory, is not changed, and computes attention by {own!r}"
        remedy = (
            f"Call model.set_attn_implementation({wanted!r}) before, or give its folder or Hub id, or leave it out"
        )
        raise ModelError.of("attn_implementation", wanted, rule, remedy)


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


def _check_keys(name: str, info: dict[str, Any], model_type: str) -> None:
    """Refuse a model that transformers has filled up with random weights, or of which it has left weights out."""
    unexpected = [key for key in info.get("unexpected_keys") or () if not is_computed(model_type, str(key))]
    info = {**info, "unexpected_keys": unexpected}
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
    mapped = MappedWeights()
    for key, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):  # packed integers of torch's own quantization
            remedy = "Give the dense model that it was made from"
            raise model_error(name, f"its weights are quantized ({key} is no tensor)", remedy)
        if tensor.is_meta:
            remedy = "Use a device with more memory, a smaller dtype, or device_map=None"
            raise model_error(name, f"its tensor {key} was offloaded and is not in memory", remedy)
        # aminmax passes NaN on and needs no memory of its own, unlike isfinite().all()
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            count = int((~torch.isfinite(tensor)).sum())
            rule = f"its tensor {key} has {count} values that are NaN or infinite"
            raise model_error(name, rule, "Fetch the model again, or choose another one")
        mapped.let_go([tensor])


def load_tokenizer(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | os.PathLike | None = None,
):
    """Load the tokenizer of a model.

    Args:
        path (`str` or `os.PathLike`): A local folder, or a Hub id.
        revision (`str` or `None`): Branch, tag or commit on the Hub.
        token (`str`, `bool` or `None`): For private or gated models on the Hub.
        trust_remote_code (`bool`): Allow code that comes with the tokenizer to run.
        cache_dir (`str`, `os.PathLike` or `None`): Where files of the Hub are kept; `None` for transformers' own cache.

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
    with transformers_quiet(bars=False):
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=revision, token=token, trust_remote_code=trust_remote_code, cache_dir=cache_dir
            )
        except Exception as error:
            problem = load_error(name, error).problems[0]
            rule = problem.rule.replace("it could not be read", "its tokenizer could not be read")
            raise model_error(name, rule, f"{problem.remedy}. {remedy}") from error
    # transformers 5 makes an empty tokenizer for some types where a model has none
    if len(tokenizer) < 2:
        raise model_error(name, "it has no tokenizer, or an empty one", remedy)
    return tokenizer


def check_tokenizer(tokenizer: Any) -> None:
    """Check that an object is a tokenizer, or a processor that can be called like one; or `None`.

    Raises:
        ModelError: If it is neither.
    """
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "save_pretrained")):
        rule = f"a {type(tokenizer).__name__} is no tokenizer"
        raise ModelError.of(
            "tokenizer", tokenizer, rule, "Give what AutoTokenizer.from_pretrained returns, or a folder"
        )


@contextlib.contextmanager
def transformers_quiet(bars: bool) -> Iterator[None]:
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
