"""Notices in the package's log: a test expects each one that it brings about, or it fails (`conftest.py` sees to that)."""

import logging
import re
from contextlib import contextmanager

import pytest


class _Collector(logging.Handler):
    """Keeps the notices that no test has expected yet. Errors are not among them: reports and exit statuses have these."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        if record.levelno == logging.WARNING:
            self.texts.append(record.getMessage())


COLLECTOR = _Collector()


@contextmanager
def notice(match):
    """Something in the block is told of, in words that match; gives the list of those notices."""
    before, COLLECTOR.texts = COLLECTOR.texts, []
    found = []
    try:
        yield found
    finally:
        told, COLLECTOR.texts = COLLECTOR.texts, before
        found += [text for text in told if re.search(match, text)]
        COLLECTOR.texts += [text for text in told if text not in found]
    assert found, f"nothing told matches {match!r}, only {told}"


@contextmanager
def notices():
    """Whatever is told in the block is expected; gives the list of it."""
    before, COLLECTOR.texts = COLLECTOR.texts, []
    found = []
    try:
        yield found
    finally:
        found += COLLECTOR.texts
        COLLECTOR.texts = before


def check_none_is_left():
    """Fail if something was told that nobody has expected."""
    left, COLLECTOR.texts = COLLECTOR.texts, []
    if left:
        pytest.fail(f"told in the log, and not expected (tests/notices.py): {left}", pytrace=False)
