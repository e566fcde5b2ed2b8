"""`deepen-ext doctor`: what members share, what they cost, and whether fusing them is worth it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepen_ext.commands import options
from deepen_ext.commands.console import exit_codes, progress, tables, write
from deepen_ext.commands.load_options import Loading, with_load_options
from deepen_ext.commands.loading import named_members
from deepen_ext.errors import InputError
from deepen_ext.ground.paths import check_apart, user_path
from deepen_ext.measure.doctor.sample_text import split_sample
from deepen_ext.members.source import is_url
from deepen_ext.plots.output_file import check_output_file, write_file

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from deepen_ext.measure.doctor.diagnosis import Diagnosis


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
    html: Annotated[
        Path | None, typer.Option(help="Also write it, with pictures, as a page of HTML into this file.")
    ] = None,
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
        check_output_file("--html", html, [".html"])
        check_apart({"--html": html}, {"--text": text}, named)
        if sample is not None:
            split_sample(sample)  # raises for a text that is too short, before models are loaded
        with progress() as say:
            say("Starting")
            from rich.text import Text

            from deepen_ext.commands.doctor_report import doctor_report, server_report
            from deepen_ext.measure.doctor.diagnose import diagnose
            from deepen_ext.measure.doctor.server_findings import server_findings, why_not_measured
            from deepen_ext.members.loading import load_members

            members = load_members(named, progress=say, **loading.options())
            servers, reason = list(server_findings(members)), why_not_measured(members)
            measured = None if reason else diagnose(members, text=sample, batch=batch, progress=say)
        parts = [part for one in servers for part in server_report(one)]
        if measured is None:
            parts.append(Text(f"The gain is not measured: {reason}."))
        else:
            parts += doctor_report(measured)
        if html is not None:
            _write_page(html, parts, measured)
        if as_json:
            found = {"servers": [asdict(one) for one in servers], "not_measured": reason}
            found |= {} if measured is None else measured.as_dict()
            write(json.dumps(found, ensure_ascii=False) + "\n")
            return
        console = tables()
        for part in parts:
            console.print(part)
        if html is not None:
            write(f"Written to {html}\n")


def _write_page(file: Path, parts: Sequence[Text | Table], measured: Diagnosis | None) -> None:
    from rich.text import Text

    from deepen_ext.plots.doctor import doctor_page, doctor_plots

    *rest, last = parts
    assert isinstance(last, Text)
    title = "deepen-ext doctor"
    if measured is not None:
        title += ": " + ", ".join(one.name for one in measured.members)
    pictures = [] if measured is None else list(doctor_plots(measured))
    write_file(file, doctor_page(title, last, rest, pictures))


def _read(file: Path) -> str:
    """Raises InputError for a file that is not there or is not UTF-8 text."""
    try:
        return user_path(file).read_bytes().decode()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); name a text file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text ({error}); convert it first") from error
