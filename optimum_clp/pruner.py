"""`CLPPruner`: a dense model goes in, a smaller one comes out."""

import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from optimum.quantization_base import OptimumQuantizer
from transformers import PreTrainedModel

from .architecture.lookup import allowed_segments, find_architecture, num_layers, text_config
from .calibration.rows import CalibrationData, load_calibration, tokenize_dataset
from .calibration.sample_cache import tensors_fingerprint, weights_fingerprint
from .checkpoint.loading import load_model, load_tokenizer
from .checkpoint.output import check_output, staged_folder
from .checkpoint.saving import save_checkpoint, save_configs, save_tokenizer, verify_checkpoint
from .configuration.clp_config import CLPConfig
from .errors import (
    CalibrationError,
    ConfigurationError,
    ExportError,
    ModelError,
    QuantizationError,
    TuningError,
)
from .evaluation.outcome import measure_outcome
from .evaluation.tasks import evaluate_tasks, load_task
from .evaluation.tokens import evaluate_tokens
from .exporters.export import export_onnx, write_runtime_configs
from .exporters.obstacle import onnx_obstacle
from .exporters.rounding.weights import needs_calibration
from .forward.dense_outputs import DenseOutputs
from .processes import is_first, wait_for_all
from .quantization import quanto_obstacle, save_quantized
from .report.environment import environment_info
from .report.hub import upload, written_file
from .report.model_card import write_model_card
from .report.plots import write_plots
from .report.report import REPORT_NAME, CLPReport
from .runtime.causal_lm import OnnxCausalLM
from .search import SearchResult, search_segments, search_within_budget
from .search.journal import journal_file
from .segments import LayerSegment, check_segments, endpoint_layers, kept_layers, number_of_layers_to_remove
from .surgery.cut import cut_model
from .surgery.sizes import count_parameters
from .tuning.endpoints import tune_layers
from .tuning.result import TuningResult


class CLPPruner(OptimumQuantizer):
    """Continuous layer pruning of a causal language model.

    `prune` does everything; `search`, `cut`, `tune`, `quantize` and `export` are its steps, and each can be called alone.
    The dense model is never changed: the cut model shares its tensors, and only the tuned layers get storage of their own.

    Args:
        model (`PreTrainedModel` or `None`): The dense model; `None` if only a cut one is at hand.
        tokenizer (`PreTrainedTokenizerBase` or `None`): Needed for given text; self-written text does without.
        config ([`CLPConfig`], *optional*): The recipe.
        report ([`CLPReport`], *optional*): What was measured so far.
        pruned_model (`PreTrainedModel`, *optional*): The cut model, if there is one.
        segments (`Iterable[LayerSegment]`, *optional*): What was cut, in the dense model's numbering.
        quiet (`bool`): No progress bars.

    Attributes:
        model, pruned_model, tokenizer, config, report, segments: As above.
    """

    def __init__(
        self,
        model: PreTrainedModel | None,
        tokenizer: Any = None,
        config: CLPConfig | None = None,
        *,
        report: CLPReport | None = None,
        pruned_model: PreTrainedModel | None = None,
        segments: Iterable[LayerSegment] | None = None,
        quiet: bool = False,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.config = config or CLPConfig()
        self.report = report or CLPReport()
        self.pruned_model = pruned_model
        self.segments = tuple(segments) if segments is not None else None
        self.quiet = quiet
        self._folder: Path | None = None
        self._file: OnnxCausalLM | None = None
        self._data: tuple[dict[str, Any], CalibrationData] | None = None
        self._weights: tuple[PreTrainedModel, str | None] | None = None
        if model is not None and self.report.base_model is None:
            self.report.base_model = _description(model, model.name_or_path, None)

    @classmethod
    def from_pretrained(
        cls,
        model_or_path: PreTrainedModel | str | os.PathLike,
        file_name: str | None = None,
        *,
        tokenizer: Any = None,
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        revision: str | None = None,
        token: str | bool | None = None,
        trust_remote_code: bool = False,
        use_safetensors: bool = True,
        quiet: bool = False,
    ) -> "CLPPruner":
        """Open a dense model, or a folder that this class wrote.

        Args:
            model_or_path (`PreTrainedModel`, `str` or `os.PathLike`): A model, a Hub id, or a local folder. From a folder
                that [`~CLPPruner.save_pretrained`] wrote, config, report and segments are restored; the dense model is
                then loaded from `base_model` of the report when a step needs it.
            file_name (`str`, *optional*): An ONNX file of the folder, such as `"onnx/model_q4.onnx"`: only that file is
                opened, for [`~CLPPruner.evaluate`].
            tokenizer (`PreTrainedTokenizerBase` or path, *optional*): If it does not lie beside the model.
            dtype (`str` or `torch.dtype`): Of the weights; `"auto"` takes the checkpoint's own.
            device_map: As in transformers.
            revision (`str`, *optional*): Branch, tag or commit on the Hub.
            token (`str` or `bool`, *optional*): For private or gated models.
            trust_remote_code (`bool`): Run code that comes with the model.
            use_safetensors (`bool`): `False` also allows pickled weights, which can run code when they are read.
            quiet (`bool`): No progress bars.

        Raises:
            ModelError: If the model or its tokenizer cannot be read, or its architecture is not supported.
            ConfigurationError: If `file_name` is given with a model in memory.
        """
        hub: dict[str, Any] = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
        path = None if isinstance(model_or_path, PreTrainedModel) else os.fspath(model_or_path)
        folder = Path(path) if path is not None and os.path.isdir(path) else None
        recipe, record = (written_file(path, name, revision, token) for name in (CLPConfig.CONFIG_NAME, REPORT_NAME))
        config = CLPConfig.from_pretrained(recipe) if recipe else None
        report = CLPReport.load(record) if record else None
        if file_name is not None:
            if path is None:
                rule = "it names a file of a folder, and a model in memory has none"
                raise ConfigurationError.of("file_name", file_name, rule, "Give the folder instead of the model")
            pruner = cls(None, config=config, report=report, quiet=quiet)
            pruner._file = OnnxCausalLM.from_pretrained(path, file_name)
        else:
            loaded = load_model(
                model_or_path,
                dtype=dtype,
                device_map=device_map,
                use_safetensors=use_safetensors,
                accept=find_architecture,
                quiet=quiet,
                **hub,
            )
            if report is not None and report.cut is not None:
                segments = [LayerSegment(*s) for s in report.cut["segments"]]
                pruner = cls(None, config=config, report=report, pruned_model=loaded, segments=segments, quiet=quiet)
            else:
                report = CLPReport(base_model=_description(loaded, path or loaded.name_or_path, revision))
                pruner = cls(loaded, config=config, report=report, quiet=quiet)
        pruner._folder = folder
        source = path if tokenizer is None else tokenizer
        pruner.tokenizer = load_tokenizer(source, **hub) if isinstance(source, (str, os.PathLike)) else source
        return pruner

    def search(self, config: CLPConfig | None = None) -> SearchResult:
        """Find the layers to remove; nothing is removed.

        What is measured is kept beside self-written text (`calibration.rows.cache_dir`) until the search has ended: called
        again after an interruption, with the same model and recipe, it goes on where it was.

        Args:
            config ([`CLPConfig`], *optional*): The recipe; replaces the pruner's own.

        Returns:
            [`SearchResult`]: Also in `report.report.search`; its segments are the next `cut`'s.

        Raises:
            ConfigurationError: If the ratio removes no layer or all of them.
            CalibrationError: If the text cannot be had.
            SearchError: If no segment has a finite score, or if not even one layer fits the quality budget.
        """
        config = self._use(config)
        dense = self._dense()
        bound = config.perplexity_bound()
        if bound is None:
            count = number_of_layers_to_remove(float(config.pruning_ratio), num_layers(dense.config))
            if config.num_segments == 1:
                allowed_segments(dense.config, count)  # refused before any text is read or written
        data = self._calibration()
        options: dict[str, Any] = {
            "num_segments": config.num_segments,
            "seed": config.seed,
            "journal": self._search_journal(data),
            "quiet": self.quiet,
        }
        if bound is None:
            result = search_segments(dense, data.train, count, config.search, **options)
        else:
            result = search_within_budget(dense, data.train, data.validation, bound, config.search, **options)
        if result.segments != self.segments:
            self._forget_cut()
        self.segments = result.segments
        self.report.search = result.to_dict()
        return result

    def cut(self, segments: Iterable[LayerSegment] | None = None) -> PreTrainedModel:
        """Remove layers; the dense model stays whole, and the smaller one shares its tensors.

        Args:
            segments (`Iterable[LayerSegment]`, *optional*): What to remove; what `search` found if not given.

        Returns:
            `PreTrainedModel`: The cut model, also as `pruned_model`.

        Raises:
            ConfigurationError: If there are no segments, or they do not fit the model.
            CutError: If the config cannot express the cut.
        """
        dense = self._dense()
        if segments is None and self.segments is None:
            raise ConfigurationError.of(
                "segments", None, "there is nothing to cut yet", "Call search() first, or give segments"
            )
        total = num_layers(dense.config)
        chosen = check_segments(self.segments or () if segments is None else segments, total)
        self._forget_cut()
        self.pruned_model = cut_model(dense, chosen)
        self.segments = chosen
        kept = kept_layers(chosen, total)
        self.report.cut = {
            "segments": [s.to_list() for s in chosen],
            "removed_layers": [i for i in range(total) if i not in kept],
            "num_layers_before": total,
            "num_layers_after": len(kept),
            "num_parameters_before": count_parameters(dense),
            "num_parameters_after": count_parameters(self.pruned_model),
        }
        if self.report.search and self.report.search["segments"] != self.report.cut["segments"]:
            self.report.search = None  # these layers are not what that search chose
        return self.pruned_model

    def tune(self, config: CLPConfig | None = None) -> TuningResult:
        """Train the layers next to the cut towards the dense model.

        Checkpoints are kept beside self-written text (`calibration.rows.cache_dir`) until tuning has ended: called again after
        an interruption, with the same model and recipe, it goes on from the last one.

        Args:
            config ([`CLPConfig`], *optional*): The recipe; replaces the pruner's own.

        Returns:
            [`TuningResult`]: Also in `report.report.tuning`. The weights with the best validation loss are in `pruned_model`;
            these are the untuned ones if tuning did not help.

        Raises:
            TuningError: If the loss is not finite; the last good weights are in `pruned_model`.
        """
        config = self._use(config)
        model, dense, data = self._cut_model(), self._dense(), self._calibration()
        layers = endpoint_layers(self.segments or (), num_layers(dense.config), config.tuning.endpoint_width)
        self._folder = None  # what was saved before is not this model
        folder = self._tuning_folder(data, layers)
        try:
            result = tune_layers(
                model,
                dense,
                layers,
                data.train,
                data.validation,
                config.tuning,
                kept=kept_layers(self.segments or (), num_layers(dense.config)),
                validation_kinds=data.validation_kinds,
                seed=config.seed,
                folder=folder,
                quiet=self.quiet,
            )
        except TuningError as error:
            if error.result is not None:
                self.report.tuning = error.result.to_dict()
                _remove(folder)
            raise
        _remove(folder)
        self.report.tuning = result.to_dict()
        return result

    def quantize(  # type: ignore[override]  # Optimum's save_dir is save_directory in everything newer
        self,
        save_directory: str | os.PathLike,
        file_prefix: str | None = None,
        *,
        weights: str = "int8",
        overwrite: bool = False,
    ) -> Path:
        """Write an optimum-quanto checkpoint of the cut model, which [`load_quantized`] reads.

        Args:
            save_directory (`str` or `os.PathLike`): A folder of its own.
            file_prefix (`None`): Part of Optimum's interface; quanto's file names are fixed.
            weights (`str`): `"int8"` or `"int4"`.
            overwrite (`bool`): Replace a folder that is not empty.

        Returns:
            `Path`: The folder.
        """
        if file_prefix is not None:
            raise ConfigurationError.of(
                "file_prefix", file_prefix, "quanto checkpoints have fixed file names", "Leave it out"
            )
        target = check_output(save_directory, overwrite)
        result = save_quantized(
            self._cut_model(), self.tokenizer, target, weights, overwrite=overwrite, quiet=self.quiet
        )
        self.report.quantization = [*(self.report.quantization or []), result.to_dict()]
        return target

    def export(self, save_directory: str | os.PathLike, *, overwrite: bool = False) -> Path:
        """Write the cut model as ONNX files (`onnx/...`), with config and tokenizer but without PyTorch weights.

        Args:
            save_directory (`str` or `os.PathLike`): Output folder.
            overwrite (`bool`): Replace a folder that is not empty.

        Returns:
            `Path`: The folder.

        Raises:
            ExportError: If a file does not say what the PyTorch model says; nothing is written then.
        """
        target = check_output(save_directory, overwrite)
        model = self._cut_model()
        self.report.quantization = None  # quanto folders made before are elsewhere
        with staged_folder(target, overwrite) as folder:
            save_configs(model, folder)
            save_tokenizer(self.tokenizer, folder)
            self._export_into(folder, model)
            self._write_records(folder, target.name)
        self._folder = target
        return target

    def evaluate(
        self,
        text: str | list[str] | None = None,
        *,
        reference: PreTrainedModel | str | os.PathLike | None = None,
        file_name: str | None = None,
        tasks: Mapping[str, str | os.PathLike | list[dict[str, Any]]] | None = None,
        task_limit: int | None = None,
    ) -> dict[str, Any]:
        """Measure the cut model (or the dense one if nothing is cut, or an ONNX file) on a text, or on tasks, or on both.

        Args:
            text (`str` or `list[str]`, *optional*): As `calibration.rows.dataset`; the recipe's own test rows if neither text
                nor tasks are given.
            reference (`PreTrainedModel`, `str` or `os.PathLike`, *optional*): The dense model, for KL, agreement and
                retention; the pruner's own dense model if it is loaded.
            file_name (`str`, *optional*): An ONNX file of the folder that was opened or saved last.
            tasks (`Mapping[str, str | os.PathLike | list[dict]]`, *optional*): For each task's name a JSON lines file or
                its rows, see [`load_task`]. Needs a tokenizer.
            task_limit (`int`, *optional*): Only so many examples of each task, from the start; at least 1.

        Returns:
            `dict`: `perplexity`, `loss`, `num_tokens`, `kl`, `top1_agreement`, `retention` (dense perplexity divided by
            this one's), as in [`Evaluation`], unless only tasks are measured; `tasks` if there are any: for each name the
            values of [`TaskScore`], and with a dense model `dense_accuracy` and `retention`.

        Raises:
            CalibrationError: If the text or a task cannot be read or tokenized.
            ConfigurationError: If `task_limit` is below 1, or `file_name` has no folder.
        """
        loaded = [load_task(name, source) for name, source in (tasks or {}).items()]
        batch = self.config.search.batch_size
        model: Any = self._file or self.pruned_model or self.model
        if file_name is not None:
            if self._folder is None:
                raise ConfigurationError.of(
                    "file_name", file_name, "no folder was opened or saved yet", "Save the model first"
                )
            model = OnnxCausalLM.from_pretrained(self._folder, file_name)
        dense = self.model
        if reference is not None:
            dense = reference if isinstance(reference, PreTrainedModel) else load_model(reference, quiet=self.quiet)
        measured: dict[str, Any] = {}
        if text is not None or not loaded:
            if text is None:
                tokens = self._calibration().test
            else:
                length = self.config.calibration.sequence_length
                length = min(length, getattr(text_config(model.config), "max_position_embeddings", None) or length)
                tokens = tokenize_dataset(
                    text,
                    self.tokenizer,
                    sequence_length=length,
                    text_column=self.config.calibration.text_column,
                    name="text",
                )
            outputs = None if dense is None else DenseOutputs(dense, tokens, batch_size=batch, quiet=self.quiet)
            found = evaluate_tokens(model, tokens, reference=outputs, batch_size=batch, quiet=self.quiet)
            measured = found.to_dict()
        if loaded:
            measured["tasks"] = evaluate_tasks(
                model, dense, self.tokenizer, loaded, batch_size=batch, limit=task_limit, quiet=self.quiet
            )
        return measured

    def prune(
        self,
        config: CLPConfig | None = None,
        save_directory: str | os.PathLike | None = None,
        *,
        overwrite: bool = False,
    ) -> PreTrainedModel:
        """Search, cut, tune; and, with a folder, quantize, export, measure and write it all.

        Args:
            config ([`CLPConfig`], *optional*): The recipe; replaces the pruner's own.
            save_directory (`str` or `os.PathLike`, *optional*): Output folder, see [`~CLPPruner.save_pretrained`].
            overwrite (`bool`): Replace a folder that is not empty.

        Returns:
            `PreTrainedModel`: The smaller model.

        Raises:
            ExportError, QuantizationError: Before any work, if this architecture has no ONNX file or no quanto checkpoint.
            CLPError: What any of the steps raises. After a [`TuningError`] the last good weights have been saved.
        """
        config = self._use(config)
        if save_directory is not None:
            check_output(save_directory, overwrite)
            self._refuse_early(config)
        self.search(config)
        model = self.cut()
        failure = None
        if config.tuning.enabled:
            try:
                self.tune()
            except TuningError as error:
                failure = error
        if save_directory is not None:
            self.save_pretrained(save_directory, overwrite=overwrite)
        if failure is not None:
            raise failure
        return model

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, *, overwrite: bool = False, **kwargs: Any
    ) -> Path:
        """Write the whole output folder: checkpoint, tokenizer, recipe, report, model card, plots, ONNX files.

        The checkpoint is an ordinary one; it is read back with transformers' own classes and compared before anything
        else is done. The folder appears whole or not at all. In a group of processes the first one writes, and the others
        wait for it.

        Args:
            save_directory (`str` or `os.PathLike`): Output folder.
            push_to_hub (`bool`): Also upload it, to `repo_id` in `kwargs` or else to the folder's name.
            overwrite (`bool`): Replace a folder that is not empty.
            kwargs: Passed to [`~CLPPruner.push_to_hub`].

        Returns:
            `Path`: The folder.
        """
        model = self._cut_model()
        if not is_first():
            # not checked here: the first process may have filled the folder by now
            wait_for_all()
            self._folder = Path(save_directory)
            return self._folder
        target = check_output(save_directory, overwrite)
        # the report of a folder speaks of that folder's files alone
        self.report.quantization = self.report.export = self.report.evaluation = None
        with staged_folder(target, overwrite) as folder:
            save_checkpoint(model, self.tokenizer, folder)
            verify_checkpoint(folder, model)
            if self.config.quantization.quanto:
                made = [
                    save_quantized(model, self.tokenizer, folder / f"quanto-{weights}", weights, quiet=self.quiet)
                    for weights in self.config.quantization.weights
                ]
                self.report.quantization = [result.to_dict() for result in made]
            if self.config.export.enabled:
                self._export_into(folder, model)
            self._measure(folder, model)
            self._write_records(folder, target.name)
        self._folder = target
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", target.name), **kwargs)
        wait_for_all()
        return target

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the output folder that was saved or opened last, with its subfolders; save one first if there is none.

        Args:
            repo_id (`str`): Repository on the Hub; made if it does not exist.
            kwargs: `private`, `token`, `revision`, `commit_message`, `commit_description`, `create_pr`.

        Returns:
            `str`: The commit's address.
        """
        if self._folder is not None and (self._folder / REPORT_NAME).is_file():
            return upload(self._folder, repo_id, **kwargs)
        with tempfile.TemporaryDirectory() as parent:
            folder = self.save_pretrained(Path(parent) / repo_id.split("/")[-1])
            try:
                return upload(folder, repo_id, **kwargs)
            finally:
                self._folder = None

    def _refuse_early(self, config: CLPConfig) -> None:
        """Say before any work what a later stage would say of this architecture after all of it."""
        if config.quantization.quanto and (problem := quanto_obstacle(self._dense())) is not None:
            raise QuantizationError(problem)
        if config.export.enabled and (problem := onnx_obstacle(self._dense())) is not None:
            raise ExportError(problem)

    def _use(self, config: CLPConfig | None) -> CLPConfig:
        if config is not None:
            self.config = config
        self.config.validate()
        return self.config

    def _forget_cut(self) -> None:
        """Drop the cut model: what was done to it and measured of it says nothing about another cut."""
        self.pruned_model = self._folder = self.report.cut = self.report.tuning = None
        self.report.quantization = self.report.export = self.report.evaluation = None

    def _cut_model(self) -> PreTrainedModel:
        if self.pruned_model is None:
            raise ConfigurationError.of(
                "pruned_model", None, "nothing has been cut yet", "Call prune(), or search() and cut(), first"
            )
        return self.pruned_model

    def _dense(self) -> PreTrainedModel:
        """The dense model; for a folder that was cut before, from where its report says."""
        if self.model is None:
            base = self.report.base_model or {}
            name = base.get("name_or_path")
            try:
                if not name:
                    raise ModelError.of("base_model", name, "the report does not name it", "Name it")
                like = self.pruned_model
                self.model = load_model(
                    name,
                    revision=base.get("revision"),
                    dtype="auto" if like is None else like.dtype,
                    device_map=None if like is None else {"": like.device},
                    quiet=self.quiet,
                )
            except ModelError as error:
                raise ModelError.of(
                    "base_model",
                    name,
                    f"this step needs the dense model, and it could not be loaded ({error.problems[0].rule})",
                    "Start from the dense model, or set the pruner's `model` to it",
                ) from error
        return self.model

    def _calibration(self) -> CalibrationData:
        """The recipe's text, read or written once for each recipe."""
        source = {"seed": self.config.seed, **vars(self.config.calibration)}
        if self._data is None or self._data[0] != source:
            if self._file is not None:
                raise CalibrationError.of(
                    "text", None, "an ONNX file alone has no test rows", "Name the text to measure on"
                )
            model = self._dense() if self.config.calibration.dataset is None else self.model or self.pruned_model
            assert model is not None
            self._weights = None
            data = load_calibration(
                self.config.calibration,
                self.tokenizer,
                model,
                self.config.seed,
                self.quiet,
                fingerprint=self._fingerprint() if self.config.calibration.dataset is None else None,
            )
            self._data = (source, data)
        self.report.calibration = self._data[1].to_dict()
        return self._data[1]

    def _search_journal(self, data: CalibrationData) -> Path | None:
        """Where this search keeps what it measures; nowhere if the weights are not in memory."""
        rows = (data.train[: self.config.search.num_sequences], data.validation)
        recipe = {**self.config.to_dict(), "calibration": None, "tuning": None, "export": None}
        contents = self._work_contents(rows, recipe)
        return None if contents is None else journal_file("search", contents, self.config.calibration.cache_dir)

    def _tuning_folder(self, data: CalibrationData, layers: list[int]) -> Path | None:
        """Where this tuning keeps its checkpoints; nowhere if the weights are not in memory."""
        model, shared = self._cut_model(), {p.data_ptr() for p in self._dense().parameters()}
        own = tensors_fingerprint(
            [(n, p) for n, p in model.named_parameters() if p.data_ptr() not in shared], self.quiet
        )
        recipe = {"tuning": vars(self.config.tuning), "seed": self.config.seed, "own": own, "layers": layers}
        contents = self._work_contents(
            (data.train, data.validation), {**recipe, "segments": list(map(str, self.segments or ()))}
        )
        if contents is None or own is None:
            return None
        return journal_file("tuning", contents, self.config.calibration.cache_dir).with_suffix("")

    def _work_contents(self, rows: Iterable[torch.Tensor], recipe: dict[str, Any]) -> dict[str, Any] | None:
        """All that the outcome of a resumable stage depends on; `None` if the dense weights are not in memory."""
        fingerprint = self._fingerprint()
        if fingerprint is None:
            return None
        return {
            "weights": fingerprint,
            "model": self._dense().config.to_dict(),
            "recipe": recipe,
            "rows": [hashlib.sha256(part.contiguous().numpy().tobytes()).hexdigest() for part in rows],
            "threads": torch.get_num_threads(),
        }

    def _fingerprint(self) -> str | None:
        """The dense weights' hash, taken once for each text: the text itself is not written again either."""
        if self._weights is None or self._weights[0] is not self._dense():
            self._weights = (self._dense(), weights_fingerprint(self._dense(), self.quiet))
        return self._weights[1]

    def _measure(self, folder: Path, model: PreTrainedModel) -> None:
        data, seed = self._calibration(), self.config.seed
        written = f"text that the dense model wrote (seed {seed + 1}; calibrated on seed {seed})"
        self.report.evaluation = measure_outcome(
            data.test,
            f"the test split of {data.source}" if data.statistics is None else written,
            dense=self.model,
            pruned=model,
            segments=self.segments or (),
            tuned=self.report.tuning is not None,
            folder=folder,
            export=self.report.export,
            batch_size=self.config.search.batch_size,
            quiet=self.quiet,
        )

    def _export_into(self, folder: Path, model: PreTrainedModel) -> None:
        result = export_onnx(
            model,
            folder,
            self.config.export,
            self.config.quantization,
            calibration=self._quantization_rows(model),
            seed=self.config.seed,
            quiet=self.quiet,
        )
        obstacles = write_runtime_configs(folder, model, result)
        self.report.export = {**result.to_dict(), "genai_obstacle": obstacles["genai"]}

    def _quantization_rows(self, model: PreTrainedModel) -> torch.Tensor | None:
        """The rows that the rounding of the ONNX files' weights looks at, if it looks at any."""
        quantization, text = self.config.quantization, self.config.calibration
        if not needs_calibration(quantization):
            return None
        if self.model is not None or text.dataset is not None:
            return self._calibration().train[: quantization.calibration_sequences]
        # a cut folder is exported without its dense model: the cut one writes the text
        rows = min(quantization.calibration_sequences, text.train_sequences)
        text = dataclasses.replace(text, train_sequences=rows, validation_sequences=1, test_sequences=1)
        return load_calibration(text, self.tokenizer, model, self.config.seed, self.quiet).train

    def _write_records(self, folder: Path, name: str) -> None:
        device = (self.pruned_model or self._dense()).device
        self.report.environment = environment_info(device)
        self.config.save_pretrained(folder)
        self.report.save(folder)
        write_plots(self.report, folder)
        write_model_card(self.report, self.config, folder, model_name=name)


def _remove(folder: Path | None) -> None:
    """Remove what a stage that has ended kept for its resumption."""
    wait_for_all()
    if folder is not None and is_first():
        shutil.rmtree(folder, ignore_errors=True)


def _description(model: PreTrainedModel, name: str | None, revision: str | None) -> dict[str, Any]:
    """The `base_model` section of the report."""
    return {
        "name_or_path": name or None,
        "revision": revision,
        "model_type": model.config.model_type,
        "num_layers": num_layers(model.config),
        "num_parameters": count_parameters(model),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
