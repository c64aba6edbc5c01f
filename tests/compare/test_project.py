"""The laws that a project chooses, and how bad a broken one has to be: [tool.thinned] and its options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from thinned.compare.laws import LAWS, Finding, Level, Verdict
from thinned.compare.project import Policy, Project, parse_level
from thinned.compare.report import Report
from thinned.compare.settings import Settings

NAMES = [law.name for law in LAWS]
RATES = [name for name in NAMES if name.startswith("drop rate")]
TRANSFORMS = [law.name for law in LAWS if law.family == "transforms"]


@pytest.mark.parametrize(
    ("only", "skip", "chosen"),
    [
        ((), (), NAMES),
        (("drop rate*",), (), RATES),
        (("DROP rate at P = 0.5",), (), ["drop rate at p = 0.5"]),
        (("p outside [0, 1]",), (), ["p outside [0, 1]"]),
        (("transforms",), (), TRANSFORMS),
        (("trans*", "evaluation"), ("*pick*",), ["evaluation", *(n for n in TRANSFORMS if n != "pickle")]),
        ((), ("*a*",), ["neighbours", "rows", "counts", "contents"]),
        (("vmap",), ("transforms",), []),
    ],
)
def test_laws_are_chosen_by_name_family_or_pattern(
    only: tuple[str, ...], skip: tuple[str, ...], chosen: list[str]
) -> None:
    policy = Policy(only=only, skip=skip)
    if not chosen:
        with pytest.raises(ValueError, match="no law is left"):
            policy.chosen(LAWS)
        return
    assert [law.name for law in policy.chosen(LAWS)] == chosen
    policy.require_known(LAWS)


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("evalution", "evaluation"),
        ("Transform", "transforms"),
        ("drop rate at p = 0.7", "drop rate at p = 0.9"),
    ],
)
def test_an_unknown_law_gets_the_nearest_names(pattern: str, nearest: str) -> None:
    for policy in (Policy(only=(pattern,)), Policy(skip=("evaluation", pattern))):
        with pytest.raises(ValueError, match=f"is called {pattern!r}; did you mean .*{re.escape(nearest)}"):
            policy.require_known(LAWS)


def test_a_check_fails_at_its_level_and_worse() -> None:
    laws = [next(law for law in LAWS if law.level is level) for level in Level]
    wrong, unlike, nicety = laws

    def report(level: Level, **verdicts: Verdict) -> Report:
        found = Report(["theirs"], Settings(), laws, policy=Policy(level))
        for law in laws:
            verdict = verdicts.get(law.level.name, Verdict.NOT_OFFERED)
            found.findings[law.name] = {"theirs": Finding(verdict, "")}
        return found

    def fails(**verdicts: Verdict) -> list[bool]:
        return [report(level, **verdicts).fails("theirs") for level in Level]

    broken = Verdict.BROKEN
    assert fails(WRONG=Verdict.CRASHED) == [True, True, True]
    assert fails(UNLIKE_TORCH=broken, NICETY=broken) == [False, True, True]
    assert fails(NICETY=broken) == [False, False, True]
    assert fails() == [False, False, False]
    every = report(Level.WRONG, WRONG=Verdict.CRASHED, UNLIKE_TORCH=broken, NICETY=broken)
    assert every.breaches("theirs") == [wrong, unlike, nicety]


def write(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(text)


def test_the_nearest_table_counts(tmp_path: Path) -> None:
    inner = tmp_path / "package" / "deep"
    write(
        tmp_path,
        '[tool.thinned]\nimplementations = ["src/a.py:A", "b.c:B"]\nlevel = "nicety"\nonly = ["p*"]\n'
        'kwargs = {features = 8, "src/a.py:A" = {axis = -1}}\n',
    )
    write(inner, "[tool.ruff]\n")  # which has no table of ours
    project = Project.found_from(inner)
    ours = f"{tmp_path / 'src' / 'a.py'}:A"
    assert project.implementations == (ours, "b.c:B")
    assert project.policy == Policy(Level.NICETY, only=("p*",))
    assert project.kwargs[ours] == {"axis": -1}
    assert project.kwargs["b.c:B"] == {"features": 8}
    assert Project.found_from(tmp_path / "package").folder == tmp_path


def test_options_override_the_table(tmp_path: Path) -> None:
    write(tmp_path, '[tool.thinned]\nimplementations = ["a:A"]\nlevel = "nicety"\nskip = ["vmap"]\n')
    project = Project.found_from(tmp_path)
    assert project.overridden() == project
    changed = project.overridden(["b:B"], "wrong", skip=["pickle"], kwargs={"rate": 1})
    assert changed.implementations == ("b:B",)
    assert changed.policy == Policy(skip=("pickle",))
    assert changed.kwargs["b:B"] == {"rate": 1}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[tool.thinned]\nlevl = 'wrong'", "unknown key 'levl'; did you mean level?"),
        ("[tool.thinned]\nseed = 3", "unknown key 'seed'; accepted are implementations, kwargs, level, only"),
        ("[tool.thinned]\nlevel = 3", "level has to be one of wrong, unlike-torch, nicety, but is 3"),
        ("[tool.thinned]\nlevel = 'bad'", "level has to be one of wrong, unlike-torch, nicety, but got bad"),
        ("[tool.thinned]\nskip = 'vmap'", "skip has to be a list of strings, but is 'vmap'"),
        ("[tool.thinned]\nonly = [1]", "only has to be a list of strings, but is [1]"),
        ("[tool]\nthinned = 5", "has to be a table, but is 5"),
        ("[tool.thinned\n", "cannot read "),
    ],
)
def test_a_wrong_table_gets_one_line(tmp_path: Path, table: str, message: str) -> None:
    write(tmp_path, table)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        Project.found_from(tmp_path)
    assert str(tmp_path / "pyproject.toml") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_levels_are_spelled_either_way() -> None:
    assert [parse_level(text) for text in ("wrong", "unlike-torch", "Unlike torch", "nicety")] == [
        *(Level.WRONG, Level.UNLIKE_TORCH),
        *(Level.UNLIKE_TORCH, Level.NICETY),
    ]
