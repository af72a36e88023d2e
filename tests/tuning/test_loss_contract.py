"""What every loss of the registry has to do: the built-in ones, and those of other packages that are installed.

A new built-in loss gets a row in `PLAIN`: its formula, written plainly.
"""

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import random_tokens, tiny_model
from torch.nn import functional as F

from optimum_clp.configuration.stages import TuningConfig
from optimum_clp.doors import LOSSES
from optimum_clp.errors import ConfigurationError
from optimum_clp.forward.dense_outputs import DenseOutputs
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model
from optimum_clp.tuning.endpoints import tune_layers
from optimum_clp.tuning.losses import NEEDS, LossBatch, needs_of, weighted_losses
from optimum_clp.tuning.student import EndpointStudent

ROWS, LENGTH, VOCABULARY, WIDTH = 5, 7, 11, 6
COMPARED = (1, 3)


def plain_kd(batch):
    teacher, student = (logits.double().log_softmax(-1) for logits in (batch.teacher_logits, batch.logits))
    return (teacher.exp() * (teacher - student)).sum(-1).mean(-1)


def plain_jsd(batch):
    # a vocabulary of less than 100 tokens: there is no rest
    p, q = (logits.double().softmax(-1) for logits in (batch.teacher_logits, batch.logits))
    m = (p + q) / 2
    return ((p * (p / m).log() + q * (q / m).log()) / 2).sum(-1).mean(-1)


def plain_ce(batch):
    losses = [F.cross_entropy(row[:-1].double(), ids[1:]) for row, ids in zip(batch.logits, batch.tokens, strict=True)]
    return torch.stack(losses)


def plain_hidden(batch):
    errors = []
    for i in COMPARED:
        error, target = (batch.states[i] - batch.targets[i]).double(), batch.targets[i].double()
        errors.append((error.norm(dim=-1) / target.norm(dim=-1)).square().mean(1))
    return sum(errors) / len(errors)


# the formula, and whether it is 0 where the cut model is the dense one
PLAIN = {"kd": (plain_kd, True), "jsd": (plain_jsd, True), "ce": (plain_ce, False), "hidden": (plain_hidden, True)}


def made(*shape, seed, dtype=torch.float32):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.requires_grad_()


def batch_of(dtype=torch.float32, same=False):
    """A batch with everything in it, all of which takes gradients; `same`: the cut model is the dense one."""
    logits = [made(ROWS, LENGTH, VOCABULARY, seed=0 if same else seed, dtype=dtype) for seed in (0, 1)]
    states, targets = (
        {i: made(ROWS, LENGTH, WIDTH, seed=i if same else i + shift, dtype=dtype) for i in COMPARED}
        for shift in (0, 9)
    )
    tokens = random_tokens(ROWS, LENGTH) % VOCABULARY
    return LossBatch(tokens, *logits, states, targets)


def rows_of(batch, rows):
    def some(states):
        return {i: state[rows] for i, state in states.items()}

    return LossBatch(
        batch.tokens[rows],
        batch.logits[rows],
        batch.teacher_logits[rows],
        some(batch.states),
        some(batch.targets),
    )


def loss_of(name, batch):
    """The loss of each row, from what the loss says that it needs."""
    loss = LOSSES.get(name)()
    found = loss(batch.only(loss.needs))
    assert found.shape in {(len(batch.tokens),), (len(found), len(batch.tokens))}
    return found.reshape(-1, len(batch.tokens)).sum(0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_has_a_finite_float32_loss(name, dtype):
    found = loss_of(name, batch_of(dtype))
    assert found.dtype == torch.float32 and found.shape == (ROWS,) and found.isfinite().all()
    assert torch.equal(found, loss_of(name, batch_of(dtype)))
    if name in PLAIN:
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(found.double(), PLAIN[name][0](batch_of(dtype)), rtol=tolerance, atol=1e-6)


def test_hidden_states_are_compared_as_they_are_and_as_they_are_read():
    weight = torch.linspace(0.1, 3, WIDTH)

    def read(states):
        return weight * states / states.norm(dim=-1, keepdim=True)

    batch = batch_of()
    # of the first layer alone: nothing reads the other's states through a norm
    behind = {
        "states": {**batch.states, 1: read(batch.states[1])},
        "targets": {**batch.targets, 1: read(batch.targets[1])},
    }
    expected = (plain_hidden(batch) + plain_hidden(replace(batch, **behind))) / 2
    torch.testing.assert_close(loss_of("hidden", replace(batch, norms={1: read})).double(), expected)
    assert not torch.allclose(expected, plain_hidden(batch))


@pytest.mark.parametrize("name", LOSSES)
def test_a_rows_loss_does_not_depend_on_the_other_rows(name):
    batch = batch_of()
    whole = loss_of(name, batch)
    for row in range(ROWS):
        torch.testing.assert_close(loss_of(name, rows_of(batch, [row])), whole[[row]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss_of(name, rows_of(batch, [3, 0])), whole[[3, 0]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_reach_the_cut_model_and_nothing_else(name):
    batch, needs = batch_of(), LOSSES.get(name).needs
    loss_of(name, batch)[1].backward()
    for given, values in (("logits", [batch.logits]), ("states", batch.states.values())):
        for value in values if given in needs else ():
            assert value.grad[1].abs().sum() > 0 and not value.grad[[0, 2, 3, 4]].any()
    assert batch.teacher_logits.grad is None and all(target.grad is None for target in batch.targets.values())


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_needs_what_it_says_and_is_given_nothing_else(name):
    loss = LOSSES.get(name)()
    assert loss.needs and loss.needs <= set(NEEDS)
    batch = batch_of().only(loss.needs)
    given = {"logits": batch.logits, "teacher_logits": batch.teacher_logits, "states": batch.states}
    assert {need for need, value in given.items() if value is not None} == loss.needs
    assert (batch.states is None) == (batch.targets is None)
    for need in loss.needs:
        with pytest.raises(Exception):  # noqa: B017 - whatever a loss says when it is not given what it needs
            loss(batch.only(loss.needs - {need}))


@pytest.mark.parametrize("name", [name for name, (_, zero) in PLAIN.items() if zero])
def test_what_compares_with_the_dense_model_is_0_where_nothing_differs(name):
    assert loss_of(name, batch_of(same=True)).tolist() == pytest.approx([0] * ROWS, abs=1e-6)
    assert (loss_of(name, batch_of()) > 0.1).all()


def plain_masked(name, batch):
    """Row by row over the positions whose next token is in the mask."""
    found = []
    for row in range(ROWS):
        places = [t for t in range(LENGTH - 1) if batch.mask[row, t + 1]]
        logits, teacher = (x[row].double().log_softmax(-1) for x in (batch.logits, batch.teacher_logits))
        of = {
            "kd": lambda t, s=logits, d=teacher: (d[t].exp() * (d[t] - s[t])).sum(),
            "jsd": lambda t, s=logits, d=teacher: (
                sum((part[t].exp() * (part[t] - ((s[t].exp() + d[t].exp()) / 2).log())).sum() for part in (s, d)) / 2
            ),
            "ce": lambda t, s=logits, r=row: -s[t, batch.tokens[r, t + 1]],
            "hidden": lambda t, r=row: (
                sum(
                    (batch.states[i][r, t] - batch.targets[i][r, t]).double().square().sum()
                    / batch.targets[i][r, t].double().square().sum()
                    for i in COMPARED
                )
                / len(COMPARED)
            ),
        }[name]
        found.append(sum((of(t) for t in places), torch.zeros((), dtype=torch.float64)) / max(len(places), 1))
    return torch.stack(found)


@pytest.mark.parametrize("name", PLAIN)
def test_a_mask_leaves_the_positions_before_its_tokens(name):
    mask = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(4)) < 0.4
    mask[2] = False
    mask[3] = True
    batch = replace(batch_of(), mask=mask)
    found = loss_of(name, batch)
    torch.testing.assert_close(found.double(), plain_masked(name, batch), rtol=1e-5, atol=1e-6)
    assert found[2] == 0
    found.sum().backward()
    for value in [batch.logits] if name != "hidden" else batch.states.values():
        # the last position predicts no token of the row
        assert not value.grad[2].any() and not value.grad[:, -1].any()
    # all tokens but the first are what cross-entropy counts anyway
    if name == "ce":
        torch.testing.assert_close(found[3], loss_of("ce", replace(batch, mask=None))[3])


def test_every_loss_of_this_package_has_a_row_here():
    assert set(PLAIN) == {name for name in LOSSES if LOSSES.row(name).package is None}


@pytest.fixture(scope="module")
def case():
    """A cut model, rows, what the dense model says of them, and the cut model's own pass over them."""
    dense = tiny_model()
    cut, tokens = cut_model(dense, [LayerSegment(2, 4)]), random_tokens(4, 12)
    outputs = DenseOutputs(dense, tokens, inputs_of=[1, 4, 5], quiet=True)
    own = DenseOutputs(cut, tokens, inputs_of=[2, 3], quiet=True)
    with torch.no_grad():
        logits = cut(tokens).logits
    states, targets = {1: own.hidden[2], 2: own.hidden[3]}, {1: outputs.hidden[4], 2: outputs.hidden[5]}
    whole = LossBatch(tokens, logits, outputs.logits(slice(None)), states, targets)
    return cut, outputs.hidden[1], whole


def student_loss(case, weights):
    cut, hidden, whole = case
    student = EndpointStudent(cut, [cut.model.layers[i] for i in (1, 2)], 1, weights, whole.targets)
    with torch.no_grad():
        return student(whole.tokens, hidden, whole.teacher_logits, whole.targets)


@pytest.mark.parametrize("name", LOSSES)
def test_the_student_gives_what_a_whole_pass_gives(name, case):
    expected = 0.3 * loss_of(name, case[2])
    torch.testing.assert_close(student_loss(case, {name: 0.3}), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in LOSSES if "states" not in LOSSES.get(name).needs])
@pytest.mark.parametrize("masked", [False, True])
def test_a_window_is_as_if_rows_had_no_other_positions(name, masked, case):
    cut, hidden, whole = case
    window, mask = slice(3, 9), torch.rand(whole.tokens.shape) > 0.3 if masked else None
    part = LossBatch(
        whole.tokens[:, window],
        whole.logits[:, window],
        whole.teacher_logits[:, window],
        mask=None if mask is None else mask[:, window],
    )
    student = EndpointStudent(cut, [cut.model.layers[i] for i in (1, 2)], 1, {name: 1.0}, whole.targets)
    with torch.no_grad():
        found = student(whole.tokens, hidden, whole.teacher_logits[:, window], whole.targets, mask=mask, window=window)
    torch.testing.assert_close(found, loss_of(name, part), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_no_more_of_the_model_is_run_than_is_needed(name, case, monkeypatch):
    cut, needs, run = case[0], LOSSES.get(name).needs, []
    for part, module in (("last layer", cut.model.layers[3].mlp), ("head", cut.lm_head)):
        forward = module.forward
        monkeypatch.setattr(module, "forward", lambda x, part=part, forward=forward: (run.append(part), forward(x))[1])
    student = EndpointStudent(cut, [cut.model.layers[1]], 1, {"kd": 0.0, name: 1.0}, case[2].targets)
    run.clear()
    with torch.no_grad():
        student(case[2].tokens, case[1], case[2].teacher_logits, case[2].targets)
    assert run == (["last layer", "head"] if "logits" in needs else [])
    assert needs_of({"kd": 0.0, name: 1.0}) == needs


@pytest.mark.parametrize("order", [("kd", "ce", "hidden"), ("hidden", "ce", "kd")])
def test_losses_are_added_up_in_one_order_bit_for_bit(order, case):
    """Each part on its own: the sum of weights times parts, rounded after every one, whatever order they are given in."""
    weights = {"kd": 0.7, "ce": 0.1, "hidden": 0.2}
    whole = case[2]
    total = torch.zeros(len(whole.tokens))
    for name, weight in weights.items():
        for part in LOSSES.get(name)()(rerun(case)).reshape(-1, len(total)):
            total = total + weight * part
    assert torch.equal(student_loss(case, {name: weights[name] for name in order}), total)


def rerun(case):
    """The batch as the student sees it: resumed at the first trained layer, to the last bit."""
    cut, hidden, whole = case
    student = EndpointStudent(cut, [], 1, {"kd": 1.0, "hidden": 1.0}, whole.targets)
    seen = []
    student.losses = ((1.0, Recording(seen)),)
    with torch.no_grad():
        student(whole.tokens, hidden, whole.teacher_logits, whole.targets)
    return seen[0]


class Recording:
    needs = frozenset(NEEDS)

    def __init__(self, seen):
        self.seen = seen

    def __call__(self, batch):
        self.seen.append(batch)
        return torch.zeros(len(batch.tokens))


class ReverseDistillation:
    """A loss of another package: `KL(cut || dense)`."""

    needs = frozenset({"logits", "teacher_logits"})

    def __call__(self, batch):
        assert batch.states is batch.targets is None
        student, teacher = (logits.float().log_softmax(-1) for logits in (batch.logits, batch.teacher_logits))
        return (student.exp() * (student - teacher)).sum(-1).mean(-1)


@pytest.fixture
def registered(monkeypatch):
    """Lets a test register losses."""
    monkeypatch.setattr(LOSSES, "_rows", dict(LOSSES._rows))
    return LOSSES.register


def test_a_loss_that_is_registered_can_be_tuned_with(registered):
    registered("of_others", ReverseDistillation)
    dense = tiny_model()
    cut, rows = cut_model(dense, [LayerSegment(2, 4)]), random_tokens(4, 20, seed=2)

    def divergence():
        with torch.no_grad():
            ours, theirs = (model(rows).logits.log_softmax(-1) for model in (cut, dense))
        return F.kl_div(theirs, ours, log_target=True, reduction="sum").item() / rows.numel()

    before = divergence()
    config = TuningConfig(
        init="none", hidden_epochs=0, loss={"of_others": 1.0}, epochs=3, batch_size=4, learning_rate=3e-3
    )
    result = tune_layers(cut, dense, (1, 2), random_tokens(16, 20, seed=1), rows, config, quiet=True)
    assert result.loss == {"of_others": 1.0} and result.improved
    assert result.initial_validation_loss == pytest.approx(before, rel=1e-3)
    assert result.best_validation_loss == pytest.approx(divergence(), rel=1e-3) and divergence() < before


def test_losses_that_cannot_be_used_are_refused(registered):
    with pytest.raises(ConfigurationError, match="loss is 'mse': it must be one of 'kd', 'jsd', 'ce', 'hidden'"):
        weighted_losses({"kd": 1.0, "mse": 0.5})
    registered("greedy", type("Greedy", (), {"needs": frozenset({"gradients"})}))
    with pytest.raises(ConfigurationError) as error:
        weighted_losses({"greedy": 1.0})
    assert str(error.value) == (
        "greedy.needs is ['gradients']: a loss may need logits, teacher_logits, states. Ask for these only."
    )


def test_a_loss_without_a_weight_is_not_made(registered):
    registered("broken", type("Broken", (), {"__init__": lambda self: math.sqrt(-1)}))
    assert list(weighted_losses({"broken": 0.0, "ce": 2.0})) == ["ce"]
