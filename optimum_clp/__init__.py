"""Continuous layer pruning (CLP) for causal language models, reimplemented from the paper's abstract (arXiv 2510.23652).

The names below are imported when they are first used, so that `optimum-clp --help` loads neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING

from .version import __version__

_HOMES = {
    "CLPConfig": "configuration",
    "CalibrationConfig": "configuration",
    "SearchConfig": "configuration",
    "TuningConfig": "configuration",
    "QuantizationConfig": "configuration",
    "ExportConfig": "configuration",
    "CLPPruner": "pruner",
    "LayerSegment": "segments",
    "OnnxCausalLM": "runtime",
    "CLPError": "errors",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from .configuration import (  # noqa: F401
        CalibrationConfig,
        CLPConfig,
        ExportConfig,
        QuantizationConfig,
        SearchConfig,
        TuningConfig,
    )
    from .errors import CLPError  # noqa: F401
    from .pruner import CLPPruner  # noqa: F401
    from .runtime import OnnxCausalLM  # noqa: F401
    from .segments import LayerSegment  # noqa: F401


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
