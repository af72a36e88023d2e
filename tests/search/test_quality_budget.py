import math

import pytest
import torch
from searches import settings
from tiny_models import make_identity, random_tokens, tiny_model, tiny_tokenizer

from optimum_clp import CLPConfig, CLPPruner
from optimum_clp.errors import ConfigurationError, SearchError
from optimum_clp.evaluation.tokens import evaluate_tokens
from optimum_clp.planning.plan import plan_pruning
from optimum_clp.search.segment_search import search_within_budget
from optimum_clp.segments import LayerSegment, candidate_segments
from optimum_clp.surgery.cut import cut_model


def written_by(model, rows, length, seed=0):
    """Tokens drawn from the model itself, so that damage raises their perplexity."""
    torch.manual_seed(seed)
    return model.generate(random_tokens(rows, 1), do_sample=True, min_new_tokens=length, max_new_tokens=length)


def test_as_many_layers_go_as_the_budget_lets_go():
    model = make_identity(tiny_model(num_layers=10), [3, 4, 5, 6])
    search, check = written_by(model, 8, 24), written_by(model, 6, 24, seed=1)
    result = search_within_budget(model, search, check, 0.01, settings("exhaustive"), quiet=True)
    assert result.segments == (LayerSegment(3, 7),) and result.num_removed == 4
    dense = evaluate_tokens(model, check).perplexity
    for tried in result.lengths:
        cut = evaluate_tokens(cut_model(model, tried.segments), check).perplexity
        assert tried.perplexity_increase == pytest.approx(cut / dense - 1, rel=1e-3, abs=1e-6)
        assert tried.fits == (tried.num_removed <= 4)
    everything = [evaluate_tokens(cut_model(model, [s]), check).perplexity for s in candidate_segments(10, 5)]
    assert min(everything) > 1.01 * dense
    assert {4, 5} <= {tried.num_removed for tried in result.lengths}


def test_several_segments_let_more_go():
    model = make_identity(tiny_model(num_layers=10), [1, 2, 6, 7])
    search, check = written_by(model, 8, 24), written_by(model, 6, 24, seed=1)
    found = {
        k: search_within_budget(model, search, check, 0.01, settings("exhaustive"), num_segments=k, quiet=True)
        for k in (1, 2)
    }
    assert found[1].num_removed == 2
    assert found[2].segments == (LayerSegment(1, 3), LayerSegment(6, 8))


def test_a_budget_that_not_even_one_layer_fits_is_an_error():
    model = tiny_model()
    tokens = written_by(model, 6, 24)
    with pytest.raises(
        SearchError, match="max_perplexity_increase is 1e-06: removing 1 layer already costs .*Allow more"
    ):
        search_within_budget(model, tokens, tokens, 1e-6, settings("exhaustive"), quiet=True)


def test_the_pruner_and_the_report_of_an_automatic_ratio(tmp_path):
    model = make_identity(tiny_model(num_layers=8), [2, 3])
    calibration = {"sequence_length": 16, "train_sequences": 8, "validation_sequences": 4, "test_sequences": 4}
    calibration["cache_dir"] = str(tmp_path)
    config = CLPConfig("auto", min_retention=0.98, calibration=calibration, tuning={"enabled": False})
    pruner = CLPPruner.from_pretrained(model, tokenizer=tiny_tokenizer(), quiet=True)
    smaller = pruner.prune(config)
    assert smaller.config.num_hidden_layers == 6
    assert pruner.segments == (LayerSegment(2, 4),)
    tried = {entry["num_removed"]: entry for entry in pruner.report.search["lengths"]}
    assert tried[2]["fits"] and not tried[3]["fits"]
    assert tried[2]["perplexity_increase"] <= 1 / 0.98 - 1 < tried[3]["perplexity_increase"]
    assert math.isfinite(pruner.report.search["dense_loss"])


def test_a_plan_needs_a_number():
    with pytest.raises(ConfigurationError, match="pruning_ratio is 'auto': how many layers .* is not known before"):
        plan_pruning(tiny_model().config, CLPConfig("auto", min_retention=0.9))
