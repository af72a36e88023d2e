"""The guard: a model that was built from a rewritten config is held, layer by layer, against what is meant.

Four independent looks, because no single one sees every fault:

1. what the new config says about each layer is what the old one said about the layer it stands for;
2. classes, attributes and submodules of every layer, and of everything around the layers;
3. names, shapes and storage of the tensors;
4. what the model hands to each layer: masks, positions, rotary embeddings. Some models choose these by the layer's
   index while they run, where no attribute shows it. (Not for a model on the meta device, which cannot run.)
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..architecture.lookup import (
    decoder_layers,
    decoder_path,
    describe_layers,
    num_layers,
    text_config,
    within_context,
)
from ..errors import CutError, ModelError
from ..forward.hooks import evaluation_mode, hand_on, output_lengths, replaced_forward, run_without_head
from .assembly import computes_alike, old_name, uncut_twin
from .hand_made import check_hand_made

Difference = tuple[str, Any, Any]
"""What differs, what it is in the cut model, what it is in the dense one."""

_INDEX_NAMES = ("layer_idx", "layer_id", "layer_number", "block_idx")
# transformers' own notes on the whole model
_BOOKKEEPING = ("training", "all_tied_weights_keys", "hf_device_map")
# a probe longer than a window shows where the window is; beyond this length a mask would take too much memory
_LONGEST_PROBE = 4224
_WINDOW_NAMES = ("sliding_window", "attention_window_size", "attention_chunk_size", "local_attention", "window_size")


def check_cut(cut: PreTrainedModel, dense: PreTrainedModel, kept: list[int]) -> None:
    """Check that every layer of `cut` is the dense layer it stands for, and everything around the layers is the same.

    Values that were set on the dense model after it was built (by `resize_token_embeddings`, gradient checkpointing, a
    user's own notes) are in no config, so that a saved model loses them, cut or not. Where there are such, the cut model is
    held against an [`uncut_twin`] instead, if that computes what the dense model does.

    Args:
        cut (`PreTrainedModel`): What was built from the new config.
        dense (`PreTrainedModel`): The model it came from.
        kept (`list[int]`): Layer `j` of `cut` is layer `kept[j]` of `dense`.

    Raises:
        CutError: Names the first difference, or what was done to `dense` by hand ([`check_hand_made`]).
        ModelError: If its layers share weights by hand.
    """
    check_hand_made(dense)
    differences = [*_count_difference(cut, kept), *_description_differences(cut.config, dense.config, kept)]
    if not differences:
        differences = [*_module_differences(cut, dense, kept), *_tensor_differences(cut, dense, kept)]
        if not differences:
            differences = _value_differences_but_for_changes(cut, dense, kept)
    if not differences and dense.device.type != "meta":
        differences = list(_argument_differences(cut, dense, kept))
    if differences:
        what, is_, should = differences[0]
        raise CutError.of(
            f"cut model, {what}",
            is_,
            f"the dense model has {should!r} there ({len(differences)} differences in all)",
            "The config cannot express this cut; nothing was written and the dense model is unchanged",
        )


def _value_differences_but_for_changes(
    cut: PreTrainedModel, dense: PreTrainedModel, kept: Sequence[int]
) -> list[Difference]:
    """Plain values that differ, but for those that the dense model's own config does not know either."""
    differences = list(_setting_differences(cut, dense, kept))
    if not differences or dense.device.type == "meta":
        return differences
    twin = uncut_twin(dense)
    _check_unchanged(dense, twin, list(_setting_differences(twin, dense, range(num_layers(dense.config)))))
    return list(_setting_differences(cut, twin, kept))


def _check_unchanged(dense: PreTrainedModel, twin: PreTrainedModel, changes: Sequence[Difference]) -> None:
    """Refuse a model that is not what its config says, in a way that matters: cut and saved, it would be another."""
    shown = [change for change in changes if change[0].rpartition(".")[2] in _WINDOW_NAMES]
    if not shown and changes and not computes_alike(dense, twin):
        shown = list(changes)
    if shown:
        what, should, is_ = shown[0]
        raise CutError.of(
            f"dense model, {what}",
            is_,
            f"it was changed after the model was built: its config says {should!r}, which is what a saved model would compute "
            f"with ({len(shown)} differences in all)",
            "Change the config, build the model from it, and load the weights into that; the model is as it was",
        )


def check_uncut(dense: PreTrainedModel) -> None:
    """Check before any work that a dense model is what its config says, in all that no cut could keep.

    Args:
        dense (`PreTrainedModel`): Every weight in memory; not changed.

    Raises:
        ModelError: If layers were deleted, moved or repeated by hand, so that they do not know their places; or share weights.
        CutError: If it was changed since it was built, and computes other than its config says: values, hooks, forward methods.
    """
    layers, everything = list(decoder_layers(dense)), range(num_layers(dense.config))
    if len(set(map(id, layers))) < len(layers):
        first = next(i for i, layer in enumerate(layers) if layer in layers[:i])
        raise ModelError.of(
            "model",
            type(dense).__name__,
            f"layer {first} is the same object as an earlier layer, and a saved model would have two",
            "Copy it, copy.deepcopy(layer), save the model and load it again",
        )
    twin = uncut_twin(dense)
    changes = list(_setting_differences(twin, dense, everything))
    stale = [change for change in changes if change[0].rpartition(".")[2] in _INDEX_NAMES]
    if stale:
        what, should, is_ = stale[0]
        raise ModelError.of(
            "model",
            type(dense).__name__,
            f"{what} is {is_} instead of {should}: its layers were removed or moved by hand, and a cache would mix them up",
            "Save the model and load it again, or give each layer its place: "
            "for i, layer in enumerate(layers): layer.self_attn.layer_idx = i",
        )
    _check_unchanged(dense, twin, changes)
    check_hand_made(dense)


def _count_difference(cut: PreTrainedModel, kept: Sequence[int]) -> Iterator[Difference]:
    for what, found in (
        ("number of layers", len(decoder_layers(cut))),
        ("layer count of the config", num_layers(cut.config)),
    ):
        if found != len(kept):
            yield what, found, len(kept)


def _description_differences(
    new: PretrainedConfig, old: PretrainedConfig, kept: Sequence[int]
) -> Iterator[Difference]:
    found, expected = describe_layers(new), describe_layers(old)
    for names in sorted(found.keys() | expected.keys()):
        should = [expected[names][i] for i in kept] if names in expected else None
        if found.get(names) != should:
            yield f"config.{names}", found.get(names), should


def _module_differences(cut: PreTrainedModel, dense: PreTrainedModel, kept: Sequence[int]) -> Iterator[Difference]:
    """Modules that one of them lacks, and modules of another class."""
    path, old_modules = decoder_path(dense), dict(dense.named_modules(remove_duplicate=False))
    expected = {n for n in old_modules if _survives(n, path, kept)}
    for name, module in cut.named_modules(remove_duplicate=False):
        dense_name = old_name(path, kept, name)
        counterpart = old_modules.get(dense_name)
        expected.discard(dense_name)
        where = _shown(path, name)
        if counterpart is None:
            yield where, type(module).__name__, None
        elif type(module) is not type(counterpart):
            yield f"class of {where}", type(module).__name__, type(counterpart).__name__
    for name in sorted(expected):
        yield f"dense model's {name}", None, type(old_modules[name]).__name__


def _setting_differences(cut: PreTrainedModel, dense: PreTrainedModel, kept: Sequence[int]) -> Iterator[Difference]:
    """Plain values of modules that differ, in two models of the same modules."""
    path, before = decoder_path(dense), num_layers(dense.config)
    gone = _gone_kinds(dense, kept)
    old_modules = dict(dense.named_modules(remove_duplicate=False))
    for name, module in cut.named_modules(remove_duplicate=False):
        counterpart, where = old_modules[old_name(path, kept, name)], _shown(path, name)
        if name.startswith(path + "."):
            index = int(name[len(path) + 1 :].partition(".")[0])
            for attribute, is_, should in _attribute_differences(module, counterpart):
                should = _new_index(old_modules, path, name, index, attribute, should)
                if is_ != should and not _of_all_layers(is_, should, kept, before):
                    yield f"{where}.{attribute}", is_, should
        else:
            for attribute, is_, should in _attribute_differences(module, counterpart):
                inside = name.startswith(path.rpartition(".")[0])  # a vision tower has layers of its own
                if attribute.endswith("layer_idx") and isinstance(should, int) and inside:
                    should = sum(i < should for i in kept)  # a border between layers
                is_count = (is_, should) == (len(kept), before)
                fits = is_ == should or is_count or _of_all_layers(is_, should, kept, before)
                if not fits and not _of_gone(attribute, is_, should, gone):
                    yield f"{where}.{attribute}".lstrip("."), is_, should


def _of_all_layers(is_: Any, should: Any, kept: Sequence[int], before: int) -> bool:
    """Whether a value lists all layers, and is the dense model's for those that are left."""
    return (
        isinstance(should, (list, tuple))
        and len(should) == before
        and isinstance(is_, (list, tuple))
        and list(is_) == [should[i] for i in kept]
    )


def _gone_kinds(dense: PreTrainedModel, kept: Sequence[int]) -> set[str]:
    """Kinds of layers of which none is left."""
    kinds = getattr(text_config(dense.config), "layer_types", None) or []
    return set(kinds) - {kinds[i] for i in kept} if len(kinds) == num_layers(dense.config) else set()


def _of_gone(attribute: str, is_: Any, should: Any, gone: set[str]) -> bool:
    """Whether a value outside the layers is there for kinds of layers that are gone (a rotary embedding for each kind)."""
    if isinstance(should, dict) and isinstance(is_, dict):
        return is_ == {kind: value for kind, value in should.items() if kind not in gone}
    if attribute == "layer_types" and isinstance(should, (list, tuple)):
        return list(is_ or ()) == [kind for kind in should if kind not in gone]
    if attribute == "has_sliding_layers":
        return "sliding_attention" in gone and is_ is False
    return any(attribute.startswith(kind) for kind in gone)


def _shown(path: str, name: str) -> str:
    if not name.startswith(path + "."):
        return name
    index, _, rest = name[len(path) + 1 :].partition(".")
    return f"layer {index}: {rest}".rstrip(": ") if rest else f"layer {index}"


def _new_index(modules: dict[str, nn.Module], path: str, name: str, index: int, attribute: str, should: Any) -> Any:
    """A layer's own index is not the dense layer's; it is the one that the dense model's layer at the new place has."""
    if attribute not in _INDEX_NAMES or not isinstance(should, int):
        return should
    _, _, rest = name[len(path) + 1 :].partition(".")
    here = modules.get(f"{path}.{index}.{rest}".rstrip("."))
    return getattr(here, attribute, index)


def _attribute_differences(module: nn.Module, counterpart: nn.Module) -> Iterator[Difference]:
    """Plain values (numbers, strings, and lists and mappings of them) that two modules of one class do not share."""
    for attribute, value in vars(counterpart).items():
        if attribute.startswith("_") or attribute in _BOOKKEEPING or not _is_plain(value):
            continue
        found = getattr(module, attribute, None)
        if isinstance(value, tuple) and isinstance(found, list):
            found = tuple(found)  # a file knows lists only
        if attribute in _INDEX_NAMES or found != value:
            yield attribute, found, value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, (bool, int, float, str, type(None)))


def _survives(name: str, path: str, kept: Sequence[int]) -> bool:
    prefix = path + "."
    return not name.startswith(prefix) or int(name[len(prefix) :].partition(".")[0]) in kept


def _tensor_differences(cut: PreTrainedModel, dense: PreTrainedModel, kept: Sequence[int]) -> Iterator[Difference]:
    """Names, shapes, and storage: the cut model has the dense model's own tensors."""
    path = decoder_path(dense)
    expected, found = dense.state_dict(), cut.state_dict()
    for name, tensor in found.items():
        source = expected.get(old_name(path, kept, name))
        if source is None or source.shape != tensor.shape or source.data_ptr() != tensor.data_ptr():
            yield name, tuple(tensor.shape), None if source is None else tuple(source.shape)
    missing = {n for n in expected if _survives(n, path, kept)} - {old_name(path, kept, n) for n in found}
    for name in sorted(missing):
        yield name, None, tuple(expected[name].shape)


def _argument_differences(cut: PreTrainedModel, dense: PreTrainedModel, kept: Sequence[int]) -> Iterator[Difference]:
    ids = torch.zeros(1, _probe_length(dense), dtype=torch.long)
    lengths = output_lengths(dense)
    old = _layer_arguments(dense, ids, lengths)
    new = _layer_arguments(cut, ids, [lengths[i] for i in kept])
    for j, i in enumerate(kept):
        for what, is_, should in _value_differences(new[j], old[i], "argument"):
            # a layer may be told its index
            if (is_, should) != (j, i):
                yield f"layer {j}: {what}", is_, should


def _probe_length(model: PreTrainedModel) -> int:
    config = text_config(model.config)
    windows = [vars(config).get(config.attribute_map.get(name, name)) for name in _WINDOW_NAMES]
    window = max((w for w in windows if isinstance(w, int)), default=0)
    return max(1, within_context(min(window + 8, _LONGEST_PROBE), model.config))


def _layer_arguments(model: PreTrainedModel, ids: Tensor, lengths: Sequence[int | None]) -> list[tuple]:
    """What each layer is called with; no layer is computed, each hands its input on."""
    layers = decoder_layers(model)
    seen: list[tuple] = [()] * len(layers)

    def recorder(index: int):
        skip = hand_on(lengths[index])

        def forward(*args: Any, **kwargs: Any) -> Any:
            seen[index] = (args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})
            return skip(*args, **kwargs)

        return forward

    with torch.no_grad(), evaluation_mode(model), ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(replaced_forward(layer, recorder(index)))
        run_without_head(model, ids)
    return seen


def _value_differences(new: Any, old: Any, where: str) -> Iterable[Difference]:
    if type(new) is not type(old):
        yield where, type(new).__name__, type(old).__name__
    elif isinstance(old, Tensor):
        if new.shape != old.shape or new.dtype != old.dtype:
            yield where, (tuple(new.shape), new.dtype), (tuple(old.shape), old.dtype)
        elif not old.is_meta and not torch.equal(new, old):
            yield where, "a tensor", "a tensor with other values"
    elif isinstance(old, dict):
        if new.keys() != old.keys():
            yield where, sorted(map(str, new)), sorted(map(str, old))
        else:
            for key in old:
                yield from _value_differences(new[key], old[key], f"{where} {key}")
    elif isinstance(old, (list, tuple)):
        if len(new) != len(old):
            yield where, len(new), len(old)
        else:
            for k, (a, b) in enumerate(zip(new, old, strict=True)):
                yield from _value_differences(a, b, f"{where} {k}" if len(old) > 1 else where)
    elif _is_plain(old) and new != old:
        yield where, new, old
