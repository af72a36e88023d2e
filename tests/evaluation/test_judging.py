import math
import statistics

import pytest
import torch
from tiny_models import random_tokens, tiny_model

from optimum_clp.evaluation.judging import JudgedAnswers, mean, token_mean
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model

PROMPTS = [random_tokens(1, length, length)[0].tolist() for length in (3, 7, 1, 5, 5)]
ANSWERS = [random_tokens(1, length, 50 + length)[0].tolist() for length in (9, 2, 1, 14, 6)]


def test_losses_and_divergences_are_those_of_each_text_alone():
    dense = tiny_model()
    cut = cut_model(dense, [LayerSegment(2, 4)])
    judged = JudgedAnswers(dense, PROMPTS, ANSWERS, quiet=True)
    losses, divergences = judged.losses(), judged.divergences(cut, "cut")
    for index, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        with torch.no_grad():
            ids = torch.tensor([prompt + answer])
            said, other = (model(ids).logits[0].double().log_softmax(-1) for model in (dense, cut))
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        loss = -sum(said[place, ids[0, place + 1]].item() for place in places)
        kl = sum((said[place].exp() * (said[place] - other[place])).sum().item() for place in places)
        assert losses[index] == (pytest.approx(loss, rel=1e-4), len(answer))
        assert divergences[index] == (pytest.approx(kl, rel=1e-3), len(answer))


def test_means_and_their_errors():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert mean(values) == (pytest.approx(0.6), pytest.approx(statistics.stdev(values) / math.sqrt(5)))
    assert mean([2.0]) == (2.0, None)
    # answers of one length: the mean of their means
    assert token_mean([(4 * value, 4) for value in values]) == pytest.approx(mean(values))
    assert token_mean([(3.0, 1), (1.0, 3)])[0] == 1.0
    assert token_mean([(3.0, 2)]) == (1.5, None)


def test_the_error_of_a_ratio_is_that_of_repeated_samples():
    generator = torch.Generator().manual_seed(0)
    means, errors = [], []
    for _ in range(400):
        counts = torch.randint(1, 20, (40,), generator=generator)
        sums = counts * 0.5 + counts.sqrt() * torch.randn(40, generator=generator)
        found = token_mean(list(zip(sums.tolist(), counts.tolist(), strict=True)))
        means.append(found[0])
        errors.append(found[1])
    assert statistics.fmean(errors) == pytest.approx(statistics.stdev(means), rel=0.1)
