"""The command line: arguments only."""

from __future__ import annotations

import json as json_
import platform
import sys
from collections.abc import Container
from contextlib import redirect_stdout
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated

if not all(find_spec(package) for package in ("jinja2", "matplotlib", "mlxtend", "rich", "scipy", "typer")):
    sys.exit("thinned's command line needs the extra: pip install 'thinned[compare]'")

import torch
import typer
from rich.console import Console
from rich.table import Table

import thinned
from thinned.backends.verify import verify as verify_backends
from thinned.compare import explain as explaining
from thinned.compare import tables
from thinned.compare.inspecting import inspect_named
from thinned.compare.inspecting import to_json as sites_to_json
from thinned.compare.layers import ENTRIES, entry_of
from thinned.compare.loading import ALIASES
from thinned.compare.page import to_html
from thinned.compare.project import option_of
from thinned.compare.record import to_json
from thinned.compare.request import requested
from thinned.compare.run import run, run_layer
from thinned.compare.settings import Settings, parse_dtype, parse_shape
from thinned.compare.terminal import Terminal

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main(program: str = "thinned") -> None:
    """The entry point of `thinned` and, as another program, of `python -m thinned`."""
    app(prog_name=program)


@app.callback(invoke_without_command=True)
def thinned_(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="With --version: thinned's, PyTorch's, Python's, and the backends.")
    ] = False,
) -> None:
    """Dropout for PyTorch, with masks that are a pure function of a key and a position."""
    if version:
        about = {
            "thinned": thinned.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "backends": list(thinned.backends.available()),
        }
        typer.echo(_json(about) if json else thinned.__version__)
        raise typer.Exit
    if json:
        context.fail("--json goes after a command, as in `thinned doctor --json`, or beside --version")
    if not context.invoked_subcommand:
        context.fail("Missing command.")


def _json(content: object) -> str:
    return json_.dumps(content, indent=2, ensure_ascii=False)


@app.command()
def compare(
    context: typer.Context,
    implementations: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMPLEMENTATION",
            help=f"{', '.join(ALIASES)} (the defaults), or package.module:NAME or path/to/file.py:NAME of a "
            "class, or of a function of x, p and training.",
        ),
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Examine this layer, such as DropPath, beside its peer or formula.")
    ] = None,
    p: Annotated[float, typer.Option(help="Drop probability where a law does not fix it.")] = 0.5,
    shape: Annotated[str, typer.Option(help="Shape of the inputs, as sizes with commas.")] = "64,128,128",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16, float32 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="Where to run, such as cpu or cuda:0.")] = "cpu",
    seed: Annotated[int, typer.Option(help="All random numbers follow from it.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="No training, fewer sizes; under 20 s.")] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Exit with 1 if an implementation that you name fails at --level."),
    ] = False,
    level: Annotated[
        str,
        typer.Option(
            help="The mildest level at which --check fails: wrong (the default), unlike-torch or nicety."
        ),
    ] = "",
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="LAW", help="Examine only this law or family, such as 'drop rate*'."),
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="LAW", help="Leave out this law or family.")
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="LAW", help="Say what this law or family is and how it is measured; run nothing."
        ),
    ] = None,
    kwargs: Annotated[
        str, typer.Option(help="Arguments of your own implementations beside p, as in features=8,axis=-1.")
    ] = "",
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page.", dir_okay=False)] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write everything, machine readable.", dir_okay=False)
    ] = None,
) -> None:
    """Compare implementations of dropout: which laws they break, how fast they are, how they train.

    With --layer, thinned's layer of that name is compared with its peer; `thinned layers` lists the layers.

    Beside --layer, thinned and the peer go by the names of their columns; your own take thinned's arguments.

    With --check and no implementation named, it is thinned that has to hold.

    In pyproject.toml, the table tool.thinned may have implementations, level, only, skip and kwargs.
    """
    try:
        entry = None if layer is None else entry_of(layer)
        if explain is not None:
            others = {each.name for each in context.command.params} - {"explain", "layer"}
            _refuse(context, others, "beside --explain, which runs nothing")
            Terminal().explain(explaining.explain(explain, [entry] if entry else ENTRIES))
            return
        if entry:
            _refuse(context, {"html"}, "for --layer, as the page is one of a comparison of Dropout")
            if not entry.case.takes_any_shape:
                why = f"for --layer {entry.name}, whose laws bring their own"
                _refuse(context, {"p", "shape", "dtype"}, why)
        settings = Settings(p, parse_shape(shape), parse_dtype(dtype), device, seed, quick)
        request = requested(
            Path.cwd(),
            settings,
            entry,
            implementations=implementations or (),
            level=level,
            only=only or (),
            skip=skip or (),
            kwargs=kwargs,
        )
        if html and request.policy.only:
            raise ValueError("--html writes a page of a whole comparison, and not of --only some laws")
        files = [file for file in (html, json) if file]
        for file in files:
            if not file.parent.is_dir():
                raise ValueError(f"cannot write {file}: there is no directory {file.parent}")
    except ValueError as error:
        typer.echo(f"thinned compare: {error}", err=True)
        raise typer.Exit(2) from None

    arguments = (request.implementations, settings, Terminal(), request.policy)
    report = run_layer(entry, *arguments) if entry else run(*arguments)
    if html:
        html.write_text(to_html(report), encoding="utf-8")
    if json:
        json.write_text(to_json(report), encoding="utf-8")
    if check:
        checked = ["thinned"] if request.is_default else [each.name for each in request.implementations]
        failed = [name for name in checked if report.fails(name)]
        outcome = f"{', '.join(failed)} failed" if failed else f"{', '.join(checked)} passed"
        typer.echo(f"check at level {option_of(request.policy.level)}: {outcome}")
        raise typer.Exit(1 if failed else 0)


def _refuse(context: typer.Context, options: Container[str | None], why: str) -> None:
    """Raise ValueError if one of these was given."""
    for each in context.command.params:
        source = context.get_parameter_source(each.name or "")
        if each.name in options and source and source.name == "COMMANDLINE":
            given = each.opts[0] if each.param_type_name == "option" else "an implementation"
            raise ValueError(f"{given} has no meaning {why}")


@app.command()
def layers(
    context: typer.Context,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print it as docs/layers.md has it.")] = False,
    json: Json = False,
) -> None:
    """The table of layers: functions, shape of the mask, source, peer."""
    if markdown and json:
        context.fail("--markdown and --json exclude each other")
    if markdown:
        sys.stdout.write(tables.layers_page())
    elif json:
        typer.echo(_json(tables.layers_record()))
    else:
        Terminal().show(tables.layers())


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="package.module:factory or path/to/file.py:factory, called without arguments; or a model.",
        ),
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="[NAME=]SIZES[:DTYPE]",
            help="Run the model on random input of these sizes, such as 2x3x32x32, in training and in "
            "evaluation. Repeat it for several arguments. 2x16:int64 has a dtype of torch; integers are 0 or "
            "1. mask=2x16:bool is passed by name.",
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the sites as JSON, with all attributes.")
    ] = False,
) -> None:
    """Every place at which a model drops: if it is thinned's, and how thinned reaches it."""
    try:
        with redirect_stdout(sys.stderr):  # what the model prints is no part of the output
            found = inspect_named(model, inputs or [])
    except ValueError as error:
        typer.echo(f"thinned inspect: {error}", err=True)
        raise typer.Exit(2) from None
    width = min(100, get_terminal_size((100, 24)).columns)
    typer.echo(sites_to_json(found) if json else found.table(width))


@app.command()
def doctor(
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Hash the masks, values, numbers and keys of each backend that can run here; exit with 1 if "
            "one differs from the specification or raises.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Versions, backends, instruction sets, threads: what serves dropout here, and why not another."""
    sections = thinned.backends.describe()
    found = verify_backends() if verify else None
    if json:
        typer.echo(_json(sections | ({"verify": asdict(found)} if found else {})))
    else:
        console = Console()
        for section, entries in sections.items():
            table = Table(title=section, title_justify="left", show_header=False)
            for name, value in entries.items():
                table.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
            console.print(table)
        if found:
            Terminal().show(tables.verification(found))
    raise typer.Exit(1 if found and found.failed else 0)


if __name__ == "__main__":
    main()
