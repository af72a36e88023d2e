"""The log-likelihood of a text after another one, as EleutherAI's lm-eval (0.4.13) defines it: one implementation for tasks in
files and for lm-eval's own tasks, for PyTorch models and for ONNX files.

Tokens, special tokens, white space and truncation are lm-eval's, so that a figure can be set beside published ones. It is
ours because lm-eval's own (`HFLM`) holds the logits of whole batches in the model's dtype, changes the model and the tokenizer that
it is given, and needs lm-eval installed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..architecture.lookup import context_limit, decoder_layers, text_config
from ..errors import CalibrationError, ModelError
from ..forward.dense_outputs import StateStore
from ..forward.hooks import evaluation_mode
from ..forward.layer_major import LayerMajorPasses, Residence
from ..forward.layer_stack import LayerStack
from ..progress import progress_bar

# lm-eval's, for a model whose config and tokenizer name no length
_DEFAULT_MAX_LENGTH = 2048
# transformers' tokenizers say 1e30 where no length is set
_NO_LENGTH = 10**18

_Batch = Sequence[tuple[int, ...]]
"""Inputs that run together, the longest first."""
_LastLogits = Callable[[int, int], Tensor]
"""For a row of a batch and a number of tokens the logits after the last ones, `[tokens, vocabulary]`."""


@dataclass(frozen=True)
class Request:
    """Token ids of which the last `length` are scored; there is at least one before them."""

    ids: list[int]
    length: int


def continuation_request(
    context: str, continuation: str, tokenizer: PreTrainedTokenizerBase, longest: int, name: str
) -> Request:
    """What is asked of a model to score `continuation` after `context`, cut on the left to `longest` tokens of input.

    Args:
        context (`str`): May be empty: a BOS (or EOS) token stands in for it.
        continuation (`str`): With the space before it, if there is to be one.
        tokenizer (`PreTrainedTokenizerBase`): Adds the special tokens that it adds by default.
        longest (`int`): Tokens that the model takes, see [`max_length`].
        name (`str`): The task's, for errors.

    Raises:
        CalibrationError: If the continuation has no tokens, or more than `longest`; or if there is nothing to begin with.
    """
    stripped = context.rstrip()
    # white space belongs to the token after it, so it is scored there
    text = context[len(stripped) :] + continuation
    context_ids = _encode(tokenizer, stripped) if stripped else []
    if context_ids:
        whole, scored = _encode(tokenizer, stripped + text), len(context_ids)
    else:
        whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        start = _start(tokenizer, name)
        whole = whole if whole[:1] == [start] else [start, *whole]
        scored = 1
    length = len(whole) - scored
    if length < 1:
        rule = "the tokenizer makes no token of it beside those of its context"
        raise CalibrationError.of(f"task {name}", continuation.strip(), rule, "Correct or remove that example")
    if length > longest:
        rule = f"it has {length} tokens, and the model takes {longest}"
        raise CalibrationError.of(f"task {name}", continuation.strip(), rule, "Shorten or remove that example")
    # the last token is only predicted, so one more than the model takes
    return Request(whole[-(longest + 1) :], length)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids with the tokenizer's own special tokens; no second BOS for a text that brings one."""
    start = tokenizer.bos_token or tokenizer.eos_token
    if start and text.startswith(start):
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokenizer(text, verbose=False)["input_ids"]


def _start(tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    """What stands in for an empty context."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        rule = "an example has an empty context, and the tokenizer has no BOS or EOS token to begin with"
        raise CalibrationError.of(f"task {name}", "", rule, "Remove that example, or set the tokenizer's bos_token")
    return start


def max_length(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that a model takes at once, found where lm-eval looks for it: the config, the tokenizer, else 2048."""
    own = int(tokenizer.model_max_length) if tokenizer.model_max_length < _NO_LENGTH else None
    return context_limit(model.config) or own or _DEFAULT_MAX_LENGTH


def check_vocabulary(requests: Sequence[Request], model: Any) -> None:
    """Refuse tokens that the model has not.

    Raises:
        CalibrationError: If there are any.
    """
    size = getattr(text_config(model.config), "vocab_size", None)
    largest = max(max(request.ids) for request in requests)
    if size is not None and largest >= size:
        rule = f"a task has this token, and the model's vocabulary ends at {size - 1}"
        raise CalibrationError.of("token", largest, rule, "Give the tokenizer that belongs to the model")


def log_likelihoods(
    model: Any,
    requests: Sequence[Request],
    batch_size: int,
    name: str,
    quiet: bool,
    residence: Residence | None = None,
) -> list[tuple[float, bool]]:
    """For each request, the log-likelihood of its last tokens in nats, and whether each of them is the most likely one.

    Args:
        model: Called like a causal language model of transformers: one of PyTorch, or an [`OnnxCausalLM`]. Left as it is.
        requests (`Sequence[Request]`): Of any length.
        batch_size (`int`): Rows in one forward pass, each of one input; does not change the result beyond rounding.
        name (`str`): What the progress bar and errors say.
        quiet (`bool`): No progress bar.
        residence ([`Residence`], *optional*): For a PyTorch model that memory does not hold: as many requests as memory has room for the
            states of go through it layer by layer, with one reading of the weights; the result is the same but for rounding.

    Returns:
        `list[tuple[float, bool]]`: In the requests' order; sums in float64 of a float32 `log_softmax`.

    Raises:
        CalibrationError: If a token is not in the model's vocabulary.
        ModelError: If the model gives NaN.
    """
    check_vocabulary(requests, model)
    found: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
    # choices of one token after the same text are one row: the last token is only predicted
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        alike.setdefault(tuple(request.ids[:-1]), []).append(index)
    # neighbours of one length need little padding; the longest come first, where memory would run out
    order = sorted(alike, key=lambda inputs: -len(inputs))
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    with torch.no_grad(), evaluation_mode(model), progress_bar(len(requests), f"Task {name}", quiet) as bar:
        for batch, last_logits in zip(batches, _passes(model, batches, residence, name, quiet), strict=True):
            for row, inputs in enumerate(batch):
                longest = max(requests[index].length for index in alike[inputs])
                logits = last_logits(row, longest)
                for index in alike[inputs]:
                    found[index] = _scored(logits, requests[index])
                    if math.isnan(found[index][0]):
                        rule = f"it gives NaN for an example of the task {name}"
                        remedy = "Load it in another dtype, such as float32"
                        raise ModelError.of("model", type(model).__name__, rule, remedy)
                bar.update(len(alike[inputs]))
    return found


def _passes(
    model: Any, batches: Sequence[_Batch], residence: Residence | None, name: str, quiet: bool
) -> Iterator[_LastLogits]:
    """For each batch, in order, what gives the last logits of one of its rows."""
    if residence is None or not isinstance(model, PreTrainedModel):
        return _by_batches(model, batches)
    stack = LayerStack(model, run=False)
    return (
        _by_layers(model, stack, batches, residence, name, quiet)
        if stack.layer_by_layer
        else _by_batches(model, batches)
    )


def _by_batches(model: Any, batches: Sequence[_Batch]) -> Iterator[_LastLogits]:
    """Each batch through the whole model."""
    device = getattr(model, "device", torch.device("cpu"))
    for batch in batches:
        ids, mask = (tensor.to(device) for tensor in _padded(batch))
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits

        def last(row: int, count: int, batch: _Batch = batch, logits: Tensor = logits) -> Tensor:
            return logits[row, len(batch[row]) - count : len(batch[row])]

        yield last


def _by_layers(
    model: PreTrainedModel, stack: LayerStack, batches: Sequence[_Batch], residence: Residence, name: str, quiet: bool
) -> Iterator[_LastLogits]:
    """Many batches through one layer after the other."""
    for some in _together(model, batches, residence):
        ids, mask = _padded([inputs for batch in some for inputs in batch])
        parts = torch.arange(len(ids)).split([len(batch) for batch in some])
        store = StateStore(residence.folder, residence.state_memory)
        passes = LayerMajorPasses(
            model,
            stack,
            ids,
            mask,
            parts,
            residence=residence,
            allocate=store.allocate,
            description=f"Task {name}, layer by layer",
            quiet=quiet,
            lengths=[len(batch[0]) for batch in some],
        )
        passes.run()
        left = passes.kept[len(stack)]
        with stack.head(model) as head:
            for batch, rows in zip(some, parts, strict=True):

                def last(
                    row: int, count: int, batch: _Batch = batch, rows: Tensor = rows, left: Tensor = left
                ) -> Tensor:
                    end = len(batch[row])
                    return head(left[rows[row : row + 1], end - count : end].to(model.device))[0]

                yield last


def _together(model: PreTrainedModel, batches: Sequence[_Batch], residence: Residence) -> Iterator[list[_Batch]]:
    """Batches that share a reading of the weights: their states, before a layer and behind the last one, have room in memory.

    Or in a layer's weights, if that is more: through files they then cost no more than the reading.
    """
    layer = max(sum(p.nbytes for p in layer.parameters()) for layer in decoder_layers(model))
    token = 2 * text_config(model.config).hidden_size * model.dtype.itemsize
    room, some, rows = max(residence.state_memory, layer), list[_Batch](), 0
    for batch in batches:
        # rows are as wide as the longest, which comes first
        width = len((some or [batch])[0][0])
        if some and (rows + len(batch)) * width * token > room:
            yield some
            some, rows = [], 0
        some.append(batch)
        rows += len(batch)
    if some:
        yield some


def _padded(rows: _Batch) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 `[rows, length of the longest]`, padded on the right."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, inputs in enumerate(rows):
        ids[row, : len(inputs)] = torch.tensor(inputs)
        mask[row, : len(inputs)] = 1
    return ids, mask


def _scored(logits: Tensor, request: Request) -> tuple[float, bool]:
    """The log-likelihood of a request's last tokens by the last logits of its row, and whether each is the most likely one."""
    predicted = logits[len(logits) - request.length :].float().log_softmax(-1)
    target = torch.tensor(request.ids[-request.length :], device=predicted.device)
    log_likelihood = predicted.gather(-1, target[:, None]).double().sum().item()
    return log_likelihood, bool((predicted.argmax(-1) == target).all())
