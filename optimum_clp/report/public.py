"""What a stranger may see of a recipe and a report: no local folder, nothing of the user's own text."""

import os
from pathlib import Path
from typing import Any

from ..configuration.clp_config import CLPConfig


def public_evaluation(evaluation: dict[str, Any] | None, config: CLPConfig) -> dict[str, Any] | None:
    """Without examples of answers where these show the user's own prompts, or how his own text goes on."""
    found = (evaluation or {}).get("generation")
    own_text = found and found["asked"] == "text" and config.calibration.dataset is not None
    if evaluation is None or not found or not (own_text or config.evaluation.prompts):
        return evaluation
    return {**evaluation, "generation": {**found, "examples": []}}


def public_config(config: CLPConfig) -> CLPConfig:
    """A recipe without local folders and the user's own strings; `config` is not changed."""
    public = type(config).from_dict(config.to_dict())
    dataset = public.calibration.dataset
    if isinstance(dataset, str) and os.path.exists(dataset):
        public.calibration.dataset = Path(dataset).name
    elif isinstance(dataset, (list, tuple)):
        public.calibration.dataset = [f"({len(dataset)} strings, not published)"]
    public.calibration.cache_dir = None
    public.tuning.logging_dir = None
    evaluation = public.evaluation
    evaluation.prompts = evaluation.prompts and Path(evaluation.prompts).name
    evaluation.texts = [Path(text).name if os.path.exists(text) else text for text in evaluation.texts]
    files = evaluation.task_files()
    tasks = {word.partition("=")[0]: word for word in evaluation.tasks}
    evaluation.tasks = [f"{name}={Path(files[name]).name}" if name in files else word for name, word in tasks.items()]
    evaluation.tasks_dir = evaluation.tasks_dir and Path(evaluation.tasks_dir).name
    return public
