"""A picture by matplotlib: its size, colours and text, and how it becomes a file.

Sizes are in pixels of 1/96 inch. The same results give the same bytes: no date, no random names. An SVG keeps
its text as text, has a background of its own, and is light or dark as the reader's browser asks for it.
"""

from __future__ import annotations

import io
import warnings
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from deepen_ext.plots.output_file import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHARACTER = 6.4  # the mean width of a character, in pixels
SIZE = 11 * 0.75  # of text: matplotlib has it in points
TEXT, QUIET, BACK = "#1f2328", "#57606a", "#ffffff"
GAIN, HARM, NEITHER = "#0067c0", "#c2410c", "#6e7781"
_PANEL, _GRID = "#f3f5f8", "#d5dae0"
_DARK = {
    TEXT: "#e6edf3",
    QUIET: "#9aa4af",
    BACK: "#0d1117",
    _PANEL: "#171d26",
    _GRID: "#333c48",
    GAIN: "#58a6ff",
    HARM: "#ff8a4c",
    NEITHER: "#9aa4af",
}
_PIXEL = 1 / 96  # inches
_FONT = "DejaVu Sans"  # matplotlib's own, by which it measures
_FONTS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial"
_SETTINGS: Any = {"svg.fonttype": "none", "svg.hashsalt": "deepen-ext", "font.sans-serif": [_FONT]}


class Picture:
    """An empty picture with a title and, under it, an explanation.

    Args:
        title: above everything.
        explanation: in one line; also for those who cannot see the picture.
        width: in pixels; more where the words need it.
        height: in pixels.
        source: where the numbers come from, at the bottom.
    """

    def __init__(self, title: str, explanation: str, width: float, height: float, source: str = "") -> None:
        words = max(text_width(title, strong=True, size=14), text_width(explanation), text_width(source))
        self.width = max(width, words + 24)
        self.height = height
        self.title, self.explanation = title, explanation
        self.figure = Figure(figsize=(self.width * _PIXEL, height * _PIXEL), facecolor=BACK)
        self.write(12, 22, title, strong=True, size=14)
        self.write(12, 40, explanation, quiet=True)
        if source:
            self.write(12, height - 12, source, quiet=True)

    def write(
        self, x: float, y: float, text: str, *, quiet: bool = False, strong: bool = False, size: float = 11
    ) -> None:
        """A line of text that begins at `x`, on the line `y` from the top."""
        self.figure.text(
            x / self.width,
            1 - y / self.height,
            plain(text),
            fontsize=size * 0.75,
            weight="bold" if strong else "normal",
            color=QUIET if quiet else TEXT,
            parse_math=False,
        )

    def panel(self, left: float, top: float, width: float, height: float) -> Axes:
        """A place for values, with a scale below it."""
        place = (
            left / self.width,
            1 - (top + height) / self.height,
            width / self.width,
            height / self.height,
        )
        panel = self.figure.add_axes(place, facecolor=_PANEL)
        panel.set_axisbelow(True)
        panel.spines[:].set_visible(False)
        panel.grid(axis="x", color=_GRID, linewidth=0.8)
        panel.yaxis.set_visible(False)
        panel.tick_params(length=0, labelsize=SIZE, labelcolor=QUIET)
        return panel

    def save(self, file: Path) -> None:
        """Write it in the format of the file's ending: .svg, .png, .pdf.

        Raises:
            InputError: the system does not take it.
        """
        kind = file.suffix.lower().removeprefix(".")
        content = self.svg().encode() if kind == "svg" else self._rendered(kind)
        write_file(file, content)

    def svg(self) -> str:
        """The picture as a file of its own, or part of a page of HTML."""
        _, _, picture = self._rendered("svg").decode().partition("<svg ")
        head, _, body = picture.partition(">")
        dark = "".join(
            f'[style*="{part}: {light}"]{{{part}:{dark}!important}}'
            for light, dark in _DARK.items()
            for part in ("fill", "stroke")
        )
        return (
            f'<svg role="img" aria-labelledby="title description" {head}>\n'
            f'<title id="title">{escape(plain(self.title))}</title>\n'
            f'<desc id="description">{escape(plain(self.explanation))}</desc>\n'
            f"<style>@media (prefers-color-scheme: dark){{{dark}}}</style>"
            + body.replace(f"'{_FONT}'", _FONTS)
        )

    def _rendered(self, kind: str) -> bytes:
        content = io.BytesIO()
        undated = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}}.get(kind)
        with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # matplotlib's font lacks a glyph: that of the reader may have it
            self.figure.savefig(content, format=kind, dpi=192, metadata=undated)
        return content.getvalue()


def text_width(text: str, *, strong: bool = False, size: float = 11) -> float:
    """In pixels, by matplotlib's font; hardly any font of a reader's browser is wider."""
    font = FontProperties(family=[_FONT], weight="bold" if strong else "normal", size=size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in `_rendered`
        width: float = text_to_path.get_text_width_height_descent(plain(text), font, False)[0]
    return width


def plain(text: str) -> str:
    """Without what XML cannot hold."""
    return "".join(one if one.isprintable() else "\ufffd" for one in text)
