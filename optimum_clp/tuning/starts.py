"""What the trained layers start from: the starts of `tuning.init`, and what one of another package looks like.

Whether a start is kept is not its own business: `tune_layers` keeps it if it lowers the validation loss and harms no kind
of text, and puts the cut's weights back otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedModel

from ..closed_form.ridge import solution_bytes
from ..closed_form.solver import ClosedFormResult, solve_endpoints
from ..forward.dense_outputs import StateStore
from ..segments import target_state
from .rows import TuningRows


@dataclass(frozen=True)
class StartProblem:
    """What a start is given.

    Args:
        model (`PreTrainedModel`): The cut model, in evaluation mode; the layers have storage of their own, and their
            parameters require gradients.
        layers (`Sequence[int]`): Those that will be trained, in the cut model's numbering, ascending.
        kept (`Sequence[int]` or `None`): The dense model's index of each layer of the cut model; `None` where the caller
            has not said, which no start with targets is given.
        train ([`TuningRows`]): Rows to fit on, with what should leave each layer of [`~Start.targets`].
        validation ([`TuningRows`]): Rows to choose by, alike.
        batch_size (`int`): Rows in one forward pass.
        store ([`StateStore`]): Where hidden states may lie.
        quiet (`bool`): No progress bar.
    """

    model: PreTrainedModel
    layers: Sequence[int]
    kept: Sequence[int] | None
    train: TuningRows
    validation: TuningRows
    batch_size: int
    store: StateStore
    quiet: bool = False


class StartResult(Protocol):
    """What a start says about what it did."""

    def to_dict(self) -> dict[str, Any]:
        """For the section `tuning.init` of the report, JSON-ready.

        Returns:
            `dict`: `method`, the start's name; `steps`, a list with one object of the fields of [`ClosedFormStep`] for
            each thing done, of which all but `layer` may be `None`; `seconds`, wall-clock. `kept`, `loss_before` and
            `loss_after` are added to it.
        """
        ...


class Start(Protocol):
    """A start; its class is what stands in the registry `STARTS`, and is made without arguments.

    `tests/tuning/test_start_contract.py` holds one to what is said here.
    """

    def targets(self, kept: Sequence[int], layers: Sequence[int], depth: int) -> dict[int, int]:
        """Which of the dense model's hidden states some layers should put out; they are kept for [`~Start.apply`].

        Args:
            kept (`Sequence[int]`): The dense model's index of each layer of the cut model.
            layers (`Sequence[int]`): The layers that will be trained, in the cut model's numbering.
            depth (`int`): Layers of the dense model.

        Returns:
            `dict[int, int]`: For layers of the cut model, the dense layer that the state enters, `depth` for what leaves
            the last one; empty if nothing is compared.
        """
        ...

    def held_bytes(self, layers: Sequence[nn.Module], width: int) -> int:
        """Estimate of what [`~Start.apply`] holds at once, beside the hidden states.

        Args:
            layers (`Sequence[nn.Module]`): The layers that will be trained; may be on the meta device.
            width (`int`): Of the hidden states.
        """
        ...

    def apply(self, problem: StartProblem) -> StartResult | None:
        """Change the weights of `problem.layers` in place, and nothing else.

        Returns:
            [`StartResult`] or `None`: `None` if there was nothing to do; no weight has changed then.
        """
        ...


class AsCut:
    """`none`: the layers as they were cut."""

    def targets(self, kept: Sequence[int], layers: Sequence[int], depth: int) -> dict[int, int]:
        return {}

    def held_bytes(self, layers: Sequence[nn.Module], width: int) -> int:
        return 0

    def apply(self, problem: StartProblem) -> None:
        return None


class _ClosedForm:
    """The output projections solved for, so that hidden states behind the layers match the dense model's."""

    method: str

    def targets(self, kept: Sequence[int], layers: Sequence[int], depth: int) -> dict[int, int]:
        return {i: target_state(kept, i, depth) for i in layers}

    def apply(self, problem: StartProblem) -> ClosedFormResult:
        train, validation = problem.train, problem.validation
        assert problem.kept is not None
        return solve_endpoints(
            problem.model,
            problem.layers,
            problem.kept,
            train.outputs,
            validation.outputs,
            (train.inputs, validation.inputs),
            method=self.method,
            batch_size=problem.batch_size,
            store=problem.store,
            quiet=problem.quiet,
        )


class Fold(_ClosedForm):
    """`fold`: a linear map of the hidden states, folded into each projection."""

    method = "fold"

    def held_bytes(self, layers: Sequence[nn.Module], width: int) -> int:
        return solution_bytes(width)


class LeastSquares(_ClosedForm):
    """`least_squares`: all of each projection refitted."""

    method = "least_squares"

    def held_bytes(self, layers: Sequence[nn.Module], width: int) -> int:
        """For the widest linear module that might be a projection; one that turns out to be none takes nothing."""
        modules = (module for layer in layers for module in layer.modules())
        linears = [m for m in modules if isinstance(m, nn.Linear) and m.out_features == width]
        return solution_bytes(max((m.in_features for m in linears), default=0))
