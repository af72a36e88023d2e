"""What a run takes whose weights stay in their files: the smallest bound on memory, and how often the weights are read."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..architecture.lookup import allowed_segments, decoder_layers, num_layers, text_config, within_context
from ..checkpoint.on_device import reserved_for
from ..configuration.clp_config import CLPConfig
from ..configuration.sizes import accelerator_memory, main_memory
from ..errors import ConfigurationError, ModelError
from ..exporters.room import export_work
from ..exporters.rounding.weights import needs_calibration
from ..forward.memory_bound import copies_within, pass_memory
from ..search.gate_descent import SETTLING_ROUNDS, places_along, radii
from ..search.races import FINALISTS
from ..segments import LayerSegment, endpoint_layers, kept_layers
from ..surgery.sizes import count_bytes, count_parameters
from ..tuning.activations import layer_activations
from ..tuning.losses import LOGITS, needs_of
from ..tuning.schedule import stages_of
from .footprint import TuningMemory, tuning_memory

DISK_SPEED = 3e9
"""Bytes a second of the disk that a plan is made for."""

# what a process holds that has loaded the libraries, measured on Linux: 320 MB, and what an allocator keeps of a layer's work
_PROCESS = 400 * 2**20
# passes over the float32 copy and over the float file, each with a cache of a few steps, and what writes and rounds them
_EXPORT_PASSES = 24


@dataclass(frozen=True)
class PlannedStreaming:
    """How a run keeps a bound on memory.

    Args:
        max_memory (`int` or `None`): The bound, in bytes; `None` without one.
        resident (`int`): Bytes that passes hold with every weight in memory (estimate).
        smallest (`int`): The smallest bound that will do, tuning and export included (estimate).
        layers_at_once (`int`): Layers whose weights are in memory together; all of them where they may stay.
        readings (`dict[str, float]`): How often each stage reads the dense model's weights, at most; 1 in all where they may stay. A reading of
            the cut model is a part of one. `tuning steps` are the passes of the optimizer's steps, and of what judges them, which read the layers
            above the first trained one each time; `self-written text` and `generation` read all weights for each token.
        bytes_read (`int`): All readings together.
    """

    max_memory: int | None
    resident: int
    smallest: int
    layers_at_once: int
    readings: dict[str, float]
    bytes_read: int

    def to_dict(self) -> dict[str, Any]:
        """All of it, and `seconds_read` at [`DISK_SPEED`]."""
        return {**vars(self), "readings": dict(self.readings), "seconds_read": self.bytes_read / DISK_SPEED}


def planned_streaming(dense: PreTrainedModel, recipe: CLPConfig, removed: int | None) -> PlannedStreaming:
    """Plan a run under the recipe's bound on memory; without a bound, with every weight in memory.

    Args:
        dense (`PreTrainedModel`): The dense model; may be on the meta device.
        recipe ([`CLPConfig`]): Its bound, and what its stages do.
        removed (`int` or `None`): Layers that go; `None` if a quality budget decides.

    Raises:
        ConfigurationError: If the bound is too small; it says what would do.
    """
    length, depth = within_context(recipe.calibration.sequence_length, dense.config), num_layers(dense.config)
    needs, bound = (
        pass_memory(dense, length, private=_PROCESS if dense.device.type == "meta" else None),
        recipe.max_memory,
    )
    on_accelerator = bool(accelerator_memory(bound))
    smallest = max(
        needs.smallest,
        # an accelerator that runs the model has the tuning's numbers, too
        needs.smallest - needs.least + (0 if on_accelerator else _tuning(dense, recipe, length, removed or 1)),
        needs.private + _export(dense, recipe),
    )
    limit = main_memory(bound)
    if limit is not None and limit < smallest:
        rule = f"the weights of one layer, what is around the layers, this process and its largest stage take {smallest / 2**30:.2f} GiB"
        raise ConfigurationError.of("max_memory", bound, rule, f"Give at least {-(-smallest // 2**20)}MiB")
    for number, bytes_there in accelerator_memory(bound).items():
        reserved = reserved_for(dense, recipe)
        copies_within(bytes_there, dense, length, torch.device("meta"), reserved=reserved, name=str(number))
    residence = None if limit is None else needs.residence(limit, None)
    readings = {"loading": 1.0} if residence is None else _readings(dense, recipe, removed)
    together = depth if residence is None else residence.layers
    total = round(sum(readings.values()) * count_bytes(dense))
    return PlannedStreaming(limit, needs.resident, smallest, together, readings, total)


def _export(dense: PreTrainedModel, recipe: CLPConfig) -> int:
    """Bytes that an ONNX export holds whose large arrays lie in files."""
    if not recipe.export.enabled:
        return 0
    length = within_context(recipe.calibration.sequence_length, dense.config)
    return export_work(dense, length if needs_calibration(recipe.quantization) else None)


def _tuning(dense: PreTrainedModel, recipe: CLPConfig, length: int, removed: int) -> int:
    """Bytes that tuning holds beside the weights that it does not train, for the segment that takes most."""
    if not recipe.tuning.enabled:
        return 0
    try:
        segments = allowed_segments(dense.config, removed)
    except ModelError:  # several segments are meant, or another number of layers
        segments = [LayerSegment(0, removed)]
    element, depth, text = dense.dtype.itemsize, num_layers(dense.config), recipe.calibration
    activations = [
        (layer_activations(layer, element, trained=False), layer_activations(layer, element, trained=True))
        for layer in decoder_layers(dense)
    ]

    tuning = recipe.tuning
    # a part of a step is in work at a time
    part = replace(tuning, batch_size=-(-tuning.batch_size // tuning.gradient_accumulation_steps))

    def held(segment: LayerSegment) -> int:
        memory: TuningMemory = tuning_memory(
            dense,
            kept_layers([segment], depth),
            endpoint_layers([segment], depth, recipe.tuning.endpoint_width),
            part,
            activations=activations,
            train_rows=text.train_sequences,
            validation_rows=text.validation_sequences,
            sequence_length=length,
        )
        # what leaves the layers above is kept for all rows of a part, what is inside one for a row; states that memory does not hold
        # lie on disk; a solution's factor and products were measured to be as much again as its sums
        left = (depth - segment.start) * part.batch_size * length * text_config(dense.config).hidden_size * element
        row = max(memory.logits // part.batch_size, length * max(trained for _, trained in activations))
        steps = memory.masters + memory.gradients + memory.moments + left + row
        return memory.endpoints + max(2 * memory.closed_form, steps)

    return max(map(held, (segments[0], segments[len(segments) // 2], segments[-1])))


def _readings(dense: PreTrainedModel, recipe: CLPConfig, removed: int | None) -> dict[str, float]:
    """By stage, in readings of the dense model. What is counted are the code's own passes, each of which is named here."""
    left = _share_left(dense, removed or 1)
    found: dict[str, float] = {
        # whether every number is finite
        "loading": 1,
        # the trial cut is guarded, saved, compared and run (it and what was saved); the fingerprint; what a layer's work is; the rounds
        "search": 1 + 4 * left + 1 + 1 + search_rounds(dense, recipe, removed),
        "cut": 1,  # the guard's look at what layers return
        # read back, compared and run (two models), and the fingerprints of both at the end
        "saving": 1 + 5 * left,
        "evaluation": _evaluation(recipe, left),
    }
    found |= {"self-written text": _self_written(dense, recipe), "generation": _generation(recipe, left)}
    if recipe.tuning.enabled:
        started = recipe.tuning.init != "none"
        # the fingerprint, and the dense model's states of both splits; the student, and for a start another and its own passes, look once at
        # what layers return
        found["tuning"] = 1 + 2 + left * (4 if started else 1)
        found["tuning steps"] = _steps(dense, recipe, left, started)
    if recipe.export.enabled:
        found["export"] = left * (1 + _EXPORT_PASSES * 4 / dense.dtype.itemsize)
    return {stage: round(count, 2) for stage, count in found.items() if count}


def _share_left(dense: PreTrainedModel, removed: int) -> float:
    """Of the weights' bytes, what the cut model has: the lightest layers go."""
    layers = sorted(sum(p.nbytes for p in layer.parameters()) for layer in decoder_layers(dense))
    return 1 - sum(layers[:removed]) / count_bytes(dense)


def _steps(dense: PreTrainedModel, recipe: CLPConfig, left: float, started: bool) -> float:
    """Readings by the steps of the optimizer, up and down, and by what judges the weights: of all layers if the first is trained."""
    config, rows = recipe.tuning, recipe.calibration.train_sequences
    width = config.endpoint_width * 2 * recipe.num_segments / num_layers(dense.config)
    # a start is judged before and after
    found = left * (2 if started else 1)
    for stage in stages_of(config, text_config(dense.config).hidden_size, rows):
        through = left if LOGITS in needs_of(stage.loss) else min(left, width)
        steps = stage.steps(rows) + stage.measuring_steps(rows)
        found += 2 * through * steps * config.gradient_accumulation_steps + left * stage.evaluations
    return found


def _evaluation(recipe: CLPConfig, left: float) -> float:
    """The dense model's outputs for each text, and each model's own figures; the untuned cut is made, and guarded, again."""
    cuts, config = (2 if recipe.tuning.enabled else 1), recipe.evaluation
    texts = 1 + len(config.texts)
    # a task is one more text, if the states of its requests have room
    return texts + (texts + len(config.tasks)) * (1 + cuts * left) + (cuts - 1)


def _self_written(dense: PreTrainedModel, recipe: CLPConfig) -> float:
    """A reading for each token of a batch; train and validation rows are a sample, and test rows if there is no other text."""
    text = recipe.calibration
    given = text.dataset is not None
    share = text.self_written_share if given else 1.0
    samples = [share * (text.train_sequences + text.validation_sequences), 0 if given else text.test_sequences]
    batches = sum(math.ceil(rows / text.generation_batch_size) for rows in samples)
    return batches * within_context(text.sequence_length, dense.config)


def _generation(recipe: CLPConfig, left: float) -> float:
    """All prompts at once, greedy and sampled: a reading for each token of an answer; and the dense model's opinion of the answers."""
    if not recipe.evaluation.generation:
        return 0
    cuts = 2 if recipe.tuning.enabled else 1
    return 2 * recipe.evaluation.max_new_tokens * (1 + cuts * left)


def search_rounds(dense: PreTrainedModel, recipe: CLPConfig, removed: int | None) -> int:
    """How often a search passes through the dense model, at most, if each pass serves all candidates of a round.

    Gradients (`taylor`) go up and down.
    """
    config, depth = recipe.search, num_layers(dense.config)
    if removed is None:  # bisection over the number of layers, each with a look at the validation rows
        lengths = max(1, math.ceil(math.log2(depth)))
        return lengths * (1 + max(_rounds_of(config.strategy, recipe, depth, n) for n in (1, depth // 2)))
    strategy = config.strategy
    if strategy == "auto":
        strategy = "gate" if recipe.num_segments > 1 else _automatic(dense, recipe, depth, removed)
    return _rounds_of(strategy, recipe, depth, removed)


def _automatic(dense: PreTrainedModel, recipe: CLPConfig, depth: int, removed: int) -> str:
    """What the strategy `auto` will choose, with the head's work told by its weights."""
    layers = [count_parameters(layer) for layer in decoder_layers(dense)]
    embedding: Any = dense.get_input_embeddings()
    head = embedding.weight.numel() / (sum(layers) / depth)
    rest = depth - removed
    cost = 1 + (rest * (rest + 1) / 2 + (rest + 1) * head) / (depth + head)
    return "exhaustive" if recipe.search.repair == "none" and cost <= recipe.search.budget else "halving"


def _rounds_of(strategy: str, recipe: CLPConfig, depth: int, removed: int) -> int:
    candidates = depth - removed + 1
    if strategy == "exhaustive":
        return 1
    if strategy == "halving":
        return _halvings(candidates)
    if strategy == "gate":
        places = places_along(depth - removed, removed)
        spacing = places[1] - places[0] if len(places) > 1 else 1.0
        return 1 + len(radii(spacing / 2)) + SETTLING_ROUNDS + _halvings(recipe.search.num_rescored)
    if strategy == "perplexity_greedy":
        return removed
    if strategy in ("tail", "random"):
        return 1
    # what ranks layers, and the cut's own figures
    return 3 if strategy == "taylor" else 2


def _halvings(candidates: int) -> int:
    return max(1, math.ceil(math.log2(candidates / FINALISTS)) + 1) if candidates > 1 else 1
