"""What is said about a model that cannot be read, whatever library noticed it."""

from typing import Any

from huggingface_hub import errors as hub_errors

from ..errors import ModelError


def model_error(name: Any, rule: str, remedy: str) -> ModelError:
    """A [`ModelError`] about the model called `name`."""
    return ModelError.of("model", str(name), rule, remedy)


def quanto_error(name: Any) -> ModelError:
    """The error for a model that quanto has quantized already."""
    return model_error(
        name,
        "its weights are quantized with quanto and cannot be cut, tuned or exported",
        "Give the dense checkpoint that it was made from; to run this one, load it with "
        "optimum_clp.quantization.load_quantized",
    )


_HUB_RULES: tuple[tuple[type[Exception], str, str], ...] = (
    (
        hub_errors.LocalEntryNotFoundError,
        "there is no such folder, and the Hugging Face Hub could not be reached",
        "Check the network, or give the path of a local folder",
    ),
    (
        hub_errors.HFValidationError,
        "there is no such folder, and it is not a valid Hub id",
        "Give a local folder, or an id such as 'Qwen/Qwen3-0.6B'",
    ),
    (
        hub_errors.GatedRepoError,
        "access to it is restricted on the Hugging Face Hub",
        "Accept its terms on its page, then pass token= or log in with `hf auth login`",
    ),
    (
        hub_errors.RepositoryNotFoundError,
        "there is no such folder, and no such model on the Hugging Face Hub",
        "Check the name; for a private model pass token= or log in with `hf auth login`",
    ),
    (
        hub_errors.RevisionNotFoundError,
        "the Hugging Face Hub has no such revision of it",
        "Choose another revision, or none for the main branch",
    ),
    (
        hub_errors.EntryNotFoundError,
        "a file that is needed is missing from it on the Hugging Face Hub",
        "Choose a model with config.json, safetensors weights and a tokenizer",
    ),
)


def load_error(name: str, error: BaseException) -> ModelError:
    """`error` as a [`ModelError`]: by its cause where the Hub is to blame, else with the library's own words."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for kind, rule, remedy in _HUB_RULES:
        if any(isinstance(e, kind) for e in chain):
            return model_error(name, rule, remedy)
    said = " ".join(str(error).split())[:300] or type(error).__name__
    if any(isinstance(e, hub_errors.OfflineModeIsEnabled) for e in chain) or "couldn't connect to" in said.lower():
        return model_error(name, *_HUB_RULES[0][1:])
    return model_error(name, f"it could not be read ({said})", "Check its files, or fetch them again")
