"""What the dense model says about some rows of tokens, computed once.

Not its logits (a vocabulary wide), but the hidden states that leave its last layer; norm and head are run again when
the logits are wanted. The hidden states that enter other layers can be kept in the same pass.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .gating import LayerStack, recorded_inputs, run_without_head
from .progress import progress_bar


class DenseOutputs:
    """Hidden states of a model over all rows, in the model's dtype, on the CPU.

    Args:
        model (`PreTrainedModel`): The dense model; not changed.
        tokens (`Tensor`): int64 `[rows, length]`, full rows.
        batch_size (`int`): Rows in one forward pass.
        inputs_of (`Sequence[int]`): Layers whose inputs are kept too.
        quiet (`bool`): No progress bar.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        *,
        batch_size: int = 8,
        inputs_of: Sequence[int] = (),
        quiet: bool = False,
    ):
        self.model = model
        self.tokens = tokens
        self.stack = LayerStack(model)
        wanted = sorted({*inputs_of, len(self.stack)})
        kept: dict[int, list[Tensor]] = {i: [] for i in wanted}
        with (
            torch.no_grad(),
            recorded_inputs(self.stack.layers, wanted) as found,
            progress_bar(len(tokens), "Dense model", quiet) as bar,
        ):
            for rows in tokens.split(batch_size):
                run_without_head(model, rows)
                for index in wanted:
                    kept[index].append(found[index].cpu())
                bar.update(len(rows))
        self.hidden = {i: torch.cat(parts) for i, parts in kept.items()}

    def logits(self, rows: slice | Tensor) -> Tensor:
        """Logits `[batch, length, vocab]` of some rows, in the model's dtype and on its device, without gradient."""
        tokens = self.tokens[rows].to(self.model.device)
        last = len(self.stack)
        with torch.no_grad(), self.stack.resumed(last, self.hidden[last][rows].to(self.model.device)):
            return self.model(input_ids=tokens, use_cache=False).logits
