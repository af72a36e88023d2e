"""What the site does with the pages that GitHub shows as they are.

- Pages outside `docs/` (`CONTRIBUTING.md`, the benchmarks, the changelog) are pages of the site.
- Notebooks are pages, without their outputs.
- A relative link to a page leads to that page; one to any other file of the repository leads to the repository.
- The table of every option is made from the parsers of the commands.
- A page that would fetch anything from a network when it is read ends the build.
- Mermaid diagrams are pictures that were drawn beforehand (`python docs/_site/diagrams.py`): a page that draws them itself
  fetches the program for it from a network.
"""

import argparse
import hashlib
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# files of the repository that lie outside docs/, and where they are on the site
ELSEWHERE = {
    "CONTRIBUTING.md": "contribute/index.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "measurements/index.md",
    "benchmarks/search/README.md": "measurements/search.md",
    "benchmarks/recovery/README.md": "measurements/recovery.md",
    "benchmarks/edge/README.md": "measurements/edge.md",
    "benchmarks/edge/results/speed.png": "measurements/speed.png",
    "benchmarks/edge/results/speed-intel.png": "measurements/speed-intel.png",
    "benchmarks/edge/results/frontier/frontier.png": "measurements/frontier.png",
    "README.md": "index.md",
    "examples/first_cut.ipynb": "notebooks/first_cut.md",
    "examples/chat_model_own_data.ipynb": "notebooks/chat_model_own_data.md",
    "examples/compare_and_read_the_report.ipynb": "notebooks/compare_and_read_the_report.md",
}
OPTIONS = "reference/options.md"
# sections of one page, which have nothing to list beside it
ALONE = ("index.md", "tutorial.md")
DIAGRAMS = "assets/diagrams"
_FENCE = re.compile(r"(^ *(?:```|~~~).*?^ *(?:```|~~~)[ ]*$)", re.MULTILINE | re.DOTALL)
_MERMAID = re.compile(r"^```mermaid\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
_FETCHED = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=["']?(?:https?:)?//[^"' >]*""")
_LINK = re.compile(r"(!?\[(?:[^\]\[]|\[[^\]]*\])*\]\()([^)\s]+)(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere, and those that are made."""
    for source, page in ELSEWHERE.items():
        if source.endswith(".ipynb"):
            files.append(File.generated(config, page, content=notebook_page(source, str(config.repo_url))))
        elif not (ROOT / "docs" / page).exists():
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, OPTIONS, content=options_page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links and diagrams."""
    src = page.file.src_uri
    if src in ALONE:
        page.meta["hide"] = ["navigation"]
    source = next((own for own, uri in ELSEWHERE.items() if uri == src and src != "index.md"), f"docs/{src}")
    return with_diagrams(with_links(markdown, source, src, str(config.repo_url)), src)


def on_post_build(config: MkDocsConfig) -> None:
    """Nothing is fetched from elsewhere when a page is read."""
    for page in sorted(Path(config.site_dir).rglob("*.html")):
        if found := fetched(page.read_text(encoding="utf-8")):
            raise PluginError(f"{page.name} fetches from a network: {found[0]}")


def fetched(html: str) -> list[str]:
    """Tags of a page that make a browser ask another machine; links that somebody may follow do not."""
    return [tag for tag in _FETCHED.findall(html) if 'rel="canonical"' not in tag]


def with_links(markdown: str, source: str, page: str, repository: str) -> str:
    """The text with every relative link leading to a page of the site, or to a file of the repository.

    Args:
        markdown (`str`): The text.
        source (`str`): The file that it is from, seen from the repository's root.
        page (`str`): The page that it becomes, seen from the site's root.
        repository (`str`): The repository's address.
    """

    def led(found: re.Match[str]) -> str:
        opening, link, closing = found.groups()
        name, hash_, anchor = link.partition("#")
        if not name or re.match(r"[a-z]+:", link):
            return found.group()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), name))
        uri = ELSEWHERE.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if uri is None or uri.endswith(".json") or (ROOT / target).is_dir():
            kind = "tree" if (ROOT / target).is_dir() else "blob"
            return f"{opening}{repository}/{kind}/main/{target}{hash_}{anchor}{closing}"
        if re.fullmatch(r"\[[\w/.-]+\.md\]\(", opening):
            opening = f"[{title(ROOT / target)}]("
        return f"{opening}{posixpath.relpath(uri, posixpath.dirname(page) or '.')}{hash_}{anchor}{closing}"

    parts = _FENCE.split(markdown)
    return "".join(part if i % 2 else _LINK.sub(led, part) for i, part in enumerate(parts))


def title(source: Path) -> str:
    """A page's first heading: what a link says that has only named its file."""
    return next(line[2:] for line in source.read_text(encoding="utf-8").splitlines() if line.startswith("# "))


def drawn(diagram: str) -> str:
    """Name of a diagram's picture: its text's hash, so that a picture of another text is never shown."""
    return f"{hashlib.sha256(diagram.encode()).hexdigest()[:16]}.svg"


def diagrams(markdown: str) -> list[str]:
    """Texts of the Mermaid diagrams of a page."""
    return _MERMAID.findall(markdown)


def with_diagrams(markdown: str, page: str) -> str:
    """The text with pictures instead of Mermaid's text."""

    def picture(found: re.Match[str]) -> str:
        name = drawn(found.group(1))
        if not (ROOT / "docs" / DIAGRAMS / name).is_file():
            raise PluginError(f"{page}: a diagram was changed; draw it with `python docs/_site/diagrams.py`")
        address = posixpath.relpath(f"{DIAGRAMS}/{name}", posixpath.dirname(page) or ".")
        return f"![Diagram; the text above and below says the same]({address}){{ .diagram }}"

    return _MERMAID.sub(picture, markdown)


def notebook_page(source: str, repository: str) -> str:
    """A notebook as Markdown: its texts, and its code to be copied.

    Args:
        source (`str`): The file, seen from the repository's root.
        repository (`str`): The repository's address. Links of a notebook name it, as they are read outside of it too.
    """
    path, files = f"blob/main/{source}", f"{repository}/blob/main/"
    opened = f"https://colab.research.google.com/github/{repository.split('://')[-1].split('/', 1)[1]}/{path}"
    parts = []
    for cell in json.loads((ROOT / source).read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text.replace(f"]({files}", "](../"))
    where = f"This page is a notebook: [the file]({repository}/{path}), or [open it in Colab]({opened})."
    return "\n\n".join([parts[0], where, *parts[1:]]) + "\n"


def options_page() -> str:
    """Every command's usage and options, as its parser has them."""
    from optimum_clp.commands.clp import COMMANDS, build_parser

    parser = build_parser()
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    lines = [
        "# Every option",
        "",
        "What `optimum-clp COMMAND --help` says, made from the same parsers. How commands fit together, exit statuses, and what all of "
        "them share: [the command line](../cli.md). What a setting's value must be: [settings](../configuration.md).",
    ]
    for name, command in COMMANDS.items():
        lines += ["", f"## {name}", "", f"{sentence(command.HELP)}", "", "```", f"optimum-clp {name} {command.USAGE}"]
        lines += ["```", ""]
        for title, rows in grouped(subparsers.choices[name]):
            lines += [f"**{title}**", "", "| option | what it is |", "| --- | --- |", *rows, ""]
    return "\n".join(lines) + "\n"


def grouped(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    """Title and rows of each group of a parser's options."""
    formatter = parser._get_formatter()
    for group in parser._action_groups:
        rows = []
        for action in group._group_actions:
            if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
                continue
            metavar = (
                ""
                if action.nargs == 0
                else f" {formatter._format_args(action, formatter._get_default_metavar_for_optional(action) if action.option_strings else formatter._get_default_metavar_for_positional(action))}"
            )
            names = ", ".join(f"`{option}`" for option in action.option_strings) or f"`{metavar.strip()}`"
            shown = names if not action.option_strings else names[:-1] + metavar + "`"
            text = " ".join(formatter._expand_help(action).split()) if action.help else ""
            rows.append(f"| {cell(shown)} | {cell(sentence(text))} |")
        if rows:
            yield (group.title or "options").capitalize(), rows


def sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".") if text else text


def cell(text: str) -> str:
    """As it can stand in a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")
