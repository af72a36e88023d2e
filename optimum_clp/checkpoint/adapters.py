"""Folders that hold an adapter (LoRA): merged into the model that they were trained for, where `peft` is installed."""

import importlib.util
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..model_files import read_model_file
from .errors import load_error, model_error
from .files import CONFIG_FILE, has_weights

ADAPTER_FILE = "adapter_config.json"


def adapter_base(folder: Path) -> str | None:
    """The model that a folder's adapter was trained for; `None` if the folder holds no adapter.

    Raises:
        ModelError: If there is one, and `peft` is not installed, it does not say for which model it is, or a whole model
            lies beside it: whether that has the adapter in it already, nothing tells.
    """
    if not (folder / ADAPTER_FILE).is_file():
        return None
    if (folder / CONFIG_FILE).is_file() and has_weights(folder):
        raise model_error(
            folder,
            "it holds a model and an adapter, and the adapter may be merged into that model already",
            f"Remove {ADAPTER_FILE} if it is; else give a folder with the adapter alone",
        )
    base = read_model_file(folder / ADAPTER_FILE, folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise model_error(
            folder,
            f"it holds an adapter, and its {ADAPTER_FILE} does not name the model that it is for",
            "Merge it with peft first: PeftModel.from_pretrained(model, folder).merge_and_unload()",
        )
    if importlib.util.find_spec("peft") is None:
        raise model_error(
            folder,
            f"it holds an adapter for {base}, not a model, and peft is not installed",
            "Install peft, or merge the adapter into its base model first",
        )
    return base


def merged(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`base` with an adapter merged into its weights, in place; no second copy of them is made.

    Args:
        base (`PreTrainedModel`): Whose weights may be changed.
        folder (`Path`): Of the adapter.

    Raises:
        ModelError: If the adapter does not fit the model, or is of a kind that cannot be merged.
    """
    from peft import PeftModel

    try:
        whole: Any = PeftModel.from_pretrained(base, str(folder))
    except Exception as error:  # whatever peft says of a bad file
        raise load_error(str(folder), error) from error
    if not hasattr(whole, "merge_and_unload"):
        kind = getattr(whole.peft_type, "value", whole.peft_type)
        raise model_error(folder, f"its adapter ({kind}) cannot be merged into weights", "Cut the base model alone")
    return whole.merge_and_unload().requires_grad_(True).eval()
