"""The command line: arguments only."""

from __future__ import annotations

import json as json_
import platform
import shlex
import sys
from collections.abc import Container, Iterable
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
from thinned.compare.errors import one_line_with_place
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
from thinned.uncertainty.data import read
from thinned.uncertainty.page import to_html as uncertainty_to_html
from thinned.uncertainty.rows import StoppedError
from thinned.uncertainty.run import parse_inject, parse_until, prepare

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
        _check_directories(files)
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


def _check_directories(files: Iterable[Path]) -> None:
    """Raise ValueError if there is none for one of these."""
    for file in files:
        if not file.parent.is_dir():
            raise ValueError(f"cannot write {file}: there is no directory {file.parent}")


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
def uncertainty(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="package.module:factory or path/to/file.py:factory, called without arguments; or a model. "
            "It returns logits, or with --task regression a mean or a tuple of a mean and a variance.",
        ),
    ],
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="A .npz file with an array x, an example in each row, and perhaps y, the targets; or a .csv "
            "file of numbers with names of columns in its first line.",
        ),
    ],
    weights: Annotated[
        Path | None, typer.Option(help="Load this state_dict, a file of torch.save, into the model.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="The targets' column in a .csv file. The others are features."),
    ] = None,
    x: Annotated[str, typer.Option(metavar="NAME", help="The inputs' array in a .npz file.")] = "x",
    y: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The targets' array in a .npz file.", show_default="y if there"),
    ] = None,
    task: Annotated[str, typer.Option(help="classification or regression.")] = "classification",
    samples: Annotated[int, typer.Option(min=2, help="Draws of each example.")] = 100,
    seed: Annotated[int, typer.Option(help="All masks follow from it.")] = 0,
    method: Annotated[
        str,
        typer.Option(
            help="stratified or independent draws, of which the first have a mean of a smaller error; or "
            "moments: a regression's mean and variance without draws."
        ),
    ] = "stratified",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Examples at a time; the results do not depend on it.")
    ] = 256,
    consistent: Annotated[
        bool, typer.Option("--consistent", help="One thinned network a draw, for all examples.")
    ] = False,
    inject: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=P",
            help="Put dropout before the modules at these paths, such as 'layers.*.fc=0.1'; head stands for "
            "the last linear layer or convolution, with p = 0.1.",
        ),
    ] = None,
    until: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[STATISTIC=]ERROR",
            help="Stop the draws of an example once the standard error of its mean, or of expected_entropy, "
            "is so small.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Write the predictions here, batch by batch.", dir_okay=False)
    ] = Path("predictions.csv"),
    html: Annotated[Path | None, typer.Option(help="Write a self-contained report.", dir_okay=False)] = None,
    json: Json = False,
) -> None:
    """Predict with dropout on: each example's prediction and uncertainty as a row of a .csv file.

    With targets it prints scores: accuracy, NLL, ECE and Brier, or RMSE, log-likelihood and coverage.

    Columns of a classification: id, target, label, max_probability and its standard_error, entropies in nats.

    Columns of a regression: id, target, mean, its standard_error, std of the draws, aleatoric variance.

    After Ctrl-C (status 130) or an error (status 1) the rows of the finished batches remain.
    """
    try:
        _refuse(context, {"target"} if data.suffix.lower() == ".npz" else {"x", "y"}, f"for {data.name}")
        files = [output, *([html] if html else [])]
        _check_directories(files)
        if len({each.resolve() for each in (*files, data)}) <= len(files):
            raise ValueError("the data, --output and --html must be different files")
        options = {
            "samples": samples,
            "seed": seed,
            "task": task,
            "method": method,
            "batch_size": batch_size,
            "consistent": consistent,
            "inject": parse_inject(inject or ()),
            "until": parse_until(until or ()),
        }
        with redirect_stdout(sys.stderr):  # what the model prints is no part of the output
            predict = prepare(
                model, weights, data, lambda: read(data, x=x, y=y, target=target), _typed(context), options
            )
    except ValueError as error:
        typer.echo(f"thinned uncertainty: {error}", err=True)
        raise typer.Exit(2) from None
    try:
        with redirect_stdout(sys.stderr):
            report = predict(output)
    except StoppedError as stopped:
        cause = stopped.__cause__
        interrupted = isinstance(cause, KeyboardInterrupt)
        why = "interrupted" if interrupted or cause is None else one_line_with_place(cause)
        kept = f"{output} has the rows of the first {stopped.rows:,} examples"
        typer.echo(f"thinned uncertainty: {why}; {kept}", err=True)
        raise typer.Exit(130 if interrupted else 1) from None
    if html:
        html.write_text(uncertainty_to_html(report), encoding="utf-8")
    for warning in report.warnings:
        typer.echo(f"thinned uncertainty: {warning}", err=True)
    typer.echo(report.to_json() if json else "\n".join(report.sentences()))


def _typed(context: typer.Context) -> str:
    """The command, as it was typed but for the order of its options."""
    words = context.command_path.split()
    for each in context.command.params:
        source = context.get_parameter_source(each.name or "")
        if not (source and source.name == "COMMANDLINE"):
            continue
        value = context.params[each.name or ""]
        for one in value if isinstance(value, list | tuple) else [value]:
            words += [] if each.param_type_name == "argument" else [each.opts[0]]
            words += [] if one is True else [str(one)]
    return shlex.join(words)


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
