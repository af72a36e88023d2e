"""Models that run on an accelerator which does not hold them: where their weights lie, and where their layers run."""

import torch
from transformers import PreTrainedModel

from ..architecture.lookup import decoder_layers, text_config
from ..configuration.clp_config import CLPConfig
from ..doors import STARTS
from ..errors import ConfigurationError
from ..forward.memory_bound import copies_within
from ..forward.streamed_layers import copies_of, run_on
from ..processes import launched_local_rank, world_size
from .offloaded import bare_copy

# of a trained parameter: the weight itself, its float32 master, gradient, and two moments
_TRAINED_BYTES = 2 + 4 * 4


def placed(model: PreTrainedModel, bounds: dict[int, int], length: int, *, reserved: int = 0) -> PreTrainedModel:
    """A model on an accelerator, within a bound on what may be held there.

    Args:
        model (`PreTrainedModel`): Not changed. Its weights stay where they lie.
        bounds (`dict[int, int]`): For accelerators, by number, the bytes of each that may be held; a process of a group takes its
            own, one that is alone has one.
        length (`int`): Tokens in a row.
        reserved (`int`): Bytes that something else will take there.

    Returns:
        `PreTrainedModel`: A twin over the same layers, with what is around them on the accelerator; `model` itself if nothing
        is bounded, or if it is on an accelerator whole.

    Raises:
        ConfigurationError: If there is no such accelerator, or the bound is too small.
    """
    if not bounds or model.device.type == "meta":
        return model
    number = _own_number(bounds)
    device = accelerator(number)
    before = copies_of(model)
    if before is None and model.device.type != "cpu":
        return model
    copies = copies_within(bounds[number], model, length, device, reserved=reserved, name=str(number))
    if before is not None and before.device == device:
        before.within(copies)
        return model
    twin = bare_copy(model)
    run_on(twin, copies)
    return twin


def reserved_for(model: PreTrainedModel, recipe: CLPConfig) -> int:
    """Bytes of an accelerator that a tuning takes: of what is trained, or of its closed form.

    Args:
        model (`PreTrainedModel`): Not run.
        recipe ([`CLPConfig`]): Whether it tunes, and what.
    """
    tuning, layers = recipe.tuning, list(decoder_layers(model))
    if not tuning.enabled:
        return 0
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
    start = STARTS.get(tuning.init)().held_bytes(layers, text_config(model.config).hidden_size)
    return max(2 * tuning.endpoint_width * recipe.num_segments * largest * _TRAINED_BYTES, start)


def accelerator(number: int) -> torch.device:
    """The accelerator that accelerate knows by a number.

    Raises:
        ConfigurationError: If there is none.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = 0 if found is None else torch.accelerator.device_count()
    if found is None or number >= count:
        rule = f"there are {count} accelerators here, numbered from 0" if count else "there is no accelerator here"
        raise ConfigurationError.of("max_memory", f"{number}=...", rule, "Leave it out; cpu=... bounds main memory")
    return torch.device(found.type, number)


def _own_number(bounds: dict[int, int]) -> int:
    """The accelerator of this process.

    Raises:
        ConfigurationError: If it is not clear which one that is.
    """
    if world_size() > 1:
        own = launched_local_rank()
        if own in bounds:
            return own
        rule = f"this process's accelerator is {own}, and it has no bound"
        raise ConfigurationError.of("max_memory", bounds, rule, "Name the accelerator of each process")
    if len(bounds) > 1:
        rule = "one process runs a bounded model on one accelerator"
        remedy = "Name one; or start a process for each, accelerate launch; or spread the whole model, device_map='auto', without a bound"
        raise ConfigurationError.of("max_memory", bounds, rule, remedy)
    return next(iter(bounds))
