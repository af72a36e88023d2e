import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from notices import notice
from searches import settings
from tiny_models import random_tokens, tiny_model, tiny_tokenizer

from optimum_clp import CLPConfig, CLPPruner
from optimum_clp.resume import Journal, cache_file
from optimum_clp.search.objective import Objective
from optimum_clp.search.segment_search import search_segments, search_within_budget


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, count):
    """Let the objective compute so many micro-batches."""
    computed = []
    whole = Objective._measure

    def measure(self, gates, rows):
        if len(computed) == count:
            raise Interrupted
        computed.append(rows)
        return whole(self, gates, rows)

    monkeypatch.setattr(Objective, "_measure", measure)
    return computed


@pytest.mark.parametrize("strategy", ["gate", "halving", "exhaustive"])
@pytest.mark.parametrize("num_segments", [1, 2])
def test_an_interrupted_search_goes_on_where_it_was(strategy, num_segments, tmp_path, monkeypatch):
    model, tokens, file = tiny_model(num_layers=10), random_tokens(8, 16), tmp_path / "search.jsonl"

    def search(journal=None):
        config = settings(strategy, batch_size=1)
        return search_segments(model, tokens, 3, config, num_segments=num_segments, journal=journal, quiet=True)

    with monkeypatch.context() as patch:
        computed = interrupt_after(patch, 10_000)
        uninterrupted = search()
        total = len(computed)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(Interrupted):
            search(file)
    assert len(file.read_text().splitlines()) == 5
    with file.open("a") as stream:
        stream.write('{"key": "cut off in the mid')
    with monkeypatch.context() as patch:
        computed = interrupt_after(patch, 10_000)
        resumed = search(file)
    assert resumed == uninterrupted
    assert len(computed) == total - 5
    assert len(file.read_text().splitlines()) == total


def test_a_search_for_a_quality_budget_is_resumed(tmp_path, monkeypatch):
    model, tokens, file = tiny_model(num_layers=8), random_tokens(8, 16), tmp_path / "search.jsonl"

    def search(journal=None):
        config = settings("halving", batch_size=2)
        return search_within_budget(model, tokens[:6], tokens[6:], 5.0, config, journal=journal, quiet=True)

    uninterrupted = search()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        with pytest.raises(Interrupted):
            search(file)
    assert search(file) == uninterrupted


def test_the_pruner_resumes_by_itself_and_only_the_same_search(tmp_path, monkeypatch):
    model = tiny_model(num_layers=8)
    text = [" ".join(f"w{3 + (i * j) % 90}" for i in range(200)) for j in range(1, 40)]
    calibration = {"dataset": text, "sequence_length": 16, "train_sequences": 8, "cache_dir": str(tmp_path)}
    calibration |= {"validation_sequences": 4, "test_sequences": 4}
    config = CLPConfig(0.25, calibration=calibration, search={"strategy": "exhaustive", "batch_size": 1})
    pruner = CLPPruner.from_pretrained(model, tokenizer=tiny_tokenizer(), quiet=True)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Interrupted):
            pruner.search(config)
    (kept,) = (tmp_path / "optimum_clp").glob("search-*")
    other = CLPConfig(0.25, seed=1, calibration=calibration, search={"strategy": "exhaustive", "batch_size": 1})
    with monkeypatch.context() as patch:
        computed = interrupt_after(patch, 10_000)
        CLPPruner.from_pretrained(model, tokenizer=tiny_tokenizer(), quiet=True).search(other)
        assert len(computed) == 8 and kept.exists()
        computed.clear()
        CLPPruner.from_pretrained(model, tokenizer=tiny_tokenizer(), quiet=True).search(config)
        assert len(computed) == 5 and not kept.exists()


def test_a_search_is_resumed_after_what_comes_behind_it_was_changed(tmp_path, monkeypatch):
    text = [" ".join(f"w{3 + (i * j) % 90}" for i in range(200)) for j in range(1, 40)]
    calibration = {"dataset": text, "sequence_length": 16, "train_sequences": 8, "cache_dir": str(tmp_path)}
    calibration |= {"validation_sequences": 4, "test_sequences": 4}
    search = {"strategy": "exhaustive", "batch_size": 1}

    def computed(interrupted_after=None, **stages):
        pruner = CLPPruner.from_pretrained(tiny_model(num_layers=8), tokenizer=tiny_tokenizer(), quiet=True)
        config = CLPConfig(0.25, calibration=calibration, search=search, **stages)
        with monkeypatch.context() as patch:
            done = interrupt_after(patch, interrupted_after or 10_000)
            with contextlib.suppress(Interrupted):
                pruner.search(config)
        return len(done)

    assert computed(interrupted_after=3) == 3
    assert computed(quantization={"method": "rtn"}, tuning={"epochs": 7}, export={"enabled": False}) == 5


def test_what_cannot_be_written_is_told_once(tmp_path):
    (tmp_path / "file").write_text("")
    journal = Journal(tmp_path / "file" / "search.jsonl")
    with notice("cannot be written .*: the search cannot be resumed"):
        assert journal.recall("key", lambda: [1.5]) == [1.5]
    assert journal.recall("other", lambda: 2) == 2


def test_a_journals_name_depends_on_all_of_its_contents(tmp_path):
    base = {"weights": "a", "rows": [1]}
    names = {cache_file("search", {**base, **change}, tmp_path) for change in ({}, {"weights": "b"}, {"rows": [2]})}
    assert len(names) == 3 and cache_file("search", base, tmp_path) in names


WORKER = """
import json, os, sys, torch, torch.distributed as dist, traceback
from searches import settings
from tiny_models import random_tokens, tiny_model
from optimum_clp.forward.layer_major import Residence
from optimum_clp.search.segment_search import search_segments


def search(rank, folder):
    torch.set_num_threads(1)
    if rank >= 0:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with open(f"{folder}/{rank}", "w") as file:
        plain = ("gate", "halving", "exhaustive", "block_influence", "taylor", "perplexity_greedy")
        asked = [(strategy, None) for strategy in plain] + [("gate", Residence(2)), ("halving", Residence())]
        for strategy, residence in asked:
            config = settings(strategy, num_sequences=7, batch_size=2)
            options = {"residence": residence, "quiet": True}
            result = search_segments(tiny_model(num_layers=8), random_tokens(7, 16), 2, config, **options)
            file.write(json.dumps({**result.to_dict(), "seconds": 0}) + "\\n")


processes = []
for rank in (-1, 0, 1):
    number = os.fork()
    if not number:
        try:
            search(rank, sys.argv[1])
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    processes.append(number)
sys.exit(max(os.waitpid(number, 0)[1] for number in processes))
"""


def test_two_processes_find_the_same_as_one(tmp_path):
    """Three processes, forked from one that has imported what they need and run nothing."""
    here = Path(__file__).parent
    path = [str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-W", "ignore", "-c", WORKER, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, first, second = (
        [json.loads(line) for line in (tmp_path / str(rank)).read_text().splitlines()] for rank in (-1, 0, 1)
    )
    assert len(alone) == 8
    assert alone == first == second
    assert alone[6:] == alone[:2], "layer by layer"


def test_tokens_are_not_changed():
    tokens = random_tokens(4, 16)
    before = tokens.clone()
    search_segments(tiny_model(), tokens, 2, settings("gate"), quiet=True)
    assert torch.equal(tokens, before)
