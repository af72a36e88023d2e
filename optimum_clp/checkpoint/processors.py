"""What a model with a vision tower or an audio encoder reads its inputs with: files that lie beside it, and stay as they are."""

import os
import shutil
from pathlib import Path

from transformers.utils import cached_file

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
)


def copy_processor(source: str | None, folder: Path, cache_dir: str | os.PathLike | None = None) -> list[str]:
    """Copy the files of a processor from where a model was loaded from; no processor is made of them.

    Args:
        source (`str` or `None`): A local folder, or a Hub id, of which the cache has what was fetched.
        folder (`Path`): Where they are wanted; files that are there stay.
        cache_dir (`str` or `os.PathLike`, *optional*): The cache of the Hub's files, if it is not the usual one.

    Returns:
        `list[str]`: What was copied.
    """
    copied = []
    for name in PROCESSOR_FILES if source else ():
        found = _find(str(source), name, cache_dir)
        if found is not None and not (folder / name).exists():
            shutil.copyfile(found, folder / name)
            copied.append(name)
    return copied


def _find(source: str, name: str, cache_dir: str | os.PathLike | None) -> Path | None:
    local = Path(source)
    if local.is_dir():
        return local / name if (local / name).is_file() else None
    try:
        found = cached_file(
            source,
            name,
            cache_dir=cache_dir,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # neither a folder nor a Hub id: a model made in memory
        return None
    return None if found is None else Path(found)
