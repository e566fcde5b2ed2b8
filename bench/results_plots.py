"""Plots as SVG: dots with intervals, a column of panels for each kind of result; bars for times.

Nothing but the standard library, and numbers rounded to a tenth of a pixel: the same results give the same
file. The picture has its own background, light or dark as the reader's browser asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

LABELS, PANEL, GAP = 224, 118, 30  # widths in pixels
BAR_LABELS, BARS, VALUES = 300, 330, 70
ROW, GROUP, TOP, BOTTOM = 15, 30, 66, 34  # heights
BAR_ROW, BAR = 19, 11

_STYLE = """
text { font: 11px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }
.head { font-weight: 600; }
.title { font-weight: 600; font-size: 14px; }
.quiet { fill: #57606a; }
.back { fill: #ffffff; }
.panel { fill: #f3f5f8; }
.grid { stroke: #d5dae0; stroke-width: 1; }
.line { stroke: #57606a; stroke-width: 1.2; stroke-dasharray: 3 2; }
.gain { fill: #0067c0; stroke: #0067c0; }
.harm { fill: #c2410c; stroke: #c2410c; }
.none { fill: #ffffff; stroke: #6e7781; }
.single { fill: #6e7781; stroke: #6e7781; }
.bar { stroke-width: 1.5; }
.spread { stroke: #1f2328; stroke-width: 1.2; }
.dot { stroke-width: 1.5; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; }
.quiet { fill: #9aa4af; }
.back { fill: #0d1117; }
.panel { fill: #171d26; }
.grid { stroke: #333c48; }
.line { stroke: #9aa4af; }
.gain { fill: #58a6ff; stroke: #58a6ff; }
.harm { fill: #ff8a4c; stroke: #ff8a4c; }
.none { fill: #0d1117; stroke: #9aa4af; }
.single { fill: #9aa4af; stroke: #9aa4af; }
.spread { stroke: #e6edf3; }
}
"""


@dataclass(frozen=True)
class Dot:
    """A value with its interval; `verdict` is "gain", "harm", "none" (within the error) or "single"."""

    value: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class Row:
    """One configuration: a dot, or none, for each column."""

    label: str
    dots: Sequence[Dot | None]
    strong: bool = False


@dataclass(frozen=True)
class Group:
    """The rows of one ensemble; `lines` are where each column has its dashed line, if anywhere."""

    title: str
    rows: Sequence[Row]
    lines: Sequence[float | None]


@dataclass(frozen=True)
class Bar:
    """A value above 0, with a line over it from `low` to `high`; `kind` is "gain" or "single"."""

    label: str
    value: float
    low: float
    high: float
    kind: str


@dataclass(frozen=True)
class Column:
    """A scale from `low` to `high`; what lies outside is an arrow at the edge."""

    title: str
    low: float
    high: float
    ticks: list[float] = field(default_factory=list)
    digits: int = 0

    def place(self, value: float) -> float:
        return PANEL * (value - self.low) / (self.high - self.low)


def column(title: str, low: float, high: float) -> Column:
    """A scale with two to four round ticks inside it."""
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(step * by for by in (5, 2, 1, 0.5) if (high - low) / (step * by) >= 2)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = [round(i * step, 9) for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]
    return Column(title, low, high, ticks, digits)


def dot_plot(
    title: str, explanation: str, columns: Sequence[Column], groups: Sequence[Group], *, signed: bool = False
) -> str:
    """The whole picture; `explanation` stands under the title, and for those who cannot see the picture."""
    width = LABELS + len(columns) * (PANEL + GAP)
    height = TOP + sum(GROUP + ROW * len(group.rows) for group in groups) + BOTTOM
    lines = _head(title, explanation, width, height)
    lefts = [LABELS + i * (PANEL + GAP) for i in range(len(columns))]
    lines += [_text(x, 60, one.title, "head") for x, one in zip(lefts, columns, strict=True)]
    y = TOP
    for group in groups:
        lines.append(_text(12, y + 20, group.title, "head"))
        top, bottom = y + 8, y + GROUP + ROW * len(group.rows) - 4
        for x, one, line in zip(lefts, columns, group.lines, strict=True):
            lines.append(f'<rect class="panel" x="{x}" y="{top}" width="{PANEL}" height="{bottom - top}"/>')
            lines += [_rule("grid", x + one.place(tick), top, bottom) for tick in one.ticks]
            if line is not None:
                lines.append(_rule("line", x + one.place(line), top, bottom))
        y += GROUP
        for row in group.rows:
            lines.append(_text(22, y + 4, row.label, "head" if row.strong else "quiet"))
            for x, one, dot in zip(lefts, columns, row.dots, strict=True):
                if dot is not None:
                    lines += _dot(x, y, one, dot)
            y += ROW
    for x, one in zip(lefts, columns, strict=True):
        for tick in one.ticks:
            shown = f"{tick:{'+' if signed and tick else ''}.{one.digits}f}".replace("-", "−")
            lines.append(_text(x + one.place(tick), y + 14, shown, "quiet", middle=True))
    return "\n".join([*lines, "</svg>", ""])


def bar_plot(
    title: str, explanation: str, source: str, groups: Sequence[tuple[str, Sequence[Bar]]], *, unit: str
) -> str:
    """Bars from 0 on one scale, in groups of a title and bars; `source`, where they come from, below."""
    scale = column(unit, 0.0, max(bar.high for _, bars in groups for bar in bars))
    width = BAR_LABELS + BARS + VALUES
    bottom = TOP - 8 + sum(GROUP + BAR_ROW * len(bars) for _, bars in groups)
    lines = _head(title, explanation, width, bottom + BOTTOM + 14)
    ticks = [(tick, BAR_LABELS + BARS * tick / scale.high) for tick in scale.ticks]
    lines.append(
        f'<rect class="panel" x="{BAR_LABELS}" y="{TOP - 14}" width="{BARS}" height="{bottom - TOP + 14}"/>'
    )
    lines += [_rule("grid", x, TOP - 14, bottom) for _, x in ticks]
    y = TOP - 8
    for name, bars in groups:
        lines.append(_text(12, y + 20, name, "head"))
        y += GROUP
        for bar in bars:
            length, low, high = (BARS * one / scale.high for one in (bar.value, bar.low, bar.high))
            lines += [
                _text(22, y + BAR - 1, bar.label, "head" if bar.kind == "gain" else "quiet"),
                f'<rect class="{bar.kind}" x="{BAR_LABELS}" y="{y}" width="{length:.1f}" height="{BAR}"/>',
                f'<line class="spread" x1="{BAR_LABELS + low:.1f}" x2="{BAR_LABELS + high:.1f}" '
                f'y1="{y + BAR / 2}" y2="{y + BAR / 2}"/>',
                _text(BAR_LABELS + BARS + 10, y + BAR - 1, f"{bar.value:.0f} {unit}", "quiet"),
            ]
            y += BAR_ROW
    lines += [_text(x, bottom + 14, f"{tick:.{scale.digits}f}", "quiet", middle=True) for tick, x in ticks]
    lines.append(_text(12, bottom + 36, source, "quiet"))
    return "\n".join([*lines, "</svg>", ""])


def _head(title: str, explanation: str, width: int, height: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-labelledby="title description">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="description">{escape(explanation)}</desc>',
        f"<style>{_STYLE}</style>",
        f'<rect class="back" width="{width}" height="{height}" rx="6"/>',
        _text(12, 22, title, "title"),
        _text(12, 40, explanation, "quiet"),
    ]


def _dot(left: float, y: float, scale: Column, dot: Dot) -> Iterator[str]:
    if not scale.low <= dot.value <= scale.high:
        out = dot.value > scale.high
        x, by = (left + PANEL - 1, -7) if out else (left + 1, 7)
        yield f'<path class="{dot.verdict}" d="M{x:.1f} {y} l{by} -4 v8 z"/>'
        return
    low, high = (left + scale.place(min(max(one, scale.low), scale.high)) for one in (dot.low, dot.high))
    yield f'<line class="bar {dot.verdict}" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
    yield f'<circle class="dot {dot.verdict}" cx="{left + scale.place(dot.value):.1f}" cy="{y}" r="3.5"/>'


def _rule(kind: str, x: float, top: float, bottom: float) -> str:
    return f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>'


def _text(x: float, y: float, text: str, kind: str, *, middle: bool = False) -> str:
    anchor = ' text-anchor="middle"' if middle else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y}"{anchor}>{escape(text)}</text>'
