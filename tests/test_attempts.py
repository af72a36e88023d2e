import pytest

from optimum_clp.attempts import Attempts
from optimum_clp.errors import ExportError


def test_a_stage_that_fails_is_noted_and_the_rest_goes_on(caplog):
    attempts = Attempts()
    with attempts.stage("plots"):
        raise ValueError("no\n  font")
    (told,) = caplog.records
    assert (told.levelname, told.name) == ("ERROR", "optimum_clp.attempts")
    assert told.getMessage() == "plots failed, and the rest goes on: ValueError: no font"
    with attempts.stage("card"):
        pass
    with attempts.stage("file"):
        raise ExportError.of("file", "a", "it is broken", "Mend it")
    assert attempts.failed == {"plots": "ValueError: no font", "file": "file is 'a': it is broken. Mend it."}
    with pytest.raises(KeyboardInterrupt), attempts.stage("speeds"):
        raise KeyboardInterrupt


def test_strict_ones_hold_nothing_back():
    with pytest.raises(ValueError), Attempts(strict=True).stage("plots"):
        raise ValueError
