"""`CLPConfig`: one dial, and one dataclass for each stage.

Validation collects every mistake, unknown keys included, and reports them in one [`ConfigurationError`].
"""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

from optimum.configuration_utils import BaseConfig
from optimum.version import __version__ as optimum_version
from transformers import __version__ as transformers_version

from ..errors import ConfigurationError
from ..version import __version__
from .recipe_files import RECIPE_NAME, read_recipe
from .settings import documented
from .sizes import with_names
from .stages import (
    STAGES,
    CalibrationConfig,
    EvaluationConfig,
    ExportConfig,
    PlainSettings,
    QuantizationConfig,
    SearchConfig,
    TuningConfig,
)
from .targets import with_target
from .validation import PLAIN_KEYS, checked_values, value_problems


@functools.partial(documented, settings=PlainSettings)
class CLPConfig(BaseConfig):
    """Configuration of continuous layer pruning, saved as `clp_config.json`.

    Args:
        {settings}
        calibration ([`CalibrationConfig`] or `dict`): The text.
        search ([`SearchConfig`] or `dict`): The search for the segment.
        tuning ([`TuningConfig`] or `dict`): Cutoff endpoint tuning.
        quantization ([`QuantizationConfig`] or `dict`): int8 and int4 files.
        export ([`ExportConfig`] or `dict`): ONNX.
        evaluation ([`EvaluationConfig`] or `dict`): What is measured at the end, and what it must reach.
        calibration_dataset: Short for `calibration.dataset`.
        target (`str`): `"cpu"`, `"web"`, `"gpu"` or `"arm"`: where the ONNX files will run, which sets `quantization` and `export` as far as these do
            not say themselves; not kept.

    Raises:
        ConfigurationError: Lists every value that is out of range and every key that is unknown.

    Example:
        >>> CLPConfig(pruning_ratio=0.25, calibration_dataset="corpus.txt", tuning={"epochs": 2})
    """

    CONFIG_NAME = RECIPE_NAME
    FULL_CONFIGURATION_FILE = RECIPE_NAME
    model_type = "clp"

    def __init__(
        self,
        pruning_ratio: float | str | None = None,
        *,
        target_size_mb: float | None = PlainSettings.target_size_mb,
        target_tokens_per_second: float | None = PlainSettings.target_tokens_per_second,
        num_segments: int = PlainSettings.num_segments,
        max_perplexity_increase: float | None = PlainSettings.max_perplexity_increase,
        min_retention: float | None = PlainSettings.min_retention,
        budget: str | float | None = PlainSettings.budget,
        max_memory: str | int | dict[str | int, str | int] | None = PlainSettings.max_memory,
        seed: int = PlainSettings.seed,
        calibration: CalibrationConfig | dict | None = None,
        search: SearchConfig | dict | None = None,
        tuning: TuningConfig | dict | None = None,
        quantization: QuantizationConfig | dict | None = None,
        export: ExportConfig | dict | None = None,
        evaluation: EvaluationConfig | dict | None = None,
        calibration_dataset: str | list[str] | None = None,
        target: str | None = None,
        **unknown: Any,
    ):
        given = {
            "pruning_ratio": pruning_ratio,
            "target_size_mb": target_size_mb,
            "target_tokens_per_second": target_tokens_per_second,
            "num_segments": num_segments,
            "max_perplexity_increase": max_perplexity_increase,
            "min_retention": min_retention,
            "budget": budget,
            "max_memory": max_memory,
            "seed": seed,
            "calibration": calibration,
            "search": search,
            "tuning": tuning,
            "quantization": quantization,
            "export": export,
            "evaluation": evaluation,
            "calibration_dataset": calibration_dataset,
        }
        values = checked_values(with_target({**given, **unknown}, target))
        self.pruning_ratio: float | str | None = values["pruning_ratio"]
        self.target_size_mb = target_size_mb
        self.target_tokens_per_second = target_tokens_per_second
        self.num_segments = num_segments
        self.max_perplexity_increase = max_perplexity_increase
        self.min_retention = min_retention
        self.budget = budget
        self.max_memory = with_names(max_memory)
        self.seed = seed
        self.calibration: CalibrationConfig = values["calibration"]
        self.search: SearchConfig = values["search"]
        self.tuning: TuningConfig = values["tuning"]
        self.quantization: QuantizationConfig = values["quantization"]
        self.export: ExportConfig = values["export"]
        self.evaluation: EvaluationConfig = values["evaluation"]

    def validate(self) -> None:
        """Check every value again, for a configuration that was changed after it was made.

        Raises:
            ConfigurationError: Lists every value that is out of range.
        """
        problems = value_problems({name: getattr(self, name) for name in (*PLAIN_KEYS, *STAGES)})
        if problems:
            raise ConfigurationError(*problems)

    def perplexity_bound(self) -> float | None:
        """The quality budget as the largest allowed relative increase of the perplexity, or `None`."""
        if self.min_retention is not None:
            return 1 / self.min_retention - 1
        return self.max_perplexity_increase

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values, with the versions that wrote it."""
        output: dict[str, Any] = {"model_type": self.model_type}
        output |= {name: getattr(self, name) for name in PLAIN_KEYS}
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
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        """The content of `clp_config.json` in a folder, a repository of the Hub, or a file.

        Raises:
            ConfigurationError: If there is none, or it is no JSON object.
        """
        name = pretrained_model_name_or_path
        try:
            return super().get_config_dict(name, **kwargs)
        except ConfigurationError:
            raise
        except (
            Exception
        ) as error:  # the Hub's, the file system's, and what Optimum makes of keys that it does not expect
            rule = f"it could not be read ({' '.join(str(error).split())})"
            remedy = f"Give a {cls.CONFIG_NAME}, or the folder that holds it"
            raise ConfigurationError.of(cls.CONFIG_NAME, name, rule, remedy) from error

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        return read_recipe(json_file)

    @classmethod
    def from_file(cls, path: str | os.PathLike, **kwargs: Any) -> "CLPConfig":
        """Read a recipe from a file: JSON as `clp_config.json`, or YAML, which may have comments.

        Args:
            path (`str` or `os.PathLike`): A file whose name ends in `.json`, `.yaml` or `.yml`, or the folder of a run.
            kwargs: Override keys of the file.

        Raises:
            ConfigurationError: If it cannot be read, or lists every key that is unknown and every value that is out of range.

        Example:
            >>> config = CLPConfig.from_file("recipe.yaml", seed=1)
        """
        return cls.from_dict(read_recipe(path), **kwargs)

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
        if not isinstance(config_dict, dict) or not all(isinstance(key, str) for key in config_dict):
            rule, remedy = (
                "a recipe is a dictionary whose keys are strings",
                f"Give the content of a {cls.CONFIG_NAME}",
            )
            raise ConfigurationError.of("config_dict", config_dict, rule, remedy)
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
