import dataclasses

import pytest
from tiny_models import random_tokens, tiny_model

from optimum_clp import CLPConfig
from optimum_clp.errors import ConfigurationError
from optimum_clp.search.recipe import layers_to_remove, search_by_recipe
from optimum_clp.search.segment_search import search_segments, search_within_budget

TOKENS, VALIDATION = random_tokens(6, 16), random_tokens(3, 16, seed=1)


def without_time(result):
    return dataclasses.replace(result, seconds=0.0)


def test_a_ratio_asks_for_a_number_of_layers():
    model = tiny_model()
    recipe = CLPConfig(0.33, num_segments=2, seed=4, search={"strategy": "random", "num_sequences": 4})
    assert layers_to_remove(recipe, model.config) == 2
    found = search_by_recipe(model, TOKENS, VALIDATION, recipe, quiet=True)
    expected = search_segments(model, TOKENS, 2, recipe.search, num_segments=2, seed=4, quiet=True)
    assert without_time(found) == without_time(expected)


def test_a_budget_asks_for_as_many_as_it_allows():
    model = tiny_model()
    recipe = CLPConfig("auto", max_perplexity_increase=5.0, seed=4, search={"strategy": "exhaustive"})
    assert layers_to_remove(recipe, model.config) is None
    found = search_by_recipe(model, TOKENS, VALIDATION, recipe, quiet=True)
    expected = search_within_budget(model, TOKENS, VALIDATION, 5.0, recipe.search, seed=4, quiet=True)
    assert without_time(found) == without_time(expected) and found.lengths


def test_a_ratio_that_removes_nothing_is_an_error():
    with pytest.raises(ConfigurationError, match="it removes none of the model's 6 layers"):
        layers_to_remove(CLPConfig(0.05), tiny_model().config)
