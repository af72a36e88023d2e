"""A loss."""

from torch import Tensor

from optimum_clp.tuning.losses import LossBatch


class SquaredLogits:
    """The mean squared difference of centred logits."""

    needs = frozenset({"logits", "teacher_logits"})

    def __call__(self, batch: LossBatch) -> Tensor:
        student, teacher = (x.float() - x.float().mean(-1, keepdim=True) for x in (batch.logits, batch.teacher_logits))
        return (student - teacher.detach()).square().mean((1, 2))
