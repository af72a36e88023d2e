"""`--help` fits on a screen and hides nothing without saying so; `--help-all` has every option."""

import argparse

import pytest

from optimum_clp.commands.clp import COMMANDS, build_parser, main
from optimum_clp.commands.short_help import GROUPS_SAY

LONG = [name for name, command in COMMANDS.items() if hasattr(command, "MOST_USED")]


def parser_of(name):
    (found,) = (
        action.choices[name] for action in build_parser()._actions if action.choices and name in action.choices
    )
    return found


def told(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    assert stopped.value.code == 0
    return capsys.readouterr().out


def groups(parser):
    """The options of each group that are in the help."""
    return {
        group.title: [
            a for a in group._group_actions if a.help != argparse.SUPPRESS and not isinstance(a, argparse._HelpAction)
        ]
        for group in parser._action_groups
    }


def test_the_commands_with_many_options_have_a_short_help():
    assert [name for name in COMMANDS if sum(map(len, groups(parser_of(name)).values())) > 30] == LONG


@pytest.mark.parametrize("name", LONG)
def test_the_short_help_fits_on_a_screen_and_counts_what_it_leaves_out(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text, parser, shown = told(capsys, name, "--help"), parser_of(name), COMMANDS[name].MOST_USED
    assert len(text.splitlines()) <= 60
    first, _, rest = text.partition("all others, by --help-all:")
    for dest in shown:
        action = next(action for action in parser._actions if action.dest == dest)
        assert (action.option_strings[-1] if action.option_strings else action.metavar) in first
    for title, actions in groups(parser).items():
        left = [action for action in actions if action.dest not in shown]
        if left:
            assert f"\n  {title}, {len(left)}" in rest and GROUPS_SAY.get(title, "").split(" ")[0] in rest
    assert COMMANDS[name].EXAMPLE.split()[-1] in text


@pytest.mark.parametrize("name", COMMANDS)
def test_the_whole_help_has_every_option(name, capsys):
    text = told(capsys, name, "--help-all" if name in LONG else "--help")
    for actions in groups(parser_of(name)).values():
        for action in actions:
            assert all(option in text for option in action.option_strings)
    assert "all others" not in text


def test_optimum_cli_has_both_as_well(capsys):
    from optimum.commands.base import RootOptimumCLICommand
    from optimum.commands.optimum_cli import register_optimum_cli_subcommand

    from optimum_clp.commands.optimum_cli import CLPCommand

    root = RootOptimumCLICommand("Optimum CLI tool", usage="optimum-cli")
    register_optimum_cli_subcommand(CLPCommand, parent_command=root)
    lengths = []
    for option in ("-h", "--help-all"):
        with pytest.raises(SystemExit):
            root.parser.parse_args(["clp", "prune", option])
        lengths.append(len(capsys.readouterr().out.splitlines()))
    assert lengths[0] < 75 < 200 < lengths[1]
