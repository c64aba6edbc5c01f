"""The pytest plugin: a test for each law of dropout, as `thinned compare --check --quick` examines them.

A package of its own, because pytest imports it at each start and ``import thinned`` imports torch.
"""

from __future__ import annotations

import pytest

__all__: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("thinned", "dropout held to its law, a test for each law")
    group.addoption(
        "--thinned",
        action="append",
        default=[],
        metavar="IMPLEMENTATION",
        help="package.module:NAME or path/to/file.py:NAME of a class or a function; may be repeated. "
        "[tool.thinned] of pyproject.toml has level, only, skip and kwargs.",
    )
    group.addoption(
        "--thinned-project", action="store_true", help="Examine the implementations of [tool.thinned]."
    )
    group.addoption(
        "--thinned-level",
        default="",
        metavar="LEVEL",
        help="The mildest level that fails: wrong, unlike-torch or nicety. Milder ones are xfailed.",
    )


@pytest.hookimpl(tryfirst=True)  # so that -k, --deselect and --last-failed see these tests too
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    wanted = config.getoption("thinned") or config.getoption("thinned_project")
    single = config.args and all("::" in argument for argument in config.args)
    if wanted and not single:  # with the options in addopts, `pytest test_a.py::test_b` means that test alone
        try:
            from pytest_thinned import laws
        except ImportError as error:
            raise pytest.UsageError(
                f"--thinned needs the extra: pip install 'thinned[compare]' ({error})"
            ) from error
        items += laws.collect(session, config)
