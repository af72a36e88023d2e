"""What may be fed to an exported file: a graph takes any number for a token or a position, and computes with what lies there."""

from typing import Any

from torch import Tensor

from ..errors import ModelError

# where a model has positions for so many tokens and no more; transformers' attribute_map answers for other names
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx")


def vocabulary_size(config: Any) -> int | None:
    """Tokens of the vocabulary; `None` if the config does not say."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def position_limit(config: Any) -> int | None:
    """Positions that the model was made for; `None` if the config does not say."""
    inner = config.get_text_config()
    sizes = (getattr(inner, name, None) for name in _POSITIONS)
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


def check_tokens(input_ids: Any, vocabulary: int | None) -> None:
    """Check token ids.

    Raises:
        ModelError: If they are no whole numbers `[batch, length]`, or one is not in the vocabulary.
    """
    _check_whole("input_ids", input_ids, 2)
    if input_ids.numel() == 0:
        raise ModelError.of(
            "input_ids", tuple(input_ids.shape), "there is no token in it", "Give at least one token a row"
        )
    low, high = (int(bound) for bound in input_ids.aminmax())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        end = "" if vocabulary is None else f" to {vocabulary - 1}"
        rule = f"the vocabulary has the tokens 0{end}"
        remedy = "Give the ids of the tokenizer that belongs to the model; padding is told by attention_mask"
        raise ModelError.of("input_ids", low if low < 0 else high, rule, remedy)


def check_positions(position_ids: Any, limit: int | None) -> None:
    """Check positions.

    Raises:
        ModelError: If they are no whole numbers, or one is not within the model's context.
    """
    _check_whole("position_ids", position_ids)
    low, high = (int(bound) for bound in position_ids.aminmax())
    if low < 0 or (limit is not None and high >= limit):
        rule = f"the model has the positions 0 to {limit - 1}" if limit is not None else "positions begin at 0"
        raise ModelError.of(
            "position_ids", low if low < 0 else high, rule, "Give a shorter text, or generate fewer tokens"
        )


def check_mask(mask: Any) -> None:
    """Check the kind of a mask.

    Raises:
        ModelError: If it is no tensor of numbers `[batch, length]`.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise ModelError.of(
            "attention_mask", _shown(mask), "it must be a tensor [rows, tokens]", "Give 1 and 0 on padding"
        )


def _check_whole(name: str, value: Any, dimensions: int | None = None) -> None:
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or "bool" in str(value.dtype):
        rule = "it must be a tensor of whole numbers"
        raise ModelError.of(name, _shown(value), rule, "Give int64, as a tokenizer does with return_tensors='pt'")
    if dimensions is not None and value.dim() != dimensions:
        rule = f"its shape must be [rows, tokens], and it has {value.dim()} dimensions"
        raise ModelError.of(name, tuple(value.shape), rule, "Add the dimension of the rows: input_ids[None]")


def _shown(value: Any) -> Any:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else value
