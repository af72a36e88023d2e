"""The benchmark of chat models runs, on a tiny one, and its rivals are what their papers say."""

import argparse
import importlib.util
import json
import sys

import pytest
import torch
from tiny_models import random_tokens, tiny_model, tiny_tokenizer
from torch.nn import functional as F

from benchmarks.recovery import chat
from benchmarks.recovery.chat_model import training
from benchmarks.recovery.chat_model.evaluation import can_generate
from benchmarks.recovery.chat_model.on_policy import loop_start, on_policy
from benchmarks.recovery.chat_model.ours import ours
from benchmarks.recovery.chat_model.overrep import OverRep, OverRepLinear, identity_share
from benchmarks.recovery.chat_model.rivals import RIVALS, TopLogits
from benchmarks.recovery.chat_model.runs import changed_tensors, locked, restored, save_weights
from benchmarks.recovery.chat_model.tables import LABELS
from benchmarks.recovery.chat_model.text import Text, load_text, questions, save_text
from benchmarks.recovery.methods import Cell
from optimum_clp import LayerSegment
from optimum_clp.architecture.lookup import decoder_layers
from optimum_clp.forward.dense_outputs import StateStore
from optimum_clp.surgery.cut import cut_model
from optimum_clp.tuning.losses import LossBatch

TEMPLATE = (
    "{% for m in messages %}{{ 'w3 w4 ' if m.role == 'user' else 'w5 w6 ' }}{{ m.content }}{{ ' w7 w8 ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w5 w6 ' }}{% endif %}"
)
SEGMENT = LayerSegment(2, 4)
ROWS = random_tokens(12, 16, seed=1)


def cell(dtype=torch.float32):
    return Cell(tiny_model().to(dtype), SEGMENT, ROWS[:8], ROWS[8:], seed=0)


def needs_peft(name):
    if name == "lora" and importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")


def trained(healing, at, folder, epochs=2, rate=1e-3):
    return training.train(healing, at, rate, epochs, 4, folder, StateStore())


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_heals_leaves_the_dense_model_alone_and_can_be_restored(name, tmp_path):
    needs_peft(name)
    at, rival = cell(), RIVALS[name]
    before = {key: value.clone() for key, value in at.dense.state_dict().items()}
    model = rival.prepare(at)
    if rival.trains:
        (healing, *_) = model
        model = healing.model
        took = trained(healing, at, tmp_path)
        assert took.num_tokens == 2 * 8 * 16 and len(took.losses) == 4 and took.num_trained > 0
        assert healing.first <= min(at.endpoints) or name in ("last3", "xmerge")
    assert all(torch.equal(value, before[key]) for key, value in at.dense.state_dict().items())
    changed = changed_tensors(model, at.cut())
    assert bool(changed) == (name != "cut")
    save_weights(tmp_path / "kept.safetensors", changed)
    again = at.cut()
    assert set(restored(again, tmp_path / "kept.safetensors")) == set(changed)
    with torch.no_grad():
        torch.testing.assert_close(again(ROWS).logits, model(ROWS).logits)
    assert all(torch.equal(value, before[key]) for key, value in at.dense.state_dict().items())


@pytest.mark.parametrize("name", [name for name, rival in RIVALS.items() if rival.trains])
def test_its_loss_falls(name, tmp_path):
    needs_peft(name)
    at = cell()
    (healing, *_) = RIVALS[name].prepare(at)
    losses = trained(healing, at, tmp_path, epochs=12, rate=3e-3).losses
    assert sum(losses[-4:]) < sum(losses[:4])


def test_overrep_begins_as_the_cut_with_a_mixture_before_it():
    at = cell(torch.float64)
    model = at.cut()
    OverRep(model, at.dense, SEGMENT)
    plain = cut_model(at.dense, [SEGMENT])
    # by hand: the layer before keeps its attention, and has norms and MLP of the last layer that went
    first, last = decoder_layers(plain)[1], decoder_layers(at.dense)[3]
    first.mlp, first.input_layernorm = last.mlp, last.input_layernorm
    first.post_attention_layernorm = last.post_attention_layernorm
    with torch.no_grad():
        torch.testing.assert_close(model(ROWS).logits, plain(ROWS).logits)


def test_overrep_has_the_presets_factors():
    at = cell()
    model = at.cut()
    before, behind = OverRep(model, at.dense, SEGMENT).blocks
    found = {
        (number, name): (module.added is not None, module.factor is not None, module.base.requires_grad)
        for number, block in enumerate((before, behind))
        for name, module in block.named_modules()
        if isinstance(module, OverRepLinear)
    }
    assert len(found) == 14
    assert all(value == (True, False, True) for (n, name), value in found.items() if n == 0 and "attn" in name)
    assert all(value == (False, True, True) for (n, name), value in found.items() if n == 0 and "mlp" in name)
    assert all(value == (True, True, False) for (n, _), value in found.items() if n == 1)
    # D is as wide as the inside of the MLP everywhere
    assert before.mlp.down_proj.factor.shape == before.mlp.up_proj.factor.shape == (56, 56)


def test_overrep_merges_into_what_it_computes():
    at = cell(torch.float64)
    model = at.cut()
    blocks = OverRep(model, at.dense, SEGMENT)
    torch.manual_seed(0)
    with torch.no_grad():
        for block in blocks.blocks:
            for parameter in block.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        blocks.at(0.3)
        activated = model(ROWS).logits
        blocks.at(1.0)
        unmerged = model(ROWS).logits
        blocks.merge()
        merged = model(ROWS).logits
    torch.testing.assert_close(merged, unmerged)
    assert not torch.allclose(activated, unmerged, atol=1e-3)
    assert list(model.state_dict()) == list(at.cut().state_dict())


def test_the_activation_fades_in_and_is_gone_at_the_end():
    assert [identity_share(s) for s in (0.0, 0.01, 0.8, 0.9, 1.0)] == [1.0, 0.0, 1.0, 1.0, 1.0]
    assert identity_share(0.405) == pytest.approx(0.5)


def test_the_loss_of_linear_patch_is_the_divergence_on_the_dense_models_top():
    torch.manual_seed(0)
    dense, student = torch.randn(2, 3, 150), torch.randn(2, 3, 150)
    found = TopLogits()(LossBatch(ROWS[:2, :3], student, dense))
    for row in range(2):
        total = 0.0
        for place in range(3):
            best = dense[row, place].argsort(descending=True)[:100]
            p, q = dense[row, place, best].softmax(0), student[row, place, best].softmax(0)
            total += float((p * (p / q).log()).sum())
        assert float(found[row]) == pytest.approx(total / 3, rel=1e-5)


def test_every_epoch_has_each_row_once_and_orders_differ():
    epochs = [torch.cat([training.row_order(12, 4, 5, 3 * e + s) for s in range(3)]) for e in range(2)]
    assert all(epoch.sort().values.tolist() == list(range(12)) for epoch in epochs)
    assert not torch.equal(*epochs)
    assert not torch.equal(training.row_order(12, 4, 5, 0), training.row_order(12, 4, 6, 0))


def test_an_interrupted_run_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    at = cell()
    (healing,) = RIVALS["overrep"].prepare(at)
    trained(healing, at, tmp_path / "undisturbed")
    monkeypatch.setattr(training, "SAVE_SECONDS", -1.0)
    (broken,) = RIVALS["overrep"].prepare(at)

    def stop(share):
        if share >= 0.5:
            raise KeyboardInterrupt

    broken.at = stop
    with pytest.raises(KeyboardInterrupt):
        trained(broken, at, tmp_path / "resumed")
    (resumed,) = RIVALS["overrep"].prepare(at)
    steps = []
    resumed.at = lambda share, at=resumed.at: (steps.append(share), at(share))
    trained(resumed, at, tmp_path / "resumed")
    assert steps == [0.5, 0.75, 1.0]
    # the activation of the broken run's steps was off, as by the schedule it is not: so not weights, but the two that are alike
    assert set(changed_tensors(resumed.model, at.cut())) == set(changed_tensors(healing.model, at.cut()))


def test_ours_trains_the_endpoints(tmp_path):
    at = cell()
    model, took = ours(at, 1e-3, 2, 4, tmp_path, 4.0, ())
    assert took.num_tokens == 2 * 8 * 16
    assert {name.split(".")[2] for name in changed_tensors(model, at.cut())} <= {"1", "2"}


def test_a_question_goes_up_to_where_the_assistant_writes():
    rows = torch.tensor([[3, 4, 9, 7, 8, 5, 6, 10, 7, 8, 3, 4], [3, 4, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9]])
    assert [p.tolist() for p in questions(rows, (7, 8, 5, 6))] == [[3, 4, 9, 7, 8, 5, 6]]


def test_text_is_kept_and_parted_by_kind(tmp_path):
    text = Text(ROWS, ("plain", "conversations", "plain") * 4)
    save_text(tmp_path / "text.safetensors", text)
    again = load_text(tmp_path / "text.safetensors")
    assert torch.equal(again.tokens, ROWS) and again.kinds == text.kinds
    first, last = text.split(2)
    assert sorted(last.kinds) == ["conversations"] * 2 + ["plain"] * 2 and len(first.tokens) == 8
    assert sorted(map(tuple, torch.cat([first.tokens, last.tokens]).tolist())) == sorted(map(tuple, ROWS.tolist()))


@pytest.mark.parametrize(
    ("tokens", "start"),
    [
        ([*range(100)], 100),
        ([*range(20), *[1, 2, 3] * 20], 23),
        # too short to be called one
        ([*range(20), *[1, 2, 3] * 5], 35),
        # it ended
        ([*[1, 2, 3] * 20, 50], 61),
    ],
)
def test_where_a_loop_begins(tokens, start):
    assert loop_start(tokens) == start


def test_an_on_policy_stage_changes_what_it_is_told_to(tmp_path):
    at = cell()
    model, names = at.cut(), ["model.layers.1.mlp.down_proj.weight"]
    prompts = [ROWS[i, : 3 + i] for i in range(4)]
    options = {"rate": 1e-2, "rounds": 2, "batch_size": 2, "folder": tmp_path}
    took = on_policy(model, names, at, prompts, **options)
    assert len(took.losses) == 4 and all(loss > 0 for loss in took.losses)
    assert list(changed_tensors(model, at.cut())) == names


def test_two_processes_do_not_take_the_same_run(tmp_path):
    with locked(tmp_path, "run") as first, locked(tmp_path, "run") as second, locked(tmp_path, "other") as third:
        assert (first, second, third) == (True, False, True)
    with locked(tmp_path, "run") as again:
        assert again


@pytest.fixture
def arguments(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = " ".join(f"w{3 + i % 90}" for i in range(400))
    (tmp_path / "data/c4").mkdir(parents=True)
    (tmp_path / "data/tasks").mkdir()
    (tmp_path / "data/c4/test.jsonl").write_text(json.dumps({"text": words}))
    task = {"query": "w3 w4", "choices": ["w5", "w6 w7"], "gold": 0}
    (tmp_path / "data/tasks/piqa.jsonl").write_text(f"{json.dumps(task)}\n" * 3)
    sizes = (
        "--rows 8 --length 24 --held-out 2 --epochs 2 --rate-rows 4 --batch 2 --test-rows 2 --new-tokens 4 --rounds 1"
    )
    places = ["--model", tmp_path / "model", "--data", tmp_path / "data", "--out", tmp_path / "out"]
    return [*map(str, places), *sizes.split(), "--prompts", "2", "--device", "cpu"]


def test_the_benchmark_runs_once_and_shows_its_tables(arguments, tmp_path, monkeypatch, capsys):
    methods = ["dense", "cut", "ours", "xmerge", "xmerge@time", "xmerge+policy"]
    monkeypatch.setattr(sys, "argv", ["chat", *arguments, "--ratio", "0.4", "--cut", "2", "4", "--only", *methods])
    chat.main()
    records = {m: json.loads((tmp_path / f"out/{m}-0.4-0.json").read_text()) for m in methods}
    assert {"piqa"} == set(records["ours"]["evaluation"]["tasks"])
    assert {"plain", "conversations", "c4"} == set(records["cut"]["evaluation"]["texts"])
    assert records["dense"]["evaluation"]["texts"]["c4"]["kl"] == 0 < records["cut"]["evaluation"]["texts"]["c4"]["kl"]
    assert records["ours"]["num_tokens"] == records["xmerge"]["num_tokens"] == 2 * 8 * 24
    tried = json.loads((tmp_path / "out/rate-xmerge.json").read_text())
    assert {t["variant"] for t in tried} == {0, 1} and len(tried) >= 2 * len(chat.RATES)
    assert records["xmerge"]["rate"] == min(tried, key=lambda t: t["kl"])["rate"]
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.json")}
    capsys.readouterr()
    chat.main()
    assert capsys.readouterr().out == ""
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.json")}
    monkeypatch.setattr(sys, "argv", ["chat", "--table", str(tmp_path / "out")])
    chat.main()
    shown = capsys.readouterr().out
    assert "**ours**" in shown and "XMerge, as long as ours" in shown and "XMerge, then on-policy" in shown
    assert ("first 32 agree" in shown) == can_generate()
    # there is no such text, and no such task
    assert "WikiText" not in shown and "ARC-easy" not in shown


def test_a_part_that_is_missing_is_measured_from_the_kept_weights(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["chat", *arguments, "--cut", "2", "4", "--rate", "1e-3", "--only", "linear_patch"]
    )
    chat.main()
    file = tmp_path / "out/linear_patch-0.2-0.json"
    record = json.loads(file.read_text())
    texts = record["evaluation"].pop("texts")
    file.write_text(json.dumps(record))
    chat.main()
    again = json.loads(file.read_text())["evaluation"]["texts"]
    assert again["c4"]["kl"] == pytest.approx(texts["c4"]["kl"], rel=1e-6)


def test_a_cut_is_searched_once_and_a_rival_that_has_no_place_at_it_is_left_out(
    arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["chat", *arguments, "--ratio", "0.34", "--only", "cut"])
    monkeypatch.setattr(
        chat, "search_segments", lambda *args, **kwargs: argparse.Namespace(segments=[LayerSegment(4, 6)])
    )
    chat.main()
    monkeypatch.setattr(chat, "search_segments", None)
    monkeypatch.setattr(sys, "argv", ["chat", *arguments, "--ratio", "0.34", "--only", "overrep"])
    chat.main()
    assert "overrep-0.34-0: it needs a layer on either side of [4, 6)" in capsys.readouterr().out


def test_an_unknown_method_is_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["chat", *arguments, "--only", "magic"])
    with pytest.raises(SystemExit):
        chat.main()
    assert "--only magic: there are dense, cut," in capsys.readouterr().err


def test_every_method_has_a_label():
    assert set(LABELS) == set(chat.METHODS)


def test_the_activation_is_between_the_factors():
    linear = OverRepLinear(torch.nn.Linear(3, 4), add=True, multiply=True, input_side=False, train_base=True)
    hidden = torch.randn(2, 3)
    linear.identity = 0.25
    inner = F.linear(hidden, linear.base)
    expected = 0.75 * F.silu(inner) + 0.25 * inner + linear.bias
    torch.testing.assert_close(linear(hidden), expected)
