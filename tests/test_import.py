"""What importing costs."""

from __future__ import annotations

from process import output

SECONDS = """
    import sys, time, torch
    before, modules = time.perf_counter(), set(sys.modules)
    import thinned
    print(time.perf_counter() - before)
    print(*sorted({name.partition(".")[0] for name in set(sys.modules) - modules}))
"""


def test_import_adds_less_than_a_fifth_of_a_second_to_torch() -> None:
    """The fastest of several, as a busy machine only makes it slower."""
    attempts = (float(output(SECONDS).splitlines()[0]) for _ in range(3))
    assert any(seconds < 0.2 for seconds in attempts)


def test_import_brings_no_other_package() -> None:
    added = set(output(SECONDS).splitlines()[1].split())
    assert "thinned" in added
    assert not added & {"scipy", "matplotlib", "rich", "typer", "jinja2", "mlxtend", "sklearn", "triton"}


def test_import_does_not_bring_the_compiler() -> None:
    assert output("import thinned, sys; print('torch._dynamo' in sys.modules)") == "False\n"
