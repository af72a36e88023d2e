"""Every command in a page can be given: programs, options, files and versions are there. What runs them: `test_pages_run.py`."""

import importlib.util
import json
import re
import subprocess
import tomllib

import pytest
from page_blocks import PAGES, ROOT, RUN, SHOWN, blocks, commands, name_of, own_arguments

from optimum_clp import CLPConfig
from optimum_clp.commands.clp import build_parser
from optimum_clp.commands.running import read_config
from optimum_clp.configuration.yaml_text import parse_yaml

REPOSITORY = "https://github.com/optimum-clp/optimum-clp"
COMMANDS = [
    pytest.param(command, id=f"{name_of(page)} {' '.join(command)[:60]}")
    for page in PAGES
    for language, code in blocks(page.read_text(encoding="utf-8"))
    if language == "bash"
    for command in commands(code)
]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_say_what_they_are(page):
    for language, code in blocks(page.read_text(encoding="utf-8")):
        if not language:  # a picture of files or of what is printed
            assert not re.search(r"^(\$ )?(optimum-cl|python|pip |make |accelerate )", code, re.MULTILINE), code
        else:
            assert language in RUN | SHOWN
        if language == "json":
            assert all(json.loads(line) for line in code.splitlines())
        if language == "toml":
            assert tomllib.loads(code)
        if language == "yaml":
            assert CLPConfig.from_dict(parse_yaml(code.encode()))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_can_be_given(command):
    arguments = own_arguments(command)
    if arguments is None:
        check_other(command)
    elif arguments != ["--version"]:
        args = build_parser().parse_args(arguments)
        if hasattr(args, "config"):
            # a recipe that the page writes is not there yet
            args.config = args.config if args.config and (ROOT / args.config).is_file() else None
            read_config(args)
        needs_output = getattr(args, "output_required", False) and not getattr(args, "dry_run", False)
        assert not needs_output or args.output is not None


def check_other(command):
    program, rest = command[0], command[1:]
    if program == "pip":
        check_pip(rest)
    elif program == "make":
        subprocess.run(["make", "-n", *rest], cwd=ROOT, check=True, capture_output=True)
    elif program == "git":
        assert rest == ["clone", REPOSITORY]
    elif program == "bash":
        assert (ROOT / rest[0]).is_file()
    elif rest[:1] == ["-m"] and rest[1].startswith("benchmarks."):  # options: tests/benchmarks/test_scripts.py
        assert importlib.util.find_spec(rest[1]) is not None
    elif rest[:2] == ["-m", "pytest"]:
        files = [word.partition("::")[0] for word in rest[2:] if word.startswith("tests/")]
        assert files and all((ROOT / file).exists() for file in files)
    else:
        known = (["python3", "-m", "venv", ".venv"], [".", ".venv/bin/activate"], ["cd", "optimum-clp"])
        assert command in (*known, ["export", "OMP_NUM_THREADS=1"])


def check_pip(words):
    """`pip install`: versions are those that are tested, files and extras are there."""
    assert words[0] == "install"
    tested = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    words = words[1:]
    if "-c" in words:
        at = words.index("-c")
        assert (ROOT / words[at + 1]).is_file()
        del words[at : at + 2]
    for word in words:
        assert word == "." or word in tested, word


def test_commands_are_found():
    assert len(COMMANDS) > 70
    text = "```bash\nA=1 make x && optimum-cli clp search \\\n  --model m  # why\n```\n\n  ```json\n  {}\n  ```\n"
    (language, code), (other, _) = blocks(text)
    assert (language, other) == ("bash", "json")
    assert commands(code) == [["make", "x"], ["optimum-cli", "clp", "search", "--model", "m"]]
    assert own_arguments(commands(code)[1]) == ["search", "--model", "m"]
    assert own_arguments(["accelerate", "launch", "--cpu", "-m", "optimum_clp", "prune", "o"]) == ["prune", "o"]


def test_a_command_that_cannot_be_given_is_found():
    for command in (["pip", "install", "torch==1.0"], ["git", "clone", "https://example.org"], ["rm", "-rf", "x"]):
        with pytest.raises(AssertionError):
            check_other(command)
    with pytest.raises(subprocess.CalledProcessError):
        check_other(["make", "no-such-target"])
