"""What a run found, as one HTML file that needs nothing else: no network, no other files.

write_report(path, "Internal RL", "What this is.",
    [Claim("internal RL solves the task", "success 0.81 over 5 seeds", True)],
    [Section("Learning", [Text("..."), Figure(run.figure("success.png"), "Success.")])])
"""

import base64
import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_KINDS = {b"\x89PNG\r\n\x1a\n": "image/png", b"GIF87a": "image/gif", b"GIF89a": "image/gif"}
_VERDICTS = {True: ("yes", "✓ holds"), False: ("no", "✗ does not hold"), None: ("", "not decided")}

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --page: #fff; --soft: #667; --line: #dde;
  --yes: #007a5a; --no: #b3401a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6ea; --page: #17181b; --soft: #9aa; --line: #34363c; --yes: #3ecf9f;
    --no: #ff8a5c; } }
body { margin: 0 auto; max-width: 52rem; padding: 1.5rem 1rem 4rem; color: var(--ink);
  background: var(--page); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .45rem .7rem .45rem 0;
  border-bottom: 1px solid var(--line); }
th, caption, figcaption { color: var(--soft); font-size: .9rem; font-weight: 500; }
caption { caption-side: bottom; text-align: left; padding-top: .5rem; }
.number { text-align: right; white-space: nowrap; }
.yes { color: var(--yes); font-weight: 600; } .no { color: var(--no); font-weight: 600; }
.row { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); }
figure { margin: 1rem 0; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; border-radius: 6px; background: #fff; }
figcaption { margin-top: .4rem; }
"""


@dataclass(frozen=True)
class Claim:
    """What a paper says, what came out here, and whether that holds (None: not decided)."""

    claim: str
    measured: str
    holds: bool | None


@dataclass(frozen=True)
class Text:
    """Plain text; an empty line starts a new paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows as long as `columns`; floats are shown with three digits, None as a dash."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A PNG or a (moving) GIF: a file or its bytes."""

    image: Path | bytes
    caption: str = ""


@dataclass(frozen=True)
class SideBySide:
    """Figures in one row, before and after say; below each other on a narrow screen."""

    figures: Sequence[Figure]


Block = Text | Table | Figure | SideBySide


@dataclass(frozen=True)
class Section:
    """A heading and what is under it."""

    title: str
    blocks: Sequence[Block]


def write_report(
    path: str | Path,
    title: str,
    summary: str,
    claims: Sequence[Claim],
    sections: Sequence[Section],
) -> Path:
    """Writes the report to `path`, usually `report.html`, and returns the path.

    Raises FileNotFoundError for an absent image and ValueError for one that is no PNG or GIF or a
    table whose rows do not fit its columns; an earlier report then stays as it was.
    """
    path = Path(path)
    body = [f"<h1>{_escape(title)}</h1>", _block(Text(summary)), _claims(claims)]
    for section in sections:
        body.append(f"<section>\n<h2>{_escape(section.title)}</h2>")
        body += [_block(block) for block in section.blocks]
        body.append("</section>")
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def _claims(claims: Sequence[Claim]) -> str:
    rows = "\n".join(
        f"<tr><td>{_escape(c.claim)}</td><td>{_escape(c.measured)}</td>"
        f'<td class="{_VERDICTS[c.holds][0]}">{_VERDICTS[c.holds][1]}</td></tr>'
        for c in claims
    )
    return _table("<th>Claimed</th><th>Measured</th><th>Verdict</th>", rows, "")


def _block(block: Block) -> str:
    match block:
        case Text(text):
            paragraphs = (part.strip() for part in text.split("\n\n"))
            return "\n".join(f"<p>{_escape(part)}</p>" for part in paragraphs if part)
        case Table(columns, rows, caption):
            return _table(
                "".join(f"<th>{_escape(name)}</th>" for name in columns),
                "\n".join(_row(row, columns) for row in rows),
                caption,
            )
        case Figure(image, caption):
            source, alt = _data_uri(image), html.escape(caption or "figure")
            under = f"<figcaption>{_escape(caption)}</figcaption>" if caption else ""
            return f'<figure><img src="{source}" alt="{alt}">{under}</figure>'
        case SideBySide(figures):
            inner = "\n".join(_block(figure) for figure in figures)
            return f'<div class="row">\n{inner}\n</div>'


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a README."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def _table(head: str, rows: str, caption: str) -> str:
    under = f"<caption>{_escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{under}<thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def _row(row: Sequence[Any], columns: Sequence[str]) -> str:
    if len(row) != len(columns):
        raise ValueError(f"table: row {row!r} has {len(row)} cells, expected {list(columns)}")
    return "<tr>" + "".join(_cell(value) for value in row) + "</tr>"


def _cell(value: Any) -> str:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None:
        return "<td>–</td>"
    if isinstance(value, bool):
        return f"<td>{'yes' if value else 'no'}</td>"
    if isinstance(value, int):
        return f'<td class="number">{value:,}</td>'
    if isinstance(value, float):
        return f'<td class="number">{value:.3g}</td>'
    return f"<td>{_escape(str(value))}</td>"


def _data_uri(image: Path | bytes) -> str:
    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    for start, kind in _KINDS.items():
        if data.startswith(start):
            return f"data:{kind};base64,{base64.b64encode(data).decode()}"
    name = "image" if isinstance(image, bytes) else image
    raise ValueError(f"{name} starts with {data[:8]!r}, expected a PNG or GIF")


def _escape(text: str) -> str:
    return html.escape(text, quote=False)
