import copy

import pytest
import torch
from gates import gated
from tiny_models import MODEL_TYPES, random_tokens, tiny_model
from transformers import AutoModelForCausalLM

from optimum_clp.architecture.lookup import cut_config, decoder_layers
from optimum_clp.errors import CLPError, CutError, ModelError
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model, own_storage
from optimum_clp.surgery.guard import check_cut
from optimum_clp.surgery.sizes import count_bytes, count_parameters

CUTS = [[(0, 2)], [(2, 4)], [(4, 6)], [(1, 2), (3, 5)]]


def segments_of(cut):
    return [LayerSegment(*s) for s in cut]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_cut_model_is_the_hard_gated_model_and_reloads(model_type, tied, cut, tmp_path):
    model, ids = tiny_model(model_type, tie_word_embeddings=tied), random_tokens(2, 30)
    gate = torch.ones(6)
    for start, stop in cut:
        gate[start:stop] = 0
    smaller = cut_model(model, segments_of(cut))
    with torch.no_grad(), gated(decoder_layers(model), gate):
        expected = model(ids, use_cache=False).logits
    with torch.no_grad():
        assert torch.equal(smaller(ids, use_cache=False).logits, expected)
    smaller.save_pretrained(tmp_path)
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(stock.eval()(ids, use_cache=False).logits, expected)
    assert stock.config.num_hidden_layers == 6 - sum(b - a for a, b in cut)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_cached_generation_equals_uncached(model_type):
    smaller = cut_model(tiny_model(model_type), [LayerSegment(2, 4)])
    ids = random_tokens(2, 20)  # longer than the sliding window
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    cached = smaller.generate(ids, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached, smaller.generate(ids, attention_mask=mask, use_cache=False, **options))
    assert len(cached[:, 20:].unique()) > 4


def test_storage_is_shared_and_the_dense_model_is_untouched():
    model = tiny_model(tie_word_embeddings=True)
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    smaller = cut_model(model, [LayerSegment(2, 4)])
    assert smaller.model.layers[2].mlp.up_proj.weight.data_ptr() == model.model.layers[4].mlp.up_proj.weight.data_ptr()
    assert smaller.lm_head.weight is smaller.model.embed_tokens.weight
    assert smaller.model.layers[2].self_attn.layer_idx == 2 and model.model.layers[4].self_attn.layer_idx == 4
    smaller.requires_grad_(False)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.config.num_hidden_layers == 6
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(t.is_meta for t in [*smaller.parameters(), *smaller.buffers()])
    assert not any(isinstance(v, torch.Tensor) and v.is_meta for m in smaller.modules() for v in vars(m).values())


def test_owned_layers_no_longer_share():
    model = tiny_model()
    smaller = cut_model(model, [LayerSegment(2, 4)])
    own_storage(decoder_layers(smaller)[1])
    with torch.no_grad():
        for p in smaller.model.layers[1].parameters():
            p.add_(1)
    assert torch.equal(smaller.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    torch.testing.assert_close(
        smaller.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight + 1, rtol=0, atol=0
    )


def test_generation_config_dtype_and_attention_are_kept():
    model = tiny_model().to(torch.bfloat16)
    model.set_attn_implementation("eager")
    model.generation_config.temperature = 0.37
    smaller = cut_model(model, [LayerSegment(1, 3)])
    assert smaller.dtype == torch.bfloat16
    assert smaller.config._attn_implementation == "eager"
    assert smaller.generation_config.temperature == 0.37
    smaller.generation_config.temperature = 1.0
    assert model.generation_config.temperature == 0.37


def test_counts():
    model = tiny_model(tie_word_embeddings=True)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    smaller = cut_model(model, [LayerSegment(0, 2)])
    assert count_parameters(model) - count_parameters(smaller) == 2 * layer
    assert count_bytes(smaller) == 4 * count_parameters(smaller)


def test_offloaded_weights_are_refused():
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.empty(56, 32, device="meta"))
    with pytest.raises(ModelError, match="a cut needs every weight in memory, and this one is offloaded"):
        cut_model(model, [LayerSegment(2, 4)])


def test_a_segment_outside_the_model_is_refused():
    with pytest.raises(CLPError, match="the model has 6 layers"):
        cut_model(tiny_model(), [LayerSegment(4, 9)])


class TestGuard:
    """Planted faults, each of which a naive slice would let through."""

    def pair(self, model_type="qwen3"):
        model = tiny_model(model_type)
        return model, cut_model(model, [LayerSegment(2, 4)])

    def test_a_stale_layer_index(self):
        model, smaller = self.pair()
        smaller.model.layers[2].self_attn.layer_idx = 4
        with pytest.raises(CutError, match="layer 2: self_attn.layer_idx is 4: the dense model has 2 there"):
            check_cut(smaller, model, [0, 1, 4, 5])

    def test_a_shifted_sliding_window(self):
        model, smaller = self.pair()
        smaller.model.layers[1].self_attn.sliding_window = 12
        with pytest.raises(CutError, match="layer 1: self_attn.sliding_window is 12: the dense model has None"):
            check_cut(smaller, model, [0, 1, 4, 5])

    def test_weights_of_another_layer(self):
        model, smaller = self.pair()
        smaller.model.layers[2].mlp.up_proj.weight = torch.nn.Parameter(model.model.layers[3].mlp.up_proj.weight.data)
        with pytest.raises(CutError, match="model.layers.2.mlp.up_proj.weight"):
            check_cut(smaller, model, [0, 1, 4, 5])

    def test_a_config_with_the_wrong_count(self, monkeypatch):
        monkeypatch.setattr("optimum_clp.surgery.cut.cut_config", lambda config, kept: cut_config(config, kept[:-1]))
        with pytest.raises(CutError, match="number of layers is 3: the dense model has 4 there"):
            cut_model(tiny_model(), [LayerSegment(2, 4)])
