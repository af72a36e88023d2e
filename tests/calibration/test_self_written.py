import math
import os
import subprocess
import sys

import pytest
import torch
from notices import notice
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from optimum_clp import resume
from optimum_clp.calibration import writing
from optimum_clp.calibration.self_written import sample_text
from optimum_clp.errors import CalibrationError

PROBE = 4  # calls that show whether the model takes back its cache

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def small_model(config_class=LlamaConfig, **changes):
    torch.manual_seed(0)
    config = config_class(**{**SMALL, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.4, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def markov_model(transitions, **changes):
    """A model whose next token depends on the last one only, with `transitions[i, j] = P(j | i)`."""
    size = len(transitions)
    config = LlamaConfig(
        **{**SMALL, "vocab_size": size, "hidden_size": size, "head_dim": 8, "rms_norm_eps": 0.0, **changes},
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        # RMS norm makes a one-hot vector sqrt(size) times one-hot
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(transitions.log().T / math.sqrt(size))
    return model


def some_transitions(size=8, seed=3):
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def word_tokenizer(size, **special):
    words = {f"w{i}": i for i in range(size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), **special)


@pytest.fixture
def write(tmp_path):
    def write(model, num_sequences=6, sequence_length=24, seed=0, **changes):
        changes = {"batch_size": 4, "cache_dir": tmp_path, "quiet": True, **changes}
        sizes = {"num_sequences": num_sequences, "sequence_length": sequence_length}
        return sample_text(model, seed=seed, **sizes, **changes).tokens

    return write


@pytest.fixture
def forward_calls(monkeypatch):
    calls = []
    original = LlamaForCausalLM.forward
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_follow_the_models_distribution(write, temperature):
    transitions = some_transitions()
    model = markov_model(transitions, bos_token_id=1, eos_token_id=None)
    tokens = write(model, 200, 101, temperature=temperature, batch_size=100)
    expected = transitions.pow(1 / temperature)
    expected = expected / expected.sum(-1, keepdim=True)
    counts = torch.zeros(8, 8)
    counts.index_put_((tokens[:, :-1].flatten(), tokens[:, 1:].flatten()), torch.tensor(1.0), accumulate=True)
    visits = counts.sum(-1, keepdim=True)
    # each cell is binomial: 5 standard deviations, over 64 cells
    assert ((counts - visits * expected).abs() <= 5 * (visits * expected * (1 - expected)).sqrt() + 1).all()
    assert visits.min() > 500


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_token_is_the_cumulative_distribution_inverted_at_the_rows_next_number(write, temperature):
    # vocabularies of less than one block, of some blocks, and of some and a part; half of the tokens hardly happen
    for size in (200, 512, 600):
        transitions = torch.randn(size, size, generator=torch.Generator().manual_seed(size)).exp()
        transitions[:, 1 : size - 1 : 2] = 1e-20
        model = markov_model(transitions / transitions.sum(-1, keepdim=True), bos_token_id=0, eos_token_id=None)
        tokens = write(model, 5, 40, batch_size=5, seed=7, temperature=temperature)
        likelihoods = transitions.double().pow(1 / temperature)
        for index, row in enumerate(tokens):
            uniforms = writing.random_stream(7, index, 40)
            cumulative = likelihoods[row[:-1]].cumsum(-1)
            below = (cumulative < uniforms[1:, None] * cumulative[:, -1:]).sum(-1)
            # rounding decides only where a number is at a border
            assert (below == row[1:]).float().mean() > 0.97


def test_document_ends_are_followed_by_bos_and_rows_are_full(write):
    tokens = write(markov_model(some_transitions(), bos_token_id=1, eos_token_id=[2, 5]), 20, 60)
    assert tokens.shape == (20, 60) and tokens.dtype == torch.int64 and tokens.device.type == "cpu"
    assert (tokens[:, 0] == 1).all()
    after_end = tokens[:, 1:][torch.isin(tokens[:, :-1], torch.tensor([2, 5]))]
    assert len(after_end) > 50 and (after_end == 1).all()


def test_a_start_token_that_also_ends_documents_is_not_doubled(write):
    tokens = write(markov_model(some_transitions(), bos_token_id=None, eos_token_id=2), 20, 60)
    assert (tokens[:, 0] == 2).all()
    after_end = tokens[:, 1:][tokens[:, :-1] == 2]
    assert len(after_end.unique()) == 8


def test_without_bos_and_eos_the_first_token_is_any_ordinary_one(write):
    model = markov_model(some_transitions(), bos_token_id=None, eos_token_id=None)
    model.generation_config.pad_token_id = 3
    tokenizer = word_tokenizer(7, unk_token="w0")
    first = write(model, 300, 2, batch_size=300, tokenizer=tokenizer)[:, 0]
    counts = torch.bincount(first, minlength=8)
    assert counts[[0, 3, 7]].sum() == 0
    assert counts[[1, 2, 4, 5, 6]].min() > 30


def test_ids_beyond_the_tokenizer_are_never_written(write):
    model = markov_model(some_transitions(), bos_token_id=1, eos_token_id=None)
    assert write(model, 20, 60).max() == 7
    assert write(model, 20, 60, tokenizer=word_tokenizer(6)).max() == 5


@pytest.mark.parametrize(
    ("config_class", "changes"),
    [
        (LlamaConfig, {}),
        (LlamaConfig, {"tie_word_embeddings": True}),
        (MistralConfig, {"sliding_window": 8}),
        (Qwen2Config, {}),
        (Qwen3Config, {"head_dim": 16}),
    ],
)
def test_losses_are_those_of_one_uncached_forward_pass(tmp_path, config_class, changes):
    model = small_model(config_class, **changes)
    sample = sample_text(
        model, num_sequences=5, sequence_length=40, seed=0, batch_size=3, cache_dir=tmp_path, quiet=True
    )
    with torch.no_grad():
        logits = model(sample.tokens, use_cache=False).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), sample.tokens[:, 1:], reduction="none")
    torch.testing.assert_close(sample.losses.float(), expected.mean(1), rtol=1e-4, atol=1e-4)
    assert sample.tokens.unique().numel() > 20


def test_same_seed_same_tokens_whatever_the_number_of_rows(write, tmp_path):
    model = small_model().double()
    tokens = write(model, 8)
    assert torch.equal(write(model, 8, cache_dir=tmp_path / "other"), tokens)
    assert torch.equal(write(model, 5), tokens[:5])
    assert torch.equal(write(model, 8, batch_size=3), tokens)
    assert not torch.equal(write(model, 8, seed=1), tokens)
    assert len(torch.unique(tokens, dim=0)) == 8


def test_the_caller_finds_everything_as_it_was(write, tmp_path):
    model = small_model(attention_dropout=0.5)
    model.train()
    model.model.layers[1].eval()
    model.config.use_cache = False
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    tokens = write(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    # dropout was off
    assert torch.equal(tokens, write(model.eval(), cache_dir=tmp_path / "evaluation"))


def test_modes_are_restored_after_an_error(write):
    model = small_model()
    model.train()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(CalibrationError, match="model is 'NaN': its logits must be finite.*check its weights for NaN"):
        write(model)
    assert all(module.training for module in model.modules())


def test_a_second_call_reads_the_cache(write, forward_calls, tmp_path):
    model = small_model()
    first = write(model)
    assert len(forward_calls) == PROBE + 2 * 23
    assert torch.equal(write(model), first)
    assert len(forward_calls) == PROBE + 2 * 23
    assert [path.suffix for path in (tmp_path / "optimum_clp").iterdir()] == [".safetensors"]


@pytest.mark.parametrize("change", ["weight", "swap", "temperature", "seed", "config", "dtype"])
def test_any_change_misses_the_cache(write, forward_calls, change):
    model = small_model()
    write(model)
    calls = len(forward_calls)
    arguments = {}
    with torch.no_grad():
        if change == "weight":
            model.model.layers[0].mlp.up_proj.weight[3, 4] += 1e-6
        elif change == "swap":
            weight = model.model.layers[0].mlp.up_proj.weight
            weight[[0, 1]] = weight[[1, 0]]
        elif change == "config":
            model.config.rms_norm_eps = 1e-3
        elif change == "dtype":
            model.bfloat16()
        else:
            arguments = {"temperature": {"temperature": 0.9}, "seed": {"seed": 5}}[change]
    write(model, **arguments)
    assert len(forward_calls) > calls


def test_more_rows_begin_with_the_fewer_ones(write, forward_calls, tmp_path):
    model = small_model()
    few = write(model, 5, cache_dir=tmp_path / "both")
    forward_calls.clear()
    again = write(model, 3, cache_dir=tmp_path / "both")
    assert not forward_calls and torch.equal(again, few[:3])
    more = write(model, 14, cache_dir=tmp_path / "both")
    assert torch.equal(more[:5], few)
    at_once = write(model, 14, cache_dir=tmp_path / "at once")
    assert torch.equal(more, at_once)


def test_an_interrupted_run_goes_on_where_it_stopped(write, forward_calls, monkeypatch, tmp_path):
    model = small_model()
    whole = write(model, 10, cache_dir=tmp_path / "whole")
    assert len(forward_calls) == PROBE + 3 * 23
    forward_calls.clear()
    original = writing._write_batch

    def interrupted(*arguments):
        if len(forward_calls) >= PROBE + 2 * 23:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(writing, "_SAVE_INTERVAL", 0.0)
    monkeypatch.setattr(writing, "_write_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(model, 10)
    monkeypatch.setattr(writing, "_write_batch", original)
    forward_calls.clear()
    assert torch.equal(write(model, 10), whole)
    assert len(forward_calls) == PROBE + 23


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_a_damaged_cache_file_is_ignored_and_written_again(write, forward_calls, tmp_path, damage):
    model = small_model()
    tokens = write(model)
    (file,) = (tmp_path / "optimum_clp").iterdir()
    contents = bytearray(file.read_bytes())
    if damage == "flipped":
        contents[-100] ^= 1
    file.write_bytes({"truncated": contents[:-9], "empty": b"", "foreign": b"hello" * 50}.get(damage, bytes(contents)))
    with notice("is damaged .* and is ignored"):
        assert torch.equal(write(model), tokens)
    calls = len(forward_calls)
    assert torch.equal(write(model), tokens)
    assert len(forward_calls) == calls


def test_a_folder_that_cannot_be_written_costs_only_the_cache(write, tmp_path):
    (tmp_path / "file").write_text("")
    with notice("cannot be written .* is not kept") as caught:
        tokens = write(small_model(), cache_dir=tmp_path / "file")
    assert len(caught) == 1
    assert torch.equal(tokens, write(small_model()))


def test_the_default_folder_is_the_hugging_face_cache(write, monkeypatch, tmp_path):
    monkeypatch.setattr(resume.constants, "HF_HOME", os.fspath(tmp_path / "home"))
    write(small_model(), cache_dir=None)
    assert len(list((tmp_path / "home" / "optimum_clp").iterdir())) == 1


DEALT = """
import sys, torch, torch.distributed as dist
from optimum_clp.calibration import writing
from optimum_clp.calibration.self_written import sample_text
rank, store, model, out = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
model, batches, write = torch.load(model, weights_only=False), [], writing._write_batch
def watched(writing, script, batch, *rest):
    batches.append(batch)
    return write(writing, script, batch, *rest)
writing._write_batch = watched
options = {"sequence_length": 12, "batch_size": 2, "seed": 5, "quiet": True, "dealt": True}
samples = []
for rows, grows in ((3, True), (9, True), (3, False)):
    samples.append(sample_text(model, num_sequences=rows, grows=grows, cache_dir=f"{out}-{rank}", **options))
torch.save([batches, samples], f"{out}-{rank}.pt")
dist.destroy_process_group()
"""


def test_a_group_of_processes_deals_out_the_batches(tmp_path):
    """Also where their disks are not the same: what the first one has is what counts."""
    model = small_model()
    torch.save(model, tmp_path / "model.pt")
    arguments = [str(tmp_path / name) for name in ("store", "model.pt", "out")]
    started = [subprocess.Popen([sys.executable, "-c", DEALT, str(rank), *arguments]) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    (first, samples), (second, others) = (
        torch.load(tmp_path / f"out-{rank}.pt", weights_only=False) for rank in (0, 1)
    )
    assert first == [range(2), range(4, 6), range(8, 10), range(2)]
    assert second == [range(2, 4), range(6, 8), range(2, 3)]
    for (rows, grows), dealt, other in zip(((3, True), (9, True), (3, False)), samples, others, strict=True):
        options = {"sequence_length": 12, "batch_size": 2, "seed": 5, "quiet": True}
        alone = sample_text(model, num_sequences=rows, grows=grows, cache_dir=tmp_path, **options)
        for found in (dealt, other):
            assert torch.equal(found.tokens, alone.tokens) and torch.equal(found.losses, alone.losses)
    assert list((tmp_path / "out-0").rglob("*.safetensors")) and not list((tmp_path / "out-1").rglob("*.safetensors"))
