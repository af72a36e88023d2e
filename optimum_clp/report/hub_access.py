"""Whether something can be uploaded to the Hub, told before the work; and requests that are patient with a busy server."""

import logging
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..errors import CLPError, ConfigurationError, OutputError

logger = logging.getLogger(__name__)
T = TypeVar("T")

# seconds before a request is made again that the server, or the network, could not serve
WAITS = (1.0, 2.0, 4.0, 8.0)
_BUSY = (408, 429, 500, 502, 503, 504)
# whose errors are of the network where they are nothing else: requests (huggingface_hub below 1), httpx
_NETWORK = ("requests", "urllib3", "httpx", "httpcore", "httpx2", "httpcore2")
_LATER = "or upload later, from the folder: CLPPruner.from_pretrained(FOLDER).push_to_hub(REPO_ID)"
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write (huggingface.co/settings/tokens)"


def check_repo_id(repo_id: str) -> str:
    """Check the name of a repository, before there is anything to upload.

    Returns:
        `str`: The name.

    Raises:
        ConfigurationError: If no repository of the Hub can have it.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        remedy = "Give for example 'your-name/qwen3-0.6b-clp20'"
        raise ConfigurationError.of(
            "repo_id", repo_id, "no repository of the Hub can have this name", remedy
        ) from error
    return repo_id


def check_upload(repo_id: str, *, token: str | bool | None = None, private: bool | None = None) -> None:
    """Check, before the work, that a folder can be uploaded after it. Nothing is made on the Hub.

    Args:
        repo_id (`str`): Repository on the Hub.
        token (`str` or `bool`, *optional*): Of a user who may write there; by default the one that is logged in.
        private (`bool`, *optional*): Whether the repository shall be private.

    Raises:
        ConfigurationError: If no repository can have this name, or it exists and is public where it shall be private.
        OutputError: If nobody is logged in, the token is not known, may not write, or not there; or the Hub cannot be reached.
    """
    check_repo_id(repo_id)
    api = HfApi()
    with_words = _Words(repo_id)
    who = with_words(lambda: api.whoami(None if token is False else token))
    access = (who.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise OutputError.of("repo_id", repo_id, f"the token of {who.get('name')} may only read", _LOG_IN)
    owner = repo_id.partition("/")[0] if "/" in repo_id else who.get("name")
    roles = {entry.get("name"): entry.get("roleInOrg") for entry in who.get("orgs") or ()}
    if owner != who.get("name") and (owner not in roles or roles[owner] == "read"):
        rule = f"{who.get('name')}, whose token this is, may not write in {owner}"
        remedy = f"Give '{who.get('name')}/{repo_id.rpartition('/')[2]}', or a token of somebody who may"
        raise OutputError.of("repo_id", repo_id, rule, remedy)
    try:
        found = with_words(lambda: api.repo_info(repo_id if "/" in repo_id else f"{owner}/{repo_id}", token=token))
    except RepositoryNotFoundError:
        return  # it will be made
    if private and found.private is False:
        rule = "the repository exists and is public, and would stay so"
        remedy = "Make it private on its page of settings, choose another name, or leave --private (private=True) out"
        raise ConfigurationError.of("private", True, f"{repo_id}: {rule}", remedy)


def wanted_upload(save_directory: str | os.PathLike, options: dict[str, Any]) -> str:
    """What `push_to_hub=True` asks for: `repo_id` of the options, which is taken out of them, or else the folder's name.

    Raises:
        ConfigurationError, OutputError: As [`check_upload`].
    """
    repo_id = options.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
    check_upload(repo_id, token=options.get("token"), private=options.get("private"))
    return repo_id


def patiently(call: Callable[[], T], what: str) -> T:
    """Make a request again, later and later, while the server is busy or the connection breaks.

    huggingface_hub does that for single files; for a commit, and for asking who one is, its versions differ. Files
    that have arrived are not sent again: an upload goes on where it was.

    Args:
        call (`Callable`): Can be made again as a whole.
        what (`str`): What it is, for the log.

    Raises:
        Exception: What the last attempt has raised, or one that would not go away.
    """
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            if not _passes(error):
                raise
            logger.info(f"{what}: {_said(error)}; once more in {wait:g} s")
            time.sleep(wait)
    return call()


def hub_problem(error: Exception, repo_id: str) -> CLPError | None:
    """What one can do about an error of the Hub; `None` of an error that is something else."""
    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled) or (constants.HF_HUB_OFFLINE and _is_of_network(error)):
        rule = "the environment variable HF_HUB_OFFLINE is set, so nothing can be uploaded"
        return OutputError.of("repo_id", repo_id, rule, f"Unset it, {_LATER}")
    if isinstance(error, LocalTokenNotFoundError):
        return OutputError.of("repo_id", repo_id, "nobody is logged in to the Hugging Face Hub here", _LOG_IN)
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return OutputError.of("repo_id", repo_id, "the Hugging Face Hub does not know this token (401)", _LOG_IN)
    if status == 403:
        rule = "the Hugging Face Hub does not let this token write there (403)"
        return OutputError.of("repo_id", repo_id, rule, f"Give a repository of your own. {_LOG_IN}")
    if isinstance(error, RepositoryNotFoundError):
        rule = "for this token there is no such repository: it is not there, or it is private and somebody else's"
        return OutputError.of("repo_id", repo_id, rule, f"Give a repository of your own. {_LOG_IN}")
    if _passes(error):
        rule = f"the Hugging Face Hub could not be reached ({_said(error)}), {len(WAITS) + 1} times"
        return OutputError.of("repo_id", repo_id, rule, f"Check the network and status.huggingface.co, {_LATER}")
    if status is not None:
        return OutputError.of(
            "repo_id", repo_id, f"the Hugging Face Hub refused it ({_said(error)})", f"Mend that, {_LATER}"
        )
    return None


class _Words:
    """Calls of the Hub, patient, whose errors say what to do; a repository that is not there stays what it is."""

    def __init__(self, repo_id: str):
        self.repo_id = repo_id

    def __call__(self, call: Callable[[], T]) -> T:
        try:
            return patiently(call, "Hugging Face Hub")
        except RepositoryNotFoundError:
            raise
        except Exception as error:
            if (problem := hub_problem(error, self.repo_id)) is not None:
                raise problem from error
            raise


def _status(error: Exception) -> int | None:
    """What the server has answered, if it has; `whoami` of huggingface_hub 0 raises requests' own error."""
    if not isinstance(error, HfHubHTTPError) and not _is_of_library(error):
        return None
    return getattr(getattr(error, "response", None), "status_code", None)


def _passes(error: Exception) -> bool:
    """Whether it may be otherwise in a moment."""
    if isinstance(error, OfflineModeIsEnabled):
        return False
    status = _status(error)
    return status in _BUSY if status is not None else _is_of_network(error)


def _is_of_network(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return False
    return isinstance(error, (ConnectionError, TimeoutError)) or _is_of_library(error)


def _is_of_library(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in _NETWORK


def _said(error: Exception) -> str:
    status = _status(error)
    if status is not None:
        return f"it answered {status}" if status in _BUSY else f"{status}: {' '.join(str(error).split())[:200]}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200] or 'no message'}"
