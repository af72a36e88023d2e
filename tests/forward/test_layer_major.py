import os
import sys

import pytest
import torch
from gates import gated
from resident_pages import resident_pages
from tiny_models import MODEL_TYPES, random_tokens, tiny_model
from transformers import AutoModelForCausalLM
from zoo import ZOO, zoo_model

from optimum_clp.architecture.lookup import decoder_layers
from optimum_clp.errors import ModelError
from optimum_clp.forward.dense_outputs import DenseOutputs, StateStore
from optimum_clp.forward.hooks import recorded_inputs
from optimum_clp.forward.layer_major import LayerMajorPasses, Residence
from optimum_clp.forward.layer_stack import LayerStack
from optimum_clp.mapped_weights import MappedWeights

ROWS, LENGTH = 5, 12


def passes(model, tokens, layers=1, batch_size=2):
    stack = LayerStack(model, run=False)
    batches = torch.arange(len(tokens)).split(batch_size)
    options = {"residence": Residence(layers), "allocate": StateStore().allocate, "description": "", "quiet": True}
    return LayerMajorPasses(model, stack, tokens, None, batches, **options)


@pytest.mark.parametrize("tiny", ZOO, ids=lambda t: f"{t.model_type}{t.variant}")
def test_every_architecture_has_the_same_states_in_both_orders(tiny):
    """Types whose layers hand on more than hidden states go the old way."""
    model, tokens = zoo_model(tiny), random_tokens(3, LENGTH)
    depth = len(decoder_layers(model))
    kept = {"batch_size": 2, "inputs_of": range(depth), "quiet": True}
    plain, layer_major = (DenseOutputs(model, tokens, **kept, residence=r) for r in (None, Residence()))
    assert plain.hidden.keys() == layer_major.hidden.keys() == set(range(depth + 1))
    for index, states in plain.hidden.items():
        assert torch.equal(states, layer_major.hidden[index]), index
    rows = slice(0, 2)
    assert torch.equal(plain.logits(rows), layer_major.logits(rows))


def test_layers_are_read_once_whatever_the_rows_and_the_gates():
    model, tokens, ran = tiny_model(), random_tokens(ROWS, LENGTH), []
    layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        layer.self_attn.register_forward_hook(lambda *_, i=index: ran.append(i))
    passes(model, tokens).run([(1, 1, 0, 0, 1, 1), (0, 1, 1, 1, 1, 0.5)])
    assert ran == sorted(ran)  # never back to a layer that was left
    batches = 3
    assert [ran.count(i) for i in range(6)] == [
        batches,
        2 * batches,
        2 * batches,
        2 * batches,
        3 * batches,
        3 * batches,
    ]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("together", [1, 2, 4, 6])
def test_gates_leave_what_whole_passes_leave(model_type, together):
    model, tokens = tiny_model(model_type), random_tokens(ROWS, LENGTH)
    gates = [
        (1, 1, 0, 0, 1, 1),
        (0, 0, 1, 1, 1, 1),
        (1, 1, 1, 1, 1, 0),
        (1, 0.25, 0.5, 0, 1, 0.75),
        (0.5, 1, 1, 1, 0, 1),
        (1,) * 6,
    ]
    found = passes(model, tokens, together, batch_size=ROWS).run(gates)
    for gate, states in zip(gates, found, strict=True):
        with (
            torch.no_grad(),
            gated(model.model.layers, torch.tensor(gate, dtype=torch.float64)),
            recorded_inputs(model.model.layers, [6]) as expected,
        ):
            model(tokens, use_cache=False)
        assert torch.equal(states, expected[6])


def test_padding_is_seen_by_every_layer():
    model, tokens = tiny_model(), random_tokens(2, LENGTH)
    mask = torch.ones_like(tokens)
    mask[1, 7:] = 0
    walk = passes(model, tokens)
    walk.mask = mask
    walk.run()
    with torch.no_grad():
        alone = model.model(tokens[1:, :7], output_hidden_states=True)
    with torch.no_grad():
        torch.testing.assert_close(model.model.norm(walk.kept[6][1:, :7]), alone.last_hidden_state)


def test_states_wait_on_disk_beyond_the_memory_that_they_have(tmp_path):
    model, tokens = tiny_model(), random_tokens(ROWS, LENGTH)
    expected, store = DenseOutputs(model, tokens, batch_size=2, quiet=True), StateStore(tmp_path / "states", 0)
    found = DenseOutputs(model, tokens, batch_size=2, store=store, quiet=True, residence=Residence())
    assert torch.equal(found.hidden[6], expected.hidden[6])
    assert store.free_memory == 0 and (tmp_path / "states").is_dir()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the table of mappings is Linux's")
@pytest.mark.parametrize("together", [1, 2])
def test_no_more_layers_are_in_memory_than_may_be(tmp_path, together):
    """By the kernel's own table, at every call of a layer; a page or two at the ends hold a neighbour's numbers."""
    tiny_model(hidden_size=128, intermediate_size=512).save_pretrained(tmp_path)
    model, most = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval(), []
    weights = [layer.mlp.up_proj.weight for layer in model.model.layers]
    MappedWeights().let_go(model.parameters())
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: most.append(sum(resident_pages(weight) > 16 for weight in weights)))
    passes(model, random_tokens(ROWS, LENGTH), together).run([(1, 0, 0, 1, 1, 1), (1, 1, 1, 0, 1, 1)])
    assert max(most) == together
    assert all(resident_pages(weight) <= 16 for weight in weights)


def test_layers_that_hand_on_more_cannot_be_walked():
    walk, stack = passes(tiny_model(), random_tokens(2, 8)), LayerStack(tiny_model())
    stack._threads_state = True
    assert not stack.layer_by_layer
    with pytest.raises(ValueError, match="hand on more than hidden states"):
        LayerMajorPasses(
            walk.model, stack, walk.tokens, None, (), residence=Residence(), allocate=walk.allocate, description=""
        )


def test_a_file_that_is_written_to_meanwhile_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model, file = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval(), tmp_path / "model.safetensors"
    walk = passes(model, random_tokens(2, LENGTH))
    model.model.layers[3].register_forward_hook(lambda *_: file.open("r+b").close() or os.utime(file, (1, 1)))
    with pytest.raises(
        ModelError, match=r"model is '.*model\.safetensors': it was written to while its weights were read"
    ):
        walk.run()


def test_a_file_that_is_removed_meanwhile_does_not_matter(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model, tokens = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval(), random_tokens(2, LENGTH)
    expected = passes(model, tokens)
    expected.run()
    (tmp_path / "model.safetensors").unlink()
    found = passes(model, tokens)
    found.run()
    assert torch.equal(found.kept[6], expected.kept[6])
