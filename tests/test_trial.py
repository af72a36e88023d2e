"""What would be refused after the search is refused before it."""

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from zoo import ZOO, zoo_model

from optimum_clp import CLPConfig, CLPPruner
from optimum_clp import trial as trials
from optimum_clp.errors import CutError, ModelError
from optimum_clp.trial import try_cut


def norm(model):
    model.model.layers[5].input_layernorm.variance_epsilon = 0.1


def rotary_base(model):
    if getattr(model.config, "rope_parameters", None):
        model.config.rope_parameters["rope_theta"] = 7.0
    else:
        model.config.rope_theta = 7.0


def buffer(model):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 2


def value_head(model):
    model.add_module("value_head", torch.nn.Linear(32, 1))


def deleted_layer(model):
    del model.model.layers[1]
    model.config.num_hidden_layers = 5


def repeated_layer(model):
    model.model.layers.insert(2, model.model.layers[1])
    model.config.num_hidden_layers = 7


def count_of_another(model):
    model.config.num_hidden_layers = 5


CHANGES = {
    norm: (CutError, "layer 5: input_layernorm.variance_epsilon is 0.1: it was changed after the model was built"),
    rotary_base: (
        CutError,
        "dense model is 'LlamaForCausalLM': saved and read back it would be another, cut or not: .*inv_f",
    ),
    buffer: (CutError, "saved and read back it would be another, cut or not: .*inv_freq.*Its config and its weights"),
    value_head: (CutError, "value_head is None: the dense model has 'Linear' there"),
    deleted_layer: (
        ModelError,
        r"layer 1: self_attn.layer_idx is 2 instead of 1.*Save the model and load it again, or",
    ),
    repeated_layer: (ModelError, "layer 2 is the same object as an earlier layer.*copy.deepcopy"),
    count_of_another: (ModelError, "its decoder layers were not found: lists of 5 modules are nowhere"),
}


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_refused_before_any_text_is_written(change, size, monkeypatch):
    """Also where the weights are too large to be written for a trial."""
    error, message = CHANGES[change]
    if size == "large":
        monkeypatch.setattr(trials, "LARGEST_TRIAL", 0)
    model = tiny_model()
    change(model)
    pruner = CLPPruner(model, tiny_tokenizer(), quiet=True) if change is not count_of_another else None
    monkeypatch.setattr(
        "optimum_clp.session.load_calibration", lambda *given, **named: pytest.fail("text was asked for")
    )
    with pytest.raises(error, match=message):
        if pruner is None:
            try_cut(model, None, 2)
        else:
            pruner.prune(CLPConfig(pruning_ratio=0.33))


# what the trial does differs little from type to type, and the contract cuts and saves them all
USUAL = {"llama", "gpt2", "phi3", "gemma3_text", "qwen3_moe", "qwen3_next", "deepseek_v3", "mpt", "bamba", "mamba2"}


@pytest.mark.parametrize(
    "tiny",
    [pytest.param(t, marks=() if t.name in USUAL else pytest.mark.slow, id=t.name) for t in ZOO],
)
def test_no_architecture_is_refused_by_its_trial(tiny, monkeypatch):
    """As large models are tried; that they come back with their weights is in the contract."""
    monkeypatch.setattr(trials, "LARGEST_TRIAL", 0)
    model = zoo_model(tiny)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try_cut(model, None, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_fault_of_saving_is_found(monkeypatch):
    """A class whose config does not come back from its file."""
    model = tiny_model("mistral")
    real = trials.save_checkpoint

    def forgetful(model, tokenizer, folder, cache_dir=None):
        real(model, tokenizer, folder)
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace('"sliding_window": 12', '"sliding_window": 5'))

    monkeypatch.setattr(trials, "save_checkpoint", forgetful)
    with pytest.raises(CutError, match="saved and read back it would be another, cut or not: .*computes other logits"):
        try_cut(model, None, 2)


def test_a_fault_of_the_cut_alone_is_the_cuts(monkeypatch):
    model = tiny_model()
    real = trials.save_checkpoint

    def spoils_cuts(model, tokenizer, folder, cache_dir=None):
        if model.config.num_hidden_layers < 6:
            model.config.rms_norm_eps = 0.1
        real(model, tokenizer, folder)

    monkeypatch.setattr(trials, "save_checkpoint", spoils_cuts)
    with pytest.raises(CutError, match="checkpoint is .*read back it computes other logits"):
        try_cut(model, None, 2)


def test_no_large_weights_are_written(monkeypatch):
    monkeypatch.setattr(trials, "LARGEST_TRIAL", 0)
    monkeypatch.setattr(trials, "save_checkpoint", lambda *given: pytest.fail("weights were written"))
    try_cut(tiny_model(), tiny_tokenizer(), 2)


def test_copy_shares_nothing_with_the_dense_model():
    model = tiny_model(tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    from optimum_clp import LayerSegment

    for shares, options in ((True, {}), (False, {"copy": True})):
        smaller = CLPPruner(model, quiet=True).cut([LayerSegment(2, 4)], **options)
        pointers = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        assert any(tensor.data_ptr() in pointers for tensor in (*smaller.parameters(), *smaller.buffers())) == shares
        assert smaller.lm_head.weight is smaller.model.embed_tokens.weight
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
