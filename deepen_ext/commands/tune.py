"""`deepen-ext tune`: choose weights, settings and main model on dev items, and write a preset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepen_ext.commands import options
from deepen_ext.commands.console import exit_codes, progress, tables, write
from deepen_ext.commands.load_options import Loading, with_load_options
from deepen_ext.commands.loading import named_members
from deepen_ext.errors import InputError
from deepen_ext.ground.paths import check_apart, user_path
from deepen_ext.plots.output_file import check_output_file, check_place
from deepen_ext.space.recipes import RECIPES, check_recipe

if TYPE_CHECKING:
    from deepen_ext.measure.tuning.configurations import Configuration
    from deepen_ext.measure.tuning.dev_items import DevSet
    from deepen_ext.measure.tuning.fit_gate import FittedGate
    from deepen_ext.measure.tuning.tune import Tuning


@with_load_options
def tune(
    loading: Loading,
    model: options.Models = None,
    demo: options.Demo = False,
    task: Annotated[
        str | None, typer.Option(help="Choose on this benchmark's dev split: gsm8k, arc_challenge, mmlu, ...")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="The folder of the benchmarks, with a folder for each task.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Choose on this text instead.")] = None,
    limit: Annotated[
        int, typer.Option(min=2, help="Read at most so many items (pieces of a text), spread evenly.")
    ] = 200,
    minutes: Annotated[
        float,
        typer.Option(help="The budget, from when the models are loaded. At most half goes into reading."),
    ] = 10.0,
    out: Annotated[Path, typer.Option(help="The preset to write.")] = Path("preset.yaml"),
    fuser: options.TunedFuser = None,
    gate: Annotated[
        bool,
        typer.Option(
            "--gate",
            help="Also fit a gate: four numbers that say what makes a model count more at a token. "
            "With --fuser union-vocab or average.",
        ),
    ] = False,
    plot: options.Plot = None,
    debug: options.Debug = False,
) -> None:
    """Choose weights, settings and the main model of two or more models, and write a preset.

    Whatever is chosen is chosen on dev items, by the likelihood of their right continuations: a test split
    cannot be named. Compare the result on test items with `eval --preset`.
    """
    with exit_codes(debug):
        if (text is None) == (task is None):
            raise InputError("say what to choose on: --task TASK with --data DIR, or --text FILE")
        if (task is None) != (data is None):
            raise InputError("--task and --data go together: the benchmark, and the folder it is in")
        place = user_path(out).absolute()  # its folder is made where it is missing
        check_place("--out", place if place.is_dir() else _first_there(place.parent) / place.name)
        check_output_file("--plot", plot)
        named = named_members(model, demo).members
        check_apart({"--out": out, "--plot": plot}, {"--text": text}, named)
        with progress() as say:
            say("Starting")
            from deepen_ext.fusers import parse_fuser
            from deepen_ext.measure.tuning.dev_items import DevSet
            from deepen_ext.measure.tuning.tune import check_minutes, check_tunable
            from deepen_ext.measure.tuning.tune import tune as tune_members
            from deepen_ext.members.loading import load_members
            from deepen_ext.presets import write_preset

            spec = fuser or "deepen"
            way, recipe = parse_fuser(spec, "")
            if recipe:
                check_recipe(recipe)
            check_minutes(minutes)
            check_tunable(way, len(named), gate)
            if text is not None:
                dev = DevSet.from_text(text, limit)
            else:
                assert task is not None
                assert data is not None
                dev = DevSet.from_task(task, user_path(data), limit)
            given = loading.options()
            members = load_members(named, progress=say, **given)
            tuning = tune_members(
                members,
                dev,
                minutes=minutes,
                fuser=way,
                recipes=[one for one in RECIPES if recipe in ("", one)],
                gate=gate,
                progress=say,
            )
        try:
            write_preset(out, tuning.preset(named, dev, spec, given))
            if plot is not None:
                from deepen_ext.plots.tuning import tuning_plot

                tuning_plot(tuning).save(plot)
        finally:  # where a file cannot be written, too: it took minutes to find
            _show(tuning, dev)
        write(f"Written to {out}; use it with --preset {out}\n")
        if tuning.ended == "interrupted":
            raise typer.Exit(130)  # as where nothing could be kept


def _first_there(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return folder if folder.exists() else _first_there(folder.parent)


def _show(tuning: Tuning, dev: DevSet) -> None:
    """What was tried, in order, and the choice."""
    from rich import box
    from rich.table import Table

    console = tables()
    of = f"{len(tuning.sizes)} of {len(dev.items)} {'dev items' if dev.task else 'pieces'} of {dev.name}"
    if dev.left_out:
        of += f" ({dev.left_out} without a right continuation left out)"
    table = Table(
        "main",
        "weights, as named",
        "from",
        box=box.SIMPLE,
        title=f"Bits a byte on {of}",
        title_justify="left",
    )
    searches = bool(tuning.space.recipes)
    for name in ("recipe", "η", "τ", "confidence") if searches else ("confidence",):
        table.add_column(name)
    table.add_column("bits a byte", justify="right")
    table.add_column("against uniform", justify="right")
    for i, name in enumerate(tuning.names):
        right = f"{tuning.accuracy[i]:.3f} right of {tuning.answered}" if tuning.accuracy else ""
        cells = [name, "alone", right, *([""] * (4 if searches else 1))]
        table.add_row(*cells, f"{tuning.alone_bits_per_byte()[i]:.4f}", "", style="dim")
    for one in tuning.tried:
        table.add_row(*_cells(tuning, one), style="bold" if one == tuning.chosen else None)
    console.print(table)
    write(_verdict(tuning))


def _cells(tuning: Tuning, one: Configuration) -> list[str]:
    cells = [tuning.names[one.main], " ".join(f"{weight:.3g}" for weight in one.weights), one.source]
    if one.recipe is not None:
        cells += [
            one.recipe,
            f"{one.learning_rate:g}",
            "" if one.temperature is None else f"{one.temperature:g}",
        ]
    cells.append(f"{one.confidence:g}")
    difference, error = tuning.difference(one)
    cells.append(f"{tuning.bits_per_byte(one):.4f}")
    cells.append("" if one == tuning.baseline else f"{difference:+.4f} ± {error:.4f}")
    return cells


def _verdict(tuning: Tuning) -> str:
    """The choice in words, and whether fusing is worth it at all."""
    chosen, alone = tuning.chosen, tuning.alone_bits_per_byte()
    best = min(range(len(alone)), key=alone.__getitem__)
    difference, error = tuning.difference(chosen, tuning.alone[best])
    weights = ", ".join(
        f"{tuning.names[i]} {weight:.3g}"
        for i, weight in zip(chosen.order(), chosen.ordered_weights(), strict=True)
    )
    lines = [f"Chosen: {tuning.names[chosen.main]} as main model; weights {weights}."]
    lines.append(
        f"Against the best single member, {tuning.names[best]}: {difference:+.4f} ± {error:.4f} bits a byte"
        + (": fusing gains nothing on these items." if difference >= 0 else ".")
    )
    if tuning.gate is not None:
        lines.append(_gate_verdict(tuning.gate))
    if tuning.ended == "ended by the time":
        lines.append("The time was up before the search had come to its end; more --minutes may find better.")
    elif tuning.ended == "interrupted":
        lines.append("Interrupted: this is the choice from what had been tried by then.")
    return "\n".join(lines) + "\n"


def _gate_verdict(gate: FittedGate) -> str:
    """Whether the gate helps on items that it was not fitted on."""
    difference, error = gate.difference
    found = f"{difference:+.4f} ± {error:.4f} bits a byte on items it was not fitted on, {gate.tokens} tokens"
    if gate.helps:
        return f"Gate {list(gate.numbers)}: {found}."
    return f"No gate is written: {found}; one standard error better is needed."
