"""What a release is made of agrees with itself: version, changelog, citation, bounds of the dependencies, the sdist."""

import configparser
import importlib.machinery
import importlib.util
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from optimum_clp.version import __version__

ROOT = Path(__file__).parents[1]
# minors of these have broken us, or can: they are bounded at the last one that is tested
BY_MINOR = {"torch", "transformers", "optimum", "optimum-quanto", "onnxscript"}


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def setup():
    parser = configparser.ConfigParser()
    parser.read_string(read("setup.cfg"))
    return parser


def requirements():
    lines = setup()["options"]["install_requires"].split()
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def pinned(name):
    return dict(line.split("==") for line in read(name).splitlines() if "==" in line)


def newest():
    loader = importlib.machinery.SourceFileLoader("newest", str(ROOT / ".ci" / "newest"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("newest", loader))
    loader.exec_module(module)
    return module


def test_version_changelog_and_citation_say_the_same():
    (version, date) = re.search(r"^## ([\d.]+) \((\d{4}-\d\d-\d\d)\)$", read("CHANGELOG.md"), re.MULTILINE).groups()
    assert version == __version__
    assert f"version: {version}\n" in read("CITATION.cff")
    assert f'date-released: "{date}"' in read("CITATION.cff")
    headings = re.findall(r"^## (.*)$", read("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == f"{version} ({date})", "what is not released has no heading of its own yet"


@pytest.mark.parametrize("name", requirements())
def test_a_dependency_is_bounded_by_what_is_tested(name):
    bounds = requirements()[name].specifier
    tested = [
        Version(pins[name])
        for pins in map(pinned, ("constraints.txt", "constraints-transformers4.txt"))
        if name in pins
    ]
    if name == "transformers":
        tested.append(Version(re.search(r"^NEWEST := (.*)$", read("Makefile"), re.MULTILINE)[1]))
    assert tested and all(version in bounds for version in tested)
    last = max(tested)
    (upper,) = (Version(bound.version) for bound in bounds if bound.operator == "<")
    if name in BY_MINOR:
        assert upper == Version(f"{last.major}.{last.minor + 1}")
    else:
        assert upper == Version(f"{last.major + 1}")


def test_what_is_newest_is_told():
    module = newest()
    assert module.without_bound("torch>=2.9,<2.14") == "torch>=2.9" and module.without_bound("onnx<2") == "onnx"
    assert module.requirements(read("setup.cfg")) == setup()["options"]["install_requires"].split()
    tested = module.pinned("a==1.0  # why\n# b==3\nHugging_Face.hub==2.0\nc==1\n")
    assert tested == {"a": "1.0", "hugging-face-hub": "2.0", "c": "1"}
    shown = module.table(
        tested, {"a": "1.0", "hugging-face-hub": "2.1"}, {"a": "2.0", "hugging-face-hub": "2.1", "d": "5"}
    )
    assert shown.splitlines()[2:] == ["| a | 1.0 | 1.0 | 2.0 |", "| hugging-face-hub | 2.0 | 2.1 | 2.1 |"]
    assert module.table(tested, tested, tested) == "Everything that is newest has been tested."


def test_what_cannot_be_resolved_fails_nothing(monkeypatch, capsys):
    module = newest()
    error = subprocess.CalledProcessError(1, "pip", stderr="ERROR: first\nERROR: no network\n")
    monkeypatch.setattr(module.subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(error))
    assert module.main() == 0
    assert capsys.readouterr().out == "The newest versions could not be resolved: ERROR: no network\n"


def test_the_workflow_and_the_container_run_targets_that_exist():
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    workflow = read(".github/workflows/ci.yml")
    lists, single = re.findall(r"target: \[(.*?)\]", workflow), re.findall(r"target: ([\w-]+)", workflow)
    asked = {name.strip() for names in lists for name in names.split(",")} | set(single)
    asked |= set(re.findall(r"\bmake ([\w-]+)", workflow + read("Dockerfile")))
    assert len(asked) > 7 and asked <= targets
    torch = re.search(r"^TORCH \?= (.*)$", read("Makefile"), re.MULTILINE)[1]
    assert torch in workflow and f'ARG TORCH="{torch}"' in read("Dockerfile")
    assert torch in read("constraints.txt").splitlines()


def test_what_the_container_copies_is_there():
    copied = [
        word for line in re.findall(r"^COPY \S+ (.*) \S+$", read("Dockerfile"), re.MULTILINE) for word in line.split()
    ]
    allowed = [line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")]
    assert set(copied) == set(allowed) and all((ROOT / name).exists() for name in copied)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an sdist has no repository to compare with")
def test_the_sdist_holds_every_file_of_the_repository(tmp_path):
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert [name for name in listed if name not in held] == []
