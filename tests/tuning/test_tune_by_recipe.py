import torch
from tiny_models import random_tokens, tiny_model

from optimum_clp import CLPConfig, LayerSegment
from optimum_clp.calibration.rows import CalibrationData
from optimum_clp.surgery.cut import cut_model
from optimum_clp.tuning.endpoints import tune_layers
from optimum_clp.tuning.recipe import tune_by_recipe


def test_the_layers_next_to_the_cut_are_tuned_on_the_recipes_rows():
    dense, segments = tiny_model(num_layers=8), (LayerSegment(3, 5),)
    train, validation = random_tokens(8, 12), random_tokens(4, 12, seed=1)
    kinds = ("given", "given", "self-written", "self-written")
    data = CalibrationData(train, validation, validation, "text", None, kinds)
    recipe = CLPConfig(seed=3, tuning={"endpoint_width": 2, "epochs": 1, "batch_size": 4})
    model, other = cut_model(dense, segments), cut_model(dense, segments)
    found = tune_by_recipe(model, dense, segments, data, recipe, quiet=True)
    expected = tune_layers(
        other,
        dense,
        [1, 2, 3, 4],
        train,
        validation,
        recipe.tuning,
        kept=[0, 1, 2, 5, 6, 7],
        validation_kinds=kinds,
        seed=3,
        quiet=True,
    )
    assert found == expected and found.layers == (1, 2, 3, 4) and set(found.history[0].by_kind) == set(kinds)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
