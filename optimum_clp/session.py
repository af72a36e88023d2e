"""What the steps of a run work on: the dense model, the text and the weights' fingerprint, each made when it is needed.

What has come out so far lies beside them, with the one rule of what a new outcome makes void.
"""

import contextlib
import copy
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .architecture.lookup import find_architecture, num_layers, within_context
from .argument_types import check_argument
from .attempts import Attempts
from .calibration.rows import CalibrationData, load_calibration, load_test_rows, tokenize_dataset
from .checkpoint.in_memory import check_in_memory, model_or_name
from .checkpoint.loading import check_tokenizer, load_model, load_tokenizer
from .checkpoint.offloaded import read_in_place
from .checkpoint.on_device import placed, reserved_for
from .configuration.clp_config import CLPConfig
from .configuration.durations import seconds
from .configuration.run_stages import stages_of_run
from .configuration.sizes import accelerator_memory, main_memory
from .configuration.stages import CalibrationConfig
from .doors import load_chosen
from .errors import CalibrationError, ConfigurationError, ModelError
from .forward.layer_major import Residence
from .forward.memory_bound import residence_under, streaming
from .forward.streamed_layers import copies_of
from .mapped_weights import FileStamps, MappedWeights
from .origin import check_base, check_seal, weights_changed
from .processes import by_first, is_first
from .progress import Stages, say
from .report.hub import written_file
from .report.report import REPORT_NAME, CLPReport
from .report.section import to_section
from .resume import Caches, cache_file, search_journal, tuning_folder, weights_fingerprint
from .runtime.causal_lm import OnnxCausalLM
from .segments import LayerSegment, check_segments, endpoint_layers, further_segments
from .surgery.cut import separate
from .surgery.description import CutStep, describe_cut, describe_dense

logger = logging.getLogger(__name__)

_OF_A_FOLDER = ("quantization", "export", "evaluation", "failures")
# what each step makes void: sections of the report that speak of another cut, or of files that lie elsewhere
_VOID = {
    "search": ("cut", "tuning", *_OF_A_FOLDER),  # once it has chosen other segments than before
    "cut": ("cut", "tuning", *_OF_A_FOLDER),
    "cut elsewhere": ("search",),  # these layers are not what that search chose
    "tune": (),
    "export": ("quantization",),
    "save": _OF_A_FOLDER,
}
# steps after which what was saved before is not this model
_UNSAVED = ("search", "cut", "tune")


@dataclass(frozen=True)
class Further:
    """A model that was cut before, and is cut further.

    Args:
        model (`PreTrainedModel`): As it was given.
        segments (`tuple[LayerSegment, ...]`): What it has lost, in the dense model's numbering; nothing if the given model
            stands in for a dense one that cannot be had.
        steps (`tuple[CutStep, ...]`): The cuts that it has been through.
        name (`str` or `None`): Folder or Hub id.
    """

    model: PreTrainedModel
    segments: tuple[LayerSegment, ...]
    steps: tuple[CutStep, ...]
    name: str | None


@dataclass(eq=False)
class Session:
    """What the steps of a run work on, and what has come out of them.

    Args:
        model (`PreTrainedModel` or `None`): The dense model, never changed; [`~Session.dense`] loads a missing one.
        tokenizer (`PreTrainedTokenizerBase` or `None`): The model's.
        config ([`CLPConfig`]): The recipe.
        report ([`CLPReport`]): What was measured so far.
        pruned_model (`PreTrainedModel` or `None`): The cut model.
        segments (`tuple[LayerSegment, ...]` or `None`): What was or is to be cut, in the dense model's numbering.
        quiet (`bool`): No progress bars.
        onnx_file ([`OnnxCausalLM`] or `None`): All that there is, if a file of a folder was opened.
        folder (`Path` or `None`): The folder that was opened or saved last, as long as it holds this model.
        cache_dir (`str`, `os.PathLike` or `None`): Where files of the Hub are kept; `None` for transformers' own cache.
        attn_implementation (`str` or `None`): How models that are loaded compute attention; `None` for transformers' choice.

    Attributes:
        speed_choice (`SpeedChoice` or `None`): What was measured for `quantization.tune_for="speed"`.
        ratio_chosen (`float` or `None`): What the recipe's speed target came to.
        train_rows (`int` or `None`): Under a time budget: how many train rows the text has so far; `None` for as many as
            search and rounding look at.
        further ([`Further`] or `None`): What is cut, if it was cut before.
        cut_segments (`tuple[LayerSegment, ...]`): The last cut, in the numbering of the model that it was made in.
        attempts ([`Attempts`]): What has failed of this run so far.
        caches ([`Caches`]): What the stages keep on disk until the run has ended.
        stages ([`Stages`]): Which there are in a whole run; each says its place when it begins.
    """

    model: PreTrainedModel | None = None
    tokenizer: Any = None
    config: CLPConfig = field(default_factory=CLPConfig)
    report: CLPReport = field(default_factory=CLPReport)
    pruned_model: PreTrainedModel | None = None
    segments: tuple[LayerSegment, ...] | None = None
    quiet: bool = False
    onnx_file: OnnxCausalLM | None = None
    folder: Path | None = None
    cache_dir: str | os.PathLike | None = None
    attn_implementation: str | None = None
    speed_choice: Any = field(default=None, init=False)
    ratio_chosen: Any = field(default=None, init=False)
    train_rows: int | None = field(default=None, init=False)
    further: Further | None = field(default=None, init=False)
    cut_segments: tuple[LayerSegment, ...] = field(default=(), init=False)
    attempts: Attempts = field(default_factory=Attempts, init=False)
    caches: Caches = field(default_factory=Caches, init=False)
    stages: Stages = field(default_factory=Stages, init=False)
    _deadline: float | None = field(default=None, init=False)
    _changed: bool = field(default=False, init=False)
    _opened: Path | str | None = field(default=None, init=False)
    _checked: PreTrainedModel | None = field(default=None, init=False)
    _text: tuple[dict[str, Any], CalibrationData] | None = field(default=None, init=False)
    _weights: tuple[PreTrainedModel, str | None] | None = field(default=None, init=False)
    _measured: dict[Any, Any] = field(default_factory=dict, init=False)
    _stamps: tuple[PreTrainedModel, FileStamps] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_tokenizer(self.tokenizer)
        for name in ("model", "pruned_model"):
            if getattr(self, name) is not None:
                given = model_or_name(getattr(self, name))
                if isinstance(given, str):
                    remedy = "Open it: CLPPruner.from_pretrained(...)"
                    raise ModelError.of(name, given, "it is the name of a model, not a model", remedy)
                check_in_memory(given)
                setattr(self, name, read_in_place(given))
        if self.model is not None and self.report.base_model is None:
            self.report.base_model = to_section(describe_dense(self.model, self.model.name_or_path, None))

    def use(self, config: CLPConfig | None, again: bool = False) -> CLPConfig:
        """Replace the recipe by `config`, if there is one; check it, import what it names, and start its clock (`again`)."""
        if config is not None:
            self.config = config
        check_argument("config", self.config, CLPConfig)
        self.config.validate()
        load_chosen(self.config)
        self._start_clock(again)
        self._place()
        return self.config

    def _place(self) -> None:
        """Let the models that are at hand run on the accelerator that the recipe names, if it names one."""
        if self.pruned_model is not None:
            self.pruned_model = self._placed(self.pruned_model)
        if (dense := self.model) is not None:
            self.model = self._placed(dense)
            self._checked = self.model if self._checked is dense else self._checked

    def _placed(self, model: PreTrainedModel) -> PreTrainedModel:
        bounds = accelerator_memory(self.config.max_memory)
        if not bounds:
            return model
        length = within_context(self.config.calibration.sequence_length, model.config)
        return placed(model, bounds, length, reserved=reserved_for(model, self.config))

    def forget(self, step: str) -> None:
        """Drop what a step makes void: what was done to a cut model and measured of it says nothing about another."""
        if "cut" in _VOID[step]:
            self.pruned_model = None
        if step in _UNSAVED:
            self.folder = None
            self.attempts.failed.clear()
        for section in _VOID[step]:
            setattr(self.report, section, None)

    def dense(self) -> PreTrainedModel:
        """The dense model; for a folder that was cut before, from where its report says.

        Raises:
            ModelError: If it is needed and cannot be loaded.
        """
        if self.model is None:
            base = self.report.base_model or {}
            name = base.get("name_or_path")
            try:
                if not name:
                    raise ModelError.of("base_model", name, "the report does not name it", "Name it")
                like = self.pruned_model
                loaded = load_model(
                    name,
                    revision=base.get("revision"),
                    dtype="auto" if like is None else like.dtype,
                    device_map=self._beside(like),
                    **self._reading(),
                )
                check_base(self.report, loaded, self.quiet)
                self.model = self._checked = self._placed(loaded)
            except ModelError as error:
                raise ModelError.of(
                    "base_model",
                    name,
                    f"this step needs the dense model, and it could not be loaded ({error.problems[0].rule})",
                    "Start from the dense model, or set the pruner's `model` to it",
                ) from error
        if self._opened is not None and self._checked is not self.model:  # the caller has set it
            check_base(self.report, self.model, self.quiet)
            self._checked = self.model
        if any(parameter.is_inference() for parameter in self.model.parameters()):
            rule = "its weights were made within torch.inference_mode(), and no gradient passes through them"
            remedy = "Load it outside of torch.inference_mode()"
            raise ModelError.of("model", self.model.name_or_path or type(self.model).__name__, rule, remedy)
        return self.model

    def _beside(self, model: PreTrainedModel | None) -> dict[str, Any] | None:
        """Where the dense model is loaded to: beside the cut one, or where it lies if an accelerator does not hold it."""
        streamed = bool(accelerator_memory(self.config.max_memory)) or (
            model is not None and copies_of(model) is not None
        )
        return None if model is None or streamed else {"": model.device}

    def _reading(self) -> dict[str, Any]:
        """How models that are named are loaded, as the first one was."""
        own = {"cache_dir": self.cache_dir, "attn_implementation": self.attn_implementation}
        return {**own, "quiet": self.quiet}

    def source(self) -> PreTrainedModel:
        """The model that is searched and cut: the dense one; or, of a folder that was cut before, what is left there.

        That one is compared with the first dense model, or with itself if the first cannot be had; a warning says which.
        """
        if self._opened is not None and self.pruned_model is not None and self.further is None:
            self.further = self._cut_before(self.pruned_model)
        return self.dense() if self.further is None else self.further.model

    def _cut_before(self, given: PreTrainedModel) -> Further:
        cut, name = self.report.cut or {}, str(self._opened)
        steps = tuple(CutStep(s["model"], s["num_layers_before"], s["segments"]) for s in cut.get("chain", ()))
        first = (self.report.base_model or {}).get("name_or_path")
        steps = steps or (CutStep(first, cut["num_layers_before"], self.segments or ()),)
        segments = self.segments or ()
        try:
            self.dense()
            like = f"the first dense model, {first}"
        except ModelError as error:
            self.model, segments, like = given, (), f"itself, because of the first: {error.problems[0].rule}"
            self.report.base_model = to_section(describe_dense(given, name, None))
            self._checked = given
        logger.warning(f"{name} was cut before, and is cut further; what comes out is compared with {like}.")
        self.segments = None
        return Further(given, segments, steps, name)

    def cut_model(self, copy: bool = False) -> PreTrainedModel:
        """The cut model; with `copy`, it shares no storage with the dense one from now on.

        Raises:
            ConfigurationError: If nothing has been cut yet.
        """
        if self.pruned_model is None:
            raise ConfigurationError.of(
                "pruned_model", None, "nothing has been cut yet", "Call prune(), or search() and cut(), first"
            )
        source = self.model if self.further is None else self.further.model
        if copy and source is not None:
            separate(self.pruned_model, source)
        return self.pruned_model

    def cut_or_dense_config(self) -> PretrainedConfig:
        """The config of whichever model is at hand: both take the same texts."""
        return (self.pruned_model or self.dense()).config

    def segments_to_cut(self, given: Iterable[LayerSegment] | None) -> tuple[LayerSegment, ...]:
        """`given`, or else what the search has found, checked against the dense model.

        Raises:
            ConfigurationError: If there are none, or they do not fit the model.
        """
        total, chosen = num_layers(self.source().config), self.segments if given is None else given
        if chosen is None:
            raise ConfigurationError.of(
                "segments", None, "there is nothing to cut yet", "Call search() first, or give segments"
            )
        return check_segments(chosen, total)

    def set_cut(self, model: PreTrainedModel, segments: tuple[LayerSegment, ...]) -> None:
        """Take over a cut model, and write the report's `cut` section."""
        source, further, dense = self.source(), self.further, self.dense()
        self.pruned_model, self.segments, self.cut_segments = model, segments, segments
        if further is not None and further.segments:
            self.segments = further_segments(further.segments, segments, num_layers(dense.config))
        found = describe_cut(dense, model, self.segments)
        if further is not None:
            step = CutStep(further.name, num_layers(source.config), segments)
            towards = "first dense model" if further.segments else "given model"
            found = dataclasses.replace(found, chain=(*further.steps, step), towards=towards)
        self.report.cut = to_section(found)
        if self.report.search and self.report.search["segments"] != [s.to_list() for s in segments]:
            self.forget("cut elsewhere")

    def _start_clock(self, again: bool) -> None:
        """Let the recipe's time budget run from now, if there is one and it does not run already; or `again`."""
        budget = self.config.budget
        if again or budget is None or self._deadline is None:
            self._deadline = None if budget is None else time.monotonic() + seconds(budget)
            self.train_rows = None

    def open_cut(self, name: str) -> None:
        """The cut model comes from a folder: its weights are compared with the folder's report."""
        assert self.pruned_model is not None
        self._opened, self._changed = name, weights_changed(self.report, self.pruned_model, name, self.quiet)

    @contextlib.contextmanager
    def run(self, writes: bool) -> Iterator[None]:
        """A whole run: what its stages keep stays until its end, and each of them says its place.

        Args:
            writes (`bool`): A folder is to be written.
        """
        quiet = self.quiet or not is_first()
        with self.caches.run(), self.stages.run(stages_of_run(self.config, writes), quiet):
            yield

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage, of a run or called alone: what it keeps stays until the end of that."""
        self.stages.begin(name)
        with self.caches.run():
            yield

    def stop_clock(self) -> None:
        """What a budget was for has ended; the next step that has one starts it anew."""
        self._deadline = None

    def seconds_left(self) -> float:
        """Of the time budget."""
        assert self._deadline is not None
        return self._deadline - time.monotonic()

    def measured(self, key: Any, measure: Callable[[], Any]) -> Any:
        """What was measured on this machine under a key, once in this session."""
        if key not in self._measured:
            self._measured[key] = measure()
        return self._measured[key]

    def repeatable(self) -> CLPConfig:
        """The recipe that repeats this run: what its time budget has bought stands in place of the budget, and the ratio that
        its speed target came to on this machine in place of its targets.

        With so little time that tuning saw fewer rows than the search did it is the recipe as it was given.
        """
        config, rows, tuning = self.config, self.train_rows, self.report.tuning
        if config.target_tokens_per_second is not None and self.ratio_chosen is not None:
            values = {"target_tokens_per_second": None, "target_size_mb": None, "pruning_ratio": self.ratio_chosen}
            config = CLPConfig.from_dict(config.to_dict() | values)
        if config.budget is None or rows is None or not tuning or rows < config.search.num_sequences:
            return config
        found = CLPConfig.from_dict(config.to_dict() | {"budget": None})
        found.calibration.train_sequences, found.tuning.tokens = rows, None
        found.tuning.on_policy_rounds = len(tuning.get("on_policy") or ())
        return found

    def _text_settings(self) -> CalibrationConfig:
        """The recipe's text, with the train rows that a number of tokens or a time budget make of it."""
        config, settings = self.config, self.config.calibration
        if config.budget is not None and config.tuning.enabled:
            first = max(config.search.num_sequences, config.quantization.calibration_sequences)
            return dataclasses.replace(settings, train_sequences=self.train_rows or first)
        if config.tuning.tokens is not None:
            model = self.model or self.pruned_model
            assert model is not None
            length = within_context(settings.sequence_length, model.config)
            return dataclasses.replace(settings, train_sequences=max(1, round(config.tuning.tokens / length)))
        return settings

    def calibration(
        self, train_rows: int | None = None, *, test_rows: int | None = None, dealt: bool = True
    ) -> CalibrationData:
        """The recipe's text, read or written once for each recipe; also the report's `calibration` section.

        Args:
            train_rows (`int`, *optional*): No more train rows than these.
            test_rows (`int`, *optional*): No more test rows than these.
            dealt (`bool`): All processes of a group ask for it, and each one writes a part.

        Raises:
            CalibrationError: If it cannot be had.
        """
        if self.onnx_file is not None:
            raise CalibrationError.of(
                "text", None, "an ONNX file alone has no test rows", "Name the text to measure on"
            )
        settings = self._text_settings()
        if train_rows is not None:
            settings = dataclasses.replace(settings, train_sequences=min(settings.train_sequences, train_rows))
        if test_rows is not None:
            settings = dataclasses.replace(settings, test_sequences=min(settings.test_sequences, test_rows))
        source = self._text_key(settings)
        if self._text is None or self._text[0] != source:
            writes = self.config.calibration.dataset is None
            model = self.dense() if writes else self.model or self.pruned_model
            assert model is not None
            self._weights = None
            data = load_calibration(
                settings,
                self.tokenizer,
                model,
                self.config.seed,
                self.quiet,
                fingerprint=self.fingerprint() if writes else None,
                dense=self.dense,
                dealt=dealt,
            )
            self._text = source, data
        self.report.calibration = self._text[1].to_dict()
        return self._text[1]

    def search_text(self) -> CalibrationData:
        """The text of a search: no more train rows than it looks at, as writing all of them takes longer than the search.

        Of a search that is called alone the dense model writes no test rows either, which are a sample of their own. Those of a
        given text stay set apart: what a later step measures on is not what this one has looked at.
        """
        writes_in_vain = self.config.calibration.dataset is None and self.caches.is_of_one_stage
        return self.calibration(self.config.search.num_sequences, test_rows=1 if writes_in_vain else None)

    def outcome_text(self) -> CalibrationData:
        """The text that what comes out is rounded and measured on: untuned, with no more train rows than rounding looks at.

        In a group of processes the first one asks for it alone.
        """
        rows = None if self.report.tuning else self.config.quantization.calibration_sequences
        return self.calibration(rows, dealt=False)

    def rows(self, text: Any, model: Any, most: int | None = None) -> torch.Tensor:
        """Token rows to measure a model on: of a given text, or else the recipe's own test rows; int64 `[rows, length]`, no more than `most`."""
        if most is not None and most < 1:
            raise ConfigurationError.of("num_sequences", most, "it must be at least 1", "Leave it out to measure all")
        if text is None:
            return self._test_rows()[:most]
        settings = self.config.calibration
        length = within_context(settings.sequence_length, model.config)
        column = settings.text_column
        return tokenize_dataset(
            text, self.tokenizer, sequence_length=length, num_sequences=most, text_column=column, name="text"
        )

    def _test_rows(self) -> torch.Tensor:
        """The recipe's test rows, for which no other rows are written."""
        found, text = self._text, self.config.calibration
        if self.onnx_file is not None or (found is not None and found[0] == self._text_key(self._text_settings())):
            return self.calibration().test
        writes = text.dataset is None
        model = self.dense() if writes else self.model or self.pruned_model
        assert model is not None
        known: dict[str, Any] = {"fingerprint": self.fingerprint() if writes else None, "dense": self.dense}
        return load_test_rows(text, self.tokenizer, model, self.config.seed, self.quiet, **known)

    def _text_key(self, settings: CalibrationConfig) -> dict[str, Any]:
        return {"seed": self.config.seed, **vars(settings)}

    def fingerprint(self) -> str | None:
        """The dense weights' hash, taken once for each text: the text itself is not written again either."""
        if self._weights is None or self._weights[0] is not self.dense():
            self._weights = self.dense(), weights_fingerprint(self.dense(), self.quiet)
        return self._weights[1]

    def search_journal(self) -> Path | None:
        """Where this search keeps what it measures; nowhere if the weights are not in memory."""
        config, data, source = self.config, self.search_text(), self.source()
        weights = self.fingerprint() if source is self.dense() else weights_fingerprint(source, self.quiet)
        rows = data.train[: config.search.num_sequences], data.validation
        cache_dir = config.calibration.cache_dir
        return self.caches.take(search_journal(source, weights, config.to_dict(), rows, cache_dir))

    def search_options(self, residence: Residence | None) -> dict[str, Any]:
        """Where this search keeps what it measures, how many layers are in memory at a time, and whether it draws bars."""
        return {"journal": self.search_journal(), "residence": residence, "quiet": self.quiet}

    def evaluation_options(self) -> dict[str, Any]:
        """Rows in one forward pass of an evaluation, how many layers are in memory at a time, and whether it draws bars."""
        model = self.model or self.pruned_model
        residence = None if model is None else self.residence("evaluation", model)
        return {"batch_size": self.config.search.batch_size, "residence": residence, "quiet": self.quiet}

    def residence(self, stage: str, model: PreTrainedModel | None = None) -> Residence | None:
        """How passes over a model keep the recipe's bound on memory; `None` where all weights may stay.

        Says what the stage will hold, and how long the weights take to be read, where they may not. In a group of processes, all of
        which ask for a search's or a tuning's, it is the first one's: rows that run together are the same in all of them.

        Args:
            stage (`str`): What it is for.
            model (`PreTrainedModel`, *optional*): The model that is searched and cut, which begins a run, if not given: only then
                is too small a bound an error. What comes later does as well as it can.

        Raises:
            ConfigurationError: If the bound is too small; it says what would do.
            ModelError: If a file of the weights was written to since the first stage of the run.
        """
        source, text = model or self.source(), self.config.calibration
        length, states = within_context(text.sequence_length, source.config), cache_file("states", {}, text.cache_dir)
        limit = main_memory(self.config.max_memory)

        if self._stamps is None or self._stamps[0] is not source:
            self._stamps = source, FileStamps(MappedWeights().files_of(source))
        self._stamps[1].check()

        def decided() -> Residence | None:
            needs, found = residence_under(limit, source, length, states, strict=model is None)
            if found is not None and not self.quiet:
                say(f"{stage}: {streaming(source, needs, found)}")
            return found

        return decided() if stage == "evaluation" else by_first(decided)

    def tuning_folder(self) -> Path | None:
        """Where this tuning keeps its checkpoints; nowhere if the weights are not in memory."""
        models = self.dense(), self.cut_model()  # there must be both, before any text is written
        if self._changed:
            rule = "its weights were changed after its report was written: they are not what was cut there"
            raise ModelError.of("model", str(self._opened), rule, "Give the folder as optimum-clp wrote it")
        config, data, segments = self.config, self.calibration(), self.segments or ()
        recipe = {
            "tuning": vars(config.tuning),
            "seed": config.seed,
            "layers": endpoint_layers(segments, num_layers(self.dense().config), config.tuning.endpoint_width),
            "segments": list(map(str, segments)),
        }
        masks = [mask for mask in (data.train_mask, data.validation_mask) if mask is not None]
        rows = data.train, data.validation, *masks
        cache_dir = config.calibration.cache_dir
        folder = tuning_folder(*models, self.fingerprint(), recipe, rows, cache_dir, self.quiet)
        return self.caches.take(folder, folder=True)

    def measured_model(self, file_name: str | None) -> Any:
        """What there is to measure: an ONNX file of the folder that was opened or saved last, if it is named; else the
        file that was opened alone, the cut model, or the dense one.

        Raises:
            ConfigurationError: If a file is named, and there is no such folder.
        """
        self._place()
        if file_name is None:
            return self.onnx_file or self.pruned_model or self.model
        if self.folder is None:
            rule = "no folder was opened or saved yet"
            raise ConfigurationError.of("file_name", file_name, rule, "Save the model first")
        return OnnxCausalLM.from_pretrained(self.folder, file_name)

    def reference(self, given: PreTrainedModel | str | os.PathLike | None) -> PreTrainedModel | None:
        """The dense model to compare with: `given`, loaded if it is a name; else the run's own, if it is loaded."""
        if given is None:
            return self.model
        return self._placed(load_model(given, **self._reading()))


def _of_session(name: str) -> Any:
    return property(lambda self: getattr(self._session, name), lambda self, value: setattr(self._session, name, value))


class SessionAttributes:
    """The attributes of a class that works on a session: they are the session's, and a copy has a session of its own."""

    _session: Session
    model: PreTrainedModel | None = _of_session("model")
    pruned_model: PreTrainedModel | None = _of_session("pruned_model")
    tokenizer: Any = _of_session("tokenizer")
    config: CLPConfig = _of_session("config")
    report: CLPReport = _of_session("report")
    segments: tuple[LayerSegment, ...] | None = _of_session("segments")
    quiet: bool = _of_session("quiet")

    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._session = copy.copy(self._session)
        return other


def open_session(
    model_or_path: PreTrainedModel | str | os.PathLike,
    file_name: str | None,
    tokenizer: Any,
    *,
    reading: dict[str, Any],
    hub: dict[str, Any],
    quiet: bool = False,
) -> Session:
    """A session over a dense model, a folder that was written before, or one ONNX file of such a folder.

    Args:
        model_or_path (`PreTrainedModel`, `str` or `os.PathLike`): A model, a Hub id, or a local folder.
        file_name (`str` or `None`): An ONNX file of the folder, which is all that is opened then.
        tokenizer (`PreTrainedTokenizerBase`, `str`, `os.PathLike` or `None`): If it does not lie beside the model.
        reading (`dict`): `dtype`, `device_map`, `use_safetensors` and `attn_implementation` of [`load_model`].
        hub (`dict`): Its `revision`, `token`, `trust_remote_code` and `cache_dir`.
        quiet (`bool`): No progress bars.

    Raises:
        ModelError: If the model or its tokenizer cannot be read, or its architecture is not supported.
        ConfigurationError: If `file_name` is given with a model in memory.
    """
    model_or_path = model_or_name(model_or_path)
    path = None if isinstance(model_or_path, PreTrainedModel) else model_or_path
    folder = Path(path) if path is not None and os.path.isdir(path) else None
    kept = {"cache_dir": hub["cache_dir"], "attn_implementation": reading["attn_implementation"]}
    session = Session(quiet=quiet, folder=folder, **kept)
    ours = CLPConfig.CONFIG_NAME, REPORT_NAME
    place = hub["revision"], hub["token"], hub["cache_dir"]
    recipe, record = (written_file(path, name, *place) for name in ours)
    if recipe:
        session.config = CLPConfig.from_pretrained(recipe)
    if record:
        session.report = CLPReport.load(record)
        check_seal(session.report, str(path))
    if file_name is not None:
        if path is None:
            rule = "it names a file of a folder, and a model in memory has none"
            raise ConfigurationError.of("file_name", file_name, rule, "Give the folder instead of the model")
        session.onnx_file = OnnxCausalLM.from_pretrained(path, file_name, cache_dir=hub["cache_dir"])
    else:
        loaded = load_model(model_or_path, accept=find_architecture, quiet=quiet, **reading, **hub)
        if session.report.cut is not None:
            session.pruned_model = loaded
            session.open_cut(str(path))
            session.segments = tuple(LayerSegment(*bounds) for bounds in session.report.cut["segments"])
        else:
            # what was measured before the cut, as by a search, is measured again
            session.model = loaded
            name = path or loaded.name_or_path
            session.report = CLPReport(base_model=to_section(describe_dense(loaded, name, hub["revision"])))
    source = path if tokenizer is None else tokenizer
    session.tokenizer = load_tokenizer(source, **hub) if isinstance(source, (str, os.PathLike)) else source
    check_tokenizer(session.tokenizer)
    return session
