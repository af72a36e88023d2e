"""Draw the Mermaid diagrams of the pages as SVG files, which the site shows: `python docs/_site/diagrams.py [MERMAID_JS]`.

Needs Chromium, and Mermaid's `mermaid.min.js` (`npm pack mermaid`, in `package/dist`); both only when a diagram was changed.
"""

import re
import subprocess
import sys
import tempfile
from html import escape, unescape
from pathlib import Path

from hooks import DIAGRAMS, ROOT, diagrams, drawn

PAGE = """<!doctype html><meta charset="utf-8"><pre class="mermaid">{diagram}</pre><script src="{program}"></script>
<script>mermaid.initialize({{startOnLoad: true, theme: "neutral", htmlLabels: false, flowchart: {{htmlLabels: false}}}});</script>"""


def main() -> None:
    program = Path(sys.argv[1] if len(sys.argv) > 1 else "mermaid.min.js").resolve()
    folder = ROOT / "docs" / DIAGRAMS
    wanted = {drawn(d): d for page in ROOT.glob("docs/**/*.md") for d in diagrams(page.read_text(encoding="utf-8"))}
    for old in folder.glob("*.svg"):
        if old.name not in wanted:
            old.unlink()
    for name, diagram in wanted.items():
        if not (folder / name).exists():
            (folder / name).write_text(draw(diagram, program), encoding="utf-8")


def draw(diagram: str, program: Path) -> str:
    """The picture, with a white ground so that it can be read in the dark scheme too."""
    with tempfile.TemporaryDirectory() as parent:
        page = Path(parent) / "page.html"
        page.write_text(PAGE.format(diagram=escape(diagram), program=program.as_uri()), encoding="utf-8")
        command = [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--allow-file-access-from-files",
            "--virtual-time-budget=20000",
        ]
        dom = subprocess.run(
            [*command, "--dump-dom", page.as_uri()], check=True, capture_output=True, text=True
        ).stdout
    picture = re.search(r"<svg.*?</svg>", dom, re.DOTALL)
    if picture is None:
        raise SystemExit("Chromium has drawn nothing")
    text = unescape(picture.group()).replace("&nbsp;", " ")
    width, height = re.search(r'viewBox="[-\d.]+ [-\d.]+ ([\d.]+) ([\d.]+)"', text).groups()
    name = re.match(r'<svg id="([^"]*)"', text)[1]
    text = text.replace(name, "diagram").replace('width="100%"', f'width="{width}" height="{height}"', 1)
    return text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) if "xmlns=" not in text else text


if __name__ == "__main__":
    main()
