import random

import pytest

from optimum_clp.evaluation.loops import has_loop, loop_begin


def plain(tokens):
    """The definition, written out: any window of 64 of the last 512 tokens, any period up to 10."""
    tail = tokens[-512:]
    for start in range(len(tail) - 63):
        window = tail[start : start + 64]
        for period in range(1, 11):
            pairs = [window[i] == window[i + period] for i in range(64 - period)]
            if sum(pairs) >= 0.9 * len(pairs):
                return True
    return False


def noisy(period, length, errors, rng):
    tokens = [i % period for i in range(length)]
    for place in rng.sample(range(length), errors):
        tokens[place] = 99
    return tokens


def test_it_is_the_definition():
    rng, found = random.Random(0), []
    for _ in range(60):
        before = [rng.randrange(50) for _ in range(rng.randrange(80))]
        text = before + noisy(rng.randrange(1, 13), rng.randrange(40, 120), rng.randrange(8), rng)
        found.append(plain(text))
        assert has_loop(text) is found[-1]
    assert 10 < sum(found) < 50


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([7] * 64, True),
        ([7] * 63, False),
        (list(range(10)) * 7, True),
        (list(range(11)) * 7, False),
        (list(range(300)), False),
        ([7] * 64 + list(range(512)), False),
        ([], False),
    ],
)
def test_where_it_begins_and_ends(tokens, loops):
    assert has_loop(tokens) is loops


def test_where_the_first_loop_begins():
    before = list(range(100, 150))
    assert loop_begin([*before, *[7] * 80]) == 50 - 6  # a tenth may disagree
    assert loop_begin([*range(100, 800), *[1, 2, 3] * 40]) == 700 - 6
    assert loop_begin(before) is None
