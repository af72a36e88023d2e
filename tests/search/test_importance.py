"""The layer-selection rules of the field, each against the formula of its paper, computed plainly."""

import dataclasses
import math
import weakref

import pytest
import torch
from tiny_models import MODEL_TYPES, make_identity, random_tokens, tiny_model
from torch.nn import functional as F
from zoo import ZOO, zoo_model

from optimum_clp.architecture.lookup import allowed_segments
from optimum_clp.configuration.stages import SearchConfig
from optimum_clp.errors import ModelError
from optimum_clp.evaluation.tokens import evaluate_tokens
from optimum_clp.resume import Journal
from optimum_clp.search import hidden_changes as hidden_changes_module
from optimum_clp.search import importance, weight_gradients
from optimum_clp.search.hidden_changes import hidden_changes
from optimum_clp.search.importance import (
    angular,
    block_influence,
    cosine_block,
    perplexity_greedy,
    random,
    tail,
    taylor,
)
from optimum_clp.search.objective import Objective
from optimum_clp.search.problem import Rows, SearchProblem, cut_of
from optimum_clp.search.scoreboard import Scoreboard
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model

DATA_DRIVEN = (block_influence, angular, cosine_block, taylor, perplexity_greedy)
RANKING = (block_influence, taylor)
ALL = (*DATA_DRIVEN, tail, random)


def member(name):
    found = [tiny for tiny in ZOO if tiny.name == name]
    return found[0] if found else pytest.skip("not in this transformers")


def problem_of(model, tokens, num_removed, *, mask=None, seed=0, batch_size=4, journal=None, kind=SearchProblem):
    objective = Objective(model, tokens, attention_mask=mask, batch_size=batch_size, journal=journal, quiet=True)
    allowed = tuple(allowed_segments(model.config, num_removed))
    rows = Rows(len(tokens), seed)
    return kind(objective, Scoreboard(objective), SearchConfig(), num_removed, 1, allowed, rows, seed)


class OnlyTwoSegments(SearchProblem):
    """Layers 1 and 2, or layers 4 and 5, can go, and nothing else."""

    def can_go(self, layers):
        return sorted(layers) in ([1, 2], [4, 5])


def only_two_segments(model, tokens):
    problem = problem_of(model, tokens, 2, kind=OnlyTwoSegments)
    return dataclasses.replace(problem, allowed=(LayerSegment(1, 3), LayerSegment(4, 6)))


def padded(rows, side):
    """Rows of several lengths as one batch, with other tokens where there is padding."""
    length = max(map(len, rows))
    tokens, mask = random_tokens(len(rows), length, seed=99), torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        tokens[index, where], mask[index, where] = row, 1
    return tokens, mask


def some_rows():
    return [row[:length] for row, length in zip(random_tokens(5, 24), (24, 9, 17, 5, 20), strict=True)]


def said_by(model, rows=8, length=24):
    """Tokens drawn from the model itself, so that no other model predicts them better."""
    generator = torch.Generator().manual_seed(0)
    tokens = random_tokens(rows, 1)
    with torch.no_grad():
        while tokens.shape[1] < length:
            chances = model(tokens).logits[:, -1].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return tokens


def states_of(model, row):
    """Hidden states that enter each layer, and those that leave the last one: `[layers + 1, length, hidden]`."""
    last = []
    # the model's own last hidden states are those after the norm
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    with torch.no_grad():
        states = model(row[None], output_hidden_states=True).hidden_states
    handle.remove()
    return torch.cat([*states[:-1], last[0]]).double()


def cosines(model, rows, length):
    """Of each run of `length` layers: float64 `[starts, tokens of all rows]`."""
    parts = []
    for row in rows:
        states = states_of(model, row)
        parts.append(F.cosine_similarity(states[:-length], states[length:], dim=-1))
    return torch.cat(parts, dim=-1)


def taylor_scores(model, rows):
    scores = torch.zeros(len(model.model.layers), dtype=torch.float64)
    for row in rows:
        loss = F.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="sum")
        model.zero_grad()
        loss.backward()
        for index, layer in enumerate(model.model.layers):
            scores[index] += sum((p * p.grad).double().abs().sum() for p in layer.parameters()).detach()
    model.zero_grad()
    return scores / sum(len(row) - 1 for row in rows)


def lowest_segment(values):
    return min(range(len(values)), key=values.__getitem__)


def assert_near(found, truth, tolerance=1e-5):
    assert list(found) == pytest.approx(torch.as_tensor(truth).tolist(), rel=tolerance, abs=1e-9)


@pytest.mark.parametrize("strategy", DATA_DRIVEN, ids=lambda s: s.__name__)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("start", [1, 5])
def test_planted_identity_layers_are_found(strategy, model_type, start):
    model = make_identity(tiny_model(model_type, num_layers=8), [start, start + 1, start + 2])
    outcome = strategy(problem_of(model, said_by(model), 3))
    assert outcome.cut == (LayerSegment(start, start + 3),)


@pytest.mark.parametrize("strategy", [*RANKING, perplexity_greedy], ids=lambda s: s.__name__)
def test_planted_identity_layers_need_not_be_neighbours(strategy):
    model = make_identity(tiny_model(num_layers=8), [1, 4, 7])
    outcome = strategy(problem_of(model, said_by(model), 3))
    assert outcome.cut == (LayerSegment(1, 2), LayerSegment(4, 5), LayerSegment(7, 8))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_block_influence_is_one_minus_the_mean_cosine_of_every_layer_and_the_last(model_type):
    model, tokens = tiny_model(model_type), random_tokens(6, 20)
    outcome = block_influence(problem_of(model, tokens, 2))
    truth = 1 - cosines(model, tokens, 1).mean(1)
    assert_near(outcome.layer_scores, truth)
    assert len(outcome.layer_scores) == 6
    assert outcome.cut == cut_of(truth.argsort()[:2].tolist(), 6)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_angular_and_cosine_block_are_those_of_the_papers(length):
    model, tokens = tiny_model("qwen3"), random_tokens(6, 20)
    problem = problem_of(model, tokens, length)
    truth = cosines(model, tokens, length)
    changes = hidden_changes(problem.objective, length)
    assert_near(changes["angle"], (truth.arccos() / math.pi).mean(1))
    assert_near(changes["one_minus_cosine"], (1 - truth).mean(1))
    start = truth.arccos().mean(1).argmin().item()
    assert angular(problem).cut == (LayerSegment(start, start + length),)
    start = truth.mean(1).argmax().item()
    assert cosine_block(problem).cut == (LayerSegment(start, start + length),)


def test_angular_and_cosine_block_can_differ_and_look_only_where_it_is_allowed():
    model, tokens = tiny_model(num_layers=8), random_tokens(4, 16)
    problem = problem_of(model, tokens, 2)
    angles = cosines(model, tokens, 2).arccos().mean(1)
    best = problem.allowed[angles.argmin().item()]
    others = dataclasses.replace(problem, allowed=tuple(s for s in problem.allowed if s != best))
    for strategy in (angular, cosine_block):
        assert strategy(others).cut[0] in others.allowed
    assert angular(others).cut[0].start == angles.argsort()[1].item()


def test_cosines_of_a_half_precision_model_are_not_taken_in_half_precision():
    model, tokens = make_identity(tiny_model().bfloat16(), [2]), random_tokens(3, 16)
    scores = block_influence(problem_of(model, tokens, 1)).layer_scores
    assert scores[2] == 0
    assert_near(scores, 1 - cosines(model, tokens, 1).mean(1))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_enters_no_average(side):
    model, rows = tiny_model(), some_rows()
    tokens, mask = padded(rows, side)

    def problem(length):
        return problem_of(model, tokens, length, mask=mask, batch_size=3)

    assert_near(block_influence(problem(2)).layer_scores, 1 - cosines(model, rows, 1).mean(1), 1e-4)
    truth = cosines(model, rows, 2)
    changes = hidden_changes(problem(2).objective, 2)
    assert_near(changes["angle"], (truth.arccos() / math.pi).mean(1), 1e-4)
    assert_near(changes["one_minus_cosine"], (1 - truth).mean(1), 1e-4)
    assert_near(taylor(problem(2)).layer_scores, taylor_scores(model, rows), 1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_perplexity_greedy_weighs_rows_by_their_predicted_tokens(side):
    model, rows = tiny_model(), some_rows()
    tokens, mask = padded(rows, side)
    problem = problem_of(model, tokens, 1, mask=mask)
    cuts = [(segment,) for segment in problem.allowed]
    losses = []
    for cut in cuts:
        smaller = cut_model(model, cut)
        found = [evaluate_tokens(smaller, row[None], quiet=True) for row in rows]
        losses.append(sum(e.loss * e.num_tokens for e in found) / sum(e.num_tokens for e in found))
    assert importance._losses(problem.board, cuts) == pytest.approx(losses, rel=1e-5)
    assert perplexity_greedy(problem).cut == cuts[lowest_segment(losses)]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_taylor_is_the_sum_of_weight_times_gradient(model_type):
    model, tokens = tiny_model(model_type), random_tokens(5, 20)
    truth = taylor_scores(model, tokens)
    with torch.no_grad():
        outcome = taylor(problem_of(model, tokens, 2))
    assert_near(outcome.layer_scores, truth)
    assert outcome.cut == cut_of(truth.argsort()[:2].tolist(), 6)


def test_taylor_takes_large_weights_in_pieces(monkeypatch):
    model, tokens = tiny_model(), random_tokens(2, 12)
    monkeypatch.setattr(weight_gradients, "_PIECE", 100)
    assert_near(taylor(problem_of(model, tokens, 2)).layer_scores, taylor_scores(model, tokens))


def test_taylor_counts_shared_weights_for_every_layer_that_has_them():
    model, tokens = tiny_model(), random_tokens(2, 12)
    model.model.layers[3].mlp = model.model.layers[1].mlp
    scores = taylor(problem_of(model, tokens, 2)).layer_scores
    assert_near(scores, taylor_scores(model, tokens))


@pytest.mark.parametrize("fails", [False, True])
def test_taylor_puts_back_what_requires_gradients_and_the_gradients(fails, monkeypatch):
    model, tokens = tiny_model(), random_tokens(3, 12)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
        parameter.grad = torch.full_like(parameter, index) if index % 2 else None
    before = [(p.requires_grad, p.grad, p.clone()) for p in model.parameters()]
    problem = problem_of(model, tokens, 2)
    if fails:
        calls = []

        def loss(logits, ids):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("out of memory")
            return F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")[None]

        monkeypatch.setattr(weight_gradients, "next_token_cross_entropy", loss)
        with pytest.raises(RuntimeError, match="out of memory"):
            taylor(problem)
    else:
        taylor(problem)
    for index, (parameter, (required, gradient, value)) in enumerate(zip(model.parameters(), before, strict=True)):
        assert parameter.requires_grad == required and parameter.grad is gradient
        assert gradient is None or (gradient == index).all()
        assert torch.equal(parameter, value)
        assert not parameter._post_accumulate_grad_hooks


def test_taylor_keeps_one_gradient_at_a_time():
    model, tokens = tiny_model(), random_tokens(3, 12)
    present, handles = [], []

    def count(parameter):
        present.append(sum(p.grad is not None for p in model.parameters()))

    # the test's hooks were there first, so they see a gradient before it is dropped
    for parameter in model.parameters():
        handles.append(parameter.register_post_accumulate_grad_hook(count))
    taylor(problem_of(model, tokens, 2))
    assert len(present) == 3 * sum(1 for _ in model.model.layers.parameters())
    assert set(present) == {1}


def quantize(model):
    weight = model.model.layers[2].mlp.down_proj.weight
    model.model.layers[2].mlp.down_proj.weight = torch.nn.Parameter(
        weight.detach().to(torch.int8), requires_grad=False
    )


def say_quantized(model):
    model.is_quantized = True


def offload(model):
    model.model.layers[2].to("meta")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (quantize, "its weights are quantized, and integers have no gradients"),
        (say_quantized, "its weights are quantized"),
        (offload, r"some of its weights are not in memory \(offloaded\), and get no gradients there"),
    ],
)
def test_taylor_refuses_weights_that_have_no_gradients(spoil, message):
    model = tiny_model()
    problem = problem_of(model, random_tokens(2, 12), 2)
    spoil(model)
    with pytest.raises(ModelError, match=f"model is 'LlamaForCausalLM': {message}.*such as block_influence"):
        taylor(problem)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_perplexity_greedy_is_the_greedy_search_with_physically_cut_models(seed):
    model, tokens = tiny_model("qwen2", seed=seed), random_tokens(4, 20)
    problem = problem_of(model, tokens, 3)
    outcome = perplexity_greedy(problem)
    gone = []
    for _ in range(3):
        losses = {
            i: evaluate_tokens(cut_model(model, cut_of([*gone, i], 6)), tokens, quiet=True).loss
            for i in range(6)
            if i not in gone
        }
        gone.append(min(losses, key=losses.__getitem__))
    assert outcome.cut == cut_of(gone, 6)
    # the last round is on the board, the rounds before are not
    assert set(problem.board.loss) == {cut_of([*gone[:2], i], 6) for i in set(range(6)) - set(gone[:2])}
    assert problem.board.mean(outcome.cut, problem.board.loss) == pytest.approx(min(losses.values()), rel=1e-5)


def test_tail_is_the_last_layers():
    problem = problem_of(tiny_model(), random_tokens(2, 12), 2)
    assert tail(problem).cut == (LayerSegment(4, 6),)


def test_random_is_drawn_by_the_seed_and_favours_no_layer():
    problem = problem_of(tiny_model(num_layers=8), random_tokens(1, 4), 3)
    draws = [random(dataclasses.replace(problem, seed=seed)).cut for seed in range(300)]
    assert draws == [random(dataclasses.replace(problem, seed=seed)).cut for seed in range(300)]
    assert all(sum(map(len, cut)) == 3 for cut in draws)
    assert len(set(draws)) > 50  # of 56
    for layer in range(8):
        times = sum(any(s.start <= layer < s.stop for s in cut) for cut in draws)
        assert abs(times - 300 * 3 / 8) < 5 * (300 * 3 / 8 * 5 / 8) ** 0.5


@pytest.mark.parametrize("strategy", RANKING, ids=lambda s: s.__name__)
def test_a_ranking_falls_back_on_the_allowed_segment_of_the_smallest_sum(strategy):
    model = make_identity(tiny_model(num_layers=8), [0, 7])
    outcome = strategy(only_two_segments(model, random_tokens(3, 12)))
    sums = {s: sum(outcome.layer_scores[s.start : s.stop]) for s in (LayerSegment(1, 3), LayerSegment(4, 6))}
    assert outcome.cut == (min(sums, key=sums.__getitem__),)


def test_perplexity_greedy_falls_back_on_the_allowed_segment_of_the_lowest_loss():
    model, tokens = make_identity(tiny_model(num_layers=8), [0, 7]), random_tokens(3, 12)
    problem = only_two_segments(model, tokens)
    losses = {s: evaluate_tokens(cut_model(model, [s]), tokens, quiet=True).loss for s in problem.allowed}
    assert perplexity_greedy(problem).cut == (min(losses, key=losses.__getitem__),)


def test_perplexity_greedy_goes_on_where_single_layers_can_go():
    """Only the last layers can go, so there is one way."""
    model, tokens = zoo_model(member("diffllama")), random_tokens(2, 12)
    problem = problem_of(model, tokens, 2)
    assert perplexity_greedy(problem).cut == tail(problem).cut == (LayerSegment(6, 8),)
    assert set(problem.board.loss) == {(LayerSegment(6, 8),)}


def test_random_falls_back_on_a_random_allowed_segment_and_tail_on_the_last():
    problem = only_two_segments(tiny_model(num_layers=8), random_tokens(3, 12))
    draws = [random(dataclasses.replace(problem, seed=seed)).cut for seed in range(100)]
    assert set(draws) == {(LayerSegment(1, 3),), (LayerSegment(4, 6),)}
    assert tail(problem).cut == (LayerSegment(4, 6),)


def test_without_single_segments_at_hand_they_are_looked_up():
    """A search for several segments has none in its problem."""
    problem = problem_of(tiny_model(), random_tokens(2, 12), 2)
    assert angular(dataclasses.replace(problem, allowed=())).cut == angular(problem).cut
    model = zoo_model(member("jamba"))
    few = dataclasses.replace(problem_of(model, random_tokens(2, 12), 2), allowed=())
    assert tail(few).cut == (allowed_segments(model.config, 2)[-1],)


@pytest.mark.parametrize("strategy", RANKING, ids=lambda s: s.__name__)
def test_scores_and_choice_do_not_depend_on_the_batch_size(strategy):
    model, tokens = tiny_model(), random_tokens(7, 16)
    one, all_at_once = (strategy(problem_of(model, tokens, 2, batch_size=size)) for size in (1, 8))
    assert one.cut == all_at_once.cut
    assert_near(one.layer_scores, all_at_once.layer_scores, 1e-6)
    assert len(one.layer_scores) == 6 and all(score > 0 for score in one.layer_scores)


@pytest.mark.parametrize("strategy", [angular, cosine_block, perplexity_greedy], ids=lambda s: s.__name__)
def test_the_choice_does_not_depend_on_the_batch_size(strategy):
    model, tokens = tiny_model(), random_tokens(7, 16)
    assert len({strategy(problem_of(model, tokens, 2, batch_size=size)).cut for size in (1, 3, 8)}) == 1


def test_no_more_hidden_states_are_held_than_wait_to_be_compared():
    model, seen, starts, held = tiny_model(num_layers=8), [], [], []

    def remember(module, args, kwargs):
        seen.append(weakref.ref(args[0] if args else kwargs["hidden_states"]))

    def compare(start, before, after):
        starts.append(start)
        # the model itself holds the first, its embeddings
        held.append(sum(state() is not None for state in seen[1:]))

    handles = [layer.register_forward_pre_hook(remember, with_kwargs=True) for layer in model.model.layers]
    with hidden_changes_module._compared(model.model.layers, 2, compare), torch.no_grad():
        model(random_tokens(1, 8))
    for handle in handles:
        handle.remove()
    assert starts == list(range(7))
    assert max(held) == 3
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("strategy", DATA_DRIVEN, ids=lambda s: s.__name__)
def test_an_interrupted_search_goes_on_from_its_journal(strategy, tmp_path, monkeypatch):
    model, tokens = tiny_model(), random_tokens(6, 12)
    journal = Journal(tmp_path / "journal.jsonl")
    first = strategy(problem_of(model, tokens, 2, journal=journal))
    again, asked = Journal(tmp_path / "journal.jsonl"), []

    def recall(key, measure):
        asked.append(key)
        return Journal.recall(again, key, lambda: pytest.fail("it is measured again"))

    monkeypatch.setattr(again, "recall", recall)
    assert strategy(problem_of(model, tokens, 2, journal=again)) == first
    assert len(asked) == len(journal.known) > 0


@pytest.mark.parametrize("strategy", ALL, ids=lambda s: s.__name__)
def test_the_work_is_counted(strategy):
    model, tokens = tiny_model(), random_tokens(4, 16)
    problem = problem_of(model, tokens, 2)
    objective = problem.objective
    spent, passes = objective.spent, objective.layer_passes
    strategy(problem)
    without_head = objective.work.of(range(6), head=False)
    greedy = [cut_of([i], 6) for i in range(6)] + list(problem.board.loss)
    expected = {
        "taylor": (3, 18),
        "perplexity_greedy": (
            2 + sum(map(objective.price_of, greedy)),
            # the dense pass of each round, and what lies above the first gate that is not open
            2 * 6 + sum(6 - c[0].start - sum(map(len, c)) for c in greedy),
        ),
        "tail": (0, 0),
        "random": (0, 0),
    }.get(strategy.__name__, (without_head, 6))
    assert objective.spent - spent == pytest.approx(expected[0])
    assert objective.layer_passes - passes == pytest.approx(expected[1])


@pytest.mark.parametrize("strategy", DATA_DRIVEN, ids=lambda s: s.__name__)
def test_what_is_not_finite_comes_last(strategy):
    """The last layer gives NaN; hidden states before it can be measured, losses cannot."""
    model, tokens = make_identity(tiny_model(num_layers=8), [1, 2]), random_tokens(3, 12)
    with torch.no_grad():
        model.model.layers[7].mlp.down_proj.weight.fill_(math.nan)
    problem = problem_of(model, tokens, 2)
    if strategy in (block_influence, angular, cosine_block):
        assert strategy(problem).cut == (LayerSegment(1, 3),)
    else:
        assert sum(map(len, strategy(problem).cut)) == 2
