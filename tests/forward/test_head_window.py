import pytest
import torch
from tiny_models import random_tokens, tiny_model
from zoo import ZOO, zoo_model

from optimum_clp.forward.dense_outputs import DenseOutputs
from optimum_clp.forward.head_window import logits_within

WINDOW = slice(3, 7)


@pytest.mark.slow
@pytest.mark.parametrize("tiny", ZOO, ids=lambda t: f"{t.model_type}{t.variant}")
def test_every_architecture_gives_the_logits_of_a_window(tiny):
    model, tokens = zoo_model(tiny).eval(), random_tokens(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(
            logits_within(model, tokens, WINDOW), model(input_ids=tokens, use_cache=False).logits[:, WINDOW]
        )


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "falcon", "mamba", "cohere"])
def test_logits_of_a_window_are_those_of_whole_rows(model_type):
    tiny = next(tiny for tiny in ZOO if tiny.model_type == model_type)
    test_every_architecture_gives_the_logits_of_a_window(tiny)


def test_the_head_runs_on_the_window_alone_where_the_model_takes_positions(monkeypatch):
    model, tokens, seen = tiny_model(), random_tokens(2, 12), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    with torch.no_grad():
        whole, part = logits_within(model, tokens, None), logits_within(model, tokens, WINDOW)
    assert seen == [12, 4] and torch.equal(whole[:, WINDOW], part)
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, input_ids, use_cache: forward(self, input_ids, use_cache=use_cache)
    )
    with torch.no_grad():
        assert torch.equal(logits_within(model, tokens, WINDOW), part)
    assert seen == [12, 4, 12]


def test_kept_outputs_give_the_logits_of_a_window():
    outputs = DenseOutputs(tiny_model(), random_tokens(4, 12), quiet=True)
    assert torch.equal(outputs.logits(slice(1, 3), WINDOW), outputs.logits(slice(1, 3))[:, WINDOW])
