"""`CLPPruner`: a dense model goes in, a smaller one comes out."""

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from optimum.quantization_base import OptimumQuantizer
from transformers import PreTrainedModel

from .argument_types import check_methods
from .checkpoint.output import claimed_output
from .configuration.clp_config import CLPConfig
from .errors import TuningError
from .evaluation.model import evaluate_model
from .evaluation.tasks import load_tasks
from .healing import heal
from .output_folder import check_run, finish_run, write_export, write_quanto, write_run
from .own_state import verbs
from .planning.speed_target import aimed
from .processes import entered_by_first, is_first, wait_for_all
from .report.hub import upload
from .report.hub_access import check_repo_id, wanted_upload
from .report.report import REPORT_NAME, CLPReport
from .search.recipe import layers_to_remove, search_by_recipe
from .search.result import SearchResult
from .segments import LayerSegment
from .session import Session, SessionAttributes, open_session
from .surgery.cut import cut_model
from .trial import try_cut
from .tuning.result import TuningResult


@check_methods
@verbs(
    "from_pretrained", "search", "cut", "tune", "quantize", "export", "evaluate", "prune", "save_pretrained", "finish"
)
class CLPPruner(SessionAttributes, OptimumQuantizer):
    """Continuous layer pruning of a causal language model.

    `prune` does everything; `search`, `cut`, `tune`, `quantize` and `export` are its steps, and each can be called alone.
    The dense model is never changed. The cut model shares its tensors, and only tuned layers get storage of their own: whoever
    trains it further asks for `copy=True`, or changes the dense one too.

    Args (all of them attributes, too):
        model (`PreTrainedModel` or `None`): The dense model; `None` if only a cut one is at hand.
        tokenizer (`PreTrainedTokenizerBase` or `None`): Needed for given text; self-written text does without.
        config ([`CLPConfig`], *optional*): The recipe.
        report ([`CLPReport`], *optional*): What was measured so far.
        pruned_model (`PreTrainedModel`, *optional*): The cut model, if there is one.
        segments (`Iterable[LayerSegment]`, *optional*): What was cut, in the dense model's numbering.
        quiet (`bool`): No progress bars.
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
        cut = pruned_model, None if segments is None else tuple(segments)
        self._session = Session(model, tokenizer, config or CLPConfig(), report or CLPReport(), *cut, quiet)

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
        attn_implementation: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        quiet: bool = False,
    ) -> "CLPPruner":
        """Open a dense model, or a folder that this class wrote.

        Args:
            model_or_path (`PreTrainedModel`, `str` or `os.PathLike`): A model, a Hub id, or a local folder. From a folder
                that [`~CLPPruner.save_pretrained`] wrote, config, report and segments are restored; the dense model is
                then loaded from `base_model` of the report when a step needs it.
            file_name (`str`, *optional*): A file of the folder, `"onnx/model_q4.onnx"`: it alone is opened, for [`~CLPPruner.evaluate`].
            tokenizer (`PreTrainedTokenizerBase` or path, *optional*): If it does not lie beside the model.
            dtype (`str` or `torch.dtype`): Of the weights; `"auto"` takes the checkpoint's own.
            device_map, attn_implementation: As in transformers, which chooses if they are not given; a model in memory keeps its own.
            revision, token, cache_dir: As in transformers, for the Hub: branch, tag or commit; access to private and gated
                models; the folder in which its files are kept.
            trust_remote_code (`bool`): Run code that comes with the model.
            use_safetensors (`bool`): `False` also allows pickled weights, which can run code when they are read.
            quiet (`bool`): No progress bars.

        Raises:
            ModelError: If the model or its tokenizer cannot be read, or its architecture or attention is not supported.
            ConfigurationError: If `file_name` is given with a model in memory.
        """
        reading: dict[str, Any] = {"dtype": dtype, "device_map": device_map, "use_safetensors": use_safetensors}
        reading["attn_implementation"], pruner = attn_implementation, cls(None)
        hub = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code, "cache_dir": cache_dir}
        pruner._session = open_session(model_or_path, file_name, tokenizer, reading=reading, hub=hub, quiet=quiet)
        return pruner

    def search(self, config: CLPConfig | None = None) -> SearchResult:
        """Find the layers to remove; nothing is removed.

        What is measured is kept beside self-written text (`calibration.cache_dir`) until the search has ended: called
        again after an interruption, with the same model and recipe, it goes on where it was.

        Args:
            config ([`CLPConfig`], *optional*): The recipe; replaces the pruner's own.

        Returns:
            [`SearchResult`]: Also in `report.search`; its segments are the next `cut`'s.

        Raises:
            ConfigurationError: If the ratio removes no layer or all of them, or no file has the size or speed that is asked for.
            CalibrationError: If the text cannot be had.
            SearchError: If no segment has a finite score, or if not even one layer fits the quality budget.
            ModelError, CutError: Before any text, if a trial cut, saved and read back, is not the model that is meant.
        """
        session = self._session
        config, dense, residence = aimed(session, config), session.source(), session.residence("search")
        try_cut(dense, self.tokenizer, layers_to_remove(config, dense.config), session.cache_dir)  # before any text
        with session.stage("search"):
            data, options = session.search_text(), session.search_options(residence)
            result = search_by_recipe(dense, data.train, data.validation, config, **options)
        if result.segments != self.segments:
            session.forget("search")
        self.segments, self.report.search = result.segments, result.to_dict()
        return result

    def cut(self, segments: Iterable[LayerSegment] | None = None, *, copy: bool = False) -> PreTrainedModel:
        """Remove layers; the dense model stays whole, and the smaller one shares its tensors.

        Args:
            segments (`Iterable[LayerSegment]`, *optional*): What to remove; what `search` found if not given.
            copy (`bool`): Give it storage of its own: training it as a whole then leaves the dense model as it is.

        Returns:
            `PreTrainedModel`: The cut model, also as `pruned_model`.

        Raises:
            ConfigurationError: If there are no segments, or they do not fit the model.
            CutError: If the config cannot express the cut.
        """
        chosen = self._session.segments_to_cut(segments)
        self._session.forget("cut")
        self._session.set_cut(cut_model(self._session.source(), chosen), chosen)
        return self._session.cut_model(copy)

    def tune(self, config: CLPConfig | None = None) -> TuningResult:
        """Train the layers next to the cut towards the dense model.

        Checkpoints are kept beside self-written text (`calibration.cache_dir`) until tuning has ended: called again after an
        interruption, with the same model and recipe, it goes on from the last one.

        Args:
            config ([`CLPConfig`], *optional*): The recipe; replaces the pruner's own.

        Returns:
            [`TuningResult`]: Also in `report.tuning`. `pruned_model` has the best weights, untuned ones if none were better.

        Raises:
            TuningError: If the loss is not finite; the last good weights are in `pruned_model`.
        """
        self._session.use(config)
        return heal(self._session)

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
        return write_quanto(self._session, save_directory, file_prefix, weights, overwrite)

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
        return write_export(self._session, save_directory, overwrite)

    def evaluate(
        self,
        text: Any = None,
        *,
        num_sequences: int | None = None,
        reference: PreTrainedModel | str | os.PathLike | None = None,
        file_name: str | None = None,
        tasks: Mapping[str, str | os.PathLike | list[dict[str, Any]]] | list[Any] | None = None,
        task_limit: int | None = None,
        generation: bool | None = None,
    ) -> dict[str, Any]:
        """Measure the cut model (or the dense one if nothing is cut, or an ONNX file) on a text, on tasks, and by what it says.

        Args:
            text (`str`, `os.PathLike` or `list[str]`, *optional*): As `calibration.dataset`; the recipe's own test rows if no text, no tasks.
            num_sequences (`int`, *optional*): Only so many rows of the text, from the start; at least 1.
            reference (`PreTrainedModel`, `str` or `os.PathLike`, *optional*): The dense model; the pruner's if it is loaded.
            file_name (`str`, *optional*): An ONNX file of the folder that was opened or saved last.
            tasks (`Mapping[str, str | os.PathLike | list[dict]]` or `list`, *optional*): For each task's name a JSON lines file or
                its rows, see [`load_task`]; or a list of names of lm-eval's tasks and of `NAME=FILE`. Needs a tokenizer.
            task_limit (`int`, *optional*): Only so many examples of each task, from the start; at least 1.
            generation (`bool`, *optional*): Let it answer; if not given, as the recipe says, and not where only tasks are measured.

        Returns:
            `dict`: Figures of [`Evaluation`], unless only tasks are measured; for each name in `tasks` the values of
            [`TaskScore`], with a dense model `dense_accuracy` and `retention`; `generation`, with a dense model `verdict`.

        Raises:
            CalibrationError: If the text or a task cannot be read or tokenized.
            ConfigurationError: If `num_sequences` or `task_limit` is below 1, `file_name` has no folder, or the prompts cannot be used.
        """
        session, loaded = self._session, load_tasks(tasks or {}, self.config.evaluation)
        model, dense = session.measured_model(file_name), session.reference(reference)
        rows = None if text is None and loaded else session.rows(text, model, num_sequences)
        asked = (rows is not None and self.config.evaluation.generation) if generation is None else generation
        more = {"task_limit": task_limit, "generation": self.config if asked else None, **session.evaluation_options()}
        return evaluate_model(model, dense, rows, loaded, self.tokenizer, **more)

    def prune(
        self,
        config: CLPConfig | None = None,
        save_directory: str | os.PathLike | None = None,
        *,
        overwrite: bool = False,
        copy: bool = False,
    ) -> PreTrainedModel:
        """Search, cut, tune; and, with a folder, quantize, export, measure and write it all.

        What is left in a folder that was cut before is cut further, and compared with the first dense model if there is one.

        Args:
            config ([`CLPConfig`], *optional*): The recipe; replaces the pruner's own.
            save_directory (`str` or `os.PathLike`, *optional*): Output folder, see [`~CLPPruner.save_pretrained`].
            overwrite (`bool`): Replace a folder that is not empty.
            copy (`bool`): As in [`~CLPPruner.cut`], at the end.

        Returns:
            `PreTrainedModel`: The smaller model.

        Raises:
            ExportError, QuantizationError: Before any work, if this architecture has no ONNX file or no quanto checkpoint.
            CLPError: What search, cut and tuning raise; after a [`TuningError`] the last good weights have been saved.
        """
        session = self._session
        config, failure = session.use(config, again=True), None
        with entered_by_first(claimed_output(save_directory, overwrite)), session.run(save_directory is not None):
            check_run(session, writes=save_directory is not None)
            self.search(config)
            self.cut()
            if config.tuning.enabled:
                try:
                    self.tune()
                except TuningError as error:
                    failure = error
            if save_directory is not None:
                self.save_pretrained(save_directory, overwrite=overwrite)
        if failure is not None:
            raise failure
        return self._session.cut_model(copy)

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, *, overwrite: bool = False, **kwargs: Any
    ) -> Path:
        """Write the whole output folder: checkpoint, tokenizer, recipe, report, model card, plots, ONNX files.

        The checkpoint is an ordinary one; it is read back with transformers' own classes and compared first. The folder
        appears whole or not at all; what fails once the checkpoint is in it is left out, and named in `report.failures`. In a
        group of processes the first one writes, and the others wait for it.

        Args:
            save_directory (`str` or `os.PathLike`): Output folder.
            push_to_hub (`bool`): Also upload it, to `repo_id` in `kwargs` or else to the folder's name.
            overwrite (`bool`): Replace a folder that is not empty.
            kwargs: Passed to [`~CLPPruner.push_to_hub`].

        Returns:
            `Path`: The folder.
        """
        self._session.cut_model()  # there must be one, in each process
        if is_first():
            repo_id = wanted_upload(save_directory, kwargs) if push_to_hub else None  # before the work
            folder = write_run(self._session, save_directory, overwrite)
            if repo_id:
                self.push_to_hub(repo_id, **kwargs)
        else:  # not checked here: the first process may have filled the folder by now
            folder = self._session.folder = Path(save_directory)
        wait_for_all()
        return folder

    def finish(self) -> Path:
        """Do again what failed when the folder that was opened or saved last was written, as its report says.

        Raises:
            ConfigurationError: If nothing in it has failed.
        """
        return finish_run(self._session)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the output folder that was saved or opened last, with its subfolders; save one first if there is none.

        Args:
            repo_id (`str`): Repository on the Hub; made if it does not exist.
            kwargs: `private`, `token`, `revision`, `commit_message`, `commit_description`, `create_pr`.

        Returns:
            `str`: The commit's address.
        """
        saved, repo_id = self._session.folder, check_repo_id(repo_id)
        if saved is not None and (saved / REPORT_NAME).is_file():
            return upload(saved, repo_id, **kwargs)
        with tempfile.TemporaryDirectory() as parent:
            try:
                return upload(self.save_pretrained(Path(parent) / repo_id.split("/")[-1]), repo_id, **kwargs)
            finally:
                self._session.folder = None
