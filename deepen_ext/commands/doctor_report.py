"""What `doctor` found as lines and tables, for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich import box
from rich.table import Table
from rich.text import Text

from deepen_ext.measure.doctor.coverage import RowShape
from deepen_ext.measure.doctor.diagnosis import Diagnosis, MemberFacts, with_error
from deepen_ext.measure.doctor.draft_times import DraftTimes
from deepen_ext.measure.doctor.server_findings import ServerFindings

_COLOURS = {"worth fusing": "green", "little to gain": "yellow", "not worth fusing": "red"}


def verdict_colour(found: Diagnosis) -> str:
    """Green, yellow or red."""
    return _COLOURS[found.verdict.outcome]


def doctor_report(found: Diagnosis) -> Iterator[Text | Table]:
    """Everything; the verdict last. Headings are bold."""
    yield Text("Members, main model first", "bold")
    yield _members(found)
    yield Text(_anchors(found))
    if found.rows:
        yield Text("\nRelative rows of the most probable tokens: how much is on which anchors", "bold")
        yield _rows(found)
    if found.fused:
        read = f"{found.characters:,} of {found.characters_given:,} characters"
        yield Text(f"Fused ({found.method}) on the sample text, {read}", "bold")
        yield _gains(found)
    yield from map(Text, _costs(found))
    if found.drafts is not None:
        yield from _drafts(found.drafts)
    yield Text("")
    for member in found.members:
        for trap in member.traps:
            yield Text(f"{member.name}, {trap.name}: {trap.text}", "yellow" if trap.serious else "dim")
    yield Text("")
    for warning in found.warnings:
        yield Text(f"Warning: {warning}.", "yellow")
    yield Text(found.verdict.text, f"bold {verdict_colour(found)}")


def server_report(found: ServerFindings) -> Iterator[Text | Table]:
    """What was found out of one server."""
    yield Text(f"{found.member}, {found.backend}", "bold")
    for one in found.findings:
        yield Text(f"  {one.name}: {one.text}", "" if one.good else "yellow")
    yield Text("")


def _table(first: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="left" if column in ("member", "weights") else "right")
    return table


def _members(found: Diagnosis) -> Table:
    """One column a member, one line a fact."""
    table = _table("", *(member.name for member in found.members))

    def line(title: str, cell: Callable[[MemberFacts], str]) -> None:
        table.add_row(title, *map(cell, found.members))

    line("run by", lambda one: one.backend)
    line("architecture", lambda one: one.architecture)
    line("parameters", lambda one: _million(one.parameters))
    line("outside of the embeddings", lambda one: _million(one.non_embedding_parameters))
    line("weights", lambda one: f"{one.dtype or '?'} on {one.device}, {_size(one.weights_bytes)}")
    line("KV cache of 1,000 tokens", lambda one: _size(one.cache_bytes))
    line(
        "context", lambda one: "not known" if one.context_length is None else f"{one.context_length:,} tokens"
    )
    line("tokenizer", lambda one: f"{one.tokenizer}, {one.vocab_size:,} tokens")
    line("ends of text", lambda one: " ".join(one.end_tokens) or "none")
    line("bytes a token", lambda one: f"{one.bytes_per_token:.2f}")
    line("probability on anchors", lambda one: f"{one.coverage.anchors:.2%}")
    line("on tokens that begin with one", lambda one: f"{one.coverage.prefixes:.2%}")
    line("on others", lambda one: f"{one.coverage.rest:.2%}")
    line("bits a byte, alone", lambda one: with_error(one.bits_per_byte, one.bits_per_byte_error))
    return table


def _anchors(found: Diagnosis) -> str:
    end = "the end of the text among them" if found.anchors.end else "the end of the text not among them"
    text = f"{found.anchors.shared:,} shared tokens (anchors), {end}"
    if len(found.members) > 2:
        pairs = zip(found.members[1:], found.anchors.with_main, strict=True)
        text += "; with the main model alone, " + ", ".join(f"{one.name} {count:,}" for one, count in pairs)
    return text + "."


def _rows(found: Diagnosis) -> Table:
    table = _table(
        "recipe",
        "member",
        "anchors: on itself",
        "32 largest",
        "spread over",
        "others: 32 largest",
        "spread over",
    )
    for row in found.rows:
        cells = ["", ""] if row.others is None else _shape(row.others)
        table.add_row(
            row.recipe,
            row.member,
            f"{row.anchors.own:.4f}",
            *_shape(row.anchors),
            *cells,
            style="yellow" if row.uniform else None,
        )
    return table


def _shape(shape: RowShape) -> list[str]:
    return [f"{shape.largest:.4f}", f"{shape.effective:,.{0 if shape.effective >= 100 else 1}f}"]


def _gains(found: Diagnosis) -> Table:
    table = _table(
        "main model",
        "weights",
        "bits a byte",
        f"fewer than {found.best_single.name} alone",
    )
    for one in found.fused:
        table.add_row(
            one.main,
            " ".join(f"{weight:.2g}" for weight in one.weights),
            f"{one.bits_per_byte:.3f}",
            f"{'+' if one.gain >= 0 else ''}{with_error(one.gain, one.gain_error)}",
            style="bold" if one.as_named else None,
        )
    return table


def _costs(found: Diagnosis) -> Iterator[str]:
    for memory in found.memory:
        yield (
            f"Memory on {memory.device}: weights {_size(memory.weights_bytes)}, relative rows "
            f"{_size(memory.rows_bytes)}, KV caches of 1,000 tokens {_size(memory.cache_bytes)}; "
            f"{_size(memory.available_bytes)} available beside what is loaded."
        )
    lengths = [(one.context_length, one) for one in found.members if one.context_length is not None]
    if lengths:
        length, one = min(lengths, key=lambda pair: pair[0] * pair[1].bytes_per_token)
        yield (
            f"The longest text of this kind has about {length * one.bytes_per_token:,.0f} bytes "
            f"({one.name}: {length:,} tokens)."
        )
    if (speed := found.speed) is not None:
        parts = [f"{name} {ms:.1f}" for name, ms in speed.members_ms.items()]
        parts += [f"fusion {speed.fusion_ms:.2f}", f"hand-off of text {speed.handoff_ms:.2f}"]
        texts = "one text" if speed.texts == 1 else f"{speed.texts} texts side by side"
        yield (
            f"About {speed.ms_per_token:.1f} ms a token over {speed.tokens} tokens of {texts}, without "
            f"drafts and certified skip: {', '.join(parts)}."
        )


def _drafts(found: DraftTimes) -> Iterator[Text | Table]:
    texts = "one text" if found.lanes == 1 else f"each of {found.lanes} texts"
    yield Text(f"\nDrafts: expected milliseconds a token of {texts}, context {found.context}", "bold")
    expected = _table("who writes ahead", "tokens that stood", "of", "tokens ahead", "ms a token")
    expected.add_row("nobody", "", "", "0", f"{found.without_ms:.1f}")
    for one in found.drafters:
        stood, bold = f"{one.acceptance:.0%}", "bold" if one == found.best else None
        name = one.name if one.reach == 1 else f"{one.name}, at {one.reach:.0%} of the places"
        expected.add_row(name, stood, str(one.seen), str(one.length), f"{one.ms_per_token:.1f}", style=bold)
    yield expected
    yield Text("Forward passes in milliseconds, by tokens of each text", "bold")
    forwards = _table("member", *map(str, found.widths), "more for going back")
    for own in found.forwards:
        forwards.add_row(own.name, *(f"{ms:.2f}" for ms in own.ms), f"{own.back_ms:.2f}")
    yield forwards
    text = "No draft is expected to pay."
    if (best := found.best) is not None:
        text = (
            f"Expected to be the fastest: {best.name} writes {best.length} "
            f"{'token' if best.length == 1 else 'tokens'} ahead, {best.ms_per_token:.1f} instead of "
            f"{found.without_ms:.1f} ms a token."
        )
    yield Text(text)
    yield from (Text(f"{name}: {said}.") for name, said in found.allows.items())


def _million(count: int | None) -> str:
    return "not known" if count is None else f"{count / 1e6:,.0f} million"


def _size(count: int | None) -> str:
    if count is None:
        return "size not known"
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
