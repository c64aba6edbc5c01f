"""The report for a browser: one self-contained page."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from thinned.compare import plots, tables
from thinned.compare.report import Report, machine

__all__ = ["to_html"]


def to_html(report: Report) -> str:
    """The verdict on top, then the tables and plots."""
    templates = Environment(
        loader=PackageLoader("thinned", "compare"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return templates.get_template("page.html.jinja").render(
        report=report,
        machine=machine(),
        tutorial=tables.tutorial(report),
        laws=tables.laws(report),
        speed=tables.speed(report),
        training=tables.training_runs(report) if report.training else None,
        masks={name: plots.mask_picture(mask) for name, mask in report.masks.items()},
        drop_rates=Markup(plots.drop_rates(report)),
        speed_plot=Markup(plots.speed(report)),
        losses=Markup(plots.losses(report)) if report.training else None,
    )
