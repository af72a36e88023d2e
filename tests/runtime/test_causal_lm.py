import copy
import functools
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_models import random_tokens
from tiny_onnx import exported_halves, exported_llama
from transformers import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

from optimum_clp.errors import ConfigurationError, ModelError
from optimum_clp.evaluation.tokens import evaluate_tokens
from optimum_clp.runtime.causal_lm import OnnxCausalLM


@pytest.fixture(scope="module")
def pytorch():
    return exported_llama().model


@pytest.fixture(scope="module")
def folder():
    return exported_llama().folder


@pytest.fixture(scope="module")
def onnx_model(folder):
    return OnnxCausalLM.from_pretrained(folder, num_threads=1)


def padded_batch():
    """Rows of 9, 4 and 1 tokens, left-padded, and their mask."""
    ids = random_tokens(3, 9, seed=5)
    mask = (torch.arange(9)[None] >= torch.tensor([[0], [5], [8]])).long()
    return ids.masked_fill(mask == 0, 0), mask


def generate(model, ids, mask=None, **options):
    settings = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **options}
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        return model.generate(input_ids=ids, attention_mask=mask, **settings)


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_logits_are_pytorchs_in_any_call(onnx_model, pytorch):
    ids, mask = padded_batch()
    with torch.no_grad():
        expected = pytorch(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    output = onnx_model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert output.past_key_values is None
    assert output.logits.dtype == torch.float32 and output.logits.shape == (3, 9, pytorch.config.vocab_size)
    real = mask.bool()
    torch.testing.assert_close(output.logits[real], expected[real], rtol=1e-4, atol=1e-4)
    # without a mask there is no padding
    alone = onnx_model(ids[1:2, 5:]).logits
    torch.testing.assert_close(alone, output.logits[1:2, 5:], rtol=1e-4, atol=1e-4)


def test_cached_logits_are_the_uncached_ones(onnx_model):
    ids, mask = padded_batch()
    whole = onnx_model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    cache, parts = None, []
    for first, last in ((0, 4), (4, 5), (5, 8), (8, 9)):
        output = onnx_model(
            input_ids=ids[:, first:last], attention_mask=mask[:, :last], past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        assert cache.get_seq_length() == last
        parts.append(output.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], whole[real], rtol=1e-4, atol=1e-4)


def test_cache_is_extended_in_place_and_older_tensors_stay_whole(onnx_model):
    ids = random_tokens(2, 6)
    cache = DynamicCache()
    output = onnx_model(ids[:, :4], past_key_values=cache)
    assert output.past_key_values is cache and cache.get_seq_length() == 4
    keys = cache.layers[0].keys
    copy = keys.clone()
    onnx_model(ids[:, 4:], past_key_values=cache)
    assert cache.get_seq_length() == 6
    assert torch.equal(keys, copy) and torch.equal(cache.layers[0].keys[:, :, :4], copy)


def test_tokens_are_appended_where_the_cache_lies(folder, onnx_model):
    """The cache is copied when its room ends, and not once for each token."""
    config = copy.deepcopy(onnx_model.config)
    config.max_position_embeddings = 300
    onnx_model = OnnxCausalLM(onnx_model.session, config)
    ids = random_tokens(2, 300)
    cache, places, pieces = DynamicCache(), set(), []
    pieces.append(onnx_model(ids[:, :5], past_key_values=cache).logits)
    for position in range(5, 300):
        pieces.append(onnx_model(ids[:, position : position + 1], past_key_values=cache).logits)
        places.add((cache.layers[0].keys.data_ptr(), cache.layers[-1].values.data_ptr()))
    assert len(places) == 2
    torch.testing.assert_close(torch.cat(pieces, 1), onnx_model(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("change", ["copied", "cut", "reordered", "selected", "repeated"])
def test_a_cache_that_was_changed_is_not_written_over(onnx_model, change):
    ids = random_tokens(2, 12)
    cache = onnx_model(ids[:, :6], past_key_values=DynamicCache()).past_key_values
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    rows, past = [0, 1], 6
    if change == "copied":
        onnx_model(ids[:, 6:9], past_key_values=cache)
    elif change == "cut":
        onnx_model(ids[:, 6:9], past_key_values=other)
        # -4 in transformers 5, and 5 tokens that are left in both
        for layer in other.layers:
            layer.keys, layer.values = layer.keys[:, :, :5], layer.values[:, :, :5]
        past = 5
    elif change == "reordered":
        rows = [1, 0]
        other.reorder_cache(torch.tensor(rows))
    elif change == "selected":
        rows = [1]
        other.batch_select_indices(torch.tensor(rows))
    else:
        rows = [0, 0, 1, 1]
        other.batch_repeat_interleave(2)
    kept = [layer.keys.clone() for layer in cache.layers]
    new = torch.flip(ids, [1])[:, :1][rows]
    found = onnx_model(new, past_key_values=other).logits
    expected = onnx_model(torch.cat([ids[rows, :past], new], 1)).logits[:, -1:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert all(torch.equal(a, layer.keys) for a, layer in zip(kept, cache.layers, strict=True))


def test_a_step_binds_its_tokens_alone(onnx_model, monkeypatch):
    """What stays where it is, the cache, is bound to the session once; logits that were given out stay what they were."""
    bound, made = [], []
    binding, bind = onnxruntime.InferenceSession.io_binding, onnxruntime.IOBinding.bind_input
    monkeypatch.setattr(onnxruntime.InferenceSession, "io_binding", lambda self: made.append(1) or binding(self))
    monkeypatch.setattr(
        onnxruntime.IOBinding, "bind_input", lambda self, name, *a: bound.append(name) or bind(self, name, *a)
    )
    ids = random_tokens(1, 12)
    output = onnx_model(ids[:, :6], past_key_values=DynamicCache())
    first, kept = output.logits, output.logits.clone()
    assert sum(name.startswith("past_key_values") for name in bound) == 2 * onnx_model.config.num_hidden_layers
    bound.clear()
    pieces = [first]
    for position in range(6, 12):
        pieces.append(onnx_model(ids[:, position : position + 1], past_key_values=output.past_key_values).logits)
    first_step = ["input_ids", "position_ids", "num_logits_to_keep", "attention_mask"]
    assert bound == first_step + 5 * ["attention_mask"] and len(made) == 1
    assert torch.equal(first, kept)
    torch.testing.assert_close(torch.cat(pieces, 1), onnx_model(ids).logits, rtol=0, atol=1e-4)


def test_a_cropped_cache_is_written_again_only_if_nobody_looks_at_it(onnx_model):
    """Speculative decoding takes rejected tokens back at each step: that copies nothing."""
    ids = random_tokens(1, 12)
    cache = onnx_model(ids[:, :9], past_key_values=DynamicCache()).past_key_values
    room = cache.layers[0].room
    for layer in cache.layers:
        layer.crop(-3)
    assert cache.get_seq_length() == 6 and cache.layers[0].keys.shape[2] == 6
    expected = onnx_model(torch.cat([ids[:, :6], ids[:, 10:]], 1)).logits[:, -2:]
    looked_at = cache.layers[0].values
    before = looked_at.clone()
    torch.testing.assert_close(onnx_model(ids[:, 10:], past_key_values=cache).logits, expected, rtol=0, atol=1e-4)
    assert cache.layers[0].room is not room and torch.equal(looked_at, before)
    room = cache.layers[0].room
    for layer in cache.layers:
        layer.crop(-2)
    torch.testing.assert_close(onnx_model(ids[:, 10:], past_key_values=cache).logits, expected, rtol=0, atol=1e-4)
    assert cache.layers[0].room is room


def test_a_deep_copy_of_a_cache_has_memory_of_its_own(onnx_model):
    ids = random_tokens(1, 9)
    cache = onnx_model(ids[:, :6], past_key_values=DynamicCache()).past_key_values
    other = copy.deepcopy(cache)
    ours = onnx_model(ids[:, 6:], past_key_values=cache).logits
    theirs = onnx_model(torch.flip(ids, [1])[:, :3], past_key_values=other).logits
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(onnx_model(ids).logits[:, 6:], ours, rtol=0, atol=1e-4)
    mixed = onnx_model(torch.cat([ids[:, :6], torch.flip(ids, [1])[:, :3]], 1)).logits[:, 6:]
    torch.testing.assert_close(mixed, theirs, rtol=0, atol=1e-4)
    assert other.layers[0].room is other.layers[-1].room is not cache.layers[0].room


def test_greedy_tokens_are_pytorchs(onnx_model, pytorch):
    ids = random_tokens(1, 6, seed=2)
    expected = generate(pytorch, ids)
    assert len(set(expected[0, 6:].tolist())) > 8  # not one token over and over
    assert torch.equal(generate(onnx_model, ids), expected)
    assert torch.equal(generate(onnx_model, ids, use_cache=False), expected)


def test_left_padded_batch_generates_what_each_row_does_alone(onnx_model, pytorch):
    ids, mask = padded_batch()
    together = generate(onnx_model, ids, mask)
    assert torch.equal(together, generate(pytorch, ids, mask))
    for row in range(3):
        alone = generate(onnx_model, ids[row : row + 1, mask[row] == 1])
        assert torch.equal(together[row, 9:], alone[0, mask[row].sum() :])


def test_sampling_with_a_seed_is_pytorchs(onnx_model, pytorch):
    ids, mask = padded_batch()
    sampled = []
    for model in (pytorch, onnx_model):
        torch.manual_seed(11)
        sampled.append(generate(model, ids, mask, do_sample=True, temperature=0.9, top_k=20))
    assert torch.equal(*sampled)
    torch.manual_seed(12)
    assert not torch.equal(generate(onnx_model, ids, mask, do_sample=True, temperature=0.9, top_k=20), sampled[0])


def test_beam_search_is_pytorchs(onnx_model, pytorch):
    ids, mask = padded_batch()
    options = {"num_beams": 3, "max_new_tokens": 10, "min_new_tokens": 10}
    assert torch.equal(generate(onnx_model, ids, mask, **options), generate(pytorch, ids, mask, **options))


def test_streamer_gets_the_same_tokens(onnx_model):
    ids = random_tokens(1, 6, seed=2)
    streamer = Recorder()
    tokens = generate(onnx_model, ids, streamer=streamer)
    assert streamer.tokens == tokens[0].tolist() and streamer.ended


def test_generation_stops_at_the_end_token(onnx_model):
    ids = random_tokens(1, 6, seed=2)
    free = generate(onnx_model, ids)[0, 6:].tolist()
    # generate() above kept token 2, the configuration's end token, away until the end
    stopped = generate(onnx_model, ids, min_new_tokens=0, eos_token_id=free[3], suppress_tokens=[2])[0, 6:].tolist()
    assert stopped == free[: free.index(free[3]) + 1]


@pytest.mark.parametrize("file", ["onnx/model_quantized.onnx", "onnx/model_q4.onnx"])
def test_quantized_files_run_with_the_same_code(folder, onnx_model, file):
    model = OnnxCausalLM.from_pretrained(folder, file)
    ids, mask = padded_batch()
    exact, ours = (m(input_ids=ids, attention_mask=mask).logits[mask.bool()] for m in (onnx_model, model))
    assert 0 < (ours - exact).abs().max() < exact.abs().max()
    assert generate(model, ids, mask).shape == (3, 33)


def test_evaluation_measures_file_and_model_alike(onnx_model, pytorch):
    tokens = random_tokens(4, 16)
    ours, theirs = (evaluate_tokens(model, tokens, quiet=True) for model in (onnx_model, pytorch))
    assert ours.perplexity == pytest.approx(theirs.perplexity, rel=1e-5)


def test_generation_asks_for_the_last_logits_alone(onnx_model, monkeypatch):
    runs, sizes = {name: getattr(onnx_model, name) for name in ("_whole", "_next")}, []

    def spy(name, *args, **kwargs):
        found = runs[name](*args, **kwargs)
        logits = found[0] if name == "_whole" else found
        sizes.extend([] if logits is None else [logits.shape[1]])
        return found

    for name in runs:
        monkeypatch.setattr(onnx_model, name, functools.partial(spy, name))
    ids = random_tokens(1, 7)
    generate(onnx_model, ids, max_new_tokens=3, min_new_tokens=3)
    assert sizes == [1, 1, 1]
    every = onnx_model(ids).logits
    for count in (1, 3, 9):
        torch.testing.assert_close(onnx_model(ids, logits_to_keep=count).logits, every[:, -count:])
    assert sizes[3:] == [7, 1, 3, 7]


@pytest.mark.parametrize("count", [-1, torch.tensor([0, 2])])
def test_positions_that_cannot_be_kept_are_refused(onnx_model, count):
    with pytest.raises(ModelError, match=r"logits_to_keep is .*: it must be a number of positions, the last ones"):
        onnx_model(random_tokens(1, 4), logits_to_keep=count)


def test_last_logits_of_several_rows_after_a_past(onnx_model):
    ids = random_tokens(2, 8, seed=3)
    every = onnx_model(ids).logits
    past = onnx_model(ids[:, :4], use_cache=True).past_key_values
    kept = onnx_model(ids[:, 4:], past_key_values=past, logits_to_keep=2).logits
    torch.testing.assert_close(kept, every[:, -2:])


def test_a_file_without_the_choice_of_positions_runs(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    graph = onnx.load(folder / "onnx/model.onnx")
    (index,) = [i for i, value in enumerate(graph.graph.input) if value.name == "num_logits_to_keep"]
    # no input any more: a constant, as before this package gave a choice
    del graph.graph.input[index]
    onnx.save(graph, tmp_path / "copy/onnx/model.onnx")
    older, ids = OnnxCausalLM.from_pretrained(tmp_path / "copy"), random_tokens(2, 5)
    assert not older.session.get_overridable_initializers()
    torch.testing.assert_close(older(ids, logits_to_keep=2).logits, older(ids).logits[:, -2:])


def test_session_options_and_generation_config_are_used(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy/generation_config.json").write_text(
        '{"eos_token_id": 7, "max_new_tokens": 5, "pad_token_id": 0}'
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = OnnxCausalLM.from_pretrained(tmp_path / "copy", session_options=options)
    assert model.generation_config.eos_token_id == 7
    assert model.generate(random_tokens(1, 4)).shape[1] <= 9
    assert model.session.get_session_options().intra_op_num_threads == 1
    limited = OnnxCausalLM.from_pretrained(folder, num_threads=2)
    assert limited.session.get_session_options().intra_op_num_threads == 2
    for arguments in ({"num_threads": 0}, {"num_threads": 2, "session_options": options}):
        with pytest.raises(
            ConfigurationError, match="num_threads is [02]: it must be at least 1, and cannot be given"
        ):
            OnnxCausalLM.from_pretrained(folder, **arguments)


def test_missing_file_is_named_with_what_is_there(folder, tmp_path):
    with pytest.raises(ModelError, match=r"model_q2\.onnx'.*no such file.*onnx/model\.onnx, onnx/model_q4\.onnx"):
        OnnxCausalLM.from_pretrained(folder, "onnx/model_q2.onnx")
    with pytest.raises(ModelError, match="there is no folder .*nowhere"):
        OnnxCausalLM.from_pretrained(tmp_path / "nowhere")


def test_missing_or_broken_config_is_named(folder, tmp_path):
    shutil.copytree(folder / "onnx", tmp_path / "onnx")
    with pytest.raises(ModelError, match=r"folder is .*it has no config\.json"):
        OnnxCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"its config\.json is malformed .*Fetch or save the model again"):
        OnnxCausalLM.from_pretrained(tmp_path)


def test_broken_file_is_named(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    (tmp_path / "model.onnx").write_bytes((folder / "onnx/model.onnx").read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"file_name is .*model\.onnx'.*cannot load it"):
        OnnxCausalLM.from_pretrained(tmp_path, "model.onnx")


def test_file_of_another_kind_is_refused(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["pixels"], ["logits"])],
        "g",
        [value("pixels", onnx.TensorProto.FLOAT, [1])],
        [value("logits", onnx.TensorProto.FLOAT, [1])],
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10),
        tmp_path / "model.onnx",
    )
    with pytest.raises(ModelError, match=r"\['pixels'\].*missing: attention_mask, input_ids.*unknown: pixels"):
        OnnxCausalLM.from_pretrained(tmp_path, "model.onnx")


def test_file_without_positions_runs(folder, tmp_path):
    """As of BLOOM: the logit of token t at each position is 1, and the cache is that of one head of one number."""
    shutil.copy(folder / "config.json", tmp_path)
    helper, types = onnx.helper, onnx.TensorProto
    shape = ["batch", 1, "past", 1]
    depth = onnx.numpy_helper.from_array(np.array(97), "depth")
    values = onnx.numpy_helper.from_array(np.array([0, 1], np.float32), "values")
    axes = [onnx.numpy_helper.from_array(np.array([axis]), f"axis{axis}") for axis in (1, 3)]
    nodes = [
        helper.make_node("OneHot", ["input_ids", "depth", "values"], ["logits"]),
        helper.make_node("Cast", ["input_ids"], ["numbers"], to=types.FLOAT),
        helper.make_node("Unsqueeze", ["numbers", "axis1"], ["heads"]),
        helper.make_node("Unsqueeze", ["heads", "axis3"], ["new"]),
    ]
    inputs = [helper.make_tensor_value_info(n, types.INT64, ["batch", n]) for n in ("input_ids", "attention_mask")]
    outputs = [helper.make_tensor_value_info("logits", types.FLOAT, ["batch", "length", 97])]
    for kind in ("key", "value"):
        inputs.append(helper.make_tensor_value_info(f"past_key_values.0.{kind}", types.FLOAT, shape))
        outputs.append(helper.make_tensor_value_info(f"present.0.{kind}", types.FLOAT, ["batch", 1, "total", 1]))
        nodes.append(helper.make_node("Concat", [f"past_key_values.0.{kind}", "new"], [f"present.0.{kind}"], axis=2))
    graph = helper.make_graph(nodes, "g", inputs, outputs, [depth, values, *axes])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "model.onnx"
    )
    model, ids = OnnxCausalLM.from_pretrained(tmp_path, "model.onnx"), random_tokens(2, 4)
    output = model(ids, position_ids=torch.zeros_like(ids))
    assert torch.equal(output.logits.argmax(-1), ids)
    assert torch.equal(output.past_key_values.layers[0].keys[:, 0, :, 0].long(), ids)
    assert torch.equal(
        generate(model, ids, max_new_tokens=3, min_new_tokens=0, eos_token_id=96)[:, 4:], ids[:, -1:].expand(-1, 3)
    )


def test_mask_of_another_length_is_refused(onnx_model):
    cache = onnx_model(random_tokens(2, 3), use_cache=True).past_key_values
    with pytest.raises(ModelError, match=r"attention_mask is \(2, 1\): its shape must be \(2, 4\)"):
        onnx_model(random_tokens(2, 1), attention_mask=torch.ones(2, 1), past_key_values=cache)


def test_cache_of_another_kind_is_refused(onnx_model):
    cache = StaticCache(config=onnx_model.config, max_cache_len=16)
    for name in ("past_key_values", "cache"):
        with pytest.raises(ModelError, match=f"{name} is 'StaticCache'.*Pass the cache of an earlier output"):
            onnx_model(random_tokens(1, 3), **{name: cache})


def test_cache_has_the_names_of_all_versions(onnx_model, pytorch):
    ids, caches = random_tokens(1, 7, seed=8), [DynamicCache(), DynamicCache()]
    for part in (ids[:, :4], ids[:, 4:]):
        old, new = onnx_model(part, past_key_values=caches[0]), onnx_model(part, cache=caches[1])
        assert torch.equal(old.logits, new.logits)
    # the field that transformers' own output has, and no other
    expected = pytorch(ids, use_cache=True)
    assert list(new.keys()) == list(expected.keys())
    torch.testing.assert_close(new.logits, expected.logits[:, 4:].detach(), rtol=1e-4, atol=1e-4)
    assert [cache.get_seq_length() for cache in caches] == [7, 7]
    with pytest.raises(ModelError, match="cache is 'DynamicCache': past_key_values is given too.*Give one of them"):
        onnx_model(ids, past_key_values=caches[0], cache=caches[1])


@pytest.mark.parametrize(
    "argument", [{"output_attentions": True}, {"output_hidden_states": True}, {"inputs_embeds": torch.ones(1, 3, 32)}]
)
def test_what_the_file_lacks_is_refused(onnx_model, argument):
    with pytest.raises(
        ModelError, match=f"{next(iter(argument))} is .*the ONNX file takes token ids, and gives logits"
    ):
        onnx_model(random_tokens(1, 3), **argument)


def test_shapes_of_the_cache_come_from_the_file(folder, pytorch, tmp_path):
    """A configuration that states another head size changes nothing."""
    shutil.copytree(folder, tmp_path / "copy")
    config = type(pytorch.config).from_pretrained(folder)
    config.head_dim, config.num_key_value_heads = 8, 4
    config.save_pretrained(tmp_path / "copy")
    ids = random_tokens(1, 6, seed=2)
    model = OnnxCausalLM.from_pretrained(tmp_path / "copy")
    np.testing.assert_array_equal(generate(model, ids), generate(pytorch, ids))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[3, -1]]), r"input_ids is -1: the vocabulary has the tokens 0 to 96\. Give the ids of the tok"),
        (torch.tensor([[3, 97]]), "input_ids is 97: the vocabulary has the tokens 0 to 96"),
        (torch.tensor([[3.0, 4.0]]), r"input_ids is 'torch\.float32 \(1, 2\)': it must be a tensor of whole numbers"),
        (torch.tensor([[True, False]]), "it must be a tensor of whole numbers"),
        (torch.tensor([3, 4]), r"input_ids is \(2,\): its shape must be \[rows, tokens\], and it has 1 dimensions"),
        (torch.empty(1, 0, dtype=torch.long), r"input_ids is \(1, 0\): there is no token in it"),
        ([[3, 4]], r"input_ids is \[\[3, 4\]\]: it must be a tensor of whole numbers"),
        (None, "input_ids is None: it must be a tensor"),
    ],
)
def test_what_are_no_tokens_is_refused(onnx_model, ids, message):
    with pytest.raises(ModelError, match=message):
        onnx_model(ids)


def test_positions_end_where_the_context_does(onnx_model, folder):
    ids = random_tokens(1, 128)
    last = onnx_model(ids, use_cache=True)
    with pytest.raises(
        ModelError, match="position_ids is 128: the model has the positions 0 to 127. Give a shorter text"
    ):
        onnx_model(random_tokens(1, 1), past_key_values=last.past_key_values)
    for positions, shown in (([[5, -1]], -1), ([[0, 128]], 128)):
        with pytest.raises(ModelError, match=f"position_ids is {shown}: the model has the positions 0 to 127"):
            onnx_model(ids[:, :2], position_ids=torch.tensor(positions))
    with pytest.raises(ModelError, match="position_ids is .*: it must be a tensor of whole numbers"):
        onnx_model(ids[:, :2], position_ids=torch.tensor([[0.0, 1.0]]))
    # padding has no position: a row of 120 tokens behind 8 of padding is within the context
    mask = torch.ones_like(ids)
    mask[:, :8] = 0
    cache = onnx_model(ids, attention_mask=mask, use_cache=True).past_key_values
    assert (
        onnx_model(ids[:, :1], attention_mask=torch.cat([mask, mask[:, -1:]], 1), past_key_values=cache)
        .logits.isfinite()
        .all()
    )


def test_a_mask_is_a_tensor(onnx_model):
    for mask in ([[1, 1]], torch.ones(2)):
        with pytest.raises(ModelError, match=r"attention_mask is .*: it must be a tensor \[rows, tokens\]"):
            onnx_model(random_tokens(1, 2), attention_mask=mask)


@pytest.mark.parametrize("name", ["../x.onnx", "/etc/passwd", "onnx/../../x.onnx", "", "..\\x.onnx", "C:\\x.onnx"])
def test_files_outside_the_folder_are_refused(folder, name):
    with pytest.raises(ModelError, match="file_name is .*: it must lie inside the folder. Give a name such as"):
        OnnxCausalLM.from_pretrained(folder, name)


def test_unknown_providers_are_refused_instead_of_falling_back(folder):
    for provider in ("NoSuchProvider", ("NoSuchProvider", {}), 5):
        with pytest.raises(
            ConfigurationError, match=r"providers is .*: this installation of ONNX Runtime has .*CPUExec"
        ):
            OnnxCausalLM.from_pretrained(folder, providers=[provider])
    chosen = OnnxCausalLM.from_pretrained(folder, providers=[("CPUExecutionProvider", {})])
    assert chosen.session.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize("wrong", [5, b"x", None, "\0"])
def test_folders_of_no_kind_are_refused(wrong):
    with pytest.raises(ConfigurationError, match="folder is "):
        OnnxCausalLM.from_pretrained(wrong)


def test_a_repository_of_the_hub_is_fetched_as_far_as_it_is_needed(folder, onnx_model, monkeypatch):
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr("optimum_clp.runtime.folder.snapshot_download", download)
    model = OnnxCausalLM.from_pretrained("me/tiny-clp20", "onnx/model_q4.onnx", revision="main", token="t")
    ids = random_tokens(1, 4)
    assert model(ids).logits.isfinite().all()
    (name, options) = asked[0]
    assert (name, options["revision"], options["token"]) == ("me/tiny-clp20", "main", "t")
    assert {"config.json", "generation_config.json", "onnx/model_q4.onnx"} <= set(options["allow_patterns"])
    assert "onnx/model.onnx" not in options["allow_patterns"]


def test_a_repository_that_cannot_be_had_is_named():
    with pytest.raises(
        ModelError, match="folder is 'me/none': there is no such folder, and no such repository could be had"
    ):
        OnnxCausalLM.from_pretrained("me/none")


class TestAsTransformersOwnClass:
    """What `generate()` takes besides, with the same result as the PyTorch model's."""

    def test_stop_strings(self, onnx_model, pytorch):
        from byte_tokenizer import tiny_tokenizer

        tokenizer, ids = tiny_tokenizer(), random_tokens(1, 6)
        free = generate(pytorch, ids, min_new_tokens=None)
        options = {"stop_strings": [tokenizer.decode(free[0, 9])], "tokenizer": tokenizer, "min_new_tokens": None}
        expected = generate(pytorch, ids, **options)
        assert expected.shape[1] < free.shape[1]
        assert torch.equal(generate(onnx_model, ids, **options), expected)

    def test_text_streamer(self, onnx_model, pytorch, capsys):
        from tiny_models import tiny_tokenizer
        from transformers import TextStreamer

        tokenizer, ids = tiny_tokenizer(), random_tokens(1, 6)
        for model in (onnx_model, pytorch):
            generate(model, ids, streamer=TextStreamer(tokenizer))
        first, second = capsys.readouterr().out.strip().split("\n")
        assert first == second and len(first.split()) == 30

    @pytest.mark.parametrize("kind", ["same", "other", "onnx", "of onnx"])
    def test_assistant_model(self, folder, onnx_model, pytorch, kind):
        from tiny_models import tiny_model

        ids = random_tokens(1, 6)
        assistants = {"same": pytorch, "other": tiny_model("llama", 1, seed=3), "of onnx": onnx_model}
        assistant = assistants.get(kind) or OnnxCausalLM.from_pretrained(folder)
        model = pytorch if kind == "of onnx" else onnx_model
        options = {"min_new_tokens": None}
        assert torch.equal(
            generate(model, ids, assistant_model=assistant, **options), generate(pytorch, ids, **options)
        )


@pytest.mark.parametrize("name", ["fp16", "q4f16"])
def test_files_with_a_cache_of_16_bits_generate(name):
    made = exported_halves()
    model = OnnxCausalLM.from_pretrained(made.folder, f"onnx/model_{name}.onnx", num_threads=1)
    other = OnnxCausalLM.from_pretrained(
        made.folder, f"onnx/model{'' if name == 'fp16' else '_q4'}.onnx", num_threads=1
    )
    ids, mask = padded_batch()
    whole, expected = (m(ids, attention_mask=mask, use_cache=True) for m in (model, other))
    assert whole.logits.dtype == torch.float32
    real = mask.bool()
    difference = (whole.logits - expected.logits)[real].abs().max() / expected.logits[real].abs().max()
    # with int8 activations a code may tip
    assert difference < (0.03 if name == "fp16" else 0.1)
    cache = whole.get("cache", whole.get("past_key_values"))
    assert {layer.keys.dtype for layer in cache.layers} == {torch.float16}
    with_cache, without = (generate(model, ids, mask, use_cache=use_cache) for use_cache in (True, False))
    assert with_cache.shape == (3, 33) and torch.equal(with_cache[:, :13], without[:, :13])
