"""What a run leaves on disk: a checkpoint that was verified, quanto folders, ONNX files, and the records of all of it.

A folder appears whole or not at all, and what is found on the way goes into the session's report. Once the checkpoint is
there and verified, nothing that comes after it can lose it: a stage that fails is noted in the report, and the rest goes on;
and a process that is interrupted writes the folder without what was not done.
"""

import contextlib
import dataclasses
import logging
import os
import shlex
import shutil
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .attempts import Attempts
from .calibration.rows import load_calibration
from .calibration.sources import describe
from .checkpoint.output import check_output, claimed_output, staged_folder
from .checkpoint.saving import save_checkpoint, save_configs, save_tokenizer, verify_checkpoint
from .configuration.clp_config import CLPConfig
from .configuration.sizes import main_memory
from .configuration.stages import QuantizationConfig
from .disk_room import nothing_half_written, room_for
from .errors import ConfigurationError, ExportError, ModelError, QuantizationError
from .evaluation.deployment import DeploymentChecks
from .evaluation.outcome import measure_outcome
from .exporters.export import export_onnx, write_runtime_configs
from .exporters.graph.six_bits import six_bits_obstacle
from .exporters.obstacle import onnx_obstacle
from .exporters.probe import WeightForm
from .exporters.result import ExportResult, ReachedSize, ReachedSpeed
from .exporters.rounding.weights import needs_calibration
from .origin import record_origin
from .planning.size_target import MB, TOLERANCE, has_choice, quantization_within
from .planning.speed import interleaved_times, measured_threads, opened_file
from .planning.speed_target import SPEED_TOLERANCE, aimed, settled, with_choice
from .planning.streaming import planned_streaming
from .precisions import INT4, PRECISIONS, QUANTIZED
from .processes import by_first
from .quantization import quanto_obstacle, save_quantized
from .report.environment import environment_info
from .report.failures import TUNING, failures_section
from .report.model_card import write_model_card
from .report.origin import LICENSE_FILES, Origin, copy_files, find_origin, hub_id, origin_folder
from .report.page import write_report_page
from .report.plots import write_plots
from .report.section import to_section
from .search.recipe import layers_to_remove
from .session import Session

logger = logging.getLogger(__name__)

# how the names of stages begin that are done again together
_OF_THE_EXPORT = ("ONNX", "onnx", "files for")
_OF_THE_EVALUATION = ("evaluation", "speeds", "memory", "generation", "tasks")


def check_run(session: Session, writes: bool) -> None:
    """Say before any work what would be said after some of it.

    Args:
        session ([`Session`]): With the dense model, and the recipe.
        writes (`bool`): A folder is to be written.

    Raises:
        ConfigurationError: If the recipe's bound on memory is too small; it says what would do.
        QuantizationError, ExportError, CalibrationError: As [`check_writable`].
    """
    if session.config.max_memory is not None:
        dense, recipe = session.source(), aimed(session)
        by_first(lambda: planned_streaming(dense, recipe, layers_to_remove(recipe, dense.config)))
    if writes:
        check_writable(session)


def check_writable(session: Session) -> None:
    """Say before any work what would be said of this architecture after all of it.

    Args:
        session ([`Session`]): With the dense model, and the recipe that says what is to be written.

    Raises:
        QuantizationError: If there is to be a quanto checkpoint, and this architecture has none.
        ExportError: If there is to be an ONNX file, and this architecture has none.
        CalibrationError, ConfigurationError: If a text, a task or a prompt of the evaluation cannot be read, or be put to
            this model.
    """
    config = session.config
    if config.quantization.quanto and (problem := quanto_obstacle(session.dense())) is not None:
        raise QuantizationError(problem)
    if config.export.enabled:
        problem = six_bits_obstacle(config.quantization) or onnx_obstacle(session.dense())
        if problem is not None:
            raise ExportError(problem)
    _deployment_checks(session)


def write_run(session: Session, save_directory: str | os.PathLike, overwrite: bool = False) -> Path:
    """Write everything that a run leaves, and measure it.

    The checkpoint is read back with transformers' own classes and compared before anything else is done.

    Args:
        session ([`Session`]): With a cut model.
        save_directory (`str` or `os.PathLike`): Output folder, and the model's name in its card.
        overwrite (`bool`): Replace a folder that is not empty.

    Returns:
        `Path`: The folder, absolute.

    Raises:
        OutputError: If the folder cannot be used.
        CutError: If the checkpoint, read back, is not the model in memory.
        KeyboardInterrupt: If the caller was interrupted; once the checkpoint is there, the folder is written all the same, and its report
            says what was not done.
    """
    model = session.cut_model()
    target = check_output(save_directory, overwrite)
    session.forget("save")
    session.stages.begin("checkpoint")
    with staged_folder(target, overwrite) as folder:
        save_checkpoint(model, session.tokenizer, folder, session.cache_dir)
        verify_checkpoint(folder, model)
        left = _write_rest(session, folder, target.name)
    logger.info(f"written: {target}")
    session.folder = target
    _go_on_with_interruption(left, target)
    return target


def finish_run(session: Session) -> Path:
    """Do again what failed when the session's folder was written, in that folder.

    The files that were good stay as they are: the same bytes, under another folder that takes the place of the first.

    Args:
        session ([`Session`]): Of a folder that [`write_run`] wrote.

    Raises:
        ConfigurationError: If nothing has failed there.
        OutputError: If the folder cannot be written.
    """
    target = session.folder
    errors = {entry["stage"]: entry["error"] for entry in session.report.failures or ()}
    session.attempts.failed |= {stage: errors.pop(stage) for stage in (TUNING,) if stage in errors}
    if target is None or not errors:
        rule, remedy = "nothing in it has failed that could be done again", "Give a folder whose report has failures"
        raise ConfigurationError.of("model", None if target is None else str(target), rule, remedy)
    with contextlib.suppress(ModelError):  # what cannot be had without the dense model fails again
        session.dense()
    exported = not any(stage.startswith(_OF_THE_EXPORT) for stage in errors)
    evaluated = exported and not any(stage.startswith(_OF_THE_EVALUATION) for stage in errors)
    with staged_folder(target, overwrite=True) as folder:
        shutil.copytree(target, folder, dirs_exist_ok=True, copy_function=_linked)
        left = _write_rest(session, folder, target.name, exported=exported, evaluated=evaluated)
    session.folder = target
    _go_on_with_interruption(left, target)
    return target


def write_quanto(
    session: Session, save_directory: str | os.PathLike, file_prefix: str | None, weights: str, overwrite: bool = False
) -> Path:
    """Write an optimum-quanto checkpoint of the cut model into a folder of its own, and add it to the report.

    Args:
        session ([`Session`]): With a cut model.
        save_directory, overwrite: As in [`write_run`].
        file_prefix (`None`): Refused, since quanto's file names are fixed.
        weights (`str`): `"int8"` or `"int4"`.

    Returns:
        `Path`: The folder, absolute.

    Raises:
        ConfigurationError, OutputError, QuantizationError: If it cannot be written.
    """
    if file_prefix is not None:
        rule = "quanto checkpoints have fixed file names"
        raise ConfigurationError.of("file_prefix", file_prefix, rule, "Leave it out")
    with claimed_output(save_directory, overwrite) as target:
        assert target is not None
        limit = main_memory(session.config.max_memory)
        options = {"overwrite": overwrite, "quiet": session.quiet}
        result = save_quantized(session.cut_model(), session.tokenizer, target, weights, max_memory=limit, **options)
    session.report.quantization = [*(session.report.quantization or []), result.to_dict()]
    return target


def _write_rest(
    session: Session, folder: Path, name: str, *, exported: bool = False, evaluated: bool = False
) -> list[str]:
    """All that comes after the checkpoint, but for what is there already; each stage may fail. Returns what was not done because
    somebody has interrupted the process: the records are written then, too."""
    config, attempts, report = session.config, session.attempts, session.report
    stages: dict[str, tuple[str, Callable[[], None]]] = {}
    if config.quantization.quanto and report.quantization is None:
        stages["quanto checkpoints"] = "quanto", partial(_quantize_into, session, folder)
    if config.export.enabled and not exported:
        stages["ONNX export"] = "ONNX files", partial(_export_into, session, folder, attempts)
        report.export = None
        shutil.rmtree(folder / "onnx", ignore_errors=True)
    if not evaluated:
        stages["evaluation"] = "figures", partial(_measure, session, folder, attempts)
        report.evaluation = None
    left = list(stages)
    try:
        for stage, (place, work) in stages.items():
            session.stages.begin(place)
            with attempts.stage(stage):
                work()
            left.remove(stage)
    except KeyboardInterrupt:
        attempts.interrupted(left)
    _write_records(session, folder, name, attempts)
    return left


def _go_on_with_interruption(left: list[str], target: Path) -> None:
    """Raise what was held back until the folder was written."""
    if left:
        logger.error(
            f"interrupted: {target} is written without {' and '.join(left)}; `optimum-clp finish {shlex.quote(str(target))}` does the rest."
        )
        raise KeyboardInterrupt


def _linked(source: str, target: str) -> None:
    """Weights are linked, not copied; what may be written to again is copied."""
    if source.endswith((".safetensors", ".bin", ".onnx", ".data", ".onnx_data")):
        try:
            os.link(source, target)
            return
        except OSError:  # a file system without links
            pass
    shutil.copy2(source, target)


def write_export(session: Session, save_directory: str | os.PathLike, overwrite: bool = False) -> Path:
    """Write the ONNX files and what is read beside them, without PyTorch weights, and the records.

    Args:
        session ([`Session`]): With a cut model.
        save_directory, overwrite: As in [`write_run`].

    Returns:
        `Path`: The folder, absolute.

    Raises:
        OutputError: If the folder cannot be used.
        ExportError: If a file does not say what the PyTorch model says.
    """
    target = check_output(save_directory, overwrite)
    model = session.cut_model()
    session.forget("export")
    with staged_folder(target, overwrite) as folder:
        save_configs(model, folder)
        save_tokenizer(session.tokenizer, folder, session.cache_dir)
        _export_into(session, folder, Attempts(strict=True))
        _write_records(session, folder, target.name, Attempts(strict=True))
    session.folder = target
    return target


def _quantize_into(session: Session, folder: Path) -> None:
    model, kinds = session.cut_model(), session.config.quantization.weights
    limit = main_memory(session.config.max_memory)
    session.report.quantization = [
        save_quantized(
            model,
            session.tokenizer,
            folder / PRECISIONS[name].quanto_folder,
            name,
            max_memory=limit,
            quiet=session.quiet,
        ).to_dict()
        for name in kinds
        if name in QUANTIZED
    ]


def _export_into(session: Session, folder: Path, attempts: Attempts) -> None:
    model, config = session.cut_model(), settled(session)
    quantization = quantization_within(model, config)
    result = export_onnx(
        model,
        folder,
        config.export,
        quantization,
        calibration=_quantization_rows(session, quantization),
        teacher=session.model,
        attempts=attempts,
        seed=config.seed,
        max_memory=main_memory(config.max_memory),
        quiet=session.quiet,
    )
    obstacles = write_runtime_configs(folder, model, result, attempts)
    size, speed = _reached(config, quantization, result), None
    with attempts.stage("speed target"):
        speed = _reached_speed(config, folder, model, result, session.quiet)
    choice = session.speed_choice
    if choice is not None and WeightForm.of(quantization) != WeightForm.of(with_choice(config, choice).quantization):
        choice = None  # of another recipe
    reached = {"size_target": size, "speed_target": speed, "speed_choice": choice}
    result = dataclasses.replace(result, genai_obstacle=obstacles["genai"], runtimes=obstacles, **reached)
    session.report.export = result.to_dict()


def _reached(config: CLPConfig, quantization: QuantizationConfig, result: ExportResult) -> ReachedSize | None:
    """What came of the recipe's size target."""
    target, made = config.target_size_mb, [file.bytes for file in result.files if file.weights == INT4.name]
    if target is None or not made:
        return None
    bits, share = quantization.bits_per_weight if has_choice(config) else None, made[0] / (target * MB)
    met = share <= 1 and (bits is None or share >= 1 - TOLERANCE)
    if not met:
        logger.warning(f"target_size_mb: the int4 file has {made[0] / MB:.2f} MB, and {target:g} were asked for.")
    return ReachedSize(target, made[0], bits, met)


def _reached_speed(
    config: CLPConfig, folder: Path, model: PreTrainedModel, result: ExportResult, quiet: bool
) -> ReachedSpeed | None:
    """What came of the recipe's speed target."""
    target, made = config.target_tokens_per_second, [file for file in result.files if file.weights == INT4.name]
    if target is None or not made:
        return None
    (times,) = interleaved_times([opened_file(folder / made[0].file, model.config)], quiet=quiet)
    found = 1 / statistics.median(each.step for each in times)
    met = found >= target * (1 - SPEED_TOLERANCE)
    if not met:
        logger.warning(
            f"target_tokens_per_second: the int4 file decodes {found:.4g} tokens per second, and {target:g} were asked for."
        )
    return ReachedSpeed(target, found, measured_threads(), met)


def _quantization_rows(session: Session, quantization: QuantizationConfig) -> torch.Tensor | None:
    """The rows that the rounding of the ONNX files' weights looks at, if it looks at any: int64 `[rows, length]`."""
    text = session.config.calibration
    if not needs_calibration(quantization):
        return None
    if session.model is not None or text.dataset is not None:
        return session.outcome_text().train[: quantization.calibration_sequences]
    # a cut folder is exported without its dense model: the cut one writes the text
    rows = min(quantization.calibration_sequences, text.train_sequences)
    text = dataclasses.replace(text, train_sequences=rows, validation_sequences=1, test_sequences=1)
    return load_calibration(text, session.tokenizer, session.cut_model(), session.config.seed, session.quiet).train


def _measure(session: Session, folder: Path, attempts: Attempts) -> None:
    data, seed, report = session.outcome_text(), session.config.seed, session.report
    dataset = session.config.calibration.dataset
    written = f"text that the dense model wrote (seed {seed + 1}; calibrated on seed {seed})"
    report.evaluation = measure_outcome(
        data,
        # whoever wrote some of the train rows, test rows are the dataset's where there is one
        written if dataset is None else f"the test split of {describe(dataset)}",
        checks=_deployment_checks(session),
        dense=session.model,
        pruned=session.cut_model(),
        source=None if session.further is None else session.further.model,
        segments=(session.segments if session.further is None else session.cut_segments) or (),
        tuned=report.tuning is not None,
        folder=folder,
        export=report.export,
        attempts=attempts,
        **session.evaluation_options(),
    )


def _deployment_checks(session: Session) -> DeploymentChecks:
    return DeploymentChecks(session.config, session.tokenizer, session.cut_or_dense_config(), session.quiet)


def _take_origin_along(session: Session, folder: Path) -> None:
    """The dense model's terms into the report, and the files that state them into the folder."""
    base = session.report.base_model
    if not base or not base.get("name_or_path"):
        return
    name, revision = base["name_or_path"], base.get("revision")
    origin = find_origin(name, revision, session.cache_dir)
    if not origin.is_known and base.get("origin"):
        origin = Origin.from_section(base["origin"])  # an earlier stage had a network
    base["origin"] = to_section(origin)
    copy_files(origin_folder(name, LICENSE_FILES, revision, session.cache_dir), folder, LICENSE_FILES)
    if not origin.is_known and hub_id(name) is not None:
        logger.warning(
            f"licence: the card of {name} is not in the cache, and the Hugging Face Hub could not be reached: README.md does not say "
            "under which licence this model may be used. Add it before you pass the model on."
        )


def _write_records(session: Session, folder: Path, name: str, attempts: Attempts) -> None:
    config, report = session.repeatable(), session.report
    session.stages.begin("records")
    with _record(attempts, "origin", folder):
        _take_origin_along(session, folder)
    with _record(attempts, "recipe", folder):
        config.save_pretrained(folder)
    with attempts.stage("environment"):
        report.environment = environment_info(session.cut_model().device)
    with attempts.stage("fingerprints"):
        record_origin(report, session.model, session.cut_model(), session.quiet)
    with _record(attempts, "plots", folder):
        write_plots(report, folder)
    report.failures = failures_section(attempts.failed, name)
    with _record(attempts, "report page", folder):
        write_report_page(report, config, folder)
    with _record(attempts, "model card", folder):
        write_model_card(report, config, folder, model_name=name)
    report.failures = failures_section(attempts.failed, name)
    with _record(attempts, "report", folder):
        report.save(folder)
    report.failures = failures_section(attempts.failed, name)  # the report itself may have failed
    attempts.failed.clear()


@contextlib.contextmanager
def _record(attempts: Attempts, name: str, folder: Path) -> Iterator[None]:
    """A stage that writes into the folder; of one that fails nothing stays there half-written."""
    with attempts.stage(name), nothing_half_written(folder), room_for(f"the {name}", folder, None):
        yield
