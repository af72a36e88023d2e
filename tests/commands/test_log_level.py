"""What the commands tell while they work: `--log-level`, `--quiet`, and the package's log."""

import argparse
import logging
import subprocess
import sys
import warnings

import pytest
from notices import notices

from optimum_clp.commands.clp import COMMANDS, build_parser, main
from optimum_clp.commands.log_level import LEVELS, hides_progress, own_level
from optimum_clp.commands.running import execute

LOG = logging.getLogger("optimum_clp.some.room")
TOLD = {
    "debug": "optimum-clp: debug: looked",
    "info": "search: done",
    "warning": "optimum-clp: warning: not kept",
    "error": "optimum-clp: error: plots failed",
    "critical": "optimum-clp: critical: no more",
}


def work(args):
    """A command that tells something of each level, some of it twice, beside what other libraries say."""
    for _ in range(2):
        LOG.debug("looked")
        LOG.info("search: %s", "done")
        LOG.warning("not kept")
        LOG.error("plots failed")
        LOG.critical("no more")
    logging.getLogger("another").error("another library's error")
    warnings.warn("another library's warning", stacklevel=1)
    print("printed by a library")
    if args.fails:
        raise ValueError("it went wrong")
    return {}, "the answer"


def told(capsys, level="info", quiet=False, fails=False):
    args = argparse.Namespace(json=False, quiet=quiet, log_level=level, debug=False, fails=fails)
    with notices(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        status = execute(work, args)
    seen = capsys.readouterr()
    assert (status, seen.out) == ((1, "") if fails else (0, "the answer\n"))
    assert quiet or len(warned) == (LEVELS.index(level) <= LEVELS.index("warning"))
    return seen.err.splitlines()


def test_of_several_processes_the_first_one_tells_and_the_others_their_errors_alone(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert told(capsys).count(TOLD["warning"]) == 1
    monkeypatch.setenv("RANK", "1")
    args = argparse.Namespace(quiet=False, log_level="debug")
    assert hides_progress(args)
    assert set(TOLD.values()) & set(own(capsys)) == {TOLD["error"], TOLD["critical"]}
    monkeypatch.setenv("RANK", "no number")  # the launcher's check says so
    assert own_level("critical") == "critical"


def own(capsys):
    """What a process tells that is not the first one: it has no answer of its own."""
    args = argparse.Namespace(json=False, quiet=False, log_level="info", debug=False, fails=False)
    with notices():
        assert execute(work, args) == 0
    seen = capsys.readouterr()
    assert seen.out == ""
    return seen.err.splitlines()


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_below_the_level_is_not_told_and_a_notice_is_told_once(level, capsys):
    lines = told(capsys, level)
    ours = [line for line in lines if line in TOLD.values()]
    shown = LEVELS[LEVELS.index(level) :]
    often = {"debug": 2, "info": 2}
    assert sorted(ours) == sorted(line for name in shown for line in [TOLD[name]] * often.get(name, 1))
    assert "printed by a library" in lines


@pytest.mark.parametrize("level", LEVELS)
def test_what_other_libraries_log_goes_by_the_level_as_well(level, capsys, caplog):
    told(capsys, level)
    assert ("another library's error" in caplog.messages) == (level != "critical")
    # and so do Python warnings: `told` counts them


def test_with_quiet_the_error_that_ends_the_command_is_all(capsys):
    assert told(capsys, quiet=True) == []
    assert told(capsys, quiet=True, fails=True) == [
        "optimum-clp: error: unexpected ValueError: it went wrong",
        "The option --debug shows where it came from.",
    ]


@pytest.mark.parametrize("level", LEVELS)
def test_an_error_that_ends_the_command_is_told_at_every_level(level, capsys):
    assert "optimum-clp: error: unexpected ValueError: it went wrong" in told(capsys, level, fails=True)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("level", ["debug", "critical"])
def test_logging_is_afterwards_as_it_was(level, fails, capsys):
    def state():
        own, root = logging.getLogger("optimum_clp"), logging.getLogger()
        filters = list(warnings.filters)
        return [*own.handlers], own.level, own.propagate, [*root.handlers], root.level, root.manager.disable, filters

    before = state()
    told(capsys, level, fails=fails)
    assert state() == before


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_level_and_not_beside_quiet(command, capsys):
    parser = build_parser()
    assert parser.parse_args([command, "-m", "m"]).log_level == "info"
    assert parser.parse_args([command, "-m", "m", "--log_level", "error"]).log_level == "error"
    for words, said in (
        (["--quiet", "--log-level", "debug"], "argument --log-level: not allowed with argument --quiet"),
        (["--log-level", "loud"], "argument --log-level: invalid choice: 'loud' (choose from "),
    ):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args([command, "-m", "m", *words])
        assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(("level", "quiet"), [("debug", False), ("info", False), ("warning", True), ("error", True)])
def test_progress_is_no_more_than_information(level, quiet, pruner):
    assert main(f"prune -m m --log-level {level} out".split()) == 0
    assert pruner.calls[0][2]["quiet"] is quiet


def test_importing_the_package_sets_up_no_logging_and_notices_are_seen_all_the_same():
    code = (
        "import logging\n"
        "from optimum_clp.attempts import Attempts\n"
        "from optimum_clp.resume import Journal\n"
        "log, root = logging.getLogger('optimum_clp'), logging.getLogger()\n"
        "print(log.handlers, log.level, log.propagate, root.handlers, root.level)\n"
        "with Attempts().stage('plots'): raise ValueError('no font')\n"
        "log.info('unseen')\n"
        "logging.getLogger('optimum_clp').setLevel('CRITICAL')\n"
        "with Attempts().stage('card'): raise ValueError('no font')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] 0 True [] 30"
    assert done.stderr.splitlines() == ["plots failed, and the rest goes on: ValueError: no font"]
