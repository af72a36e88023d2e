"""Every relative link and anchor in the documentation leads somewhere, and so does every file and dotted name of the package."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/README.md") for path in ROOT.glob(pattern))
PACKAGE = ROOT / "optimum_clp"
# what a path in a page may begin at
BASES = (ROOT, PACKAGE, PACKAGE / "exporters", ROOT / "tests", ROOT / "benchmarks")
# installed elsewhere under this name
OF_OTHERS = {"optimum/commands/register/register_clp.py"}
# dotted names that are no modules: entry-point groups, metadata of files
GROUPS = {f"optimum_clp.{kind}" for kind in ("accuracy_level", "attention", "strategies", "losses", "starts")}
GROUPS |= {f"optimum_clp.{kind}" for kind in ("roundings", "runtimes", "architectures")}
# in a changelog old names stand beside new ones
TELLING = [page for page in PAGES if page.name != "CHANGELOG.md"]
# the README's links lead to the repository, as an index page has no files beside it
REPOSITORY = "https://github.com/optimum-clp/optimum-clp"
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2", re.MULTILINE | re.DOTALL)


def without_code(text):
    return re.sub(r"`[^`\n]*`", lambda code: code.group().replace("[", "(").replace("]", ")"), _FENCE.sub("", text))


def anchors(text):
    """The anchors that GitHub gives a page's headings."""
    found = []
    for heading in re.findall(r"^#+ (.*?) *#*$", _FENCE.sub("", text), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        name = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        again = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None for other in found)
        found.append(f"{name}-{again}" if again else name)
    return found


def broken_links(page, text):
    """The relative links of a page that lead nowhere."""
    broken = []
    for link in _LINK.findall(without_code(text)):
        own = re.match(rf"{REPOSITORY}/(?:blob|tree)/main/(.*)", link)
        if re.match(r"[a-z]+:", link) and not own:
            continue
        name, _, anchor = (own[1] if own else link).partition("#")
        target = ((ROOT if own else page.parent) / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


def missing_files(text):
    """Paths of Python files in backticks, with a folder, that are nowhere."""
    paths = re.findall(r"`((?:[\w.-]+/)+\w+\.py)`", _FENCE.sub("", text))
    return [path for path in paths if path not in OF_OTHERS and not any((base / path).is_file() for base in BASES)]


def missing_names(text):
    """Dotted names of the package in backticks that no module has."""
    missing = []
    for name in re.findall(r"`(optimum_clp(?:\.\w+)+)", text):
        parts = name.split(".")
        modules = [PACKAGE.parent.joinpath(*parts[:end]) for end in range(len(parts), 0, -1)]
        depth, module = next(
            (len(parts) - i, path)
            for i, path in enumerate(modules)
            if path.is_dir() or path.with_suffix(".py").is_file()
        )
        source = (module / "__init__.py" if module.is_dir() else module.with_suffix(".py")).read_text(encoding="utf-8")
        if depth < len(parts) and name not in GROUPS and not re.search(rf"\b{parts[depth]}\b", source):
            missing.append(name)
    return missing


@pytest.mark.parametrize("page", TELLING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_and_names_of_the_package_are_there(page):
    text = page.read_text(encoding="utf-8")
    assert missing_files(text) == [] and missing_names(text) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_in_pages_can_be_pasted(page):
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)):
        compile(code, f"{page.name}, block {number}", "exec")


def test_the_checker_finds_what_is_broken(tmp_path):
    (tmp_path / "other.md").write_text("# One `two`, three: four\n\n## Twice\n\n```\n# no heading\n```\n\n## Twice\n")
    text = (
        "[a](other.md) [b](other.md#one-two-three-four) [c](other.md#twice-1) [d](#here) [e](https://x.org/y) `[f](no.md)`"
        "\n\n# Here\n\n[g](gone.md) [h](other.md#gone) [i](#gone) [j](other.md#no-heading)\n"
        f"[k]({REPOSITORY}/blob/main/README.md#use-it) [l]({REPOSITORY}/blob/main/README.md#gone) [m]({REPOSITORY}/blob/main/gone.md)\n"
    )
    page = tmp_path / "page.md"
    page.write_text(text)
    ours = [f"{REPOSITORY}/blob/main/{name}" for name in ("README.md#gone", "gone.md")]
    assert broken_links(page, text) == ["gone.md", "other.md#gone", "#gone", "other.md#no-heading", *ours]


def test_links_of_the_readme_work_on_an_index_page():
    links = _LINK.findall(without_code((ROOT / "README.md").read_text(encoding="utf-8")))
    assert links and all(re.match("https:|#", link) for link in links)


def test_the_pages_are_found():
    names = {page.relative_to(ROOT).as_posix() for page in PAGES}
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/onnx.md", "benchmarks/README.md"} <= names


def test_the_checkers_of_names_find_what_is_missing():
    text = "`search/gate.py` `optimum_clp/pruner.py` `search/gone.py` `gate.py` `graph/fused.py`"
    assert missing_files(text) == ["search/gone.py"]
    text = "`optimum_clp.pruner.CLPPruner` `optimum_clp.quantization.load_quantized` `optimum_clp.gating` `optimum_clp.search.gone`"
    assert missing_names(text) == ["optimum_clp.gating", "optimum_clp.search.gone"]
