"""Where the dense model came from: what its own card says of its terms, and the files beside it that go along with it.

A model's licence asks for its name and its text to be passed on; a local folder and the cache of an offline machine have both.
"""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

from huggingface_hub import ModelCard, snapshot_download

from .section import Key

_LONGEST = 1000  # characters of a name or a link
_CARD = "README.md"
LICENSE_FILES = ("license*", "licence*", "notice*", "copying*", "use_policy*", "acceptable_use_policy*")
_MAX_BYTES = 2**27  # of a file that goes along: vocabularies have up to 30 MB
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LANGUAGE = re.compile(r"[A-Za-z][A-Za-z-]{1,19}")
_TAG = re.compile(r"[\w][\w .+-]{0,59}")
_MOST_LISTED = 100
# of the files that lie beside that card, and of programs that read these
_OF_FILES = frozenset(
    "safetensors pytorch tf jax flax onnx gguf ggml mlx openvino coreml transformers transformers.js optimum "
    "text-generation text-generation-inference endpoints_compatible autotrain_compatible bitsandbytes awq gptq exl2 "
    "compressed-tensors fp8 4-bit 8-bit int4 int8 quantized quantization vllm eval-results model-index".split()
)


@dataclass(frozen=True)
class Origin:
    """Who made the dense model, and under which terms, as far as its card says."""

    repository: Annotated[
        str | None, Key("Hub id of the dense model; of a folder in the Hub's cache, by its path.")
    ] = None
    base_model: Annotated[str | None, Key("Hub id of what the dense model says it was made from.")] = None
    license: Annotated[str | None, Key("As in the metadata of its card.")] = None
    license_name: Annotated[str | None, Key("The same, where the licence is `other`.")] = None
    license_link: Annotated[str | None, Key("The same.")] = None
    is_known: Annotated[bool, Key("Whether there was a card.")] = False
    language: Annotated[tuple[str, ...], Key("Languages, as its card has them.", sparse=True)] = ()
    datasets: Annotated[tuple[str, ...], Key("Hub ids of what it was trained on, by its card.", sparse=True)] = ()
    tags: Annotated[tuple[str, ...], Key("Tags of its card that hold of a smaller model as well.", sparse=True)] = ()

    @classmethod
    def from_section(cls, section: Mapping[str, Any]) -> "Origin":
        """What a report holds of it; keys that a later version may have added are passed over."""
        names = {field.name for field in fields(cls)}
        known: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in section.items()
            if name in names
        }
        return cls(**known)


def hub_id(name_or_path: str | None) -> str | None:
    """`name_or_path` if it is a repository of the Hub; `None` for a local folder or no name at all."""
    if not name_or_path or not _HUB_ID.fullmatch(name_or_path) or Path(name_or_path).exists():
        return None
    return name_or_path


def find_origin(
    name_or_path: str | None, revision: str | None = None, cache_dir: str | os.PathLike | None = None
) -> Origin:
    """What a model's card says of it: in a local folder, on the Hub, or in the Hub's cache.

    Args:
        name_or_path (`str` or `None`): As the user gave it.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        cache_dir (`str` or `os.PathLike`, *optional*): Where files of the Hub are kept; by default its own cache.
    """
    repository = hub_id(name_or_path) or _cached_repository(name_or_path)
    folder = origin_folder(name_or_path, (_CARD,), revision, cache_dir)
    try:
        data = ModelCard.load(folder / _CARD).data.to_dict() if folder is not None else None
    except Exception:  # no card, or one that is not valid
        data = None
    found: dict[str, Any] = data or {}
    parents = found.get("base_model")
    parent = parents[0] if isinstance(parents, list) and parents else parents

    def stated(key: str) -> str | None:
        value = found.get(key)
        return value if isinstance(value, str) and len(value) < _LONGEST else None

    terms = stated("license"), stated("license_name"), stated("license_link")
    return Origin(
        repository,
        parent if isinstance(parent, str) else None,
        *terms,
        data is not None,
        language=_listed(found.get("language"), _LANGUAGE),
        datasets=_listed(found.get("datasets"), _HUB_ID),
        tags=tuple(tag for tag in _listed(found.get("tags"), _TAG) if _is_inherited(tag)),
    )


def origin_folder(
    name_or_path: str | None,
    patterns: Sequence[str],
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Path | None:
    """A local folder with those files of a model that match `patterns`, as far as they can be had.

    Args:
        name_or_path (`str` or `None`): A local folder, which is given back; or a Hub id, whose files are fetched, or found in
            the Hub's cache where there is no network.
        patterns (`Sequence[str]`): Names with wildcards, in lower case; of other cases the usual ones are asked for too.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        cache_dir (`str` or `os.PathLike`, *optional*): Where files of the Hub are kept; by default its own cache.
    """
    if name_or_path and Path(name_or_path).is_dir():
        return Path(name_or_path)
    repository = hub_id(name_or_path)
    if repository is None:
        return None
    cases = {case for pattern in patterns for case in (pattern, pattern.upper(), pattern.capitalize())}
    try:
        options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "etag_timeout": 5}
        return Path(snapshot_download(repository, allow_patterns=sorted(cases), **options))
    except Exception:  # no network and nothing in the cache, or no such repository
        return None


def copy_files(source: Path | None, folder: Path, patterns: Sequence[str]) -> list[str]:
    """Copy the files of a model's folder that match `patterns`, whatever their case, and are not in `folder` yet.

    Args:
        source (`Path` or `None`): As from [`origin_folder`].
        folder (`Path`): Where they go.
        patterns (`Sequence[str]`): Names with wildcards, in lower case.

    Returns:
        `list[str]`: Their names. What is no ordinary file, or larger than 128 MiB, is passed over.
    """
    copied = []
    for file in sorted(source.iterdir()) if source is not None and source.is_dir() else ():
        wanted = any(fnmatch(file.name.lower(), pattern) for pattern in patterns)
        # the Hub's cache has links to its blobs
        if wanted and file.is_file() and file.stat().st_size <= _MAX_BYTES and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
            copied.append(file.name)
    return copied


def origin_of(base_model: Mapping[str, Any] | None) -> Origin:
    """What is known of where the dense model came from: as the report says, or else as its card says now.

    Args:
        base_model (`Mapping` or `None`): The section of the report.
    """
    base = base_model or {}
    known = base.get("origin")
    return Origin.from_section(known) if known else find_origin(base.get("name_or_path"), base.get("revision"))


def base_name(base_model: Mapping[str, Any] | None) -> str:
    """The last part of the dense model's name, without any folder above it.

    Args:
        base_model (`Mapping` or `None`): The section of the report.
    """
    base = base_model or {}
    name = (base.get("origin") or {}).get("repository") or base.get("name_or_path") or ""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return last if last.strip("./~") else "model"


def _listed(value: Any, pattern: re.Pattern[str]) -> tuple[str, ...]:
    """A key of a card that is a string or a list of them, without what is neither; a stranger has written it."""
    values = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(v for v in values if isinstance(v, str) and pattern.fullmatch(v)))[:_MOST_LISTED]


def _is_inherited(tag: str) -> bool:
    return tag.lower() not in _OF_FILES


def _cached_repository(path: str | None) -> str | None:
    """The Hub id that a folder of the Hub's cache is of: `.../models--org--name/snapshots/...`."""
    for part in reversed(Path(path).parts if path else ()):
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    return None
