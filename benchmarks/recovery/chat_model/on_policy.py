"""An on-policy stage on top of any healed model: it writes answers, the dense model judges them (ShortOPD, arXiv 2607.13124).

A stand-in until the package has such a stage: rounds of answers of growing length at temperature 0.8, cut off where a loop
begins; Jensen-Shannon divergence on the dense model's 100 most likely tokens and the rest as one, clipped at 2; one step
on given text after each step on answers, so that what was learnt from it is kept.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.recovery.chat_model.training import Steps, Trained, row_order
from benchmarks.recovery.methods import Cell
from optimum_clp.forward.hooks import evaluation_mode, only_trainable
from optimum_clp.forward.losses import kl_divergence
from optimum_clp.progress import progress_bar
from optimum_clp.tuning.master_adamw import MasterAdamW

TEMPERATURE, TOP, LARGEST, RATE_SHARE = 0.8, 100, 2.0, 0.25
SHORTEST, LONGEST, LONGEST_PERIOD, LOOP_TOKENS = 48, 160, 10, 32


def on_policy(
    model: PreTrainedModel,
    names: Sequence[str],
    cell: Cell,
    prompts: Sequence[Tensor],
    *,
    rate: float,
    rounds: int,
    batch_size: int,
    folder: Path,
) -> Trained:
    """Train some parameters on answers that the model itself writes.

    Args:
        model (`PreTrainedModel`): A healed model; changed.
        names (`Sequence[str]`): Of the parameters to train: those that the healing before has changed.
        cell ([`Cell`]): The dense model, and the given text.
        prompts (`Sequence[Tensor]`): int64 `[length]` each, up to where the answer begins; none that is measured on.
        rate (`float`): Of the healing before; a quarter of it is taken.
        rounds (`int`): Each is a step on answers and one on given text.
        batch_size (`int`): Answers in a round, and rows in its step on text.
        folder (`Path`): For the checkpoint.
    """
    wall, cpu, tokens = time.perf_counter(), time.process_time(), 0
    parameters = [model.get_parameter(name) for name in names]
    for parameter in parameters:
        parameter.data = parameter.data.clone()
    optimizer = MasterAdamW(parameters, lr=RATE_SHARE * rate)
    with evaluation_mode(model), only_trainable(model, parameters), progress_bar(rounds, "On-policy") as bar:
        steps = Steps(parameters, optimizer, folder / "policy.pt")
        done = len(steps.losses) // 2
        bar.update(done)
        for number in range(done, rounds):
            length = SHORTEST + (LONGEST - SHORTEST) * number // max(1, rounds - 1)
            chosen = row_order(len(prompts), batch_size, cell.seed, number)
            given = _padded([prompts[i] for i in chosen.tolist()], model)
            answers = _answers(model, *given, length, seed=cell.seed * 100_003 + number)
            steps.take(_judged(model, cell.dense, *answers))
            rows = cell.train[row_order(len(cell.train), batch_size, cell.seed, number)].to(model.device)
            with torch.no_grad():
                teacher = cell.dense(input_ids=rows, use_cache=False).logits
            steps.take(kl_divergence(teacher, model(input_ids=rows, use_cache=False).logits).mean())
            tokens += int(answers[2].sum()) + rows.numel()
            bar.update(1)
    seconds = steps.before[0] + time.perf_counter() - wall, steps.before[1] + time.process_time() - cpu
    return Trained(sum(p.numel() for p in parameters), tokens, steps.losses, *seconds)


def _padded(prompts: Sequence[Tensor], model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Prompts as one batch, padded on the left, and the mask of what is not padding."""
    masks = [torch.ones_like(prompt) for prompt in prompts]
    padded = (nn.utils.rnn.pad_sequence(part, batch_first=True, padding_side="left") for part in (prompts, masks))
    ids, mask = padded
    return ids.to(model.device), mask.to(model.device)


@torch.no_grad()
def _answers(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, length: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with answers, the mask of both, and where the answers are, without what follows a loop's beginning."""
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    pad = model.generation_config.pad_token_id
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            top_p=1.0,
            max_new_tokens=length,
            pad_token_id=pad if pad is not None else (ends or [0])[0],
        )
    answer = torch.zeros_like(written, dtype=torch.bool)
    for row, tokens in enumerate(written[:, ids.shape[1] :].tolist()):
        last = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
        answer[row, ids.shape[1] : ids.shape[1] + min(last, loop_start(tokens[:last]))] = True
    seen = answer.long()
    seen[:, : ids.shape[1]] = mask
    return written, seen, answer


def loop_start(tokens: Sequence[int]) -> int:
    """Where the second round of a loop begins that goes on to the end; the number of tokens if there is none."""
    starts = [len(tokens)]
    for period in range(1, LONGEST_PERIOD + 1):
        place = len(tokens)
        while place > period and tokens[place - 1] == tokens[place - 1 - period]:
            place -= 1
        if len(tokens) - place >= max(LOOP_TOKENS, 2 * period):
            starts.append(place)
    return min(starts)


def _judged(model: PreTrainedModel, dense: PreTrainedModel, ids: Tensor, mask: Tensor, answer: Tensor) -> Tensor:
    """The mean divergence where the next token is the answer's."""
    where = answer[:, 1:]
    options = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        teacher = dense(**options).logits[:, :-1][where].float().softmax(-1)
    student = model(**options).logits[:, :-1][where].float().softmax(-1)
    likely, indices = teacher.topk(min(TOP, teacher.shape[-1]))
    p, q = (_with_rest(part) for part in (likely, student.gather(-1, indices)))
    middle = ((p + q) / 2).log()
    divergence = 0.5 * ((p * (p.log() - middle)).sum(-1) + (q * (q.log() - middle)).sum(-1))
    return divergence.clamp(max=LARGEST).mean()


def _with_rest(likely: Tensor) -> Tensor:
    rest = 1 - likely.sum(-1, keepdim=True)
    return torch.cat([likely, rest], -1).clamp(min=1e-8)
