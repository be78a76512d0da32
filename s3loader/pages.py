"""One HTML page: tables and pictures (SVG) in one file, without scripts, fonts or anything from a network.

Whatever comes from outside, such as keys, goes through `escaped`. The figures stand in the page as JSON too, in the element
``data``.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

__all__ = [
    "COLORS",
    "Line",
    "bars",
    "chart",
    "escaped",
    "facts",
    "key_of",
    "lines_chart",
    "number",
    "page",
    "round_up",
    "table",
]

COLORS: Final = ("#2f74c0", "#d6604d", "#4d9221", "#8073ac", "#b8860b", "#17807e", "#c51b7d", "#777777")
_WIDTH: Final = 860
_HEIGHT: Final = 240
_LEFT: Final = 70
_RIGHT: Final = 20
_BOTTOM: Final = 34
_TOP: Final = 12
_STYLE: Final = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#626b75;--line:#dfe4ea;--paper:#fff;--card:#f6f8fa;--mark:#2f74c0}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#8b949e;--line:#30363d;--paper:#0d1117;--card:#161b22}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;color:var(--ink);background:var(--paper);
max-width:920px;margin:2rem auto 4rem;padding:0 1rem}
h1{font-size:1.5rem;margin:0 0 .3rem;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:2.2rem 0 .6rem}
p{margin:.3rem 0;color:var(--soft)}
.facts{display:flex;flex-wrap:wrap;gap:.6rem;margin:1rem 0}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.5rem .9rem;min-width:7rem}
.facts b{display:block;font-size:1.25rem;font-variant-numeric:tabular-nums}.facts span{color:var(--soft);font-size:.85rem}
.advice{background:var(--card);border-left:4px solid var(--mark);border-radius:0 8px 8px 0;padding:.6rem 1rem;margin:.5rem 0}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:13.5px}
th,td{padding:.3rem .5rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th{color:var(--soft);font-weight:600}
th:first-child,td:first-child,td.text,th.text{text-align:left;overflow-wrap:anywhere}
svg{width:100%;height:auto;display:block}svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
svg text.ink{fill:var(--ink)}.grid{stroke:var(--line);stroke-width:1}
.key{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin:0 .3em 0 1em}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(130px,1fr));gap:.7rem}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;overflow:hidden}
figure img{display:block;width:100%;height:130px;object-fit:contain;background:var(--paper)}
figcaption{font-size:12px;color:var(--soft);padding:.3rem .5rem;overflow-wrap:anywhere}
"""


def escaped(text: object) -> str:
    """Text that may stand in a page, in attributes too; bytes that are no text are shown as escapes."""
    return html.escape(str(text).encode("utf-8", "backslashreplace").decode())


def number(value: float) -> str:
    """Three digits that count, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20 ..."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * 0.999)


def page(title: str, parts: Sequence[str], data: Any) -> str:
    """The whole page.

    Args:
        title: Its heading.
        parts: What stands below it: HTML that is safe already.
        data: Goes in as JSON, in the element ``data``.
    """
    said = json.dumps(data, default=str).replace("<", "\\u003c")
    head = (
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>{escaped(title)}</title><style>{_STYLE}</style>"
    )
    end = f'<script type="application/json" id="data">{said}</script></html>\n'
    return "\n".join((head, f"<h1>{escaped(title)}</h1>", *parts, end))


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Figures side by side: label and value of each."""
    cells = "".join(f"<div><b>{escaped(value)}</b><span>{escaped(label)}</span></div>" for label, value in rows)
    return f'<div class="facts">{cells}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text: int = -1) -> str:
    """A table; numbers to the right, the first column and `text` to the left."""

    def line(tag: str, cells: Sequence[str]) -> str:
        inner = (f"<{tag}{' class=text' if at == text else ''}>{escaped(cell)}</{tag}>" for at, cell in enumerate(cells))
        return f"<tr>{''.join(inner)}</tr>"

    return f'<div class="wide"><table>{line("th", header)}{"".join(line("td", row) for row in rows)}</table></div>'


def key_of(names: Sequence[str]) -> str:
    """What each color means; the colors are those of `COLORS` in order."""
    return "".join(
        f'<span class="key" style="background:{COLORS[at % len(COLORS)]}"></span>{escaped(name)}'
        for at, name in enumerate(names)
    )


class Line(NamedTuple):
    """A line of a chart: points as shares of its width and height."""

    name: str
    color: str
    points: Sequence[tuple[float, float]]
    dots: bool = False
    """Mark each point."""


def chart(lines: Sequence[Line], across: Sequence[tuple[float, str]], up: Sequence[tuple[float, str]]) -> str:
    """Lines over axes whose marks are (share, label)."""
    marks = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{_y(share):.1f}" y2="{_y(share):.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{_y(share) + 4:.1f}" text-anchor="end">{escaped(label)}</text>'
        for share, label in up
    ]
    marks += [
        f'<text x="{_x(share):.1f}" y="{_HEIGHT - 12}" text-anchor="middle">{escaped(label)}</text>' for share, label in across
    ]
    drawn = "".join(map(_drawn, lines))
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(marks)}{drawn}</svg>'


def _drawn(line: Line) -> str:
    where = " ".join(f"{_x(x):.1f},{_y(y):.1f}" for x, y in line.points)
    dots = "".join(
        f'<circle cx="{_x(x):.1f}" cy="{_y(y):.1f}" r="3.5" fill="{line.color}"/>'
        for x, y in (line.points if line.dots else ())
    )
    name = escaped(line.name)
    return (
        f'<polyline data-op="{name}" fill="none" stroke="{line.color}" stroke-width="1.8" stroke-linejoin="round" '
        f'points="{where}"><title>{name}</title></polyline>{dots}'
    )


def lines_chart(series: Mapping[str, Mapping[int, float]], unit: str) -> str:
    """Values over whole numbers that grow in steps of factors (requests at a time): evenly spaced, from 0 up.

    Args:
        series: Value by number, for each name; the colors are those of `COLORS` in order.
        unit: Of the values, after the labels.
    """
    steps = sorted({step for values in series.values() for step in values})
    at = {step: 0.5 if len(steps) == 1 else place / (len(steps) - 1) for place, step in enumerate(steps)}
    top = round_up(max((value for values in series.values() for value in values.values()), default=0))
    lines = [
        Line(name, COLORS[place % len(COLORS)], [(at[step], values[step] / top) for step in sorted(values)], True)
        for place, (name, values) in enumerate(series.items())
    ]
    up = [(f / 4, f"{number(top * f / 4)} {unit}") for f in range(5)]
    return chart(lines, [(at[step], f"{step:,}") for step in steps], up)


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """Bars one below the other: label, value, and the value as it is shown."""
    if not rows:
        return ""
    high, left = 24, 210
    top = max((value for _, value, _ in rows), default=0) or 1.0
    room = _WIDTH - left - 130
    drawn = []
    for at, (label, value, shown) in enumerate(rows):
        y = at * high
        short = label if len(label) <= 30 else f"{label[:29]}…"
        width = max(1.5, room * value / top)
        drawn.append(
            f'<text class="ink" x="{left - 10}" y="{y + 16}" text-anchor="end">{escaped(short)}</text>'
            f'<rect x="{left}" y="{y + 4}" width="{width:.1f}" height="{high - 8}" rx="3" fill="{COLORS[0]}">'
            f"<title>{escaped(label)}: {escaped(shown)}</title></rect>"
            f'<text x="{left + width + 8:.1f}" y="{y + 16}">{escaped(shown)}</text>'
        )
    return f'<svg viewBox="0 0 {_WIDTH} {len(rows) * high}" role="img">{"".join(drawn)}</svg>'


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)
