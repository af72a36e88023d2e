import logging
import os
import sys

import pytest
from notices import COLLECTOR, check_none_is_left

# no test may reach the network; set before huggingface_hub is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser):
    parser.addoption(
        "--record-architectures", action="store_true", help="write what is found to docs/architectures.json"
    )


def pytest_configure(config):
    logging.getLogger("optimum_clp").addHandler(COLLECTOR)
    if config.getoption("--record-architectures") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder())


@pytest.fixture(autouse=True)
def _no_notice_is_passed_over(request):
    yield
    if request.node.get_closest_marker("notices") is None:
        check_none_is_left()
    COLLECTOR.texts.clear()


@pytest.fixture(autouse=True)
def _memory_is_measured_where_it_is_asked_for(request, monkeypatch):
    """Half a second for each file of every run that a test makes; tests of it have the mark `memory`."""
    outcome = sys.modules.get("optimum_clp.evaluation.outcome")
    if outcome is not None and request.node.get_closest_marker("memory") is None:
        memory = sys.modules["optimum_clp.evaluation.memory"]
        monkeypatch.setattr(outcome, "measure_memory", lambda file, length: memory.FileMemory(4, 5, 6, length, 8))


class _Recorder:
    """Writes the property `architecture`, `[name, column, text]`, of every test that passed to the record at the end."""

    def __init__(self):
        self.found = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            for key, value in report.user_properties:
                if key == "architecture":
                    name, column, text = value
                    self.found.setdefault(name, {})[column] = text

    def pytest_sessionfinish(self):
        from architecture_record import merge

        merge(self.found)


@pytest.fixture
def architecture_result(request, record_property):
    """`(name, column, text)`: put it on record, or compare it with the record."""

    def report(name: str, column: str, text: str) -> None:
        record_property("architecture", [name, column, text])
        if not request.config.getoption("--record-architectures"):
            from architecture_record import recorded

            was = recorded(name).get(column)
            assert was == text, f"docs/architectures.json has {was!r} here: run `make architectures`"

    return report
