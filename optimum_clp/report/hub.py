"""Our own files on the Hub: upload of an output folder in one commit, and reading recipe and report back."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.utils import cached_file

from ..configuration.clp_config import CLPConfig
from .hub_access import check_repo_id, hub_problem, patiently
from .model_card import write_model_card
from .origin import hub_id
from .page import REPORT_PAGE, write_report_page
from .public import public_config, public_evaluation
from .report import CLPReport


def written_file(
    path: str | None,
    name: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike | None = None,
) -> str | None:
    """One of our files in a local folder or a repository of the Hub; `None` where there is none, or no network."""
    if path is None or (not os.path.isdir(path) and hub_id(path) is None):
        return None
    return cached_file(
        path,
        name,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    **kwargs: Any,
) -> str:
    """Upload `folder` as it is, but for four files: card and page name the repository, and neither report nor recipe holds
    a local folder or the user's own strings.

    Args:
        folder (`Path`): What [`CLPPruner.save_pretrained`] wrote.
        repo_id (`str`): Repository on the Hub; made if it does not exist.
        private (`bool`, *optional*): For a repository that is made here.
        token (`str` or `bool`, *optional*): Of a user who may write there.
        kwargs: Passed to `HfApi.upload_folder` (`revision`, `commit_message`, `commit_description`, `create_pr`).

    Returns:
        `str`: The commit's address.

    Raises:
        OutputError: If nobody is logged in, the token may not write there, or the Hub could not be reached, five times.
    """
    api, repo_id = HfApi(), check_repo_id(repo_id)

    def asked(call: Callable[[], Any], what: str) -> Any:
        try:
            return patiently(call, what)
        except Exception as error:
            if (problem := hub_problem(error, repo_id)) is not None:
                raise problem from error
            raise

    making: dict[str, Any] = {"private": private, "token": token, "exist_ok": True}
    repository = asked(lambda: api.create_repo(repo_id, **making), "repository")
    repo_id = getattr(repository, "repo_id", repo_id)
    kwargs.setdefault("commit_message", "Upload with optimum-clp")
    # hard links: the copy costs nothing, and the files that differ are replaced in it, not in the folder
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".upload-") as parent:
        copy = Path(parent) / "folder"
        shutil.copytree(folder, copy, copy_function=_link)
        public, config = CLPReport.load(copy), CLPConfig.from_pretrained(copy)
        base = public.base_model or {}
        if hub_id(base.get("name_or_path")) is None:
            public.base_model = {**base, "name_or_path": None}
        public.evaluation = public_evaluation(public.evaluation, config)
        for name in ("clp_report.json", "clp_config.json", "README.md", REPORT_PAGE):
            (copy / name).unlink(missing_ok=True)
        public.save(copy)
        public_config(config).save_pretrained(copy)
        write_report_page(public, config, copy, title=repo_id)
        write_model_card(public, config, copy, model_name=repo_id)
        sent: dict[str, Any] = {"repo_id": repo_id, "folder_path": str(copy), "token": token, **kwargs}
        commit = asked(lambda: api.upload_folder(**sent), "upload")
    return str(getattr(commit, "commit_url", commit))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
