"""The counter of live tensor bytes, against sizes by arithmetic."""

import torch
from torch import nn

from optimum_clp.evaluation.live_memory import LiveTensorBytes


def test_what_died_counts_for_the_peak_alone():
    with LiveTensorBytes() as memory:
        first = torch.zeros(256)
        second = first + first
        assert (memory.live, memory.peak) == (2048, 2048)
        del second
        assert memory.live == 1024
        half = first.half()
    assert (memory.live, memory.peak) == (1024 + 512, 2048)
    del first, half


def test_views_take_nothing_and_what_is_part_of_the_model_counts_once():
    model = nn.Linear(64, 4)
    with LiveTensorBytes(model) as memory:
        assert memory.live == 4 * (64 * 4 + 4)
        rows = torch.zeros(2, 64)
        rows.view(-1)[:5]
        model.weight.detach()
        assert memory.live == memory.peak == 4 * (64 * 4 + 4) + 4 * 128
        output = model(rows)
    assert memory.live == 4 * (64 * 4 + 4) + 4 * 128 + output.numel() * 4


def test_backward_passes_are_seen():
    weight = torch.zeros(256, requires_grad=True)
    with LiveTensorBytes() as memory:
        product = weight * 2
        product.sum().backward()
    # the product and the weight's gradient, and at the peak the sum and its own gradient too
    assert (memory.live, memory.peak) == (2048, 2048 + 2 * 4)
    assert product.requires_grad
