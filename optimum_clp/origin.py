"""What a later stage relies on in a folder: which model was cut where. The report's hashes hold it, and are checked.

The weights' names differ between the major versions of transformers, and their bits between dtypes: what was written with
another one is not compared.
"""

import json
import logging
from typing import Any

import transformers
from transformers import PreTrainedModel

from .errors import ModelError
from .private_files import digest
from .report.report import REPORT_NAME, CLPReport
from .resume import parameters_fingerprint

logger = logging.getLogger(__name__)


def record_origin(report: CLPReport, dense: PreTrainedModel | None, cut: PreTrainedModel, quiet: bool = False) -> None:
    """Write the fingerprints of the dense model and the cut one into the report, and the seal of what was cut.

    Args:
        report ([`CLPReport`]): Its `base_model` and `cut` are changed.
        dense (`PreTrainedModel` or `None`): If it is not at hand, what the report says of it stays.
        cut (`PreTrainedModel`): The cut model, as it is going to be written.
        quiet (`bool`): No progress bar.
    """
    if report.base_model is None or report.cut is None:
        return
    if dense is not None:
        report.base_model = {**report.base_model, "fingerprint": parameters_fingerprint(dense, quiet)}
    report.cut = {**report.cut, "fingerprint": parameters_fingerprint(cut, quiet)}
    report.cut["seal"] = _seal(report)


def check_seal(report: CLPReport, name: str) -> None:
    """Refuse a report in which the segments, or one of the fingerprints, are not those that were written.

    Args:
        report ([`CLPReport`]): Of a folder; one without a seal (of an earlier version) is taken as it is.
        name (`str`): The folder.

    Raises:
        ModelError: If something was changed.
    """
    if report.cut is not None and report.cut.get("seal") not in (None, _seal(report)):
        rule = f"its {REPORT_NAME} was changed: its segments and fingerprints are not those that were written together"
        raise ModelError.of("model", name, rule, "Give the folder as optimum-clp wrote it, or write it again")


def check_base(report: CLPReport, dense: PreTrainedModel, quiet: bool = False) -> None:
    """Refuse another dense model than the one that was cut.

    Raises:
        ModelError: If its weights are others.
    """
    told = (report.base_model or {}).get("fingerprint")
    if told and _comparable(report, dense) and parameters_fingerprint(dense, quiet) != told:
        name = dense.name_or_path or type(dense).__name__
        rule = f"it is not the model that was cut: its weights have another fingerprint than {REPORT_NAME} says"
        raise ModelError.of(
            "base_model", name, rule, "Give the dense model that was cut, in the revision that was cut"
        )


def weights_changed(report: CLPReport, cut: PreTrainedModel, name: str, quiet: bool = False) -> bool:
    """Whether the weights of a folder are others than its report speaks of; warns if they are."""
    told = (report.cut or {}).get("fingerprint")
    if not told or not _comparable(report, cut) or parameters_fingerprint(cut, quiet) == told:
        return False
    logger.warning(
        f"The weights in {name} were changed after {REPORT_NAME} was written: what it says of them is about others."
    )
    return True


def _comparable(report: CLPReport, model: PreTrainedModel) -> bool:
    written = str((report.environment or {}).get("transformers", "")).split(".")[0]
    dtype = (report.base_model or {}).get("dtype")
    return written == transformers.__version__.split(".")[0] and dtype == str(model.dtype).removeprefix("torch.")


def _seal(report: CLPReport) -> str:
    cut: dict[str, Any] = report.to_dict()["cut"]
    base = (report.base_model or {}).get("fingerprint")
    contents = [cut["segments"], cut["num_layers_before"], cut.get("fingerprint"), base]
    return digest(json.dumps(contents), REPORT_NAME)
