"""Every backend that can run here gives the bits of the specification, and one that does not is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

import thinned
from thinned import backends
from thinned.backends import portable, reference, verify
from thinned.backends.variants import INSTRUCTION_SETS, variants
from thinned.cli import app


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", "--verify", *arguments])


def here() -> list[str]:
    return [str(variant) for variant in variants() if not variant.why_missing()]


@pytest.fixture(autouse=True)
def without_interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first test has the time for Triton's interpreter, 10 s."""
    if request.function is not test_all_are_one:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def replaced(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Callable[..., Any]) -> None:
    """A backend under this name that is portable but for some functions."""
    backend = SimpleNamespace(**vars(portable) | functions)
    before, serving = backends.available(), backends.for_device_type
    available = before | {name: backend}
    missing = {other: reason for other, reason in backends.missing().items() if other != name}
    monkeypatch.setattr(backends, "available", lambda: available)
    monkeypatch.setattr(backends, "missing", lambda: missing)

    def for_device_type(device: str) -> Any:
        served = serving(device)
        return backend if served is before.get(name) else served

    monkeypatch.setattr(backends, "for_device_type", for_device_type)


def test_all_are_one() -> None:
    found = verify.verify()
    assert not found.failed
    assert list(found.hashes) == ["spec", *here()]
    assert all(hashes == found.hashes["spec"] for hashes in found.hashes.values())
    assert len(set(found.hashes["spec"].values())) == len(verify.KINDS)
    assert found.missing == {str(v): v.why_missing() for v in variants() if v.why_missing()}


def test_doctor_prints_hashes_and_that_they_are_one() -> None:
    result = doctor()
    assert result.exit_code == 0, result.output
    lines = result.stdout.partition("\nverify\n")[2].splitlines()
    for name, hashes in verify.verify().hashes.items():
        row = next(line for line in lines if line.startswith(f"│ {name} "))
        assert all(each in row for each in hashes.values())
        assert ("equal" in row) == (name != "spec")
    for variant in variants():
        if reason := variant.why_missing():
            assert f"{variant} cannot run here: {reason}" in result.stdout.replace("\n", " ")
    assert result.stdout.strip().endswith(f"\nall {len(here())} have the bits of the specification")


def test_json() -> None:
    result = doctor("--json")
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    verified = content.pop("verify")
    assert content == backends.describe()
    found = verify.verify()
    assert verified == {"hashes": found.hashes, "failed": {}, "missing": found.missing}


def flipped(*arguments: Any) -> Tensor:
    mask = portable.keep_mask(*arguments)
    return mask.logical_not_() if mask.dim() == 0 else mask


def last_plane_ignored(key: Tensor, shape: tuple[int, ...], geometry: Any, T: int) -> Tensor:
    return portable.keep_mask(key, shape, geometry, T & ~1)


def low_half(key: Tensor, shape: tuple[int, ...], geometry: Any, *rest: int) -> Tensor:
    """As a kernel does whose mask indices have 32 bits."""
    return portable.keep_mask(key, shape, geometry._replace(base=geometry.base % 2**32), *rest)


def rounded_scale(x: Tensor, key: Any, geometry: Any, T: int, scale: float, *rest: Any) -> Tensor:
    scale = torch.tensor(scale).to(x.dtype).real.item()
    return portable.masked_affine(x, key, geometry, T, scale, *rest)


def fill_forgotten(
    x: Tensor, key: Any, geometry: Any, T: int, scale: float, shift: float, _: float, out: Any = None
) -> Tensor:
    return portable.masked_affine(x, key, geometry, T, scale, shift, 0.0, out)


def never_in_place(x: Tensor, *arguments: Any) -> Tensor:
    return portable.masked_affine(x, *(arguments[:6] if arguments[-1] is x else arguments))


def dropped_nan_stays(x: Tensor, *arguments: Any) -> Tensor:
    y = portable.masked_affine(x, *arguments)
    return y.copy_(torch.where(x.isnan(), x, y))


def another_dtype(*arguments: Any) -> Tensor:
    return portable.uniform(*arguments).long()


def another_shape(*arguments: Any) -> Tensor:
    return portable.uniform(*arguments).flatten()


def low_word_twice(keys: Tensor, data: Any) -> Tensor:
    child = portable.fold(keys, data)
    return child & 0xFFFFFFFF | child << 32


def boom(*_: Any) -> Tensor:
    raise RuntimeError("no [such] kernel\nin this driver")


@pytest.mark.parametrize(
    ("function", "broken", "kind"),
    [
        ("keep_mask", flipped, "masks"),
        ("keep_mask", last_plane_ignored, "masks"),
        ("keep_mask", low_half, "masks"),
        ("masked_affine", rounded_scale, "values"),
        ("masked_affine", fill_forgotten, "values"),
        ("masked_affine", never_in_place, "values"),
        ("masked_affine", dropped_nan_stays, "values"),
        ("uniform", another_dtype, "numbers"),
        ("uniform", another_shape, "numbers"),
        ("fold", low_word_twice, "keys"),
    ],
)
def test_a_broken_backend_is_named(
    monkeypatch: pytest.MonkeyPatch, function: str, broken: Callable[..., Tensor], kind: str
) -> None:
    replaced(monkeypatch, "portable", **{function: broken})
    failed = [name for name in here() if name.startswith("portable")]
    found = verify.verify()
    assert found.failed == {name: {kind: "differs"} for name in failed}
    result = doctor()
    assert result.exit_code == 1
    differ = ", ".join(f"{name} ({kind})" for name in failed)
    assert result.stdout.strip().endswith(f"\nnot the bits of the specification: {differ}")
    row = next(line for line in result.stdout.splitlines() if "DIFFERS" in line)
    assert row.startswith("│ portable ")
    assert found.hashes["portable"][kind] in row
    assert json.loads(doctor("--json").stdout)["verify"]["failed"] == found.failed


def test_a_backend_that_raises_fails_with_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, "portable", uniform=boom)
    result = doctor()
    assert result.exit_code == 1
    assert "portable raises for numbers: RuntimeError: no [such] kernel\nin this driver\n" in result.stdout
    assert "not the bits of the specification: portable (numbers)" in result.stdout
    verified = json.loads(doctor("--json").stdout)["verify"]
    assert verified["failed"]["portable"] == {"numbers": "RuntimeError: no [such] kernel\nin this driver"}
    assert verified["hashes"]["portable"].keys() == {"masks", "values", "keys"}


def test_the_instruction_set_is_that_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """After results, after an error, and after Ctrl-C."""
    if "native" in backends.missing():
        pytest.skip(backends.missing()["native"])
    from thinned.backends import _native, native

    def interrupted(*_: Any) -> Tensor:
        raise KeyboardInterrupt

    for lowest in (_native.supported_isas()[0], _native.supported_isas()[-1]):
        with native.instruction_set(lowest):
            verify.verify()
            assert _native.isa() == lowest
            with monkeypatch.context() as patch:
                patch.setattr(native, "fold", boom)
                assert {"native baseline"} <= verify.verify().failed.keys()
                assert _native.isa() == lowest
                patch.setattr(native, "fold", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    verify.verify()
                assert _native.isa() == lowest


def test_native_runs_under_each_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    if "native" in backends.missing():
        pytest.skip(backends.missing()["native"])
    from thinned.backends import _native, native

    ran = []

    def fold(*arguments: Any) -> Tensor:
        ran.append(_native.isa())
        return native_fold(*arguments)

    native_fold = native.fold
    monkeypatch.setattr(native, "fold", fold)
    assert not verify.verify().failed
    assert list(dict.fromkeys(ran)) == _native.supported_isas()


@pytest.mark.parametrize(("interpret", "runs"), [("1", True), ("0", False), ("", False)])
def test_triton_on_cpu_tensors_needs_its_interpreter(
    monkeypatch: pytest.MonkeyPatch, interpret: str, runs: bool
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    replaced(monkeypatch, "triton")
    found = verify.verify()
    assert ("triton-interpreter" in found.hashes) == runs
    reason = None if runs else "TRITON_INTERPRET=1 is not set"
    assert found.missing.get("triton-interpreter") == reason
    assert not found.failed


def test_a_device_that_triton_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, "triton")
    monkeypatch.setattr("thinned.backends.variants.devices", lambda: ["cpu", "mps"])
    reasons = {str(variant): variant.why_missing() for variant in variants()}
    assert reasons["portable on mps"] == ""
    assert reasons["triton on mps"] == "Triton does not serve mps"
    assert reasons["triton on cuda"] == "torch finds no cuda device"
    triton = backends.available()["triton"]
    monkeypatch.setattr(backends, "for_device_type", lambda _: triton)
    assert {str(variant): variant.why_missing() for variant in variants()}["triton on mps"] == ""


def test_a_missing_backend_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "ImportError: no kernel"
    available = {"portable": portable}
    monkeypatch.setattr(backends, "available", lambda: available)
    monkeypatch.setattr(backends, "missing", lambda: {"native": reason})
    found = verify.verify()
    assert {f"native {isa}": reason for isa in INSTRUCTION_SETS}.items() <= found.missing.items()
    assert not found.failed


def test_the_table_without_verify_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "fold", boom)
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
    assert "verify" not in json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    with pytest.raises(RuntimeError):
        verify.verify()


def test_hashes_depend_on_no_seed() -> None:
    before = verify.verify().hashes["spec"]
    torch.manual_seed(1)
    thinned.Dropout(0.5)(torch.ones(8))
    assert verify.verify().hashes["spec"] == before


def test_the_page_shows_the_hashes_of_this_version(repository: Path) -> None:
    """A user compares with them; a change of what is hashed shows here, and so would one of the mask."""
    page = (repository / "docs" / "mask.md").read_text(encoding="utf-8")
    rows = [line.split("│")[2:6] for line in page.splitlines() if line.startswith("│")]
    expected = list(verify.verify().hashes["spec"].values())
    assert len(rows) > 1
    assert all([cell.strip() for cell in row] == expected for row in rows)
