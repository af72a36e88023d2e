"""optimum-quanto checkpoints, in folders that only [`load_quantized`] reads.

quanto stores each linear layer's weight as integers with scales: one per row for int8, one per row or group for int4.
It saves space on disk and in memory; on a CPU it does not save time. The embedding, and a head tied to it, stay float.
"""

import collections
import contextlib
import dataclasses
import os
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
from accelerate import init_empty_weights
from optimum.quanto import QLinear, QTensor, WeightQBitsTensor, qtype, qtypes, quantize_weight
from optimum.quanto.library.extensions import get_extension, is_extension_available
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedModel

from .architecture.containers import reader
from .argument_types import check_arguments
from .checkpoint.errors import load_error, model_error
from .checkpoint.files import (
    CONFIG_FILE,
    QUANTO_FILE,
    QUANTO_MAP_FILE,
    QUANTO_MODEL_TYPE,
    check_config,
    write_json,
)
from .checkpoint.output import staged_folder
from .checkpoint.saving import different_buffer, has_tied_head, save_configs, save_tokenizer
from .disk_room import room_for
from .errors import ConfigurationError, Problem, QuantizationError
from .forward.memory_bound import free_memory, private_memory
from .freed_memory import return_freed_memory
from .model_files import check_folder, check_model_file, read_model_file, safetensors_header
from .own_state import in_own_state, own_state
from .precisions import PRECISIONS, QUANTIZED
from .progress import progress_bar
from .report.section import Key, to_section
from .spill import Spill

# the tensors that quanto stores in place of a linear layer's weight
_PARTS = {"qint8": ("_data", "_scale"), "qint4": ("_data._data", "_scale", "_shift")}
# config.json of the folder holds the model's own configuration under this key
_CONFIG_KEY = "model_config"
# smaller tensors are not worth a mapping
_SMALLEST = 2**16
# of the largest layer's float32 size: what exists while it is rounded, or compared with what was read back (estimate)
_OF_A_LAYER = 5


@dataclasses.dataclass(frozen=True)
class QuantoResult:
    """What [`save_quantized`] wrote.

    Args:
        folder (`Path`): The folder.
        weights (`str`): `"int8"` or `"int4"`.
        num_quantized (`int`): Linear layers that are quantized: all of them, except a head tied to the embedding.
        bytes (`int`): Size of the weight file.
    """

    folder: Path
    weights: Annotated[str, Key(choices=QUANTIZED)]
    num_quantized: Annotated[int, Key("Quantized modules.", minimum=1)]
    bytes: Annotated[int, Key(minimum=1)]

    def to_dict(self) -> dict[str, Any]:
        """An entry of the report's `quantization` section; the folder by its name alone."""
        return to_section(self)


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Let int4 models run on the CPU inside the block without a C++ compiler.

    quanto unpacks int4 weights with an extension that it compiles at the first use, into its own installation: a
    minute, and an error where there is no compiler, no `ninja`, or no write access. Inside the block a PyTorch
    function stands in for it, with the same result. An extension that is loaded already is kept in use. What was
    there before is restored at the end; the replacement holds for the whole process while the block runs.

    Example:
        >>> model = load_quantized("model-int4")
        >>> with without_compiler():
        ...     model.generate(**tokenizer("Once", return_tensors="pt"))
    """
    if not is_extension_available("quanto_cpp"):
        yield
        return
    extension = get_extension("quanto_cpp")
    previous = extension._lib
    if previous is None:
        extension._lib = types.SimpleNamespace(unpack=_unpack)
    try:
        yield
    finally:
        extension._lib = previous


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    mask = 2**bits - 1
    return torch.cat([(packed >> (bits * i)) & mask for i in range(8 // bits)])


@check_arguments
def save_quantized(
    model: PreTrainedModel,
    tokenizer,
    folder: str | os.PathLike,
    weights: str = "int8",
    *,
    overwrite: bool = False,
    max_memory: int | None = None,
    quiet: bool = False,
) -> QuantoResult:
    """Write an optimum-quanto checkpoint of a model, and check it by reading it back.

    The layers are quantized one at a time from the caller's tensors: the model is not changed and no second float copy
    is made. Integers that memory does not hold lie in files of the folder until it is done. Stock transformers refuses the folder with an error that names [`load_quantized`].

    Args:
        model (`PreTrainedModel`): A dense model, on any device.
        tokenizer (`PreTrainedTokenizerBase` or `None`): Saved beside it.
        folder (`str` or `os.PathLike`): A folder of its own, see [`~optimum_clp.checkpoint.output.staged_folder`].
        weights (`str`): `"int8"`: one scale per row. `"int4"`: one scale and offset per group of 128, 96, 64 or 32
            inputs, the largest that divides a layer's inputs; per row if there are 128 inputs or fewer, or none
            divides.
        overwrite (`bool`): Replace a folder that is not empty.
        max_memory (`int`, *optional*): Bytes that this process may hold; what is free now if not given.
        quiet (`bool`): Show no progress bar.

    Returns:
        [`QuantoResult`]: Count and size.

    Raises:
        ConfigurationError: If `weights` is neither `"int8"` nor `"int4"`.
        QuantizationError: If there is too little to quantize ([`quanto_obstacle`]), a layer cannot be quantized, or
            what is read back is not the model, or the disk has no room for it. Nothing is left behind.
        OutputError: If the folder cannot be used.
    """
    kind = _qtype(weights)
    obstacle = quanto_obstacle(model)
    if obstacle is not None:
        raise QuantizationError(obstacle)
    with staged_folder(folder, overwrite) as staged, contextlib.ExitStack() as stack:
        layers = _layers_to_quantize(model)
        rooms = stack.enter_context(tempfile.TemporaryDirectory(dir=staged, prefix=".quanto-"))
        state, room = _float_tensors(model, layers), _room(layers, max_memory, Path(rooms))
        with progress_bar(len(layers), f"quanto {weights}", quiet) as bar:
            for name, layer in layers.items():
                state.update(
                    {f"{name}.{key}": room.keep(value) for key, value in _quantize(name, layer, kind).items()}
                )
                # the allocator would keep a float32 copy of each layer
                return_freed_memory()
                bar.update(1)
        write_json(staged / CONFIG_FILE, {"model_type": QUANTO_MODEL_TYPE, _CONFIG_KEY: save_configs(model, staged)})
        write_json(staged / QUANTO_MAP_FILE, {n: {"weights": kind.name, "activations": "none"} for n in layers})
        with room_for("the quanto checkpoint", staged, sum(t.nbytes for t in state.values()), QuantizationError):
            save_file(state, staged / QUANTO_FILE, metadata={"format": "pt"})
        del state, room
        save_tokenizer(tokenizer, staged)
        with own_state():
            reloaded = _read(staged, _room(layers, max_memory, Path(rooms)))
        _verify(reloaded, model, layers, kind)
        del reloaded
        size = (staged / QUANTO_FILE).stat().st_size
    return QuantoResult(Path(folder), weights, len(layers), size)


def quanto_obstacle(model: PreTrainedModel) -> Problem | None:
    """Why quanto cannot make a useful checkpoint of a model, or `None`. It costs a look at the parameters' shapes.

    quanto quantizes `nn.Linear` and leaves all else in float: where linear layers hold less than half of the weights
    (fused experts, GPT-2's `Conv1D`), little would be saved. Embeddings and the head do not count.

    Args:
        model ([`~transformers.PreTrainedModel`]): Left as it is.

    Returns:
        `Problem` or `None`
    """
    name = type(model).__name__
    if any(isinstance(tensor, QTensor) for tensor in model.parameters()):
        return Problem("model", name, "it is quantized already", "Give the dense model")
    again = dict(model.named_modules(remove_duplicate=False)).keys() - dict(model.named_modules()).keys()
    shared = sorted(key for key in again if _is_plain_linear(model.get_submodule(key)))
    if shared:
        return Problem(
            "model",
            name,
            f"it has blocks that are the same module under two names ({shared[0]}), which the checkpoint cannot express",
            "Use transformers 5, where such blocks share weights and not modules, or leave quanto out",
        )
    outside = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    outside |= {id(head.weight)} if head is not None else set()
    total, in_linear, others = 0, 0, collections.Counter[str]()
    seen = set(outside)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim < 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            if _is_plain_linear(module):
                in_linear += parameter.numel()
            else:
                others[type(module).__name__] += parameter.numel()
    if 2 * in_linear >= total:
        return None
    return Problem(
        "model",
        name,
        "linear layers, which are all that quanto quantizes, hold less than half of its weights "
        f"({in_linear / total:.0%}; most of the rest is in {others.most_common(1)[0][0]})",
        "Use the ONNX files instead, and leave quanto out",
    )


def _room(layers: dict[str, nn.Linear], max_memory: int | None, folder: Path) -> Spill:
    """Main memory as far as it goes, with a layer in work beside it, and files of a folder beyond."""
    work = _OF_A_LAYER * 4 * max(layer.weight.numel() for layer in layers.values())
    left = free_memory() if max_memory is None else max_memory - private_memory()
    return Spill(folder, max(0, left - work), smallest=_SMALLEST)


def _qtype(weights: str) -> qtype:
    if weights not in QUANTIZED:
        shown = [repr(name) for name in QUANTIZED]
        rule, remedy = f"it must be one of {', '.join(shown)}", f"Choose {' or '.join(shown)}"
        raise ConfigurationError.of("weights", weights, rule, remedy)
    return qtypes[PRECISIONS[weights].quanto]


def _layers_to_quantize(model: PreTrainedModel) -> dict[str, nn.Linear]:
    tied = model.get_output_embeddings() if has_tied_head(model) else None
    return {n: m for n, m in model.named_modules() if _is_plain_linear(m) and m is not tied}


def _is_plain_linear(module: nn.Module) -> bool:
    # a router that is a linear layer with a forward of its own would lose what that does
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _float_tensors(model: PreTrainedModel, layers: dict[str, nn.Linear]) -> dict[str, torch.Tensor]:
    """The tensors that stay as they are, on the CPU; those of a tied head once only."""
    skipped = {f"{name}.{key}" for name in layers for key in ("weight", "bias")} | _tied_keys(model)
    state: dict[str, torch.Tensor] = {}
    stored = set()
    for key, tensor in model.state_dict().items():
        if key not in skipped:
            # blocks that share their weights (Zamba) come under several names, and a file cannot share memory
            shared = tensor.data_ptr() in stored
            stored.add(tensor.data_ptr())
            state[key] = tensor.detach().cpu().clone() if shared else tensor.detach().cpu().contiguous()
    return state


def _tied_keys(model: PreTrainedModel) -> set[str]:
    if not has_tied_head(model):
        return set()
    head = model.get_output_embeddings()
    (name,) = [n for n, m in model.named_modules() if m is head]
    return {f"{name}.weight"}


def quanto_integers(
    model: PreTrainedModel, weights: str
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """The integers that [`save_quantized`] stores, layer by layer.

    Args:
        model (`PreTrainedModel`): A dense model; left as it is.
        weights (`str`): `"int8"` or `"int4"`.

    Yields:
        `tuple[str, Tensor, Tensor, Tensor | None]`: The weight's name; integers of shape `[outputs, inputs]`, int8 or
        uint8 in 0 to 15; scales of shape `[outputs, groups]`; for int4 shifts of that shape. A weight is
        `integer * scale - shift`.

    Raises:
        QuantizationError: If there is too little to quantize ([`quanto_obstacle`]), or a layer cannot be quantized.
    """
    obstacle = quanto_obstacle(model)
    if obstacle is not None:
        raise QuantizationError(obstacle)
    kind = _qtype(weights)
    for name, layer in _layers_to_quantize(model).items():
        quantized = _quantized_weight(name, layer, kind)
        outputs = layer.out_features
        if kind.bits == 8:
            yield f"{name}.weight", quantized._data, quantized._scale.reshape(outputs, 1), None
            continue
        with without_compiler():
            integers = quantized._data.unpack()
        # groups of a row follow one another, each a row of its own
        scale, shift = (part.reshape(outputs, -1) for part in (quantized._scale, quantized._shift))
        yield f"{name}.weight", integers.reshape(outputs, -1), scale, shift


def _quantize(name: str, layer: nn.Linear, kind: qtype) -> dict[str, torch.Tensor]:
    """What quanto stores for one linear layer, on the CPU."""
    state: dict[str, torch.Tensor] = {}
    quantized = _quantized_weight(name, layer, kind)
    quantized.save_to_state_dict(state, "weight.", False)
    if layer.bias is not None:
        state["bias"] = layer.bias.detach().cpu()
    state["input_scale"] = state["output_scale"] = torch.ones((), dtype=layer.weight.dtype)
    return {key: value.contiguous().clone() if value.ndim == 0 else value.contiguous() for key, value in state.items()}


def _quantized_weight(name: str, layer: nn.Linear, kind: qtype) -> Any:
    """quanto's tensor for the weight of a linear layer, on the CPU."""
    shell = QLinear.qcreate(layer, weights=kind, device="meta")
    weight = layer.weight.detach().cpu()
    try:
        if kind.bits == 8:
            scale, shift = shell.optimizer(weight, qtype=kind, axis=0), None
        else:
            scale, shift = shell.optimizer(weight, qtype=kind, axis=0, group_size=shell.weight_group_size)
        # a kernel's own layout (optimized=True) does not give back the exact offsets in bfloat16
        return quantize_weight(weight, kind, 0, scale, shift, shell.weight_group_size, optimized=False)
    except (ValueError, RuntimeError) as error:
        rule = f"quanto cannot quantize it ({error})"
        raise QuantizationError.of("layer", name, rule, "Use the ONNX files instead") from error


@check_arguments
@in_own_state
def load_quantized(folder: str | os.PathLike) -> PreTrainedModel:
    """Load what [`save_quantized`] wrote: exactly the model that was saved, on the CPU, in eval mode.

    To run an int4 model on the CPU, quanto compiles an extension at the first forward pass; see [`without_compiler`].

    Args:
        folder (`str` or `os.PathLike`): A local folder.

    Returns:
        `PreTrainedModel`: The model, with `optimum.quanto.QLinear` layers; no parameter requires a gradient.

    Raises:
        ModelError: If the folder holds no such checkpoint, or its files are missing, truncated, or do not fit.
    """
    return _read(Path(folder), Spill())


def _read(folder: Path, room: Spill) -> PreTrainedModel:
    """The model of a folder, its tensors where `room` keeps them."""
    config, kinds = _read_description(folder)
    # random weights are not wanted, and transformers 4 cannot make those of some state-space layers without memory
    with init_empty_weights(), mock.patch.object(PreTrainedModel, "initialize_weights", lambda model: None):
        model = reader(config.model_type, *(config.architectures or ())[:1]).from_config(config, dtype=config.dtype)
    for name, kind in kinds.items():
        model.set_submodule(name, QLinear.qcreate(model.get_submodule(name), weights=qtypes[kind], device="meta"))
    # tensors in a file are aligned to 8 bytes; PyTorch's int8 kernel for bfloat16 crashes the process below 16
    state = {k: room.allocate(t.shape, t.dtype).copy_(t) for k, t in load_file(folder / QUANTO_FILE).items()}
    expected = _expected_keys(model, kinds, config.tie_word_embeddings)
    if expected != state.keys():
        missing, extra = sorted(expected - state.keys()), sorted(state.keys() - expected)
        rule = (
            f"its {QUANTO_FILE} lacks {len(missing)} tensors and has {len(extra)} more, first {(missing + extra)[0]}"
        )
        raise model_error(folder, rule, "Quantize the dense model again")
    # assign, because quanto's own requantize leaves what a file lacks uninitialised, without a word
    with without_compiler():
        _load_odd_layers(model, kinds, state)
        model.load_state_dict(state, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.tie_weights()
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    left += [name for name in kinds if not model.get_submodule(name).frozen]
    if left:
        raise model_error(folder, f"its tensor {left[0]} was not read", "Quantize the dense model again")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.requires_grad_(False).eval()


def _load_odd_layers(model: PreTrainedModel, kinds: dict[str, str], state: dict[str, torch.Tensor]) -> None:
    """Load the int4 weights that quanto would hand to a bfloat16 kernel which refuses their number of outputs."""
    for name in kinds:
        layer: Any = model.get_submodule(name)
        if layer.weight_group_size == 128 and layer.out_features % 16:
            size, stride = layer.weight.size(), layer.weight.stride()
            missing: list[str] = []
            prefix, kind = f"{name}.weight.", layer.weight_qtype
            weight = WeightQBitsTensor.load_from_state_dict(state, prefix, kind, 0, 128, size, stride, missing)
            layer.weight = nn.Parameter(weight, requires_grad=False)


def _read_description(folder: Path):
    """The configuration of a quantized folder, and quanto's name for the type of each quantized layer's weight."""
    if not (folder / QUANTO_MAP_FILE).is_file():
        remedy = (
            "Give a folder that optimum_clp.quantization.save_quantized wrote; load others with AutoModelForCausalLM"
        )
        raise model_error(folder, f"the folder has no {QUANTO_MAP_FILE}", remedy)
    raw = read_model_file(folder / CONFIG_FILE, folder)
    own = raw.get(_CONFIG_KEY)
    if raw.get("model_type") != QUANTO_MODEL_TYPE or not isinstance(own, dict):
        remedy = "Load it with optimum.quanto.QuantizedModelForCausalLM, or quantize the dense model again"
        raise model_error(folder, "it was not written by optimum_clp.quantization.save_quantized", remedy)
    check_folder(folder, folder)
    check_model_file(CONFIG_FILE, own, folder)
    check_config(folder, own, trust_remote_code=False)
    try:
        config = CONFIG_MAPPING[own["model_type"]].from_dict(_with_infinities(own))
    except Exception as error:  # whatever a class of transformers makes of values that it does not expect
        raise load_error(str(folder), error) from error
    kinds = {n: entry.get("weights") for n, entry in read_model_file(folder / QUANTO_MAP_FILE, folder).items()}
    if not set(kinds.values()) <= set(_PARTS):
        raise model_error(folder, f"its {QUANTO_MAP_FILE} is malformed", "Quantize the dense model again")
    if not (folder / QUANTO_FILE).is_file():
        raise model_error(
            folder, f"the folder has no {QUANTO_FILE}", "Fetch it again, or quantize the dense model again"
        )
    safetensors_header(folder / QUANTO_FILE, folder)
    return config, kinds


def _with_infinities(value: Any) -> Any:
    """A configuration as transformers 5 writes it, `{"__float__": "Infinity"}`, with the number itself."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_infinities(item) for key, item in value.items()}
    return [_with_infinities(item) for item in value] if isinstance(value, list) else value


def _expected_keys(model: PreTrainedModel, kinds: dict[str, str], tied: bool) -> set[str]:
    keys = set(model.state_dict())
    for name, kind in kinds.items():
        keys.remove(f"{name}.weight")
        keys |= {f"{name}.weight.{part}" for part in _PARTS[kind]}
    head = model.get_output_embeddings()
    return keys - {f"{n}.weight" for n, m in model.named_modules() if tied and m is head}


def _verify(reloaded: PreTrainedModel, model: PreTrainedModel, layers: dict[str, nn.Linear], kind: qtype) -> None:
    """Compare what was read back with the caller's model: all float tensors, and each weight within rounding."""
    quantized = {n: m for n, m in reloaded.named_modules() if isinstance(m, QLinear) and m.frozen}
    left = sorted(layers.keys() - quantized.keys())
    if left or len(quantized) != len(layers):
        rule = f"{len(quantized)} of {len(layers)} linear layers are quantized; left are {', '.join(left)}"
        raise _fault(model, rule)
    key = different_buffer(model, reloaded)
    parameters = dict(reloaded.named_parameters())
    for name, tensor in model.named_parameters():
        layer, _, attribute = name.rpartition(".")
        if layer in layers and attribute == "weight":
            with without_compiler():
                same = _close(tensor.detach().cpu(), quantized[layer].weight.dequantize(), kind)
        else:
            same = torch.equal(tensor.detach().cpu(), parameters[name])
        key = key if same else key or name
    if key:
        raise _fault(model, f"read back, its tensor {key} differs")


def _close(weight: torch.Tensor, rounded: torch.Tensor, kind: qtype) -> bool:
    # half a step by rounding; in bfloat16 the scale and the product are rounded too, by up to another step
    step = 2 * weight.abs().amax(dim=1, keepdim=True).float() / (2**kind.bits - 2)
    return bool(((weight.float() - rounded.float()).abs() <= 2 * step + 1e-12).all())


def _fault(model: PreTrainedModel, rule: str) -> QuantizationError:
    return QuantizationError.of("model", type(model).__name__, rule, "Please report this with the model's name")
