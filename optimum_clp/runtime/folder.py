"""The folder of an exported file: a local one, or a repository of the Hub of which only the needed files are fetched."""

import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import snapshot_download

from ..errors import ModelError


def exported_folder(
    folder: str | os.PathLike,
    file_name: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Path:
    """A local folder that holds the file and `config.json`, as far as there are such.

    Args:
        folder (`str` or `os.PathLike`): A local folder, or a Hub id such as `"me/qwen3-0.6b-clp20"`.
        file_name (`str`): The ONNX file, relative to it.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        token (`str` or `bool`, *optional*): For private or gated repositories.
        cache_dir (`str` or `os.PathLike`, *optional*): Where files of the Hub are kept; by default its own cache.

    Raises:
        ModelError: If the file lies outside the folder, or there is neither such a folder nor such a repository.
    """
    _check_inside(file_name)
    name = os.fspath(folder)
    looks_local = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") != 1 or name.endswith("/")
    if os.path.exists(name) or looks_local:
        return Path(name)
    wanted = ["config.json", "generation_config.json", file_name, f"{file_name}_data*", f"{file_name}.data"]
    try:
        options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
        return Path(snapshot_download(name, allow_patterns=wanted, **options))
    except Exception as error:  # the Hub's, the network's and the cache's have no common base
        said = " ".join(str(error).split())[:300] or type(error).__name__
        rule = f"there is no such folder, and no such repository could be had from the Hugging Face Hub ({said})"
        remedy = "Check the name and the network; for a private repository pass token=, or log in with `hf auth login`"
        raise ModelError.of("folder", name, rule, remedy) from error


def check_files(folder: Path, file: Path) -> None:
    """Check that there are the file and a `config.json`.

    Raises:
        ModelError: If one is missing; lists the ONNX files that there are.
    """
    if not file.is_file():
        found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.onnx"))
        rule = "there is no such file" if folder.is_dir() else f"there is no folder {str(folder)!r}"
        remedy = f"Files in the folder: {', '.join(found)}" if found else "Export the model first"
        raise ModelError.of("file_name", str(file), rule, remedy)
    if not (folder / "config.json").is_file():
        raise ModelError.of(
            "folder",
            str(folder),
            "it has no config.json, which generate() needs",
            "Give the folder that holds config.json, and the ONNX file in it as file_name",
        )


def _check_inside(file_name: str) -> None:
    # by the name alone: files of the Hub's cache are links to another place
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(file_name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            rule = "it must lie inside the folder"
            raise ModelError.of("file_name", file_name, rule, "Give a name such as 'onnx/model.onnx'")
