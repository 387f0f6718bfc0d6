"""The report as one HTML file: made from the same Markdown, with the figures inside, no network, no script.

Text of other files stands on the page: of its HTML nothing is taken as HTML but the pictures as `picture` writes them.
"""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path
from typing import Any

from markdown import Markdown
from markdown.extensions.toc import TocExtension
from markdown.preprocessors import Preprocessor
from markdown.treeprocessors import Treeprocessor

NAME = r"figures/[\w.-]+"
PICTURE = re.compile(
    rf'<picture><source media="\(prefers-color-scheme: dark\)" srcset="({NAME})"><img src="({NAME})" alt="([^"<>]*)">'
    "</picture>"
)
LINK = re.compile(r"(?!.*\.\./)\w[\w./ -]*|#[\w-]+")  # a path below the page, or a heading of it
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
TYPES = {".png": "image/png", ".jpg": "image/jpeg"}
# The dark figures have the dark paper of app/report/figures.py.
STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --line: #d1d9e0; --soft: #f6f8fa; --link: #0969da; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --ink: #e6edf3; --line: #3d444d; --soft: #161b22; --link: #58a6ff; }
}
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { line-height: 1.25; } h2 { margin-top: 2.5rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h1 + p { padding: .8rem 1rem; border-left: 4px solid #0072b2; background: var(--soft); }
a { color: var(--link); }
img { max-width: 100%; height: auto; display: block; }
.full { display: none; }
.table, .figure { overflow-x: auto; }
@media (max-width: 45rem) { .figure img { max-width: none; width: 52rem; } .full { display: block; } }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .5rem; border: 1px solid var(--line); white-space: nowrap; }
td:last-child:not([style]) { white-space: normal; min-width: 5rem; } /* prose; columns to the right hold names */
th { background: var(--soft); }
code, pre { font: 13px/1.45 ui-monospace, monospace; background: var(--soft); border-radius: 4px; }
code { padding: .1rem .3rem; } pre { padding: .8rem; overflow-x: auto; } pre code { padding: 0; }
@media print { body { max-width: none; } pre { white-space: pre-wrap; } h2, tr, img { break-inside: avoid; } }
"""


def picture(name: str, dark_name: str, text: str) -> str:
    """HTML of a picture that Git hosts keep; `text` is its caption, whose first sentence is the alternative text."""
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="figures/{dark_name}">'
    return f'<picture>{dark}<img src="figures/{name}" alt="{alternative(text)}"></picture>'


def alternative(text: str) -> str:
    """The first sentence of a caption as the value of an HTML attribute."""
    sentence = text.partition(".")[0]
    return re.sub(r"[*`]", "", sentence).replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")


def page(text: str, root: Path, name: str) -> str:
    """Markdown of the report -> a whole HTML document.

    Args:
        text: the content of summary.md; pictures have paths relative to `root`.
        root: the run root.
        name: of the run, for the title.
    """
    body = converter(root).convert(text)
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(name)}</title>'
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def converter(root: Path) -> Markdown:
    """Markdown without HTML, pictures of other places, and links that lead away from the page."""
    headings = TocExtension(marker="")  # gives them names to link to, and takes no text for a table of contents
    made = Markdown(extensions=["tables", "fenced_code", "sane_lists", headings], output_format="html")
    made.preprocessors.deregister("html_block")
    for pattern in ("html", "image_link", "image_reference", "short_image_ref"):
        made.inlinePatterns.deregister(pattern)
    made.preprocessors.register(Pictures(made, root), "pictures", 27)  # after the white space (30), before code (25)
    made.treeprocessors.register(OwnLinks(made), "own_links", 0)  # the last one
    return made


class Pictures(Preprocessor):
    """Puts the content of the pictures into the page."""

    def __init__(self, made: Markdown, root: Path) -> None:
        super().__init__(made)
        self.root = root

    def run(self, lines: list[str]) -> list[str]:
        return PICTURE.sub(self._embedded, "\n".join(lines)).split("\n")

    def _embedded(self, match: re.Match[str]) -> str:
        dark, light = data_uri(self.root, match[1]), data_uri(self.root, match[2])
        text = html.escape(html.unescape(match[3]))
        source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">' if dark else ""
        shown = f'<picture>{source}<img src="{light}" alt="{text}"></picture>'
        return self.md.htmlStash.store(
            f'<div class="figure">{shown}</div><a class="full" href="{match[2]}">full picture</a>'
        )


class OwnLinks(Treeprocessor):
    """Takes the target of every link that does not lead to a file beside the page."""

    def run(self, root: Any) -> None:
        for link in root.iter("a"):
            if not LINK.fullmatch(link.get("href", "")):
                link.attrib.pop("href", None)


def data_uri(root: Path, name: str) -> str:
    """The content of a picture below `root`, for its `src`; empty where there is none, or where it leads out."""
    path = root / name
    if path.suffix not in TYPES or not is_inside(path, root):
        return ""
    content = base64.b64encode(path.read_bytes()).decode()
    return f"data:{TYPES[path.suffix]};base64,{content}"


def is_inside(path: Path, root: Path) -> bool:
    """Whether it is a file that lies below `root` itself, not behind a link."""
    return path.is_file() and path.resolve().is_relative_to(root.resolve())
