"""Continuous layer pruning (CLP) for causal language models, reimplemented from the paper's abstract (arXiv 2510.23652).

The names below are imported when they are first used, so that `optimum-clp --help` loads neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING

from .version import __version__

_HOMES = {
    "CLPConfig": "configuration.clp_config",
    "CalibrationConfig": "configuration.stages",
    "SearchConfig": "configuration.stages",
    "TuningConfig": "configuration.stages",
    "QuantizationConfig": "configuration.stages",
    "ExportConfig": "configuration.stages",
    "CLPPruner": "pruner",
    "LayerSegment": "segments",
    "OnnxCausalLM": "runtime.causal_lm",
    "PruningPlan": "planning.plan",
    "plan_pruning": "planning.plan",
    "CLPError": "errors",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from .configuration.clp_config import CLPConfig as CLPConfig
    from .configuration.stages import CalibrationConfig as CalibrationConfig
    from .configuration.stages import ExportConfig as ExportConfig
    from .configuration.stages import QuantizationConfig as QuantizationConfig
    from .configuration.stages import SearchConfig as SearchConfig
    from .configuration.stages import TuningConfig as TuningConfig
    from .errors import CLPError as CLPError
    from .planning.plan import PruningPlan as PruningPlan
    from .planning.plan import plan_pruning as plan_pruning
    from .pruner import CLPPruner as CLPPruner
    from .runtime.causal_lm import OnnxCausalLM as OnnxCausalLM
    from .segments import LayerSegment as LayerSegment


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
