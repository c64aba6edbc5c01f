"""The report for a browser: one self-contained page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from thinned.compare import effect, plots, tables, textbook
from thinned.compare.laws import Level
from thinned.compare.report import Report, machine

__all__ = ["render", "to_html"]


def render(template: str, **content: Any) -> str:
    """A page, from the path of its template in the package."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template(template).render(**content)


def to_html(report: Report) -> str:
    """First the effect of dropout and its masks, then the verdict and the laws, then the cost."""
    drawn = next(iter(report.masks), None)
    pair = effect.pair(report.training)
    return render(
        "compare/page.html.jinja",
        report=report,
        machine=machine(),
        tutorial=tables.tutorial(report),
        source=textbook.TUTORIAL,
        laws=tables.laws(report),
        by_name={law.name: law for law in report.laws},
        levels=Level,
        worst={name: next(iter(report.broken(name)), None) for name in report.names},
        speed=tables.speed(report),
        training=tables.training_runs(report),
        sentences=effect.sentences(*pair) if pair else [],
        errors=plots.errors(*pair, report.names) if pair else None,
        test_errors=plots.test_errors(report.training, report.names) if pair else None,
        masks={name: plots.mask_picture(mask) for name, mask in report.masks.items()},
        drawn=drawn,
        networks=plots.thinned_networks(report.masks[drawn]) if drawn else {},
        drop_rates=plots.drop_rates(report),
        speed_plots=plots.speed(report) if report.timings else [],
    )
