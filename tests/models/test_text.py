"""The tables of convert and inspect: no row of a model is lost by being merged with its neighbours."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from thinned.models.text import count, format_paths, merge_paths, to_text

NAMES = st.sampled_from(["0", "1", "2", "3", "10", "drop", "layers"])
ROWS = st.lists(st.tuples(st.lists(NAMES, min_size=1, max_size=4).map(".".join), st.sampled_from("ab")))


def paths_of(path: str) -> list[str]:
    """All that a merged path stands for."""
    found = re.search(r"(\d+)-(\d+)", path)
    if found is None:
        return [path]
    numbers = range(int(found[1]), int(found[2]) + 1)
    return [
        every for n in numbers for every in paths_of(path[: found.start()] + str(n) + path[found.end() :])
    ]


@given(ROWS)
def test_merged_rows_are_the_rows(rows: list[tuple[str, str]]) -> None:
    merged = merge_paths(rows)
    assert sorted((path, rest) for row, rest in merged for path in paths_of(row)) == sorted(rows)
    assert len(merged) <= len(rows)


def test_numbers_at_two_places() -> None:
    rows = [(f"stages.{i}.blocks.{j}.drop", "0.1") for i in (0, 1, 3) for j in range(4)]
    assert merge_paths([*rows, ("head", "")]) == [
        ("stages.0-1.blocks.0-3.drop", "0.1"),
        ("stages.3.blocks.0-3.drop", "0.1"),
        ("head", ""),
    ]


CELLS = st.text(alphabet="ab._ /(", max_size=60).map(str.strip)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=5), st.integers(40, 100))
def test_a_table_fits_its_width_and_has_every_character(rows: list[tuple[str, str, str]], width: int) -> None:
    headings = ["path", "type", "status"]
    table = to_text(headings, rows, width)
    assert max(map(len, table.splitlines()), default=0) <= width
    shown = [heading for i, heading in enumerate(headings) if any(row[i] for row in rows)]
    every = "".join([*shown, *(cell for row in rows for cell in row)])
    assert sorted("".join(table.split())) == sorted("".join(every.split()))


def test_a_cell_is_wrapped_between_words_and_a_long_word_behind_its_separators() -> None:
    rows = [("encoder.layers.0-11.attention.output.dropout", "F.dropout, modeling.py:12")]
    assert to_text(["path", "type"], rows, 50).splitlines() == [
        "path                      type",
        "encoder.layers.0-11.      F.dropout,",
        "  attention.output.         modeling.py:12",
        "  dropout",
    ]


def test_many_places() -> None:
    assert format_paths(["a.0", "a.1", "a.2"]) == "a.0, a.1, a.2"
    assert format_paths([f"a.{i}" for i in range(50)]) == "a.0, a.1 and 48 more"
    assert format_paths([""]) == "(model)"


def test_count() -> None:
    assert [count(n, "site") for n in range(3)] == ["0 sites", "1 site", "2 sites"]
