"""Memory of losses and starts that the footprint has never heard of: it goes by what they say of themselves."""

import pytest
from container_zoo import container
from container_zoo import types as container_types
from tiny_models import tiny_model

from optimum_clp.architecture.lookup import decoder_layers
from optimum_clp.configuration.stages import QuantizationConfig, TuningConfig
from optimum_clp.doors import LOSSES, STARTS
from optimum_clp.errors import ModelError
from optimum_clp.planning.footprint import stored_weights, tuning_memory

KEPT, ENDPOINTS = [0, 1, 4, 5], [1, 2]
STATE = (5 + 3) * 24 * 32 * 4  # rows, tokens, width, float32
TOKENS = 2 * 24


def memory(**tuning):
    config = TuningConfig(**{"batch_size": 2, "init": "none", "hidden_epochs": 0, **tuning})
    rows = {"train_rows": 5, "validation_rows": 3, "sequence_length": 24}
    return tuning_memory(tiny_model(), KEPT, ENDPOINTS, config, activations=[(0, 0)] * 6, **rows)


@pytest.fixture
def registered(monkeypatch):
    """Lets a test register losses and starts."""
    for door in (LOSSES, STARTS):
        monkeypatch.setattr(door, "_rows", dict(door._rows))


@pytest.mark.parametrize(
    ("needs", "sets", "states"),
    [
        (("logits",), 1, 0),
        (("logits", "teacher_logits"), 2, 0),
        (("logits", "teacher_logits", "states"), 2, 1),
        (("states",), 0, 1),
    ],
)
def test_a_loss_takes_what_it_needs(registered, needs, sets, states):
    LOSSES.register("theirs", type("Theirs", (), {"needs": frozenset(needs)}))
    found = memory(loss="theirs")
    # float32 logits and probabilities, and four copies of the tokens in work
    assert found.logits == 97 * (TOKENS * sets * (4 + 4) + 4 * TOKENS * 4)
    # validation compares all positions, and so does a step with states
    less = memory(loss="theirs", logit_share=0.25).logits
    assert less == 97 * (TOKENS * sets * (8 if states else 4) + 4 * TOKENS * 4)
    # what enters the first endpoint and leaves the last layer, and what the last of the two endpoints is compared with
    assert found.caches == 8 * 24 * 8 + (2 + states) * STATE
    assert found.closed_form == 0
    assert memory(loss={"theirs": 0.0, "ce": 1.0}) == memory(loss="ce")
    # a stage of hidden states before it compares too
    assert memory(loss="theirs", hidden_epochs=1).caches == 8 * 24 * 8 + 3 * STATE


@pytest.mark.parametrize("targets", [{}, {2: 5}, {1: 4, 2: 5}, {1: 3}], ids=str)
def test_a_start_holds_what_it_says_and_what_it_compares_with(registered, targets):
    class Theirs:
        def targets(self, kept, layers, depth):
            assert (list(kept), list(layers), depth) == (KEPT, ENDPOINTS, 6)
            return targets

        def held_bytes(self, layers, width):
            return 1000 * len(layers) + width

    STARTS.register("theirs", Theirs)
    found, plain = memory(init="theirs"), memory()
    assert found.closed_form == 2032 + (STATE if targets else 0)
    assert found.caches - plain.caches == len(targets) * STATE
    assert (found.moments, found.logits, found.endpoints) == (plain.moments, plain.logits, plain.endpoints)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", container_types())
def test_of_a_container_its_text_decoder_is_counted(model_type):
    try:
        model = container(model_type)
        decoder_layers(model)
    except (ImportError, ModelError) as error:  # its vision tower is another library's; not cut in this transformers
        pytest.skip(str(error).strip().splitlines()[0])
    found = stored_weights(model, QuantizationConfig())
    layers = {id(p): p for layer in decoder_layers(model) for p in layer.parameters()}
    outside = {id(p) for name, p in model.named_parameters() if "vision" in name or "audio" in name}
    assert layers.keys() <= found.keys() and not outside & found.keys()
    assert id(model.get_input_embeddings().weight) in found
