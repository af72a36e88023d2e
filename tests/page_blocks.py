"""Blocks of code in pages, and the commands in them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("benchmarks/**/README.md")),
]
RUN = {"python", "bash"}
# shown, and not run: what comes out, other languages; JSON and TOML are parsed, and YAML is a recipe
SHOWN = {"text", "mermaid", "js", "json", "toml", "yaml"}
_BLOCK = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```[ ]*$", re.MULTILINE | re.DOTALL)


def blocks(text):
    """`(language, code)` of each fenced block of a page."""
    found = []
    for indent, language, code in _BLOCK.findall(text):
        lines = [line.removeprefix(indent) for line in code.splitlines()]
        found.append((language.strip(), "\n".join(lines)))
    return found


def commands(code):
    """The words of each command of a shell block; continued lines joined, comments and settings of variables left out."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                command = command[1:]
            if command:
                found.append(command)
    return found


def own_arguments(command):
    """What our program is given by a command, however it is called; `None` if it is another program."""
    for call in (["optimum-clp"], ["optimum-cli", "clp"], ["python", "-m", "optimum_clp"]):
        if command[: len(call)] == call:
            return command[len(call) :]
    if command[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        launched = launch_command_parser().parse_args(command[2:])
        assert launched.module and launched.training_script == "optimum_clp", command
        assert launched.multi_gpu or launched.num_processes is None, "accelerate starts one process"
        return launched.training_script_args
    return None


def name_of(page):
    return page.relative_to(ROOT).as_posix()
