import sys

import pytest
import torch
from resident_pages import resident_pages
from tiny_models import random_tokens, tiny_model
from transformers import AutoModelForCausalLM

from optimum_clp.forward.hooks import let_go_behind
from optimum_clp.mapped_weights import MappedWeights

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the table of mappings is Linux's")
LARGE = {"hidden_size": 128, "intermediate_size": 512, "num_layers": 4}


@pytest.fixture
def mapped(tmp_path):
    """A checkpoint as transformers reads it on a CPU: in its file."""
    tiny_model(**LARGE).save_pretrained(tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()


def test_weights_of_a_checkpoint_lie_in_its_file_and_others_do_not(mapped, tmp_path):
    table = MappedWeights()
    assert all(map(table.holds, mapped.parameters()))
    assert table.bytes_of(mapped) == sum(p.nbytes for p in mapped.parameters())
    assert table.files_of(mapped) == [tmp_path / "model.safetensors"]
    own = tiny_model(**LARGE)
    assert not any(map(table.holds, own.parameters())) and table.bytes_of(own) == 0
    assert not table.holds(torch.empty(3, device="meta")) and not table.holds(torch.empty(0))


def test_pages_that_were_let_go_are_read_again(mapped):
    table, ids = MappedWeights(), random_tokens(1, 8)
    with torch.no_grad():
        before = mapped(ids).logits
        weight = mapped.model.layers[1].mlp.up_proj.weight
        assert resident_pages(weight) > 60
        freed = table.let_go(mapped.model.layers[1].parameters())
        assert resident_pages(weight) <= 2  # at the ends, with its neighbours' numbers
        assert freed > 0.9 * sum(p.nbytes for p in mapped.model.layers[1].parameters())
        assert torch.equal(mapped(ids).logits, before)


def test_weights_that_were_written_to_are_never_let_go(mapped):
    """Their file does not know the new numbers."""
    weight = mapped.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight += 1
    changed = weight.clone()
    table = MappedWeights()
    assert not table.holds(weight)
    assert table.let_go(mapped.parameters()) == 0
    assert torch.equal(weight, changed)


def test_layers_let_go_behind_their_forward(mapped):
    with torch.no_grad(), let_go_behind(mapped.model.layers):
        mapped(random_tokens(1, 8))
    assert all(resident_pages(layer.mlp.up_proj.weight) <= 2 for layer in mapped.model.layers)
    assert not any(layer._forward_hooks for layer in mapped.model.layers)


def test_without_a_table_nothing_lies_in_a_file(mapped, tmp_path):
    table = MappedWeights(tmp_path / "none")
    assert table.bytes_of(mapped) == 0 and table.let_go(mapped.parameters()) == 0
