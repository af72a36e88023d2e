"""Models that were refused after the whole search, or at its end, and are cut: each through one call of `prune`.

Each is given as people have it in memory; what is written is read back by the stock classes, and the dense model is left as it
was found.
"""

import pytest
import torch
from tiny_models import random_tokens, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

from optimum_clp import CLPConfig, CLPPruner


def phi():
    """Long texts have other rotary frequencies, and the rows of the recipe are long."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
    tokens = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    scaling = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    lengths = {"max_position_embeddings": 512, "original_max_position_embeddings": 12, "sliding_window": 30}
    config = Phi3Config(**sizes, **tokens, **lengths, rope_scaling=scaling, initializer_range=0.15)
    return Phi3ForCausalLM(config).eval()


def resized():
    model = tiny_model()
    model.resize_token_embeddings(120)
    return model


def compiled():
    return torch.compile(tiny_model())


def tagged_and_training():
    model = tiny_model().train()
    model.add_model_tags(["unsloth"])
    model.config.pad_token_id = 2
    model.config.use_cache = False
    return model


def stray_quantization():
    model = tiny_model()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    return model


def state(model):
    model = getattr(model, "_orig_mod", model)
    tensors = {name: tensor.clone() for name, tensor in (*model.state_dict().items(), *model.named_buffers())}
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    return tensors, attributes, model.config.to_dict()


def same(one, other):
    return (
        one[0].keys() == other[0].keys()
        and all(torch.equal(tensor, other[0][name]) for name, tensor in one[0].items())
        and {name: sorted(values) for name, values in one[1].items()}
        == {name: sorted(values) for name, values in other[1].items()}
        and one[2] == other[2]
    )


@pytest.mark.parametrize("make", [phi, resized, compiled, tagged_and_training, stray_quantization])
def test_prune(make, tmp_path):
    model = make()
    before = state(model)
    recipe = CLPConfig(
        pruning_ratio=0.33,
        calibration={
            "sequence_length": 24,
            "train_sequences": 8,
            "validation_sequences": 2,
            "test_sequences": 2,
            "cache_dir": str(tmp_path / "cache"),
        },
        search={"num_sequences": 4},
        tuning={"epochs": 1, "batch_size": 4},
        export={"enabled": False},
        evaluation={"max_new_tokens": 4},
    )
    pruner = CLPPruner.from_pretrained(model, tokenizer=tiny_tokenizer(), quiet=True)
    smaller = pruner.prune(recipe, save_directory=tmp_path / "out")
    assert same(state(model), before)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert stock.config.num_hidden_layers == 4 and not hasattr(stock.config, "quantization_config")
    for length in (8, 40):
        with torch.no_grad():
            ids = random_tokens(1, length)
            assert torch.equal(stock(ids, use_cache=False).logits, smaller(ids, use_cache=False).logits)
