"""The ways to heal a cut that `compare.py` compares: ours, its parts, and the published rivals.

All gradient steps are `optimum_clp`'s own: same optimizer, schedule, rows, and rule for what is kept. LoRA is peft's,
on the same loop. What is not ours was written anew from its description.
"""

import copy
import dataclasses
import functools
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_clp import LayerSegment, TuningConfig
from optimum_clp.architecture.lookup import decoder_layers, text_config
from optimum_clp.closed_form.solver import solve_endpoints
from optimum_clp.errors import TuningError
from optimum_clp.forward.dense_outputs import DenseOutputs
from optimum_clp.forward.hooks import layer_hidden
from optimum_clp.segments import endpoint_layers, kept_layers, target_state
from optimum_clp.surgery.cut import cut_model, own_storage
from optimum_clp.tuning.accelerator import tuning_accelerator
from optimum_clp.tuning.endpoints import tune_layers
from optimum_clp.tuning.loop import TrainingLoop
from optimum_clp.tuning.rows import TuningRows
from optimum_clp.tuning.schedule import stages_of
from optimum_clp.tuning.student import EndpointStudent

# the package's own when the tables were made
DEFAULTS = TuningConfig(init="least_squares", hidden_epochs=0, epochs=4)


@dataclass(frozen=True)
class Cell:
    """A cut, and the rows to heal it on."""

    dense: PreTrainedModel
    segment: LayerSegment
    train: Tensor
    validation: Tensor
    seed: int

    @property
    def depth(self) -> int:
        return self.dense.config.num_hidden_layers

    @property
    def kept(self) -> list[int]:
        return kept_layers([self.segment], self.depth)

    @property
    def endpoints(self) -> list[int]:
        """In the cut model's numbering, as all lists of layers here."""
        return endpoint_layers([self.segment], self.depth)

    @property
    def before(self) -> list[int]:
        """The layer before the cut."""
        return [i for i in self.endpoints if self.kept[i] < self.segment.start]

    @property
    def last_three(self) -> list[int]:
        return list(range(len(self.kept)))[-3:]

    @property
    def all_layers(self) -> list[int]:
        return list(range(len(self.kept)))

    def cut(self) -> PreTrainedModel:
        return cut_model(self.dense, [self.segment])

    def num_endpoint_parameters(self) -> int:
        layers = decoder_layers(self.dense)
        return sum(p.numel() for i in self.endpoints for p in layers[self.kept[i]].parameters())


@dataclass
class Healed:
    """A healed model and what it took.

    Args:
        model (`PreTrainedModel`): To be measured.
        num_trained (`int`): Parameters that gradient steps changed.
        num_added (`int`): Parameters that the plain cut model has no place for.
        steps (`int`): Optimizer steps taken.
        best_step (`int`): Step of the weights that were kept; 0 for those before the first.
        num_tokens (`int`): Tokens that the method looked at, repeats counted.
        validation_loss (`float` or `None`): The method's own loss, of the weights that were kept.
        stopped (`str` or `None`): Why the gradient steps ended.
        details (`dict`): What else is worth keeping.
    """

    model: PreTrainedModel
    num_trained: int = 0
    num_added: int = 0
    steps: int = 0
    best_step: int = 0
    num_tokens: int = 0
    validation_loss: float | None = None
    stopped: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A way to heal.

    Args:
        heal (`Callable`): Takes a cell, and for gradient steps the recipe.
        kind (`str`): `"rival"`; `"own"` (ours and its parts); `"ceiling"`, `"control"`.
        loss (`str` or `None`): Of the gradient steps; `None` if there are none.
        plain (`bool`): Whether a plain checkpoint holds the result.
        needs_before (`bool`): Whether it needs a layer before the cut.
    """

    heal: Callable[..., Healed]
    kind: str
    loss: str | None = None
    plain: bool = True
    needs_before: bool = False


def configurations() -> list[TuningConfig]:
    """What the methods make of the package's defaults; `compare.py` and `cost.py` bring their own."""
    return [
        *(variant(DEFAULTS, init=init) for init in ("none", DEFAULTS.init)),
        variant(DEFAULTS, norm=True, head=True),
    ]


def variant(config: TuningConfig, init: str = "none", norm: bool = False, head: bool = False) -> TuningConfig:
    """A recipe that starts from `init` and trains what stands behind the layers too."""
    return dataclasses.replace(config, init=init, train_final_norm=norm, train_head=head)


def untouched(cell: Cell) -> Healed:
    return Healed(cell.cut())


def solved(cell: Cell, *, layers: str, method: str, attention: bool) -> Healed:
    """Output projections in closed form."""
    model, indices, kept = cell.cut(), getattr(cell, layers), cell.kept
    for index in indices:
        own_storage(decoder_layers(model)[index])
    wanted = sorted({indices[0], *(target_state(kept, i, cell.depth) for i in indices)})
    train, validation = (
        DenseOutputs(cell.dense, rows, inputs_of=wanted, quiet=True) for rows in (cell.train, cell.validation)
    )
    inputs = (train.hidden[indices[0]], validation.hidden[indices[0]])
    result = solve_endpoints(
        model, indices, kept, train, validation, inputs, method=method, attention=attention, quiet=True
    )
    details = {"solved": list(result.solved), "errors": [[s.error_before, s.error_after] for s in result.steps]}
    return Healed(model, num_tokens=cell.train.numel(), details=details)


class Patch(nn.Module):
    """A matrix between two layers: hidden states `h` become `h @ matrix`."""

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.register_buffer("matrix", matrix)

    def hook(self, module: nn.Module, args: tuple, output: Any) -> Any:
        hidden = layer_hidden(output) @ self.matrix
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


def patched(cell: Cell, matrix_of: Callable[[Tensor, Tensor], Tensor]) -> Healed:
    """The cut with a matrix in place of the segment, made from the dense model's states on both sides of it."""
    model, ends = cell.cut(), (cell.segment.start, cell.segment.stop)
    outputs = DenseOutputs(cell.dense, cell.train, inputs_of=ends, quiet=True)
    matrix = matrix_of(*(outputs.hidden[i].double() for i in ends)).to(model.dtype)
    decoder_layers(model)[cell.segment.start - 1].register_forward_hook(Patch(matrix).hook)
    return Healed(model, num_added=matrix.numel(), num_tokens=cell.train.numel())


def linear_patch(before: Tensor, after: Tensor) -> Tensor:
    """LinearPatch (arXiv 2505.24680): in Hadamard's basis, each channel is scaled by the ratio of its mean sizes.

    As in the authors' code the ratio is taken row by row, and averaged.
    """
    rotation = hadamard(before.shape[-1])
    sizes = [(states @ rotation).abs().mean(1) for states in (before, after)]
    return (rotation * (sizes[1] / sizes[0]).mean(0)) @ rotation.T


def ghosted(before: Tensor, after: Tensor) -> Tensor:
    """Ghosted Layers (arXiv 2605.15491): `I + M`, M by least squares; the ridge of 1e-6 is the authors'."""
    x, missing = before.flatten(0, 1), (after - before).flatten(0, 1)
    identity = torch.eye(x.shape[1], dtype=x.dtype)
    return identity + torch.linalg.solve(x.T @ x + 1e-6 * identity, x.T @ missing)


# by Paley's two constructions, from primes that are 3 and 1 modulo 4; with them widths such as 576, 896 and 960
HADAMARD_ORDERS = {1: None, 12: 11, 20: 19, 28: 13, 36: 17, 60: 59}


def hadamard(width: int) -> Tensor:
    """An orthogonal float64 matrix whose entries have one size: Paley's (or 1), doubled as by Sylvester."""
    order = next(n for n in HADAMARD_ORDERS if width % n == 0 and (width // n).bit_count() == 1)
    prime, matrix = HADAMARD_ORDERS[order], torch.ones(1, 1, dtype=torch.float64)
    if prime is not None:
        matrix = _paley(prime) if prime % 4 == 3 else _paley_second(prime)
    while len(matrix) < width:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / math.sqrt(width)


def _paley(prime: int) -> Tensor:
    """Paley's Hadamard matrix of order `prime + 1`, for a prime that is 3 modulo 4."""
    matrix = torch.eye(prime + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1, -1
    matrix[1:, 1:] += _residues(prime)
    return matrix


def _paley_second(prime: int) -> Tensor:
    """Paley's other one, of order `2 (prime + 1)`, for a prime that is 1 modulo 4."""
    conference = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    conference[0, 0], conference[1:, 1:] = 0, _residues(prime)
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, signs) + torch.kron(torch.eye(prime + 1, dtype=torch.float64), diagonal)


def _residues(prime: int) -> Tensor:
    """1 where the difference of row and column is a square modulo the prime, -1 where it is none, 0 on the diagonal."""
    squares = {i * i % prime for i in range(1, prime)}
    signs = [[0 if i == j else 1 if (i - j) % prime in squares else -1 for j in range(prime)] for i in range(prime)]
    return torch.tensor(signs, dtype=torch.float64)


def tuned(cell: Cell, config: TuningConfig, *, layers: str, init: str = "none", closing: bool = False) -> Healed:
    """Some layers in full, by the package's own tuning; `closing`: the final norm too, and a head that is not tied."""
    model = cell.cut()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    config = variant(config, init=init, norm=closing, head=closing and not tied)
    return _tune(model, cell, getattr(cell, layers), config)


def tuned_from_start(cell: Cell, config: TuningConfig, *, layers: str) -> Healed:
    """Some layers in full, after the closed form of the endpoints."""
    start = solved(cell, layers="endpoints", method="least_squares", attention=True)
    healed = _tune(start.model, cell, getattr(cell, layers), variant(config))
    healed.details |= start.details
    return healed


def as_by_default(cell: Cell) -> Healed:
    """Ours with nothing chosen: the package's own learning rate and number of epochs."""
    return tuned(cell, DEFAULTS, layers="endpoints", init=DEFAULTS.init)


def tuned_dense(cell: Cell, config: TuningConfig) -> Healed:
    """The dense model itself, where the endpoints are: what it gains is adaptation to the text, not recovery."""
    layers = [cell.kept[i] for i in cell.endpoints]
    return _tune(copy.deepcopy(cell.dense), cell, layers, variant(config))


def _tune(model: PreTrainedModel, cell: Cell, layers: Sequence[int], config: TuningConfig) -> Healed:
    try:
        result = tune_layers(
            model, cell.dense, layers, cell.train, cell.validation, config, kept=cell.kept, seed=cell.seed, quiet=True
        )
    except TuningError as error:
        # a rate that diverges counts with the best weights before that
        if error.result is None:
            raise
        result = error.result
    details: dict[str, Any] = {"cache_seconds": result.cache_seconds}
    if result.init is not None:
        details["init"] = {key: result.init[key] for key in ("kept", "loss_before", "loss_after", "seconds")}
    return Healed(
        model,
        num_trained=result.num_trainable,
        steps=result.steps,
        best_step=result.best_step,
        num_tokens=result.num_tokens,
        validation_loss=result.best_validation_loss,
        stopped=result.stopped,
        details=details,
    )


def lora(cell: Cell, config: TuningConfig, *, rank: int | None) -> Healed:
    """LoRA on all linear modules of all layers, merged at the end; without a rank, as large as the endpoints."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    model = cell.cut()
    # merging writes into the weights
    own_storage(decoder_layers(model))
    if rank is None:
        linear = [m for layer in decoder_layers(model) for m in layer.modules() if isinstance(m, nn.Linear)]
        rank = max(1, round(cell.num_endpoint_parameters() / sum(m.in_features + m.out_features for m in linear)))
    with torch.random.fork_rng():
        torch.manual_seed(cell.seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"), model)
    adapters = [module for module in model.modules() if isinstance(module, LoraLayer)]
    trained = nn.ModuleList(part["default"] for layer in adapters for part in (layer.lora_A, layer.lora_B))
    with (
        tempfile.TemporaryDirectory() as folder,
        tuning_accelerator(config, model.device, trained) as accelerator,
    ):
        begin = time.perf_counter()
        # every layer runs in every step, so nothing but the tokens enters
        train, validation = (
            TuningRows(DenseOutputs(cell.dense, rows, batch_size=config.batch_size, quiet=True), rows)
            for rows in (cell.train, cell.validation)
        )
        cache_seconds = time.perf_counter() - begin
        student = EndpointStudent(model, trained, 0, config.loss_weights())
        loop = TrainingLoop(
            accelerator,
            student,
            train,
            validation,
            config,
            stages=stages_of(config, text_config(model.config).hidden_size, len(train)),
            seed=cell.seed,
            folder=Path(folder),
            checkpoints=False,
            quiet=True,
        )
        state = loop.run()
        best = loop.best_weights()
        assert best is not None
        student.load_state_dict(best)
    for layer in adapters:
        layer.merge()
    return Healed(
        model,
        num_trained=sum(p.numel() for p in trained.parameters()),
        steps=state.step,
        best_step=state.best_step,
        num_tokens=loop.num_tokens,
        validation_loss=min(step.validation_loss for step in state.history),
        stopped=state.stopped,
        details={"rank": rank, "cache_seconds": cache_seconds},
    )


BEFORE = {"layers": "before", "attention": False}
METHODS = {
    "cut": Method(untouched, "rival"),
    # before the others, which are measured against it
    "dense_ce": Method(tuned_dense, "control", "ce"),
    "linear_patch": Method(
        functools.partial(patched, matrix_of=linear_patch), "rival", plain=False, needs_before=True
    ),
    "ghosted": Method(functools.partial(patched, matrix_of=ghosted), "rival", plain=False, needs_before=True),
    "replaceme": Method(functools.partial(solved, method="fold", **BEFORE), "rival", needs_before=True),
    "refit_before": Method(functools.partial(solved, method="least_squares", **BEFORE), "own", needs_before=True),
    "least_squares": Method(
        functools.partial(solved, layers="endpoints", method="least_squares", attention=True), "own"
    ),
    "clp": Method(functools.partial(tuned, layers="endpoints", init="least_squares"), "own", "kd"),
    "clp_default_rate": Method(as_by_default, "own"),
    "endpoints_kd": Method(functools.partial(tuned, layers="endpoints"), "own", "kd"),
    "endpoints_ce": Method(functools.partial(tuned, layers="endpoints"), "rival", "ce"),
    "last3": Method(functools.partial(tuned, layers="last_three", closing=True), "rival", "ce"),
    "last3_kd": Method(functools.partial(tuned, layers="last_three", closing=True), "rival", "kd"),
    "lora_r8": Method(functools.partial(lora, rank=8), "rival", "kd"),
    "lora_equal": Method(functools.partial(lora, rank=None), "rival", "kd"),
    "all_layers_kd": Method(functools.partial(tuned, layers="all_layers"), "ceiling", "kd"),
    "all_layers_start": Method(functools.partial(tuned_from_start, layers="all_layers"), "ceiling", "kd"),
    "all_layers_ce": Method(functools.partial(tuned, layers="all_layers"), "ceiling", "ce"),
}
