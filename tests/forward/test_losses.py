import pytest
import torch

from optimum_clp.forward import losses
from optimum_clp.forward.losses import kl_divergence, next_token_cross_entropy


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


def test_cross_entropy_matches_the_definition(monkeypatch):
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 6, 9), torch.randint(0, 9, (2, 6))
    log_p = logits.double().log_softmax(-1)
    expected = torch.stack([-log_p[b, t, ids[b, t + 1]] for b in range(2) for t in range(5)]).reshape(2, 5)
    monkeypatch.setattr(losses, "CHUNK_PROBABILITIES", 4 * 9)
    torch.testing.assert_close(next_token_cross_entropy(logits, ids).double(), expected, atol=1e-6, rtol=1e-6)
