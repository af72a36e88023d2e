import argparse
import contextlib
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from optimum_clp import processes
from optimum_clp.commands.running import execute

LAUNCH = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--main_process_port",
    "0",
]


def test_a_process_alone_writes_and_waits_for_nobody():
    assert processes.is_first() and processes.own_device_map() is None
    processes.wait_for_all()
    processes.join_group()
    assert not torch.distributed.is_initialized()


def test_a_process_alone_is_a_group_of_one():
    tensor = torch.arange(3)
    assert (processes.world_size(), processes.rank()) == (1, 0)
    assert processes.broadcast(tensor) is tensor and processes.gathered({"a": 1}) == [{"a": 1}]


def test_pytorch_may_be_built_without_groups(monkeypatch):
    """`torch.distributed` has no other names then."""
    monkeypatch.setattr(processes, "dist", types.SimpleNamespace(is_available=lambda: False))
    monkeypatch.setenv("WORLD_SIZE", "1")
    processes.join_group()
    processes.wait_for_all()
    processes.leave_group()
    assert processes.is_first() and processes.own_device_map() is None
    assert (processes.world_size(), processes.rank()) == (1, 0)
    assert processes.gathered(3) == [3] and processes.broadcast(torch.ones(1)).item() == 1


GROUP = """
import sys, torch, torch.distributed as dist
from optimum_clp import processes
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
mine = torch.arange(6).reshape(2, 3).T + 10 * rank  # not contiguous
sent = [processes.broadcast(mine.clone(memory_format=torch.preserve_format), source).tolist() for source in (0, 1)]
print(processes.world_size(), processes.rank(), processes.is_first(), processes.gathered(["own", rank]), sent)
processes.wait_for_all()
processes.leave_group()
print(processes.world_size(), processes.rank())
"""


def group(script, store):
    """What two processes print that run a script with their rank and a file to meet at."""
    command = [sys.executable, "-W", "ignore", "-c", script]
    started = [
        subprocess.Popen([*command, str(rank), str(store)], stdout=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    return [process.communicate(timeout=120)[0].strip() for process in started]


def test_a_group_sends_and_gathers(tmp_path):
    printed = group(GROUP, tmp_path / "store")
    gathered = [["own", 0], ["own", 1]]
    sent = [[[0, 3], [1, 4], [2, 5]], [[10, 13], [11, 14], [12, 15]]]
    assert printed == [f"2 0 True {gathered} {sent}\n1 0", f"2 1 False {gathered} {sent}\n1 0"]


FIRST = """
import sys, contextlib, torch.distributed as dist
from optimum_clp import processes
from optimum_clp.errors import ModelError
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
calls = []
@contextlib.contextmanager
def block():
    calls.append("in")
    yield
    calls.append("out")
def fails(error):
    calls.append("failed")
    raise error
print(processes.by_first(lambda: calls.append("made") or 5), end=" ")
for error in (ModelError.of("model", "m", "it is none", "Give one"), ValueError("bad")):
    try:
        processes.by_first(lambda: fails(error))
    except Exception as raised:
        print(type(raised).__name__, raised, end=" ")
with processes.entered_by_first(block()):
    pass
print(calls)
processes.leave_group()
"""


def test_what_the_first_process_does_or_raises_all_of_them_have(tmp_path):
    first, second = group(FIRST, tmp_path / "store")
    told = "5 ModelError model is 'm': it is none. Give one."
    assert first == f"{told} ValueError bad ['made', 'failed', 'failed', 'in', 'out']"
    assert second == f"{told} RuntimeError ValueError: bad []"


def test_a_process_alone_is_the_first():
    assert processes.by_first(lambda: 3) == 3
    with pytest.raises(KeyError), processes.entered_by_first(contextlib.nullcontext()):
        processes.by_first(lambda: {}["missing"])


@pytest.mark.parametrize(("launched", "answers"), [(None, True), ("0", True), ("1", False)])
def test_the_process_that_was_launched_first_answers(launched, answers, monkeypatch, capsys):
    """Also before the processes have become a group: a command that loads no model joins none."""
    monkeypatch.delenv("RANK", raising=False)
    if launched is not None:
        monkeypatch.setenv("RANK", launched)
    assert processes.was_launched_first() == answers
    args = argparse.Namespace(json=False, quiet=False, log_level="info", debug=False)
    assert execute(lambda args: ({}, "the answer"), args) == 0
    assert capsys.readouterr().out == ("the answer\n" if answers else "")


def test_the_others_of_a_group_do_not_write(monkeypatch):
    waited = []
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(processes.dist, "barrier", lambda: waited.append(1))
    monkeypatch.setattr(processes.torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert not processes.is_first() and processes.own_device_map() == {"": 3}
    processes.wait_for_all()
    assert waited == [1]


def test_two_processes_write_one_folder(tmp_path):
    """The whole of `prune` under a launcher: one folder, one answer, the segment and the weights of a single process."""
    dense = tmp_path / "dense"
    tiny_model().save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    options = (
        "--pruning-ratio 0.34 --sequence-length 16 --train-sequences 16 --validation-sequences 4 --test-sequences 4"
    )
    line = ["prune", "--model", str(dense), *options.split(), "--no-export", "--json", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    answers = []
    for name, start in (("one", [sys.executable]), ("two", LAUNCH)):
        command = [
            *start,
            "-m",
            "optimum_clp.commands.clp",
            *line,
            "--text-cache-dir",
            str(tmp_path / f"cache-{name}"),
        ]
        done = subprocess.run([*command, str(tmp_path / name)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        answers.append(json.loads(done.stdout))
    # what was tuned differs by rounding, and so do the hashes of it
    one, two = ({k: v for k, v in a["cut"].items() if k not in ("fingerprint", "seal")} for a in answers)
    assert one == two
    assert [a["tuning"]["num_processes"] for a in answers] == [1, 2]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two")]
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, atol=3e-4, rtol=1e-2)
