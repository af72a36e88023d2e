import pytest
import torch

from optimum_clp.forward import losses
from optimum_clp.forward.losses import jensen_shannon_divergence, kl_divergence, next_token_cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_matches_the_definition_in_float64(dtype, monkeypatch):
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 2, 5, 11).to(dtype)
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1)
    for probabilities in (1, 3 * 11, 2**22):
        monkeypatch.setattr(losses, "CHUNK_PROBABILITIES", probabilities)
        torch.testing.assert_close(kl_divergence(teacher, student).double(), expected, atol=1e-5, rtol=1e-5)


def test_kl_of_equal_logits_is_zero_and_the_teacher_gets_no_gradient():
    teacher = torch.randn(3, 7, requires_grad=True)
    student = teacher.detach().clone().requires_grad_()
    loss = kl_divergence(teacher, student).sum()
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_has_autograds_gradient_and_keeps_it_alone(dtype, monkeypatch):
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 2, 5, 11).to(dtype)
    weights = torch.rand(2, 5)
    whole = student.double().requires_grad_()
    p = teacher.double().softmax(-1)
    (weights * (p * (p.log() - whole.log_softmax(-1))).sum(-1)).sum().backward()
    monkeypatch.setattr(losses, "CHUNK_PROBABILITIES", 3 * 11)
    student.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        found = kl_divergence(teacher, student)
    (weights * found).sum().backward()
    torch.testing.assert_close(
        student.grad.double(), whole.grad, atol=2e-3 if dtype == torch.bfloat16 else 1e-6, rtol=2e-2
    )
    assert sum(t.numel() for t in kept) == student.numel() and {t.dtype for t in kept} == {dtype}


def test_cross_entropy_matches_the_definition(monkeypatch):
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 6, 9), torch.randint(0, 9, (2, 6))
    log_p = logits.double().log_softmax(-1)
    expected = torch.stack([-log_p[b, t, ids[b, t + 1]] for b in range(2) for t in range(5)]).reshape(2, 5)
    monkeypatch.setattr(losses, "CHUNK_PROBABILITIES", 4 * 9)
    torch.testing.assert_close(next_token_cross_entropy(logits, ids).double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("top", [1, 4, 11, 100])
def test_jensen_shannon_is_the_definition_on_the_teachers_likely_tokens_and_the_rest(top, monkeypatch):
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 2, 5, 11)
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    order = p.argsort(-1, descending=True)
    p, q = (part.gather(-1, order) for part in (p, q))
    p, q = (torch.cat([part[..., :top], part[..., top:].sum(-1, keepdim=True)], -1) for part in (p, q))
    m = (p + q) / 2
    # xlogy, as the rest is nothing where all tokens are told apart
    expected = 0.5 * sum(torch.xlogy(part, part) - torch.xlogy(part, m) for part in (p, q)).sum(-1)
    for probabilities in (1, 3 * 11, 2**22):
        monkeypatch.setattr(losses, "CHUNK_PROBABILITIES", probabilities)
        found = jensen_shannon_divergence(teacher, student, top)
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_jensen_shannon_is_bounded_and_has_a_gradient_where_nothing_is_left_for_the_rest():
    teacher = torch.zeros(2, 50).index_fill_(1, torch.tensor([3]), 200.0)
    student = torch.zeros(2, 50).index_fill_(1, torch.tensor([4]), 200.0).requires_grad_()
    loss = jensen_shannon_divergence(teacher, student, 3)
    assert torch.allclose(loss, torch.tensor(2.0).log(), atol=1e-4)
    loss.sum().backward()
    assert torch.isfinite(student.grad).all()
