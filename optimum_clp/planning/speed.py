"""How fast int4 files of a model are on this machine, measured before there is one: with drawn weights, in turn.

What one form of a file is worth beside another is a ratio of times that were taken one after the other, many times; a form other than the
plain one is chosen only if it is faster by more than such ratios scatter. What a number of layers is worth is a line through two files.
"""

import copy
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..architecture.containers import reader
from ..architecture.lookup import allowed_segments, cut_config, num_layers, within_context
from ..configuration.clp_config import CLPConfig
from ..doors import ROUNDINGS
from ..errors import ExportError, ModelError
from ..exporters.float32_copy import float32_copy
from ..exporters.obstacle import onnx_obstacle
from ..exporters.probe import WeightForm, write_probes
from ..exporters.result import MeasuredForm, SpeedChoice
from ..forward.decoding import cache_of
from ..progress import progress_bar
from ..runtime.causal_lm import OnnxCausalLM
from ..runtime.session import open_session, quiet_options
from ..segments import kept_layers

GROUP_SIZES = (32, 64, 128)
PROMPT, STEPS = 256, 64
"""What a choice is made for: a prompt of so many tokens, and so many after it."""
_PROBE_LAYERS = 4
# of the time that a choice may take; a machine that is busy gets fewer rounds, not more time
_SECONDS, _LEAST_ROUNDS, _MOST_ROUNDS = 20.0, 5, 15
_MEASURED_STEPS = 8
# what a form must gain: medians of such rounds differ by a percent without any reason
_GAIN = 1.02


@dataclass(frozen=True)
class Times:
    """One measurement of one file.

    Args:
        prompt (`float`): Seconds of the prompt.
        step (`float`): Seconds of one token after it, the least of some: what else the machine does is not in it.
    """

    prompt: float
    step: float

    @property
    def whole(self) -> float:
        """Seconds of a prompt and the tokens after it."""
        return self.prompt + STEPS * self.step


@dataclass(frozen=True)
class LayerTimes:
    """What a token takes in files of a model with some of its layers: `rest + layers * layer`.

    Args:
        rest (`float`): Seconds of what is no layer, the head above all.
        layer (`float`): Seconds of a layer.
        num_layers (`int`): Of the dense model.
        threads (`int`): That computed.
    """

    rest: float
    layer: float
    num_layers: int
    threads: int

    def tokens_per_second(self, layers: int) -> float:
        """Of a file with so many layers."""
        return 1 / (self.rest + layers * self.layer)

    def most_layers(self, tokens_per_second: float) -> int:
        """Layers that a file of this speed may have, at most; negative if even none is too many."""
        if self.layer <= 0:
            return self.num_layers if self.tokens_per_second(0) >= tokens_per_second else -1
        # a file that is faster by a hair of rounding is one
        return (
            int((1 / tokens_per_second - self.rest) / self.layer + 1e-9) if 1 / tokens_per_second >= self.rest else -1
        )


def choose_for_speed(config: PretrainedConfig, recipe: CLPConfig, *, quiet: bool = False) -> SpeedChoice:
    """The form of the int4 file in which a model like this one is fastest on this machine.

    Measured are the plain form, and what differs from it in one thing; if more than one thing gains, both together as well.

    Args:
        config (`PretrainedConfig`): Of the dense model.
        recipe ([`CLPConfig`]): Its export and its rounding method.
        quiet (`bool`): No progress bar.

    Returns:
        [`SpeedChoice`]

    Raises:
        ExportError: If this model has no ONNX file.
    """
    plain = WeightForm(GROUP_SIZES[0], 4)
    rivals = [dataclasses.replace(plain, group_size=size) for size in GROUP_SIZES[1:]]
    rivals.append(dataclasses.replace(plain, accuracy_level=1))
    if ROUNDINGS.get(recipe.quantization.method).budget_obstacle is None:
        rivals.append(dataclasses.replace(plain, head_bits=8))
    shallow = drawn_model(shallow_config(config, _PROBE_LAYERS))
    with tempfile.TemporaryDirectory() as folder:
        measured = _measure(shallow, [plain, *rivals], recipe, Path(folder), quiet)
        gained = [form for form in measured if form.speed > _GAIN]
        best_group = max(
            (f for f in gained if f.group_size != plain.group_size), key=lambda form: form.speed, default=None
        )
        together = WeightForm(
            plain.group_size if best_group is None else best_group.group_size,
            1 if any(form.accuracy_level == 1 for form in gained) else 4,
            8 if any(form.head_bits == 8 for form in gained) else 4,
        )
        if all(_form(form) != together for form in measured):
            measured += _measure(shallow, [plain, together], recipe, Path(folder), quiet)[1:]
    best = max(measured, key=lambda form: form.speed)
    chosen = best if best.speed > _GAIN else measured[0]
    return SpeedChoice(**vars(chosen), threads=measured_threads(), measured=tuple(measured))


def layer_times(config: PretrainedConfig, recipe: CLPConfig, *, quiet: bool = False) -> LayerTimes:
    """What a token takes on this machine, by two int4 files: of the whole model, and of one with half of its layers.

    Args:
        config (`PretrainedConfig`): Of the dense model.
        recipe ([`CLPConfig`]): Its export and the form of its int4 file.
        quiet (`bool`): No progress bar.

    Raises:
        ExportError: If this model has no ONNX file.
        ModelError: If this architecture cannot be cut.
    """
    form, depth = WeightForm.of(recipe.quantization), num_layers(config)
    half = shallow_config(config, (depth + 1) // 2)
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name, each in (("whole", config), ("half", half)):
            place = Path(folder) / name
            place.mkdir()
            model = drawn_model(each)
            embeddings = recipe.quantization.quantize_embeddings
            files += write_probes(model, [form], place, recipe.export, quantize_embeddings=embeddings)
            del model
        whole, part = (opened_file(file, each) for file, each in zip(files, (config, half), strict=True))
        times = interleaved_times([whole, part], quiet=quiet)
    slow, fast = (statistics.median(each.step for each in of_one) for of_one in times)
    layer = (slow - fast) / (depth - num_layers(half))
    return LayerTimes(slow - depth * layer, layer, depth, measured_threads())


def interleaved_times(models: Sequence[OnnxCausalLM], *, quiet: bool = False) -> list[list[Times]]:
    """Times of several files, measured in turn, so that a machine that drifts hits all alike.

    Args:
        models (`Sequence[OnnxCausalLM]`): The files, open.
        quiet (`bool`): No progress bar.

    Returns:
        `list[list[Times]]`: For each file one of each round; the first round is not in it.
    """
    length = within_context(PROMPT, models[0].config) - _MEASURED_STEPS - 1
    tokens = torch.arange(3, 3 + max(1, length))[None] % int(models[0].config.get_text_config().vocab_size)
    found: list[list[Times]] = [[] for _ in models]
    begin, rounds = time.perf_counter(), 0
    with progress_bar(_MOST_ROUNDS + 1, "Measuring speed", quiet) as bar:
        while rounds <= _LEAST_ROUNDS or (rounds <= _MOST_ROUNDS and time.perf_counter() - begin < _SECONDS):
            for model, times in zip(models, found, strict=True):
                times.append(_times(model, tokens))
            rounds += 1
            bar.update()
    return [times[1:] for times in found]


def opened_file(file: Path, config: PretrainedConfig) -> OnnxCausalLM:
    """An ONNX file, with the threads that everything here is measured with."""
    return OnnxCausalLM(open_session(file, quiet_options(measured_threads())), config)


def measured_threads() -> int:
    """As many as PyTorch has: one for each core, or what `OMP_NUM_THREADS` says."""
    return torch.get_num_threads()


def shallow_config(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The config of a model like this one with so many layers, or the nearest number above that its architecture can be cut to.

    Raises:
        ModelError: If it cannot be cut at all.
    """
    depth = num_layers(config)
    for count in range(min(layers, depth), depth):
        try:
            segment = allowed_segments(config, depth - count)[0]
        except ModelError:
            continue
        return cut_config(config, kept_layers([segment], depth))
    if layers < depth:
        allowed_segments(config, 1)  # says why
    return config


def drawn_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model of this shape with drawn weights, in float32 on the CPU, as an export traces it.

    Raises:
        ExportError: If it has no ONNX file.
        ModelError: If transformers cannot build it.
    """
    own = copy.deepcopy(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = reader(own.model_type, *(own.architectures or ())[:1]).from_config(own, dtype=torch.float32)
        except Exception as error:  # whatever a model's class makes of a malformed config
            said = " ".join(str(error).split())[:300] or type(error).__name__
            rule = f"transformers cannot build it from its config ({said})"
            raise ModelError.of("model", own.model_type, rule, "Check its config.json") from error
    model = model.requires_grad_(False).eval()
    if (obstacle := onnx_obstacle(model)) is not None:
        raise ExportError(obstacle)
    return float32_copy(model)


def _measure(
    model: PreTrainedModel, forms: Sequence[WeightForm], recipe: CLPConfig, folder: Path, quiet: bool
) -> list[MeasuredForm]:
    """Each form beside the first one: how many times as fast."""
    embeddings = recipe.quantization.quantize_embeddings
    files = write_probes(model, forms, folder, recipe.export, quantize_embeddings=embeddings)
    times = interleaved_times([opened_file(file, model.config) for file in files], quiet=quiet)
    found = []
    for form, own in zip(forms, times, strict=True):
        pairs = list(zip(times[0], own, strict=True))
        ratios = (
            statistics.median(getattr(plain, name) / getattr(other, name) for plain, other in pairs)
            for name in ("whole", "prompt", "step")
        )
        found.append(MeasuredForm(form.group_size, form.accuracy_level, form.head_bits, *ratios))
    return found


def _form(form: MeasuredForm) -> WeightForm:
    return WeightForm(form.group_size, form.accuracy_level, form.head_bits)


def _times(model: OnnxCausalLM, tokens: torch.Tensor) -> Times:
    ids, moments = tokens, [time.perf_counter()]
    cache: Any = None
    for _ in range(_MEASURED_STEPS + 1):
        output = model(ids, past_key_values=cache, logits_to_keep=1)
        cache, logits = cache_of(output), output.logits
        assert logits is not None
        ids = logits[:, -1:].argmax(-1)
        moments.append(time.perf_counter())
    steps = [after - before for before, after in zip(moments[1:], moments[2:], strict=False)]
    return Times(moments[1] - moments[0], min(steps))
