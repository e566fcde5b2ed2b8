"""Plots: dots with intervals, in columns and groups; bars from 0; dots in the order of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from matplotlib.ticker import FuncFormatter, MaxNLocator

from deepen_ext.plots.picture import (
    BACK,
    CHARACTER,
    GAIN,
    HARM,
    NEITHER,
    QUIET,
    SIZE,
    TEXT,
    Picture,
    plain,
    text_width,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Verdict = Literal["gain", "harm", "none", "single"]

_COLOURS: Mapping[Verdict, str] = {"gain": GAIN, "harm": HARM, "none": NEITHER, "single": NEITHER}
_PANEL, _GAP = 118, 30  # widths in pixels
_BARS, _VALUES = 330, 76
_ROW, _GROUP, _TOP, _BOTTOM = 17, 28, 72, 30  # heights
_LABELS = (150, 420)  # the least and the most width of the labels


@dataclass(frozen=True)
class Dot:
    """A value with its interval; `verdict` is "gain", "harm", "none" (within the error) or "single"."""

    value: float
    low: float
    high: float
    verdict: Verdict


@dataclass(frozen=True)
class Row:
    """One configuration: a dot, or none, for each column."""

    label: str
    dots: Sequence[Dot | None]
    strong: bool = False


@dataclass(frozen=True)
class Group:
    """Rows under a title."""

    title: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Column:
    """A scale from `low` to `high`; where it is of differences (`signed`), with a dashed line at 0.

    A value outside is an arrow at the edge.
    """

    title: str
    low: float
    high: float
    signed: bool = True


@dataclass(frozen=True)
class Bar:
    """A value above 0, with a line over it from `low` to `high` where these are known."""

    label: str
    value: float
    verdict: Verdict = "single"
    low: float | None = None
    high: float | None = None


def bounds(dots: Iterable[Dot | None], least: float) -> tuple[float, float]:
    """A scale of differences that holds all finite intervals, and `least` on both sides of 0."""
    shown = [one for one in dots if one is not None and math.isfinite(one.low + one.high)]
    return (
        min([-least, *(1.05 * one.low for one in shown)]),
        max([least, *(1.05 * one.high for one in shown)]),
    )


def dot_plot(title: str, explanation: str, columns: Sequence[Column], groups: Sequence[Group]) -> Picture:
    """A panel for each column, a line for each row."""
    labels = _label_width(row.label for group in groups for row in group.rows)
    step = max([_PANEL + _GAP, *(len(column.title) * CHARACTER * 1.15 + 10 for column in columns)])
    bottom = _TOP + sum(_GROUP + _ROW * len(group.rows) for group in groups) + 8
    picture = Picture(title, explanation, labels + len(columns) * step, bottom + _BOTTOM)
    panels = []
    for i, column in enumerate(columns):
        panel = picture.panel(labels + i * step, _TOP, _PANEL, bottom - _TOP)
        panel.set_xlim(column.low, column.high)
        panel.set_ylim(bottom, _TOP)
        _title(panel, column.title)
        _ticks(panel, 4, column.signed)
        if column.signed:
            panel.axvline(0, color=QUIET, linewidth=1, dashes=(3, 2))
        panels.append(panel)
    y: float = _TOP
    for group in groups:
        picture.write(12, y + 20, group.title, strong=True)
        y += _GROUP
        for row in group.rows:
            label = _short(row.label, labels - 30, strong=row.strong)
            picture.write(22, y + 12, label, quiet=not row.strong, strong=row.strong)
            for panel, column, dot in zip(panels, columns, row.dots, strict=True):
                if dot is not None:
                    _draw(panel, column, dot, y + _ROW / 2)
            y += _ROW
    return picture


def bar_plot(
    title: str, explanation: str, source: str, groups: Sequence[tuple[str, Sequence[Bar]]], *, unit: str
) -> Picture:
    """Bars from 0 on one scale, in groups of a title and bars; `source`, where they come from, below."""
    bars = [bar for _, group in groups for bar in group]
    labels = _label_width(bar.label for bar in bars)
    most = max([*(bar.value for bar in bars), *(bar.high for bar in bars if bar.high is not None)])
    top = _TOP - 14
    bottom = top + sum(_GROUP + _ROW * len(group) for _, group in groups) + 8
    height = bottom + _BOTTOM + (22 if source else 0)
    picture = Picture(title, explanation, labels + _BARS + _VALUES, height, source)
    panel = picture.panel(labels, top, _BARS, bottom - top)
    panel.set_xlim(0, most or 1)
    panel.set_ylim(bottom, top)
    _ticks(panel, 4, False)
    y: float = top
    for name, group in groups:
        picture.write(12, y + 20, name, strong=True)
        y += _GROUP
        for bar in group:
            own, middle = bar.verdict == "gain", y + _ROW / 2
            (patch,) = panel.barh(middle, bar.value, height=11, color=_COLOURS[bar.verdict])
            patch.set_gid(f"bar-{len(panel.patches)}-{bar.verdict}")
            if bar.low is not None and bar.high is not None:
                panel.plot([bar.low, bar.high], [middle, middle], color=TEXT, linewidth=1)
            label = _short(bar.label, labels - 30, strong=own)
            picture.write(22, y + 12, label, quiet=not own, strong=own)
            digits = 0 if bar.value >= 10 else 1 if bar.value >= 1 else 2
            picture.write(labels + _BARS + 10, y + 12, f"{bar.value:.{digits}f} {unit}", quiet=True)
            y += _ROW
    return picture


def run_plot(
    title: str, explanation: str, across: str, dots: Sequence[Dot], lines: Sequence[tuple[str, float]]
) -> Picture:
    """Dots in the order of a run, over dashed lines at other values, with their names.

    Infinity is an arrow at the upper edge.
    """
    width, tall = 720, 248
    picture = Picture(title, explanation, width, 60 + tall + 52)
    panel = picture.panel(64, 60, width - 64 - 190, tall)
    panel.set_xlim(0, len(dots) + 1)
    panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    panel.yaxis.set_visible(True)
    panel.ticklabel_format(axis="y", useOffset=False)
    panel.set_xlabel(across, fontsize=SIZE, color=QUIET)
    for i, dot in enumerate(dots, start=1):
        if math.isfinite(dot.value):
            _mark(panel, dot, [i], [dot.value], [i, i], [dot.low, dot.high])
        else:
            _mark(panel, dot, [i], [1], [], [], "^", transform=panel.get_xaxis_transform())
    for _, value in lines:
        if math.isfinite(value):
            panel.axhline(value, color=QUIET, linewidth=1, dashes=(3, 2))
    low, high = panel.get_ylim()
    panel.set_ylim(low, high)
    heights = [(min(value, high) - low) / (high - low) * tall for _, value in lines]
    for (name, value), y in zip(lines, _apart(heights, 14, tall), strict=True):
        arrow = "" if math.isfinite(value) else " ↑"
        panel.annotate(
            plain(_short(name, 162) + arrow),
            (1, y / tall),
            xytext=(6, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            verticalalignment="center",
            fontsize=SIZE,
            color=QUIET,
            parse_math=False,
            annotation_clip=False,
        )
    return picture


def _title(panel: Axes, text: str) -> None:
    panel.set_title(plain(text), loc="left", fontsize=SIZE, weight="bold", color=TEXT, parse_math=False)


def _ticks(panel: Axes, most: int, signed: bool) -> None:
    def shown(value: float, _: object) -> str:
        sign = "+" if signed and abs(value) > 1e-9 else ""
        return f"{round(value, 9):{sign}g}".replace("-", "\N{MINUS SIGN}")

    panel.xaxis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10]))
    panel.xaxis.set_major_formatter(FuncFormatter(shown))


def _draw(panel: Axes, column: Column, dot: Dot, y: float) -> None:
    if column.low <= dot.value <= column.high:
        ends = [max(dot.low, column.low), min(dot.high, column.high)]
        _mark(panel, dot, [dot.value], [y], ends, [y, y])
    else:
        above = dot.value > column.high
        _mark(panel, dot, [column.high if above else column.low], [y], [], [], ">" if above else "<")


def _mark(
    panel: Axes,
    dot: Dot,
    x: Sequence[float],
    y: Sequence[float],
    line_x: Sequence[float],
    line_y: Sequence[float],
    mark: str = "o",
    **place: Any,
) -> None:
    colour = _COLOURS[dot.verdict]
    if all(map(math.isfinite, [*line_x, *line_y])):
        panel.plot(line_x, line_y, color=colour, linewidth=1.2)
    face = BACK if dot.verdict == "none" else colour
    (drawn,) = panel.plot(
        x, y, mark, color=colour, markerfacecolor=face, markersize=5.2, clip_on=False, **place
    )
    number = sum(len(one.lines) for one in panel.figure.axes)  # an id of an SVG is there once
    drawn.set_gid(f"dot-{number}-{dot.verdict}")


def _apart(places: Sequence[float], least: float, most: float) -> list[float]:
    """The places, moved as little as keeps them `least` apart, in their order, and not above `most`."""
    order = sorted(range(len(places)), key=places.__getitem__)
    found = list(places)
    for below, here in pairwise(order):
        found[here] = max(found[here], found[below] + least)
    for i, here in enumerate(reversed(order)):
        found[here] = min(found[here], most - i * least)
    return found


def _label_width(labels: Iterable[str]) -> float:
    least, most = _LABELS
    return min(max([least, *(len(one) * CHARACTER + 50 for one in labels)]), most)


def _short(text: str, width: float, *, strong: bool = False) -> str:
    """The end of a text that is wider: names of models differ there."""
    if text_width(text, strong=strong) <= width:
        return text
    kept = text[-int(width / 2) :]  # no letter is narrower than two pixels
    while kept and text_width(f"…{kept}", strong=strong) > width:
        kept = kept[1:]
    return f"…{kept}"
