"""A project's demands on its layers: ``[tool.thinned]`` of its pyproject.toml.

[tool.thinned]
implementations = ["my_package.layers:MyDropout"]
kwargs = {features = 8}
level = "unlike-torch"
skip = ["torch.compile", "transforms", "drop rate*"]
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from thinned.checks import did_you_mean
from thinned.compare.laws import Law, Level

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Policy", "Project", "option_of", "parse_kwargs", "parse_level"]


@dataclass(frozen=True)
class Policy:
    """The laws that are examined, and how bad a broken one has to be for a check to fail.

    Attributes:
        level: the mildest level at which a check fails.
        only: names of laws or of families, or patterns of :mod:`fnmatch`; with none, all laws.
        skip: the same, of laws that are left out.
    """

    level: Level = Level.WRONG
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def chosen(self, laws: Iterable[Law]) -> list[Law]:
        """The laws to examine.

        Raises:
            ValueError: with one line, where none is left.
        """
        found = [law for law in laws if self.chooses(law)]
        if not found:
            raise ValueError(f"no law is left by only = {list(self.only)} and skip = {list(self.skip)}")
        return found

    def chooses(self, law: Law) -> bool:
        """Whether the law is examined."""
        wanted = not self.only or any(_matches(law, pattern) for pattern in self.only)
        return wanted and not any(_matches(law, pattern) for pattern in self.skip)

    def require_known(self, laws: Sequence[Law]) -> None:
        """Raise ValueError, with one line, for a pattern that matches none of ``laws``."""
        names = list(dict.fromkeys(name for law in laws for name in (law.name, law.family)))
        for pattern in (*self.only, *self.skip):
            if not any(_matches(law, pattern) for law in laws):
                nearest = did_you_mean(pattern, names)
                raise ValueError(f"no law and no family of laws is called {pattern!r}{nearest}")


def _matches(law: Law, pattern: str) -> bool:
    """Compares names first, because fnmatch reads the brackets of "p outside [0, 1]" as a set."""
    pattern = pattern.casefold()
    names = law.name.casefold(), law.family.casefold()
    return pattern in names or any(fnmatchcase(name, pattern) for name in names)


def option_of(level: Level) -> str:
    """The level as an option or a key has it.

    >>> option_of(Level.UNLIKE_TORCH)
    'unlike-torch'
    """
    return level.value.replace(" ", "-")


def parse_level(text: str) -> Level:
    """A level by its name.

    >>> parse_level("unlike-torch").value
    'unlike torch'
    """
    for level in Level:
        if text.casefold() in (option_of(level), level.value):
            return level
    raise ValueError(f"level has to be one of {', '.join(map(option_of, Level))}, but got {text}")


@dataclass(frozen=True)
class Project:
    """The table of a pyproject.toml, or the defaults of a comparison.

    Attributes:
        implementations: as on the command line; a relative path is one from the file's folder.
        kwargs: arguments of constructors beside p, under the implementation. The file has them for all that
            it lists, or under an implementation's name.
        folder: where the file is.
    """

    implementations: tuple[str, ...] = ()
    policy: Policy = field(default_factory=Policy)
    kwargs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    folder: Path | None = None

    @classmethod
    def found_from(cls, start: Path) -> Project:
        """The table of the nearest pyproject.toml that has one, in ``start`` or a folder above it.

        Raises:
            ValueError: with one line that names file and key.
        """
        for folder in (start.resolve(), *start.resolve().parents):
            file = folder / "pyproject.toml"
            if not file.is_file():
                continue
            try:
                tool = tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {})
            except (OSError, ValueError) as error:  # a TOMLDecodeError is a ValueError
                raise ValueError(f"cannot read {file}: {error}") from error
            if isinstance(tool, dict) and "thinned" in tool:
                try:
                    return cls._of(tool["thinned"], folder)
                except ValueError as error:
                    raise ValueError(f"[tool.thinned] of {file}: {error}") from error
        return cls()

    @classmethod
    def _of(cls, table: Any, folder: Path) -> Project:
        if not isinstance(table, dict):
            raise ValueError(f"has to be a table, but is {table!r}")
        for key, value in table.items():
            if key not in KEYS:
                nearest = did_you_mean(key, KEYS, f"; accepted are {', '.join(KEYS)}")
                raise ValueError(f"unknown key {key!r}{nearest}")
            kind, words = KEYS[key]
            if not isinstance(value, kind) or (
                kind is list and not all(isinstance(x, str) for x in table[key])
            ):
                raise ValueError(f"{key} has to be {words}, but is {value!r}")
        implementations = [_from_folder(text, folder) for text in table.get("implementations", ())]
        kwargs = table.get("kwargs", {})
        of_all = {name: value for name, value in kwargs.items() if ":" not in name}
        of_one = {_from_folder(name, folder): value for name, value in kwargs.items() if ":" in name}
        for name, value in of_one.items():
            if not isinstance(value, dict):
                raise ValueError(f"kwargs of {name} have to be a table, but are {value!r}")
        return cls(
            tuple(implementations),
            Policy(
                parse_level(table.get("level", option_of(Level.WRONG))),
                tuple(table.get("only", ())),
                tuple(table.get("skip", ())),
            ),
            dict.fromkeys(implementations, of_all) | of_one,
            folder,
        )

    def overridden(
        self,
        implementations: Sequence[str] = (),
        level: str = "",
        only: Sequence[str] = (),
        skip: Sequence[str] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Project:
        """With the options that were given in place of the file's.

        Raises:
            ValueError: with one line, for an unknown level.
        """
        policy = Policy(
            parse_level(level) if level else self.policy.level,
            tuple(only) or self.policy.only,
            tuple(skip) or self.policy.skip,
        )
        chosen = tuple(implementations) or self.implementations
        of_each = self.kwargs if kwargs is None else dict.fromkeys(chosen, kwargs)
        return replace(self, implementations=chosen, policy=policy, kwargs=of_each)


KEYS: dict[str, tuple[type, str]] = {
    "implementations": (list, "a list of strings"),
    "kwargs": (dict, "a table of arguments"),
    "level": (str, f"one of {', '.join(map(option_of, Level))}"),
    "only": (list, "a list of strings"),
    "skip": (list, "a list of strings"),
}


def parse_kwargs(text: str) -> dict[str, Any]:
    """Arguments as a call has them; a word without quotes, which shells take away, is a string.

    >>> parse_kwargs("features=8, axis=(0, -1), mode=row, keep_prob=1-p, scale=true")
    {'features': 8, 'axis': (0, -1), 'mode': 'row', 'keep_prob': '1 - p', 'scale': True}
    """
    try:
        call = ast.parse(f"f({text}\n)", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(each.arg is None for each in call.keywords):
            raise ValueError
        return {str(each.arg): _value(each.value) for each in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(
            f"kwargs have to be arguments as in a call, such as features=8,axis=-1, but got {text}"
        ) from None


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return {"true": True, "false": False}.get(node.id, node.id)
    if ast.unparse(node) == "1 - p":
        return "1 - p"
    return ast.literal_eval(node)


def _from_folder(implementation: str, folder: Path) -> str:
    """A relative path/to/file.py:Class, seen from anywhere."""
    path, colon, name = implementation.rpartition(":")
    return f"{folder / path}{colon}{name}" if path.endswith(".py") else implementation
