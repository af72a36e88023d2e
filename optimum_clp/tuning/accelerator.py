"""The accelerator of one tuning run, and how a step's rows are dealt out to processes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, ProjectConfiguration
from torch import nn

from ..configuration.stages import TuningConfig
from ..errors import ConfigurationError


@contextmanager
def tuning_accelerator(config: TuningConfig, device: torch.device, modules: nn.Module) -> Iterator[Accelerator]:
    """An accelerator for one run; what it leaves in accelerate's shared state is removed if nothing was there before.

    Args:
        config ([`TuningConfig`]): Mixed precision, accumulation, loggers.
        device (`torch.device`): Of the model, which stays where it is.
        modules (`nn.Module`): What will be trained.
    """
    fresh, alone = not AcceleratorState._shared_state, not PartialState._shared_state
    unused = any("expert" in name for name, _ in modules.named_parameters())  # no token of a batch may go to one
    accelerator = Accelerator(
        cpu=device.type == "cpu" and fresh,
        device_placement=False,
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=list(config.report_to) or None,
        project_config=ProjectConfiguration(project_dir=config.logging_dir, logging_dir=config.logging_dir),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
    )
    try:
        yield accelerator
    finally:
        accelerator.free_memory()
        if fresh:
            AcceleratorState._reset_state(reset_partial_state=alone)
            GradientState._reset_state()


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether the engine deals out the weights; it brings float32 masters of its own, and changes the modules."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def micro_batch_size(setting: str, batch_size: int, accumulation: int, processes: int) -> int:
    """Rows in one forward pass of one process; `setting` is where the global batch comes from.

    Raises:
        ConfigurationError: If the global batch cannot be dealt out evenly.
    """
    if batch_size % (accumulation * processes):
        rule = (
            f"a step of {batch_size} rows must be dealt out evenly to {processes} processes times {accumulation} "
            "accumulation steps"
        )
        remedy = f"Choose a multiple of {accumulation * processes}, or fewer accumulation steps or processes"
        raise ConfigurationError.of(setting, batch_size, rule, remedy)
    return batch_size // (accumulation * processes)
