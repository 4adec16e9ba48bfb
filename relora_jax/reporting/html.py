"""Renders a Markdown page as one self-contained HTML file with embedded pictures."""

import base64
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml

from relora_jax.storage import atomic
from relora_jax.storage.location import AnyPath

# The browser enforces this: no script runs, and nothing is loaded from elsewhere.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# Wide pictures shrink and wide tables scroll in their own box: the page itself never scrolls sideways.
STYLE = """\
:root { color-scheme: light; }
body { max-width: 64rem; margin: 0 auto; padding: 1rem; color: #1f2328; background: #fff;
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; -webkit-text-size-adjust: 100%; }
h1, h2 { line-height: 1.25; }
h2 { margin-top: 2.5rem; padding-bottom: 0.3rem; border-bottom: 1px solid #d1d9e0; }
img { max-width: 100%; height: auto; }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.35rem 0.5rem; border: 1px solid #d1d9e0; text-align: left; vertical-align: top; }
td[style] { white-space: nowrap; } /* right-aligned: numbers */
th:empty { padding: 0; border: 0; }
code, pre { font-family: ui-monospace, monospace; font-size: 0.85rem; background: #f3f4f6; }
pre { padding: 0.8rem; overflow-x: auto; }
summary { cursor: pointer; }
"""
PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}</body>
</html>
"""


def write(path: AnyPath, text: str) -> None:
    """Renders the Markdown `text` to `path`, embedding its PNG files (named relative to `path`'s directory).

    HTML in `text` is passed through: the caller must escape untrusted text.
    """
    markdown = MarkdownIt("commonmark").enable("table")
    blocks = markdown.parse(text)
    inline = [token for block in blocks for token in block.children or []]
    for token in inline:
        if token.type == "image":
            picture = path.parent / unquote(str(token.attrs["src"]))
            token.attrs["src"] = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    title = escapeHtml("".join(token.content for token in blocks[1].children or []))
    body = markdown.renderer.render(blocks, markdown.options, {})
    page = PAGE.format(policy=POLICY, title=title, style=STYLE, body=body)
    atomic.write(path, page.encode())
