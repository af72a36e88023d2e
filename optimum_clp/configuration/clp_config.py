"""`CLPConfig`: one dial, and one dataclass for each stage.

Validation collects every mistake, unknown keys included, and reports them in one [`ConfigurationError`].
"""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from optimum.configuration_utils import BaseConfig
from optimum.version import __version__ as optimum_version
from packaging import version as package_version
from transformers import __version__ as transformers_version

from ..doors import ROUNDINGS
from ..errors import ConfigurationError, Problem
from ..version import __version__
from .rules import (
    _between,
    _check,
    _integer,
    _or_none,
    _positive,
)
from .stages import _RULES, STAGES, CalibrationConfig, ExportConfig, QuantizationConfig, SearchConfig, TuningConfig

_PLAIN_KEYS = ("pruning_ratio", "num_segments", "max_perplexity_increase", "min_retention", "seed")
_HOUSEKEEPING = {"model_type", "clp_version", "transformers_version", "optimum_version"}


class CLPConfig(BaseConfig):
    """Configuration of continuous layer pruning, saved as `clp_config.json`.

    Args:
        pruning_ratio (`float` or `"auto"`): Share of the decoder layers to remove, in (0, 1); of `L` layers
            `floor(pruning_ratio * L + 0.5)` go. `"auto"`: as many as `max_perplexity_increase` or `min_retention` lets go.
        num_segments (`int`): Runs of neighbouring layers that go, at most. Rules that rank single layers
            (`block_influence`, `taylor`, `perplexity_greedy`, `random`) take as many runs as they get.
        max_perplexity_increase (`float`, *optional*): With `pruning_ratio="auto"`: the cut model's perplexity on
            validation rows, before tuning, is at most `1 + max_perplexity_increase` times the dense model's. Above 0.
        min_retention (`float`, *optional*): The same bound as dense perplexity over the cut model's, in (0, 1).
        seed (`int`): Seed of everything random.
        calibration ([`CalibrationConfig`] or `dict`): The text.
        search ([`SearchConfig`] or `dict`): The search for the segment.
        tuning ([`TuningConfig`] or `dict`): Cutoff endpoint tuning.
        quantization ([`QuantizationConfig`] or `dict`): int8 and int4 files.
        export ([`ExportConfig`] or `dict`): ONNX.
        calibration_dataset: Short for `calibration.rows.dataset`.

    Raises:
        ConfigurationError: Lists every value that is out of range and every key that is unknown.

    Example:
        >>> CLPConfig(pruning_ratio=0.25, calibration_dataset="corpus.txt", tuning={"epochs": 2})
    """

    CONFIG_NAME = "clp_config.json"
    FULL_CONFIGURATION_FILE = "clp_config.json"
    model_type = "clp"

    def __init__(
        self,
        pruning_ratio: float | str = 0.2,
        *,
        num_segments: int = 1,
        max_perplexity_increase: float | None = None,
        min_retention: float | None = None,
        seed: int = 0,
        calibration: CalibrationConfig | dict | None = None,
        search: SearchConfig | dict | None = None,
        tuning: TuningConfig | dict | None = None,
        quantization: QuantizationConfig | dict | None = None,
        export: ExportConfig | dict | None = None,
        calibration_dataset: str | list[str] | None = None,
        **unknown: Any,
    ):
        newer = _newer_version(unknown)
        problems = _unknown_keys(unknown, newer)
        self.pruning_ratio = pruning_ratio
        self.num_segments = num_segments
        self.max_perplexity_increase = max_perplexity_increase
        self.min_retention = min_retention
        self.seed = seed
        given = {
            "calibration": calibration,
            "search": search,
            "tuning": tuning,
            "quantization": quantization,
            "export": export,
        }
        stages = {name: _stage(name, value, problems, newer) for name, value in given.items()}
        self.calibration: CalibrationConfig = stages["calibration"]
        self.search: SearchConfig = stages["search"]
        self.tuning: TuningConfig = stages["tuning"]
        self.quantization: QuantizationConfig = stages["quantization"]
        self.export: ExportConfig = stages["export"]
        if calibration_dataset is not None:
            self.calibration.dataset = calibration_dataset
        problems += self._problems()
        if problems:
            raise ConfigurationError(*problems)

    def validate(self) -> None:
        """Check every value again, for a configuration that was changed after it was made.

        Raises:
            ConfigurationError: Lists every value that is out of range.
        """
        problems = self._problems()
        if problems:
            raise ConfigurationError(*problems)

    def _problems(self) -> list[Problem]:
        share = _between(0, 1, open_ends=True)
        ratio = (lambda v: v == "auto" or share[0](v), f'{share[1]}, or "auto"', f'{share[2]}, or "auto"')
        problems = _check("pruning_ratio", self.pruning_ratio, ratio)
        problems += _check("num_segments", self.num_segments, _integer(1))
        problems += _check("max_perplexity_increase", self.max_perplexity_increase, _or_none(_positive()))
        problems += _check("min_retention", self.min_retention, _or_none(share))
        problems += _check("seed", self.seed, _integer(0))
        problems += self._quality_problems()
        obstacle = None
        if self.quantization.bits_per_weight is not None and self.quantization.method in ROUNDINGS:
            obstacle = ROUNDINGS.get(self.quantization.method).budget_obstacle
        if obstacle is not None:
            problems.append(
                Problem(
                    "quantization.bits_per_weight",
                    self.quantization.bits_per_weight,
                    obstacle,
                    'Leave it out, or choose the method "rtn" or "gptq"',
                )
            )
        for name in STAGES:
            stage = getattr(self, name)
            for key, rule in _RULES[name].items():
                problems += _check(f"{name}.{key}", getattr(stage, key), rule)
        return problems

    def _quality_problems(self) -> list[Problem]:
        """A quality budget belongs to `pruning_ratio="auto"`, and there is one of it."""
        bounds = {"max_perplexity_increase": self.max_perplexity_increase, "min_retention": self.min_retention}
        given = [name for name, value in bounds.items() if value is not None]
        if self.pruning_ratio == "auto" and len(given) != 1:
            rule = f"it needs one quality budget, and {' and '.join(given) + ' are' if given else 'none is'} given"
            remedy = "Give max_perplexity_increase (such as 0.1) or min_retention (such as 0.9)"
            return [Problem("pruning_ratio", "auto", rule, remedy)]
        if self.pruning_ratio != "auto" and given:
            rule = f"the ratio is fixed to {self.pruning_ratio}, so there is nothing to bound"
            return [Problem(name, bounds[name], rule, 'Leave it out, or set pruning_ratio="auto"') for name in given]
        return []

    def perplexity_bound(self) -> float | None:
        """The quality budget as the largest allowed relative increase of the perplexity, or `None`."""
        if self.min_retention is not None:
            return 1 / self.min_retention - 1
        return self.max_perplexity_increase

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values, with the versions that wrote it."""
        output: dict[str, Any] = {
            "model_type": self.model_type,
            "pruning_ratio": self.pruning_ratio,
            "num_segments": self.num_segments,
            "max_perplexity_increase": self.max_perplexity_increase,
            "min_retention": self.min_retention,
            "seed": self.seed,
        }
        for name in STAGES:
            output[name] = dataclasses.asdict(getattr(self, name))
        output["clp_version"] = __version__
        output["transformers_version"] = transformers_version
        output["optimum_version"] = optimum_version
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """Same as [`~CLPConfig.to_dict`]: a recipe states its defaults, which may change between versions."""
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """Make a configuration from a dictionary, as read from `clp_config.json`.

        Args:
            config_dict (`dict`): Keys of the constructor; the version keys that `to_dict` adds are allowed.
            kwargs: Override keys of `config_dict`.

        Raises:
            ConfigurationError: For an unknown key, with the nearest valid name; if the file was written by a newer
                version of this package, with the advice to upgrade.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        for internal in ("_from_auto", "_from_pipeline", "_commit_hash"):
            kwargs.pop(internal, None)
        merged = {**config_dict, **kwargs}
        merged.pop("_commit_hash", None)
        config = cls(**merged)
        return (config, {}) if return_unused else config

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs: Any):
        """Write `clp_config.json`, and upload it if asked.

        Args:
            save_directory (`str` or `os.PathLike`): Folder, made if missing.
            push_to_hub (`bool`): Also upload, to `repo_id` in `kwargs` or else to the folder's name.
            kwargs: Passed to `push_to_hub` (`repo_id`, `private`, `token`, `commit_message`, ...).
        """
        # optimum's own push path calls _create_repo, which transformers 5 has removed
        super().save_pretrained(str(save_directory))
        if push_to_hub:
            return self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CLPConfig) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"CLPConfig {self.to_json_string(use_diff=False)}"


def _nearest(key: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Valid keys are {', '.join(valid)}."


def _newer_version(extra: dict[str, Any]) -> str:
    """Advice to upgrade, if a newer version of this package wrote the configuration; else empty."""
    written_by = str(extra.get("clp_version") or __version__)
    if package_version.parse(written_by) > package_version.parse(__version__):
        return f" The file was written by optimum-clp {written_by}, this is {__version__}: upgrade optimum-clp"
    return ""


def _unknown_keys(extra: dict[str, Any], newer: str) -> list[Problem]:
    """Problems for the constructor's extra keys; the version keys of a saved file are not extra."""
    valid = [*_PLAIN_KEYS, *STAGES, "calibration_dataset"]
    return [
        Problem(key, value, "this version of CLPConfig has no such key", _nearest(key, valid) + newer)
        for key, value in extra.items()
        if key not in _HOUSEKEEPING
    ]


def _stage(name: str, value: Any, problems: list[Problem], newer: str) -> Any:
    """`value` as the stage's dataclass; what is wrong with it is added to `problems`."""
    cls: Any = STAGES[name]
    if value is None:
        return cls()
    if isinstance(value, cls):
        return dataclasses.replace(value)
    if not isinstance(value, dict):
        problems.append(Problem(name, value, f"it must be a {cls.__name__} or a dict", f"Give {cls.__name__}(...)"))
        return cls()
    valid = [f.name for f in dataclasses.fields(cls)]
    for key in value:
        if key not in valid:
            rule = f"{cls.__name__} has no such key"
            problems.append(Problem(f"{name}.{key}", value[key], rule, _nearest(key, valid) + newer))
    return cls(**{k: v for k, v in value.items() if k in valid})
