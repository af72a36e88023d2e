"""Models that somebody has changed since they were built, and models that change themselves while they run."""

import pytest
import torch
from tiny_models import random_tokens, tiny_model
from transformers import Phi3Config, Phi3ForCausalLM
from zoo import ZOO, zoo_model

from optimum_clp.checkpoint.saving import save_checkpoint, verify_checkpoint
from optimum_clp.errors import CutError, ModelError
from optimum_clp.forward.hooks import evaluation_mode
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model
from optimum_clp.surgery.guard import check_uncut

ORIGINAL = 24
"""Tokens from which on the long frequencies hold."""


def phi(**settings):
    """Phi-4-mini's kind: other rotary frequencies for texts of more than `ORIGINAL` tokens, and a window beyond that."""
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        original_max_position_embeddings=ORIGINAL,
        sliding_window=40,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        rope_scaling={
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
        },
        **settings,
    )
    return Phi3ForCausalLM(config).eval()


def dynamic():
    return tiny_model(max_position_embeddings=32, rope_scaling={"rope_type": "dynamic", "factor": 2.0})


def logits(model, length):
    with torch.no_grad():
        return model(random_tokens(2, length), use_cache=False).logits


def stretched(output):
    return output * 1.5 if isinstance(output, torch.Tensor) else (output[0] * 1.5, *output[1:])


def layer_hook(model, change):
    model.model.layers[1].register_forward_hook(lambda module, given, output: change(output))


def head_hook(model, change):
    model.lm_head.register_forward_hook(lambda module, given, output: change(output))


def before_hook(model, change):
    model.lm_head.register_forward_pre_hook(lambda module, given: tuple(map(change, given)))


def own_forward(model, change):
    layer = model.model.layers[1]
    forward = layer.forward
    layer.forward = lambda *given, **named: change(forward(*given, **named))


@pytest.mark.parametrize("hang", [layer_hook, head_hook, before_hook, own_forward])
def test_a_hook_that_no_checkpoint_would_have_is_refused_if_it_does_something(hang):
    model = tiny_model()
    hang(model, stretched)
    message = "dense model, .* is 'a forward (hook|method of its own)': it changes what the model computes, and is in no check"
    for step in (check_uncut, lambda given: cut_model(given, [LayerSegment(2, 4)])):
        with pytest.raises(CutError, match=message):
            step(model)
    # one that looks on, and a kernel that rounds otherwise, is no change
    for harmless in (lambda output: output, lambda output: output * (1 + 1e-6) if torch.is_tensor(output) else output):
        model = tiny_model()
        hang(model, harmless)
        check_uncut(model)
        assert cut_model(model, [LayerSegment(2, 4)]).config.num_hidden_layers == 4


def one_module(layers):
    layers[4].mlp = layers[5].mlp


def one_tensor(layers):
    layers[5].mlp.up_proj.weight = layers[4].mlp.up_proj.weight


def one_storage(layers):
    layers[5].mlp.up_proj.weight = torch.nn.Parameter(layers[4].mlp.up_proj.weight.data)


@pytest.mark.parametrize("share", [one_module, one_tensor, one_storage])
def test_layers_that_share_a_weight_by_hand_are_refused(share):
    """transformers would refuse to save them, after the search."""
    model = tiny_model()
    share(model.model.layers)
    message = (
        r"layers.5.mlp.*weight is the same tensor as model.layers.4.mlp.*Give the layer weights of its own: module.wei"
    )
    for step in (check_uncut, lambda given: cut_model(given, [LayerSegment(1, 3)])):
        with pytest.raises(ModelError, match=message):
            step(model)


def test_layers_that_share_by_their_class_are_cut():
    """Zamba's attention blocks are one block; transformers knows that, and saves it once."""
    model = zoo_model(next(tiny for tiny in ZOO if tiny.name == "zamba"))
    check_uncut(model)


def naive_cut(model, start, stop):
    """Another way to the same model: the layers deleted from a copy."""
    import copy

    copied = copy.deepcopy(model)
    copied.model.layers = torch.nn.ModuleList([*copied.model.layers[:start], *copied.model.layers[stop:]])
    copied.config.num_hidden_layers = len(copied.model.layers)
    return copied


def own_state(model):
    """Buffers and what rotary embeddings keep beside them, by value."""
    found = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, (int, float, torch.Tensor)) and not key.startswith("_"):
                found[f"{name}:{key}"] = torch.as_tensor(value).clone()
    return found


def same_state(model, before):
    now = own_state(model)
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)


@pytest.mark.parametrize("read_before", [0, 20, 60])
@pytest.mark.parametrize("make", [phi, dynamic])
def test_frequencies_that_follow_the_length(make, read_before, tmp_path):
    model = make()
    if read_before:
        logits(model, read_before)
    before = own_state(model)
    smaller = cut_model(model, [LayerSegment(2, 4)])
    assert same_state(model, before)
    logits(smaller, 60)  # what the cut model reads is its own matter
    assert same_state(model, before)
    save_checkpoint(smaller, None, tmp_path)
    verify_checkpoint(tmp_path, smaller)
    for length in (8, 20, 60, 8):
        assert torch.equal(logits(smaller, length), logits(naive_cut(make(), 2, 4), length))
    assert not torch.equal(logits(smaller, 60)[:, :20], logits(smaller, 20))


SCALINGS = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "linear": {"rope_type": "linear", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + i / 10 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
        "factor": 4.0,
        "original_max_position_embeddings": 12,
    },
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_other_scalings_of_frequencies(scaling, tmp_path):
    def make():
        return tiny_model(max_position_embeddings=48, rope_scaling=dict(SCALINGS[scaling]))

    model = make()
    smaller = cut_model(model, [LayerSegment(2, 4)])
    save_checkpoint(smaller, None, tmp_path)
    verify_checkpoint(tmp_path, smaller)
    for length in (8, 40):
        assert torch.equal(logits(smaller, length), logits(naive_cut(make(), 2, 4), length))


def test_evaluation_mode_puts_back_what_a_model_changes_of_itself():
    model = phi()
    before = own_state(model)
    with evaluation_mode(model):
        logits(model, 60)
        assert not torch.equal(model.model.rotary_emb.inv_freq, before["model.rotary_emb.inv_freq"])
    assert same_state(model, before)


def test_verify_sees_another_long_factor(tmp_path):
    smaller = cut_model(phi(), [LayerSegment(2, 4)])
    save_checkpoint(smaller, None, tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("5.0", "5.5"))
    with pytest.raises(CutError, match="read back it computes other logits"):
        verify_checkpoint(tmp_path, smaller)


def resized(model):
    model.resize_token_embeddings(120)


def notes(model):
    model.add_model_tags(["mine"])
    model.model.layers[4].note = "read twice"


def padding(model):
    model.config.pad_token_id = 5


def dropout(model):
    model.config.attention_dropout = 0.1


def checkpointing(model):
    model.gradient_checkpointing_enable()


def stale_index(model):
    for layer, index in zip(model.model.layers, (0, 1, 3, 4, 5, 6), strict=True):
        layer.self_attn.layer_idx = index


@pytest.mark.parametrize("change", [resized, notes, padding, dropout, checkpointing, stale_index])
def test_values_that_no_config_holds_and_no_output_shows(change, tmp_path):
    model = tiny_model()
    change(model)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    smaller = cut_model(model, [LayerSegment(2, 4)])
    assert all({**vars(module)} == before[name] for name, module in model.named_modules())
    save_checkpoint(smaller, None, tmp_path)
    verify_checkpoint(tmp_path, smaller)
    model.eval()
    assert torch.equal(logits(smaller, 20), logits(naive_cut(model, 2, 4), 20))
    assert [layer.self_attn.layer_idx for layer in smaller.model.layers] == [0, 1, 2, 3]


def norm(model):
    model.model.layers[5].input_layernorm.variance_epsilon = 0.1


def scale(model):
    model.model.layers[0].self_attn.scaling = 1.0


@pytest.mark.parametrize(
    ("change", "name"), [(norm, "input_layernorm.variance_epsilon"), (scale, "self_attn.scaling")]
)
def test_values_that_the_output_shows_are_refused(change, name):
    model = tiny_model()
    change(model)
    with pytest.raises(
        CutError, match=f"dense model, layer .: {name} is .*: it was changed after the model was built"
    ):
        cut_model(model, [LayerSegment(2, 4)])


def test_a_window_that_one_short_row_does_not_show_is_refused():
    model = tiny_model("mistral")
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 30
    with pytest.raises(CutError, match="dense model, layer 0: self_attn.sliding_window is 30: it was changed after"):
        cut_model(model, [LayerSegment(2, 4)])


def test_changes_do_not_hide_a_fault_of_the_cut(monkeypatch):
    """The planted faults of the guard, beside a change that is allowed."""
    from optimum_clp.architecture.lookup import cut_config

    model = tiny_model("qwen3")
    resized(model)

    def spoilt(config, kept):
        new = cut_config(config, kept)
        if len(kept) < 6:
            new.rms_norm_eps = 0.1
        return new

    monkeypatch.setattr("optimum_clp.surgery.cut.cut_config", spoilt)
    with pytest.raises(CutError, match="norm.variance_epsilon is 0.1: the dense model has 1e-06 there"):
        cut_model(model, [LayerSegment(2, 4)])
