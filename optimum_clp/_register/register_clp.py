"""Installed as `optimum/commands/register/register_clp.py`, where `optimum-cli` looks for commands.

Any exception here would break `optimum-cli` as a whole, so nothing heavy is imported.
"""

from optimum_clp.commands.optimum_cli import CLPCommand

REGISTER_COMMANDS = [CLPCommand]
