"""`deepen-ext doctor`: what members share, what they cost, and whether fusing them is worth it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepen_ext.commands import options
from deepen_ext.commands.console import exit_codes, progress, tables, write
from deepen_ext.commands.load_options import Loading, with_load_options
from deepen_ext.commands.loading import named_members
from deepen_ext.errors import InputError
from deepen_ext.members.source import is_url

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from deepen_ext.measure.doctor.coverage import RowShape
    from deepen_ext.measure.doctor.diagnosis import Diagnosis, MemberFacts
    from deepen_ext.measure.doctor.draft_times import DraftTimes
    from deepen_ext.measure.doctor.server_findings import ServerFindings


@with_load_options
def doctor(
    loading: Loading,
    model: options.Models = None,
    demo: options.Demo = False,
    text: Annotated[
        Path | None,
        typer.Option(
            help="What the models read, best of the kind they are for; a built-in sample by default."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Texts written side by side when the time is taken.")] = 1,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Examine two or more models before they are fused: is it worth it, and what will it cost?

    Of a model in a server (http://host:port) it also says what was found out of the server.

    The exit code is 0 whatever the verdict is.
    """
    with exit_codes(debug):
        named = named_members(model, demo).members
        if len(named) < 2 and not is_url(named[0]):
            raise InputError("a diagnosis needs two or more models, or a server's address; repeat --model")
        sample = None if text is None else _read(text)
        with progress() as say:
            say("Starting")
            from deepen_ext.measure.doctor.diagnose import diagnose
            from deepen_ext.measure.doctor.server_findings import server_findings, why_not_measured
            from deepen_ext.members.loading import load_members

            members = load_members(named, progress=say, **loading.options())
            servers, reason = list(server_findings(members)), why_not_measured(members)
            measured = None if reason else diagnose(members, text=sample, batch=batch, progress=say)
        if as_json:
            found = {"servers": [asdict(one) for one in servers], "not_measured": reason}
            found |= {} if measured is None else measured.as_dict()
            write(json.dumps(found, ensure_ascii=False) + "\n")
            return
        for one in servers:
            _show_server(one)
        if measured is None:
            write(f"The gain is not measured: {reason}.\n")
        else:
            _show(measured)


def _read(file: Path) -> str:
    """Raises InputError for a file that is not there or is not UTF-8 text."""
    try:
        return file.read_bytes().decode()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); name a text file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text ({error}); convert it first") from error


def _show(found: Diagnosis) -> None:
    console = tables()

    def line(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False)

    line("Members, main model first", "bold")
    console.print(_members(found))
    line(_anchors(found))
    if found.rows:
        line("\nRelative rows of the most probable tokens: how much is on which anchors", "bold")
        console.print(_rows(found))
    if found.fused:
        read = f"{found.characters:,} of {found.characters_given:,} characters"
        line(f"Fused ({found.method}) on the sample text, {read}", "bold")
        console.print(_gains(found))
    for text in _costs(found):
        line(text)
    if found.drafts is not None:
        _show_drafts(console, found.drafts)
    line("")
    for member in found.members:
        for trap in member.traps:
            line(f"{member.name}, {trap.name}: {trap.text}", "yellow" if trap.serious else "dim")
    line("")
    for warning in found.warnings:
        line(f"Warning: {warning}.", "yellow")
    colour = {"worth fusing": "green", "little to gain": "yellow", "not worth fusing": "red"}
    line(found.verdict.text, f"bold {colour[found.verdict.outcome]}")


def _show_server(found: ServerFindings) -> None:
    console = tables()
    console.print(f"{found.member}, {found.backend}", style="bold", markup=False)
    for one in found.findings:
        console.print(f"  {one.name}: {one.text}", style="" if one.good else "yellow", markup=False)
    console.print("")


def _table(first: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="left" if column in ("member", "weights") else "right")
    return table


def _members(found: Diagnosis) -> Table:
    """One column a member, one line a fact."""
    from deepen_ext.measure.doctor.diagnosis import with_error

    table = _table("", *(member.name for member in found.members))

    def line(title: str, cell: Callable[[MemberFacts], str]) -> None:
        table.add_row(title, *map(cell, found.members))

    line("run by", lambda one: one.backend)
    line("architecture", lambda one: one.architecture)
    line("parameters", lambda one: _million(one.parameters))
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
    from deepen_ext.measure.doctor.diagnosis import with_error

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


def _show_drafts(console: Console, found: DraftTimes) -> None:
    texts = "one text" if found.lanes == 1 else f"each of {found.lanes} texts"
    console.print(
        f"\nDrafts: expected milliseconds a token of {texts}, context {found.context}", style="bold"
    )
    expected = _table("who writes ahead", "tokens that stood", "of", "tokens ahead", "ms a token")
    expected.add_row("nobody", "", "", "0", f"{found.without_ms:.1f}")
    for one in found.drafters:
        stood, bold = f"{one.acceptance:.0%}", "bold" if one == found.best else None
        name = one.name if one.reach == 1 else f"{one.name}, at {one.reach:.0%} of the places"
        expected.add_row(name, stood, str(one.seen), str(one.length), f"{one.ms_per_token:.1f}", style=bold)
    console.print(expected)
    console.print("Forward passes in milliseconds, by tokens of each text", style="bold")
    forwards = _table("member", *map(str, found.widths), "more for going back")
    for own in found.forwards:
        forwards.add_row(own.name, *(f"{ms:.2f}" for ms in own.ms), f"{own.back_ms:.2f}")
    console.print(forwards)
    text = "No draft is expected to pay."
    if (best := found.best) is not None:
        text = (
            f"Expected to be the fastest: {best.name} writes {best.length} "
            f"{'token' if best.length == 1 else 'tokens'} ahead, {best.ms_per_token:.1f} instead of "
            f"{found.without_ms:.1f} ms a token."
        )
    console.print(text, markup=False)
    for name, said in found.allows.items():
        console.print(f"{name}: {said}.", markup=False)


def _million(count: int | None) -> str:
    return "not known" if count is None else f"{count / 1e6:,.0f} million"


def _size(count: int | None) -> str:
    if count is None:
        return "size not known"
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
