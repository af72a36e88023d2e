import pytest
import torch
from zoo import ZOO, zoo_model

from optimum_clp.calibration.self_written import sample_text
from optimum_clp.forward.decoding import takes_back_its_cache


def member(name):
    return next((tiny for tiny in ZOO if tiny.name == name), None) or pytest.skip("not in this transformers")


@pytest.mark.parametrize(
    ("name", "expected"), [("llama", True), ("gpt2", True), ("gemma3_text", True), ("mamba", False)]
)
def test_it_is_seen_by_trying(name, expected):
    assert takes_back_its_cache(zoo_model(member(name))) is expected


def test_a_cache_that_forgets_is_not_taken_for_one():
    model = zoo_model(member("llama"))
    whole = model.forward

    def forgetful(*args, past_key_values=None, attention_mask=None, **kwargs):
        return whole(*args, **kwargs)

    model.forward = forgetful
    assert takes_back_its_cache(model) is False


def test_text_written_without_a_cache_follows_the_model(tmp_path):
    """Each token's loss is that of one pass over the finished text."""
    model = zoo_model(member("mamba"))
    sample = sample_text(model, num_sequences=3, sequence_length=12, seed=1, cache_dir=tmp_path, quiet=True)
    with torch.no_grad():
        logits = model(input_ids=sample.tokens).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), sample.tokens[:, 1:], reduction="none"
    ).mean(1)
    torch.testing.assert_close(sample.losses.float(), expected, rtol=1e-4, atol=1e-5)
