"""A model as EleutherAI's lm-eval asks it; needs lm-eval, and is imported when a task of it is measured.

What lm-eval's own adapter for transformers does with text (chat templates, few-shot turns, stop sequences, truncation of prompts,
windows over long texts) is inherited from it. Likelihoods are [`~optimum_clp.evaluation.likelihood`]'s, as for tasks in
files; an ONNX file is asked like a PyTorch model, and neither model nor tokenizer is changed.
"""

import contextlib
import copy
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..forward.hooks import evaluation_mode
from ..forward.layer_major import Residence
from ..progress import progress_bar
from .likelihood import Request, continuation_request, log_likelihoods, max_length


class HarnessModel(HFLM):
    """What lm-eval calls a model, over one of ours.

    Args:
        model: Called like a causal language model of transformers: one of PyTorch, or an [`OnnxCausalLM`]. Left as it is.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer. Left as it is.
        name (`str`): The task's, for progress and errors.
        batch_size (`int`): Continuations, or prompts, in one forward pass.
        residence ([`Residence`], *optional*): For a model that memory does not hold: likelihoods are taken layer by layer.
        stderr (`TextIO`, *optional*): Where progress is drawn; what lm-eval draws itself may be dropped meanwhile.
        quiet (`bool`): No progress bars.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        batch_size: int = 8,
        residence: Residence | None = None,
        stderr: TextIO | None = None,
        quiet: bool = False,
    ):
        self._asked, self._name, self._quiet, self._stderr = model, name, quiet, stderr or sys.stderr
        self._unpadded, self._residence = tokenizer, residence
        super().__init__(
            pretrained=_Borrowed(model),
            tokenizer=copy.deepcopy(tokenizer),  # it gets a token to pad with
            backend="causal",
            batch_size=batch_size,
            max_length=max_length(model, tokenizer),
        )

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each request, the log-likelihood of a continuation in nats, and whether it is the greedy one."""
        asked = []
        for request in requests:
            context, continuation = request.args[:2]
            asked.append(continuation_request(context, continuation, self._unpadded, self.max_length, self._name))
        with contextlib.redirect_stderr(self._stderr):
            return log_likelihoods(self._asked, asked, self.batch_size, self._name, self._quiet, self._residence)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """The same for tokens: windows over a long text."""
        asked = [Request([*past, *new][-(self.max_length + 1) :], len(new)) for _, past, new in requests]
        size = override_bs or self.batch_size
        return log_likelihoods(self._asked, asked, size, self._name, True, self._residence)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """For each request, the log-likelihood of a whole text in nats, window by window."""
        found: list[float] = []
        with contextlib.redirect_stderr(self._stderr):
            with progress_bar(len(requests), f"Task {self._name}", self._quiet) as bar:
                for first in range(0, len(requests), self.batch_size):
                    some = list(requests[first : first + self.batch_size])
                    found += super().loglikelihood_rolling(some, disable_tqdm=True)
                    bar.update(len(some))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For each request, what the model says until one of the task's stop sequences."""
        with contextlib.redirect_stderr(self._stderr):
            bar = progress_bar(len(requests), f"Task {self._name}", self._quiet)
            with bar as self._bar:
                return super().generate_until(requests, disable_tqdm=True)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        said = super()._model_generate(context, max_length, stop, **options)
        self._bar.update(len(context))
        return said


class _Borrowed:
    """A model that lm-eval may call, and not change: it puts what is a module into another mode, and ties its weights anew."""

    def __init__(self, model: Any):
        self._lent = model
        self.config = model.config
        self.device = getattr(model, "device", torch.device("cpu"))

    def generate(self, **options: Any) -> Tensor:
        with torch.no_grad(), evaluation_mode(self._lent):
            return self._lent.generate(**options)
