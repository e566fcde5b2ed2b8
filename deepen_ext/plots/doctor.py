"""What `doctor` found as pictures, and as a page of HTML with its tables."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Iterator, Sequence

from jinja2 import Environment
from rich.table import Table
from rich.text import Text

from deepen_ext.measure.doctor.diagnosis import Diagnosis, Fused
from deepen_ext.plots.chart import Bar, Column, Dot, Group, Row, bar_plot, bounds, dot_plot
from deepen_ext.plots.picture import Picture

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; max-width: 64rem;
  margin: 2rem auto; padding: 0 1rem; color: #1f2328; background: #ffffff; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.verdict { font-weight: 600; border-left: 4px solid #6e7781; padding: .4rem .8rem; }
.green { border-color: #1a7f37; } .yellow { border-color: #9a6700; } .red { border-color: #cf222e; }
p.yellow { border-left: 4px solid #9a6700; padding-left: .8rem; } .dim { color: #57606a; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #d5dae0; }
th:first-child, td:first-child { text-align: left; } tr.bold { font-weight: 600; }
tr.yellow { background: #fff4d4; } img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
@media (prefers-color-scheme: dark) { body { color: #e6edf3; background: #0d1117; } .dim { color: #9aa4af; }
th, td { border-color: #333c48; } tr.yellow { background: #3b2f0b; } }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="verdict {{ verdict.style }}">{{ verdict.plain }}</p>
{% for picture in pictures %}<img alt="{{ picture.title }}" src="{{ picture | data }}">
{% endfor %}{% for part in parts %}{% if part is table %}<div class="scroll"><table>
<thead><tr>{% for one in part.columns %}<th scope="col">{{ one.header }}</th>{% endfor %}</tr></thead>
<tbody>{% for cells, style in part | lines %}
<tr class="{{ style or '' }}">{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{% elif part.style == "bold" %}<h2>{{ part.plain }}</h2>
{% elif part.plain.strip() %}<p class="{{ part.style }}">{{ part.plain }}</p>
{% endif %}{% endfor %}</body>
</html>
"""


def doctor_page(title: str, verdict: Text, parts: Sequence[Text | Table], pictures: Sequence[Picture]) -> str:
    """One file of HTML that needs no other: the verdict, the pictures, and what the terminal shows.

    Args:
        title: of the page.
        verdict: with a colour as style, which the page shows beside it.
        parts: lines, headings (of style "bold") and tables.
        pictures: in their order.
    """
    environment = Environment(autoescape=True)
    environment.tests["table"] = lambda part: isinstance(part, Table)
    environment.filters["data"] = _data
    environment.filters["lines"] = _lines
    page = environment.from_string(_PAGE)
    return page.render(title=title, verdict=verdict, parts=parts, pictures=pictures)


def doctor_plots(found: Diagnosis) -> Iterator[Picture]:
    """The gain by main model and weights, where each member's probability lies, what a token takes."""
    if found.fused:
        yield _gains(found)
    yield bar_plot(
        "Where each member's probability lies",
        "Only what is on shared tokens, or on tokens that begin with one, speaks to the other members.",
        "",
        [
            (
                one.name,
                [
                    Bar("on shared tokens (anchors)", 100 * one.coverage.anchors, "gain"),
                    Bar("on tokens that begin with one", 100 * one.coverage.prefixes),
                    Bar("on others", 100 * one.coverage.rest),
                ],
            )
            for one in found.members
        ],
        unit="%",
    )
    if found.speed is not None:
        yield _times(found)


def _gains(found: Diagnosis) -> Picture:
    dots = [_dot(one) for one in found.fused]
    labels = [
        f"{one.main}, weights {' '.join(f'{weight:.2g}' for weight in one.weights)}" for one in found.fused
    ]
    rows = [
        Row(label, [dot], strong=one.as_named)
        for label, dot, one in zip(labels, dots, found.fused, strict=True)
    ]
    return dot_plot(
        f"Bits a byte fewer than {found.best_single.name} alone needs",
        "Right is better. Lines: two standard errors. Blue: better, orange: worse, hollow: neither.",
        [Column("bits a byte fewer", *bounds(dots, least=0.01))],
        [Group("main model and weights", rows)],
    )


def _dot(one: Fused) -> Dot | None:
    """None where there is no number: both give the text probability 0."""
    if math.isnan(one.gain):
        return None
    error = 2 * (one.gain_error or 0.0)
    return Dot(
        one.gain,
        one.gain - error,
        one.gain + error,
        "gain" if one.gains else "harm" if one.harms else "none",
    )


def _times(found: Diagnosis) -> Picture:
    assert found.speed is not None
    parts = [Bar(f"forward passes of {name}", ms) for name, ms in found.speed.members_ms.items()]
    parts += [Bar("fusion", found.speed.fusion_ms), Bar("hand-off of text", found.speed.handoff_ms)]
    groups = [("measured, without drafts", [Bar("a token", found.speed.ms_per_token, "gain"), *parts])]
    if found.drafts is not None and found.drafts.drafters:
        drafts = [
            Bar(f"{one.name} writes {one.length} ahead", one.ms_per_token) for one in found.drafts.drafters
        ]
        groups.append(("expected, with drafts", [Bar("without", found.drafts.without_ms, "gain"), *drafts]))
    return bar_plot("Milliseconds a token", "Shorter is faster.", "", groups, unit="ms")


def _data(picture: Picture) -> str:
    return "data:image/svg+xml;base64," + b64encode(picture.svg().encode()).decode()


def _lines(table: Table) -> Iterator[tuple[tuple[object, ...], object]]:
    cells = zip(*(one.cells for one in table.columns), strict=True)
    return zip(cells, (row.style for row in table.rows), strict=True)
