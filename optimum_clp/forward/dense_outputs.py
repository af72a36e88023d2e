"""What the dense model says about some rows of tokens, computed once.

Not its logits (a vocabulary wide), but the hidden states that leave its last layer; norm and head are run again when
the logits are wanted. The hidden states that enter other layers can be kept in the same pass.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import TuningError
from ..out_of_memory import Halving
from ..processes import broadcast, rank, world_size
from ..progress import progress_bar
from ..spill import Spill
from .head_window import logits_within
from .hooks import evaluation_mode, recorded_inputs, run_without_head
from .layer_major import BATCH_SETTINGS, LayerMajorPasses, Residence
from .layer_stack import LayerStack


class StateStore(Spill):
    """Where kept hidden states lie: main memory up to a limit, mapped files beyond it.

    Raises:
        TuningError: From [`~StateStore.allocate`], if the disk has no room.
    """

    def no_room(self, folder: Path, needed: int, free: int) -> TuningError:
        rule = f"the hidden states of the text need {needed / 1e9:.1f} GB there, and {free / 1e9:.1f} GB are free"
        remedy = "Free some space, set calibration.cache_dir to a larger disk, or lower calibration.train_sequences"
        return TuningError.of("calibration.cache_dir", str(folder), rule, remedy)


class DenseOutputs:
    """Hidden states of a model over all rows, in the model's dtype, on the CPU.

    Args:
        model (`PreTrainedModel`): The dense model; not changed.
        tokens (`Tensor`): int64 `[rows, length]`, full rows.
        batch_size (`int`): Rows in one forward pass.
        inputs_of (`Sequence[int]`): Layers whose inputs are kept too.
        store ([`StateStore`], *optional*): Where the states lie; main memory if not given.
        dealt (`bool`): In a group of processes (`torch.distributed`), all of which make this call, each one computes a
            part of the rows, and all of them get everything.
        quiet (`bool`): No progress bar.
        residence ([`Residence`], *optional*): For a model that memory does not hold: all rows go through one layer after the
            other, and the weights are read once; the states are the same, bit for bit. Without it, and where layers hand on more than
            hidden states, some rows go through all layers, and then the next ones.
        description (`str`): What the progress bar says.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        *,
        batch_size: int = 8,
        inputs_of: Sequence[int] = (),
        store: StateStore | None = None,
        dealt: bool = False,
        quiet: bool = False,
        residence: Residence | None = None,
        description: str = "Dense model",
    ):
        self.model, self.description = model, description
        self.tokens = tokens
        self.stack = LayerStack(model, run=residence is None)
        self.hidden: dict[int, Tensor] = {}
        store = store or StateStore()
        wanted = sorted({*inputs_of, len(self.stack)})
        group = world_size() if dealt else 1
        batches = torch.arange(len(tokens)).split(batch_size)
        if residence is not None and self.stack.layer_by_layer:
            mine = batches[rank() :: group] if dealt else batches
            self._by_layers(batches[:1] if not mine else mine, wanted, residence, store, quiet)
        else:
            self._by_rows(batches, wanted, group, dealt, store, quiet)
        if group > 1:
            self._share(batches, group)

    def _by_layers(
        self, batches: Sequence[Tensor], wanted: list[int], residence: Residence, store: StateStore, quiet: bool
    ) -> None:
        """One layer after the other, all rows of this process through each."""
        options: dict[str, Any] = {"residence": residence, "allocate": store.allocate, "quiet": quiet}
        options |= {"description": f"{self.description}, layer by layer"}
        passes = LayerMajorPasses(self.model, self.stack, self.tokens, None, batches, **options)
        passes.run(keep=wanted)
        self.hidden = passes.kept

    def _by_rows(
        self, batches: Sequence[Tensor], wanted: list[int], group: int, dealt: bool, store: StateStore, quiet: bool
    ) -> None:
        """One batch after the other, each through all layers."""
        model, tokens = self.model, self.tokens
        with (
            torch.no_grad(),
            evaluation_mode(model),
            recorded_inputs(self.stack.layers, wanted) as found,
            progress_bar(len(tokens), self.description, quiet) as bar,
        ):

            def through(rows: Tensor) -> None:
                run_without_head(model, tokens[rows])
                for index in wanted:
                    if index not in self.hidden:
                        shape = (len(tokens), *found[index].shape[1:])
                        self.hidden[index] = store.allocate(shape, found[index].dtype)
                    self.hidden[index][rows] = found[index].cpu()

            halving = Halving("dense model", BATCH_SETTINGS)
            for number, rows in enumerate(batches):
                # the first batch also shows the shapes, so every process runs it
                if number == 0 or number % group == (rank() if dealt else 0):
                    halving.over(rows, through)
                bar.update(len(rows))

    def _share(self, batches: Sequence[Tensor], group: int) -> None:
        """Send every batch from the process that has computed it to the others."""
        for stored in self.hidden.values():
            for number, rows in enumerate(batches):
                # NCCL sends from the accelerator only
                stored[rows] = broadcast(stored[rows].to(self.model.device), number % group).cpu()

    def logits(self, rows: slice | Tensor, window: slice | None = None) -> Tensor:
        """Logits `[batch, length, vocab]` of some rows, in the model's dtype and on its device, without gradient.

        Args:
            rows (`slice` or `Tensor`): Which.
            window (`slice`, *optional*): Only of these positions, see [`~optimum_clp.forward.head_window.logits_within`].
        """
        tokens = self.tokens[rows].to(self.model.device)
        last = len(self.stack)
        with (
            torch.no_grad(),
            evaluation_mode(self.model),
            self.stack.resumed(last, self.hidden[last][rows].to(self.model.device)),
        ):
            return logits_within(self.model, tokens, window)
