"""The contract of every verb on an accelerator: what the CPU gives in float32, in bfloat16 and float16 there.

`CLP_TEST_DEVICE` names another device than the first GPU; with `cpu` the tests themselves are tried. Segments are those of the CPU in float32:
`make_identity` leaves no doubt which layers do least. Figures agree within what the dtype's last digit is worth on these logits.
"""

import gc
import os

import pytest
import torch
from notices import notice
from tiny_models import make_identity, random_tokens, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from optimum_clp import CLPConfig, CLPPruner
from optimum_clp.architecture.lookup import decoder_layers
from optimum_clp.checkpoint import on_device
from optimum_clp.checkpoint.on_device import placed
from optimum_clp.configuration.stages import SearchConfig, TuningConfig
from optimum_clp.evaluation.tokens import evaluate_tokens
from optimum_clp.forward.dense_outputs import DenseOutputs
from optimum_clp.forward.layer_major import Residence
from optimum_clp.forward.memory_bound import residence_under
from optimum_clp.search.segment_search import search_segments
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model
from optimum_clp.tuning.endpoints import tune_layers

DEVICE = torch.device(os.environ.get("CLP_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a GPU"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# of logits whose largest is near 10: eight bits of mantissa, eleven, and the order of additions
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.02}
IDENTITIES = LayerSegment(2, 4)


def dense(dtype=torch.float32, device=DEVICE, **settings):
    return make_identity(tiny_model(**settings), range(2, 4)).to(device, dtype)


def all_on_device(model):
    return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {DEVICE.type}


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """Neither memory of the device nor another state of its random numbers."""
    if not ON_GPU:
        yield
        return
    torch.cuda.synchronize()
    before, state = torch.cuda.memory_allocated(), torch.cuda.get_rng_state()
    yield
    gc.collect()  # a layer and its forward hold each other, as with accelerate's hooks
    # libraries keep a workspace from their first call on
    assert torch.cuda.memory_allocated() - before < 64 * 2**20
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", ["exhaustive", "halving", "gate", "block_influence", "taylor"])
def test_searches_find_what_the_cpu_finds(dtype, strategy):
    rows = random_tokens(8, 24)
    settings = SearchConfig(strategy=strategy, num_sequences=8)
    known = search_segments(dense(device="cpu"), rows, 2, settings, quiet=True)
    model = dense(dtype)
    found = search_segments(model, rows, 2, settings, quiet=True)
    assert found.segments == known.segments == (IDENTITIES,)
    assert all_on_device(model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cut_computes_what_the_cpu_computes(dtype):
    ids = random_tokens(2, 20)
    cut = cut_model(dense(dtype), [IDENTITIES])
    with torch.no_grad():
        known = cut_model(dense(device="cpu"), [IDENTITIES])(ids).logits
        found = cut(ids.to(DEVICE)).logits
    assert all_on_device(cut)
    assert (found.float().cpu() - known).abs().max() < TOLERANCE[dtype] * known.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residence", [None, Residence(1, state_memory=0)], ids=["plain", "layer by layer"])
def test_tuning_lowers_the_loss_as_on_the_cpu(dtype, residence):
    losses = {}
    for device, kind in (("cpu", torch.float32), (DEVICE, dtype)):
        model = tiny_model().to(device, kind)
        cut = cut_model(model, [IDENTITIES])
        settings = TuningConfig(epochs=2, hidden_epochs=1, batch_size=4, learning_rate=3e-3)
        rows = random_tokens(16, 20, seed=1), random_tokens(4, 20, seed=2)
        options = {"kept": [0, 1, 4, 5], "residence": residence, "quiet": True}
        result = tune_layers(cut, model, (1, 2), *rows, settings, **options)
        losses[str(device)] = result.initial_validation_loss, result.best_validation_loss
    (first, best), (known_first, known_best) = losses[str(DEVICE)], losses["cpu"]
    assert first == pytest.approx(known_first, rel=5 * TOLERANCE[dtype])
    assert best == pytest.approx(known_best, rel=5 * TOLERANCE[dtype]) and best < 0.9 * first
    assert all_on_device(cut)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_figures_are_the_cpus(dtype):
    rows, ours = random_tokens(6, 24, seed=3), tiny_model().to(DEVICE, dtype)
    cut, known_cut = cut_model(ours, [LayerSegment(2, 4)]), cut_model(tiny_model(), [LayerSegment(2, 4)])
    known = evaluate_tokens(known_cut, rows, reference=DenseOutputs(tiny_model(), rows, quiet=True), quiet=True)
    found = evaluate_tokens(cut, rows, reference=DenseOutputs(ours, rows, quiet=True), quiet=True)
    assert found.kl == pytest.approx(known.kl, rel=5 * TOLERANCE[dtype])
    assert found.perplexity == pytest.approx(known.perplexity, rel=5 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("place", [str(DEVICE), {"": str(DEVICE)}], ids=["a device", "a device map"])
def test_one_call_from_a_folder_to_a_folder(tmp_path, dtype, place):
    tiny_model(tie_word_embeddings=True).to(dtype).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    pruner = CLPPruner.from_pretrained(tmp_path / "dense", device_map=place, quiet=True)
    text = {"sequence_length": 24, "train_sequences": 12, "validation_sequences": 4, "test_sequences": 4}
    config = CLPConfig(
        0.33,
        calibration={**text, "cache_dir": str(tmp_path / "cache")},
        search={"num_sequences": 8},
        tuning={"epochs": 1, "batch_size": 4, "learning_rate": 3e-3},
        evaluation={"max_new_tokens": 4},
        quantization={"group_size": 16},
    )
    model = pruner.prune(config, save_directory=tmp_path / "out")
    assert all_on_device(model) and all_on_device(pruner.model)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.dtype == dtype
    ids = random_tokens(2, 16)
    with torch.no_grad():
        assert torch.equal(stock(ids).logits.argmax(-1), model.cpu()(ids).logits.argmax(-1))
    files = {file["weights"]: file["max_relative_error"] for file in pruner.report.export["files"]}
    assert files.keys() == {"float32", "int8", "int4"} and files["float32"] < 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_attention_kernels(attention):
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    model = AutoModelForCausalLM.from_config(tiny_model().config, attn_implementation=attention).eval()
    model.load_state_dict(dense(device="cpu").state_dict())
    model.to(DEVICE, torch.bfloat16)
    found = search_segments(model, random_tokens(8, 24), 2, SearchConfig(strategy="exhaustive"), quiet=True)
    assert found.segments == (IDENTITIES,)


def test_a_compiled_caller():
    model = dense(torch.bfloat16)
    before = [parameter.data_ptr() for parameter in model.parameters()]
    compiled = torch.compile(model, backend="eager")
    pruner = CLPPruner.from_pretrained(compiled, tokenizer=tiny_tokenizer(), quiet=True)
    assert [parameter.data_ptr() for parameter in pruner.model.parameters()] == before
    cut = cut_model(pruner.model, [IDENTITIES])
    assert len(decoder_layers(cut)) == 4 and all_on_device(cut)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_that_the_device_does_not_hold(dtype, monkeypatch):
    """Layers lie in main memory and are copied when their turn comes: search, cut and tuning within `max_memory`."""
    monkeypatch.setattr(on_device, "accelerator", lambda number: DEVICE)
    wide = {"hidden_size": 256, "intermediate_size": 1024, "num_layers": 24}
    rows = random_tokens(8, 24)
    model = make_identity(tiny_model(**wide), range(9, 12)).to(dtype)
    layer, total = (sum(p.nbytes for p in part.parameters()) for part in (model.model.layers[0], model))
    bound = total - 16 * layer
    twin = placed(model, {0: bound}, 24)
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    settings = SearchConfig(strategy="exhaustive", num_sequences=8)
    residence = residence_under(None, twin, 24)[1]
    found = search_segments(twin, rows, 3, settings, residence=residence, quiet=True)
    assert found.segments == (LayerSegment(9, 12),)
    assert twin.device.type == DEVICE.type and {p.device.type for p in twin.model.layers.parameters()} == {"cpu"}
    cut = cut_model(twin, [LayerSegment(12, 15)])
    train = random_tokens(16, 24, seed=1), random_tokens(4, 24, seed=2)
    tuning = TuningConfig(epochs=1, hidden_epochs=1, batch_size=4, learning_rate=3e-3)
    kept = [index for index in range(24) if not 12 <= index < 15]
    result = tune_layers(cut, twin, (11, 12), *train, tuning, kept=kept, residence=residence, quiet=True)
    assert result.best_validation_loss < result.initial_validation_loss
    if ON_GPU:
        # the two trained layers have masters, gradients and moments beside the copies
        assert torch.cuda.max_memory_allocated() - before < bound + 2 * 18 * layer // dtype.itemsize
    whole = cut_model(model.to(DEVICE), [LayerSegment(12, 15)])
    with torch.no_grad():
        ids = rows.to(DEVICE)
        settled = cut_model(twin, [LayerSegment(12, 15)])(ids).logits
        assert torch.equal(settled, whole(ids).logits)


def test_a_batch_that_the_device_has_no_memory_for_is_halved():
    """By a real allocation that fails, as often as there are eight rows in it."""
    model, tokens = dense(torch.bfloat16), random_tokens(8, 24)
    expected = DenseOutputs(model, tokens, quiet=True).hidden[6]

    def grasping(module, args, kwargs):
        if len(args[0] if args else kwargs["hidden_states"]) > 4:
            if not ON_GPU:
                raise torch.OutOfMemoryError("out of memory")
            torch.empty(2**50, dtype=torch.uint8, device=DEVICE)

    handle = model.model.layers[3].register_forward_pre_hook(grasping, with_kwargs=True)
    with notice("no memory for 8 rows at once"):
        found = DenseOutputs(model, tokens, quiet=True).hidden[6]
    handle.remove()
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=TOLERANCE[torch.bfloat16])
