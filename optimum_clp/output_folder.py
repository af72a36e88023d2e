"""What a run leaves on disk: a checkpoint that was verified, quanto folders, ONNX files, and the records of all of it.

A folder appears whole or not at all, and what is found on the way goes into the session's report.
"""

import dataclasses
import os
from pathlib import Path

import torch

from .calibration.rows import load_calibration
from .calibration.sources import describe
from .checkpoint.output import check_output, staged_folder
from .checkpoint.saving import save_checkpoint, save_configs, save_tokenizer, verify_checkpoint
from .errors import ConfigurationError, ExportError, QuantizationError
from .evaluation.deployment import DeploymentChecks
from .evaluation.outcome import measure_outcome
from .exporters.export import export_onnx, write_runtime_configs
from .exporters.obstacle import onnx_obstacle
from .exporters.rounding.weights import needs_calibration
from .precisions import PRECISIONS
from .quantization import quanto_obstacle, save_quantized
from .report.environment import environment_info
from .report.model_card import write_model_card
from .report.plots import write_plots
from .session import Session


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
    if config.export.enabled and (problem := onnx_obstacle(session.dense())) is not None:
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
        CLPError: What quantization, export and measurement raise.
    """
    model, config = session.cut_model(), session.config
    target = check_output(save_directory, overwrite)
    session.forget("save")
    with staged_folder(target, overwrite) as folder:
        save_checkpoint(model, session.tokenizer, folder)
        verify_checkpoint(folder, model)
        if config.quantization.quanto:
            _quantize_into(session, folder)
        if config.export.enabled:
            _export_into(session, folder)
        _measure(session, folder)
        _write_records(session, folder, target.name)
    session.folder = target
    return target


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
        save_tokenizer(session.tokenizer, folder)
        _export_into(session, folder)
        _write_records(session, folder, target.name)
    session.folder = target
    return target


def write_quantized(
    session: Session, save_directory: str | os.PathLike, file_prefix: str | None, weights: str, overwrite: bool
) -> Path:
    """Write a quanto checkpoint of the cut model, and put it into the report.

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
    target, model, report = check_output(save_directory, overwrite), session.cut_model(), session.report
    result = save_quantized(model, session.tokenizer, target, weights, overwrite=overwrite, quiet=session.quiet)
    report.quantization = [*(report.quantization or []), result.to_dict()]
    return target


def _quantize_into(session: Session, folder: Path) -> None:
    model, kinds = session.cut_model(), session.config.quantization.weights
    session.report.quantization = [
        save_quantized(
            model, session.tokenizer, folder / PRECISIONS[name].quanto_folder, name, quiet=session.quiet
        ).to_dict()
        for name in kinds
    ]


def _export_into(session: Session, folder: Path) -> None:
    model, config = session.cut_model(), session.config
    result = export_onnx(
        model,
        folder,
        config.export,
        config.quantization,
        calibration=_quantization_rows(session),
        seed=config.seed,
        quiet=session.quiet,
    )
    obstacles = write_runtime_configs(folder, model, result)
    result = dataclasses.replace(result, genai_obstacle=obstacles["genai"], runtimes=obstacles)
    session.report.export = result.to_dict()


def _quantization_rows(session: Session) -> torch.Tensor | None:
    """The rows that the rounding of the ONNX files' weights looks at, if it looks at any: int64 `[rows, length]`."""
    quantization, text = session.config.quantization, session.config.calibration
    if not needs_calibration(quantization):
        return None
    if session.model is not None or text.dataset is not None:
        return session.calibration().train[: quantization.calibration_sequences]
    # a cut folder is exported without its dense model: the cut one writes the text
    rows = min(quantization.calibration_sequences, text.train_sequences)
    text = dataclasses.replace(text, train_sequences=rows, validation_sequences=1, test_sequences=1)
    return load_calibration(text, session.tokenizer, session.cut_model(), session.config.seed, session.quiet).train


def _measure(session: Session, folder: Path) -> None:
    data, seed, report = session.calibration(), session.config.seed, session.report
    dataset = session.config.calibration.dataset
    written = f"text that the dense model wrote (seed {seed + 1}; calibrated on seed {seed})"
    report.evaluation = measure_outcome(
        data,
        # whoever wrote some of the train rows, test rows are the dataset's where there is one
        written if dataset is None else f"the test split of {describe(dataset)}",
        checks=_deployment_checks(session),
        dense=session.model,
        pruned=session.cut_model(),
        segments=session.segments or (),
        tuned=report.tuning is not None,
        folder=folder,
        export=report.export,
        batch_size=session.config.search.batch_size,
        quiet=session.quiet,
    )


def _deployment_checks(session: Session) -> DeploymentChecks:
    return DeploymentChecks(session.config, session.tokenizer, session.cut_or_dense_config(), session.quiet)


def _write_records(session: Session, folder: Path, name: str) -> None:
    config, report = session.config, session.report
    report.environment = environment_info(session.cut_model().device)
    config.save_pretrained(folder)
    report.save(folder)
    write_plots(report, folder)
    write_model_card(report, config, folder, model_name=name)
