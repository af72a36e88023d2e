"""The JSON schema of `clp_report.json`, from the dataclasses of the stages: `python -m optimum_clp.report_schema`.

What it prints is `docs/clp_report.schema.json`.
"""

import json
from typing import Any

from .calibration.summary import CalibrationSummary
from .evaluation.outcome import Outcome
from .exporters.result import ExportResult
from .quantization import QuantoResult
from .report.environment import Environment
from .report.failures import Failure
from .report.report import REPORT_NAME, CLPReport
from .report.schema import SEGMENTS, schema_of
from .report.section import keys_of
from .search.result import SearchResult
from .surgery.description import Cut, DenseModel
from .tuning.result import TuningResult

SECTIONS: dict[str, Any] = {
    "environment": Environment | None,
    "base_model": DenseModel | None,
    "calibration": CalibrationSummary | None,
    "search": SearchResult | None,
    "cut": Cut | None,
    "tuning": TuningResult | None,
    "quantization": list[QuantoResult] | None,
    "export": ExportResult | None,
    "evaluation": Outcome | None,
    "failures": list[Failure] | None,
}
"""What the stages put into each section of [`CLPReport`]."""


def report_schema() -> dict[str, Any]:
    """The whole schema, JSON-ready."""
    keys = keys_of(CLPReport)
    names = ["schema_version", "clp_version", "created", *SECTIONS]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": REPORT_NAME,
        "description": "What optimum-clp did to a model and what was measured. A section is null while its stage has "
        "not run; a figure that is NaN or infinite is null.",
        "type": "object",
        "additionalProperties": False,
        "required": names,
        "properties": {name: schema_of(SECTIONS.get(name, keys[name][0]), keys[name][1]) for name in names},
        "$defs": {"segments": SEGMENTS},
    }


if __name__ == "__main__":
    print(json.dumps(report_schema(), indent=2, ensure_ascii=False))
