"""The report as one HTML file: made from the same Markdown, with the figures inside, no network, no script."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

import markdown

SOURCE = re.compile(r'(src|srcset)="([^":]+)"')  # a picture that is a file: a data URI has a colon
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
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .5rem; border: 1px solid var(--line); white-space: nowrap; }
td:last-child { white-space: normal; min-width: 5rem; }
th { background: var(--soft); }
code, pre { font: 13px/1.45 ui-monospace, monospace; background: var(--soft); border-radius: 4px; }
code { padding: .1rem .3rem; } pre { padding: .8rem; overflow-x: auto; } pre code { padding: 0; }
@media print { body { max-width: none; } pre { white-space: pre-wrap; } h2, tr, img { break-inside: avoid; } }
"""


def page(text: str, root: Path, name: str) -> str:
    """Markdown of the report -> a whole HTML document.

    Args:
        text: the content of summary.md; pictures have paths relative to `root`.
        root: the run root.
        name: of the run, for the title.
    """
    body = markdown.markdown(text, extensions=["tables", "fenced_code", "sane_lists"], output_format="html")
    body = SOURCE.sub(lambda match: f'{match[1]}="{data_uri(root / match[2])}"', body)
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(name)}</title>'
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def data_uri(path: Path) -> str:
    """The content of a picture, for its `src`."""
    content = base64.b64encode(path.read_bytes()).decode()
    return f"data:{TYPES[path.suffix]};base64,{content}"
