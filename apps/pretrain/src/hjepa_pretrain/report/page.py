"""The page of a run: one HTML file that opens offline."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field

_STYLE = """
body{font:15px/1.55 system-ui,sans-serif;color:#1f2328;max-width:1080px;margin:2rem auto;padding:0 1.2rem}
h1{font-size:1.7rem;margin-bottom:.2rem}h2{font-size:1.2rem;margin:2.2rem 0 .4rem;border-bottom:1px solid #e4e6ea}
p.note{color:#57606a;max-width:75ch}table{border-collapse:collapse;margin:.6rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.28rem .7rem;text-align:right;white-space:nowrap;font-size:14px;line-height:1.3;
border-bottom:1px solid #eceef1}th{font-weight:600;color:#57606a}
th:nth-child(-n+3),td:nth-child(-n+3){text-align:left}tr.own td{background:#eef6fa}img{max-width:100%}
small{color:#57606a;font-size:11.5px}.row{display:flex;flex-wrap:wrap;gap:1rem;align-items:flex-start}
pre{background:#f6f8fa;padding:.8rem;overflow:auto;font-size:12.5px}
.alarm,.fine{padding:.5rem .8rem;border-left:4px solid #0f7b6c}.alarm{background:#fdecea;border-color:#c4554d}
"""


@dataclass(kw_only=True, slots=True)
class Section:
    """One heading with a sentence that says how to read it, pictures beside one another, and raw HTML below.

    Attributes:
        title: heading.
        note: plain text under the heading.
        pictures: PNG or SVG bytes.
        body: HTML that is trusted (made by `table` or `code`).
    """

    title: str
    note: str = ""
    pictures: Sequence[bytes] = field(default_factory=tuple)
    body: str = ""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, own: Sequence[bool] = ()) -> str:
    """Returns an HTML table; rows flagged `own` are tinted."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    flags = list(own) + [False] * (len(rows) - len(own))
    body = "".join(
        f"<tr{' class=own' if flag else ''}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row, flag in zip(rows, flags, strict=True)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def code(text: str) -> str:
    """Returns text as a preformatted block."""
    return f"<pre>{html.escape(text)}</pre>"


def notice(text: str, *, alarm: bool) -> str:
    """Returns a highlighted line: an alarm or an all-clear."""
    return f'<p class="{"alarm" if alarm else "fine"}">{html.escape(text)}</p>'


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Returns the whole page as HTML with its pictures inside."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1><p class=note>{html.escape(subtitle)}</p>",
    ]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        if section.note:
            parts.append(f"<p class=note>{html.escape(section.note)}</p>")
        if section.pictures:
            images = "".join(_image(section.title, data) for data in section.pictures)
            parts.append(f"<div class=row>{images}</div>")
        parts.append(section.body)
    # Names of files may hold bytes that are no text.
    return "\n".join(parts).encode("utf-8", "backslashreplace").decode()


def _image(title: str, data: bytes) -> str:
    kind = "png" if data.startswith(b"\x89PNG") else "svg+xml"
    return f'<img alt="{html.escape(title)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
