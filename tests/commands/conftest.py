"""A `CLPPruner` that records what the commands ask of it; the real one has tests of its own."""

import sys
import types
from pathlib import Path

import pytest
from report_example import example_report

from optimum_clp.configuration.clp_config import CLPConfig
from optimum_clp.evaluation.scores import TaskScore
from optimum_clp.report.report import CLPReport
from optimum_clp.segments import LayerSegment


@pytest.fixture(autouse=True)
def _the_hub_lets_upload(monkeypatch):
    """What is asked before an upload has tests of its own, `report/test_hub_access.py`."""
    from optimum_clp.report import hub_access

    monkeypatch.setattr(
        hub_access, "check_upload", lambda repo_id, token=None, private=None: hub_access.check_repo_id(repo_id)
    )


class FakePruner:
    """Stands in for `CLPPruner`; a folder named `cut` was cut before, everything else is dense."""

    calls: list = []
    fails_with: BaseException | None = None
    chatter = ""

    @classmethod
    def from_pretrained(cls, model_or_path, file_name=None, **options):
        options = options if file_name is None else {"file_name": file_name, **options}
        cls.calls.append(("from_pretrained", model_or_path, options))
        pruner = cls()
        pruner.report = CLPReport(base_model=example_report().base_model)
        pruner.config = CLPConfig()
        pruner.segments = None
        if Path(model_or_path).name == "cut":
            pruner.segments = (LayerSegment(7, 10),)
            pruner.config = CLPConfig(pruning_ratio=0.3, seed=5)
            pruner.report = example_report()
        return pruner

    def _stage(self, name, *arguments, **options):
        print(f"library noise on stdout {self.chatter}")
        print(f"library noise on stderr {self.chatter}", file=sys.stderr)
        self.calls.append((name, *arguments, options))
        if self.fails_with is not None:
            raise self.fails_with

    def prune(self, config=None, save_directory=None, *, overwrite=False):
        self._stage("prune", config, save_directory, overwrite=overwrite)
        self.report = example_report()

    def search(self, config=None):
        self._stage("search", config)
        self.report.search = example_report().search

    def cut(self, segments=None):
        self._stage("cut", segments)
        self.segments = tuple(segments)

    def tune(self, config=None):
        self._stage("tune", config)
        self.report.tuning = example_report().tuning

    def quantize(self, save_directory, file_prefix=None, *, weights="int8", overwrite=False):
        self._stage("quantize", save_directory, weights=weights, overwrite=overwrite)
        self.report.quantization = example_report().quantization

    def export(self, save_directory, *, overwrite=False):
        self._stage("export", self.config, save_directory, overwrite=overwrite)
        self.report.export = example_report().export

    def evaluate(self, text=None, *, reference=None, file_name=None, **tasks):
        self._stage("evaluate", text, reference=reference, file_name=file_name, **tasks)
        scores = {}
        for task in tasks.get("tasks") or ():
            name = task.name
            perplexity, chance = (15.25, 0.0) if name == "lambada" else (None, 0.5)
            score = TaskScore(name, 0.61803, 0.0123, 0.6, chance, perplexity, 1838).to_dict()
            scores[name] = score if reference is None else {**score, "dense_accuracy": 0.7, "retention": None}
        if scores and text is None:
            return {"tasks": scores}
        figures = {"name": "cut", "perplexity": 12.5, "num_tokens": 6120, "kl": None if reference is None else 0.41}
        return {**figures, "tasks": scores} if scores else figures

    def save_pretrained(self, save_directory, push_to_hub=False, *, overwrite=False):
        self._stage("save_pretrained", save_directory, overwrite=overwrite)

    def finish(self):
        self._stage("finish")
        self.report.failures = None

    def push_to_hub(self, repo_id, **options):
        self._stage("push_to_hub", repo_id, **options)


@pytest.fixture
def pruner(monkeypatch, tmp_path):
    """The fake's class, in place of the real one; the test runs in an empty folder."""
    module = types.ModuleType("optimum_clp.pruner")
    module.CLPPruner = type("CLPPruner", (FakePruner,), {"calls": []})
    monkeypatch.setitem(sys.modules, "optimum_clp.pruner", module)
    monkeypatch.chdir(tmp_path)
    return module.CLPPruner
