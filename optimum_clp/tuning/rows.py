"""The rows that tuning looks at, with all that the dense model says about them, computed once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..architecture.lookup import decoder_layers
from ..forward.dense_outputs import DenseOutputs, StateStore
from ..forward.hooks import evaluation_mode
from ..forward.layer_major import Residence


@dataclass(frozen=True)
class TuningRows:
    """Rows of tokens with all that the dense model says about them.

    Args:
        outputs ([`DenseOutputs`]): The dense model's.
        inputs (`Tensor`): `[rows, length, hidden]`: what enters the first trained layer.
        targets (`dict[int, Tensor]`): For some layers of the cut model, what should leave them: the states that enter a
            layer of the dense model, or leave its last one.
        kinds (`Sequence[str]`): What kind of text each row is; empty if that does not matter.
        mask (`Tensor` or `None`): bool `[rows, length]`: tokens that are to be learnt; `None` for all.
    """

    outputs: DenseOutputs
    inputs: Tensor
    targets: Mapping[int, Tensor] = field(default_factory=dict)
    kinds: Sequence[str] = ()
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.outputs.tokens)

    def with_targets(self, states: Mapping[int, int]) -> "TuningRows":
        """The same rows with other targets.

        Args:
            states (`dict[int, int]`): For layers of the cut model, the dense layer that the target enters; it is one of
                those whose inputs were kept.
        """
        return replace(self, targets={i: self.outputs.hidden[state] for i, state in states.items()})

    def batch(
        self, rows: Tensor, logits: bool, *, window: slice | None = None, in_parts: bool = False
    ) -> dict[str, Any]:
        """The arguments of [`EndpointStudent.forward`] for some rows.

        Args:
            rows (`Tensor`): int64.
            logits (`bool`): With the dense model's logits.
            window (`slice`, *optional*): Positions whose logits are looked at; all if not given.
            in_parts (`bool`): These as a function that makes those of some of the rows.
        """
        device = self.outputs.model.device
        return {
            "tokens": self.outputs.tokens[rows].to(device),
            "hidden": self.inputs[rows].to(device),
            "teacher_logits": self._teacher_logits(rows, window, in_parts) if logits else None,
            "targets": {i: states[rows].to(device) for i, states in self.targets.items()},
            "mask": None if self.mask is None else self.mask[rows].to(device),
            "window": window,
        }

    def _teacher_logits(
        self, rows: Tensor, window: slice | None, in_parts: bool
    ) -> Tensor | Callable[[slice], Tensor]:
        if in_parts:
            return lambda part: self.outputs.logits(rows[part], window)
        return self.outputs.logits(rows, window)


def compared_layers(layers: Sequence[int]) -> list[int]:
    """Of the trained layers those whose output is compared: of neighbours the last one, as the others' is their own business."""
    return [layer for layer in layers if layer + 1 not in layers]


def cached_rows(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    tokens: Tensor,
    first: int,
    states: Iterable[int],
    *,
    batch_size: int,
    store: StateStore,
    kinds: Sequence[str] = (),
    mask: Tensor | None = None,
    residence: Residence | None = None,
    quiet: bool = False,
) -> TuningRows:
    """Run the dense model over some rows; in a group of processes each takes its share.

    Args:
        model (`PreTrainedModel`): The cut model.
        dense (`PreTrainedModel`): The dense model.
        tokens (`Tensor`): int64 `[rows, length]`.
        first (`int`): The first layer of `model` that is trained.
        states (`Iterable[int]`): Dense layers whose inputs are kept as well.
        batch_size (`int`): Rows in one forward pass.
        store ([`StateStore`]): Where the states lie.
        kinds (`Sequence[str]`): What kind of text each row is.
        mask (`Tensor` or `None`): bool `[rows, length]`: tokens that are to be learnt; `None` for all.
        residence ([`Residence`], *optional*): As in [`DenseOutputs`].
        quiet (`bool`): No progress bar.

    Returns:
        [`TuningRows`]: Without targets.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "store": store, "quiet": quiet, "dealt": True}
    options["residence"] = residence
    with evaluation_mode(dense):
        same = _same_below(model, dense, first)
        wanted = {*states, *([first] if same else [])}
        outputs = DenseOutputs(
            dense, tokens, inputs_of=sorted(wanted), description="Dense model on the text to tune on", **options
        )
        if same:
            return TuningRows(outputs, outputs.hidden[first], kinds=kinds, mask=mask)
        # lower layers are not the dense model's: what enters the first endpoint is the model's own
        own = DenseOutputs(model, tokens, inputs_of=[first], description="Cut model on the text to tune on", **options)
        return TuningRows(outputs, own.hidden[first], kinds=kinds, mask=mask)


def _same_below(model: PreTrainedModel, dense: PreTrainedModel, first: int) -> bool:
    """Whether the embedding and the layers below `first` are the dense model's."""
    pairs = [(model.get_input_embeddings(), dense.get_input_embeddings())]
    pairs += list(zip(decoder_layers(model)[:first], decoder_layers(dense)[:first], strict=True))
    return all(
        a.data_ptr() == b.data_ptr() or torch.equal(a, b.to(a.device))
        for ours, theirs in pairs
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )
