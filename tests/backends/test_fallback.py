"""Where the compiled kernel is absent, where an instruction set is forced, and the table of backends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import thinned
from process import output, python
from thinned import backends
from thinned.backends.variants import Variant, variants

WITHOUT_NATIVE = """
    import sys, warnings
    sys.modules["thinned.backends._native"] = None
    import torch
"""


def test_native_runs() -> None:
    """The CPU is served by the compiled kernel; in CI it must be, elsewhere its absence is reported."""
    if reason := backends.missing().get("native"):
        assert os.environ.get("CI") != "true", f"the compiled kernel is missing: {reason}"
        pytest.skip(reason)
    assert backends.for_device("cpu") is backends.available()["native"]
    assert "native" not in backends.missing()


def test_triton_runs() -> None:
    """Interpreted or on a GPU; in CI it must, elsewhere its absence is reported."""
    if reason := backends.missing().get("triton"):
        assert os.environ.get("CI") != "true" or sys.platform != "linux", f"Triton is missing: {reason}"
        pytest.skip(reason)
    assert any(variant.backend == "triton" and not variant.why_missing() for variant in variants())


@pytest.mark.parametrize("variant", variants(), ids=str)
def test_backend_can_run_here(variant: Variant) -> None:
    if reason := variant.why_missing():
        pytest.skip(f"{variant}: {reason}")
    assert variant.backend in backends.available()


def test_a_build_without_the_kernel_asks_for_no_compiler(tmp_path: Path) -> None:
    """Not even for one that works: scikit-build-core configures with this CMakeLists.txt."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    source = Path(__file__).parents[2]
    broken = {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    done = subprocess.run(
        [cmake, "-S", source, "-B", tmp_path, "-DTHINNED_NATIVE=OFF"],
        env=os.environ | broken,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ci_fails_without_native() -> None:
    done = python(
        WITHOUT_NATIVE
        + f"""
        import pytest
        raise SystemExit(pytest.main([{__file__ + "::test_native_runs"!r}, "-q", "-p", "no:cacheprovider"]))
        """.replace("\n        ", "\n    "),
        CI="true",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the compiled kernel is missing" in done.stdout


def test_table() -> None:
    found = backends.available()
    assert "portable" in found
    assert set(found) | set(backends.missing()) == {"portable", "native", "triton"}
    assert not set(found) & set(backends.missing())
    assert all(backends.missing().values())
    for device in ("cuda", "xpu"):
        serves = "portable" if backends.why_not_triton(device) else "triton"
        assert backends.for_device(device) is found[serves]
    assert backends.for_device(torch.device("meta")) is found["portable"]
    assert backends.for_device("cpu") in found.values()


def test_why_triton_does_not_serve_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["thinned.backends.describe"], "devices", lambda: ["cpu", "mps"])
    assert backends.describe()["serves"]["mps"] == "portable: Triton makes kernels for cuda and xpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])
    monkeypatch.setattr(torch.version, "hip", None)
    assert backends.why_not_triton("cuda").endswith("capability 8.0 or higher, and this GPU has 7.5")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert backends.why_not_triton("cuda") == backends.missing().get("triton", "")


def test_portable_takes_over_with_one_warning_and_the_same_results() -> None:
    printed = output(
        WITHOUT_NATIVE
        + """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import thinned
        thinned.Key(7)
        print([w for w in caught if "thinned" in str(w.message)])
        x = torch.arange(1.0, 1001.0, requires_grad=True)
        y = thinned.functional.dropout(x, 0.3, key=thinned.Key(7))
        y.sum().backward()
        torch.compile(thinned.functional.dropout, backend="eager")(x, 0.3, key=thinned.Key(7))
        for _ in range(3):
            thinned.Dropout(0.5)(x)
    ours = [w for w in caught if "thinned" in str(w.message)]
    print(len(ours), ours[0].category.__name__, "compiled kernel is missing" in str(ours[0].message))
    print(y.sum().item(), x.grad.sum().item())
    print("native" in thinned.backends.available())
    print("_native" in thinned.backends.missing()["native"])
    """
    )
    x = torch.arange(1.0, 1001.0, requires_grad=True)
    y = thinned.functional.dropout(x, 0.3, key=thinned.Key(7))
    y.sum().backward()
    assert x.grad is not None
    assert printed.splitlines() == [
        "[]",  # importing alone does not warn
        "1 RuntimeWarning True",
        f"{y.sum().item()} {x.grad.sum().item()}",
        "False",
        "True",
    ]


needs_native = pytest.mark.skipif("native" in backends.missing(), reason="the compiled kernel is missing")


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_environment_forces_an_instruction_set() -> None:
    """Each that this processor has, as written, in capitals, within spaces; and the best without a name."""
    from thinned.backends import _native

    accepted = _native.supported_isas()
    best = accepted[-1]
    named = {name: isa for isa in accepted for name in (isa, isa.upper(), f" {isa} ")}
    printed = output(
        f"""
        import os, torch
        for name in {[*named, "", " "]}:
            if os.fork():
                os.wait()
                continue
            os.environ["THINNED_ISA"] = name
            import thinned
            from thinned.backends import _native
            kept = thinned.keep_mask(thinned.Key(7), (1000,), 0.3).sum().item()
            print(_native.isa(), thinned.backends.describe()["native"]["THINNED_ISA"], kept, flush=True)
            os._exit(0)
        """,
        PYTHONWARNINGS="ignore::DeprecationWarning,error::UserWarning",
    )
    kept = int(thinned.keep_mask(thinned.Key(7), (1000,), 0.3).sum())
    expected = [f"{isa} {isa} {kept}" for isa in named.values()] + [f"{best} not set {kept}"] * 2
    assert printed.splitlines() == expected


@needs_native
def test_an_unknown_instruction_set_is_one_warning_and_a_line_of_doctor() -> None:
    from thinned.backends import _native

    accepted = f"thinned has no such instruction set, accepted are {', '.join(_native.supported_isas())}"
    code = "import thinned; print(thinned.backends.describe()['native']['THINNED_ISA'])"
    warned = python(code, THINNED_ISA="sse9")
    assert warned.returncode == 0
    assert warned.stdout == f"'sse9' is ignored: {accepted}\n"
    message = f"THINNED_ISA='sse9' is ignored: {accepted}; thinned uses {_native.supported_isas()[-1]}"
    assert warned.stderr == f"<string>:1: UserWarning: {message}\n"
    strict = python(code, THINNED_ISA="sse9", PYTHONWARNINGS="error::UserWarning")
    assert strict.returncode == 1
    assert strict.stderr.splitlines()[-1] == f"UserWarning: {message}"


@needs_native
def test_an_instruction_set_that_this_processor_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from thinned.backends import _native, native

    monkeypatch.setattr(_native, "supported_isas", lambda: ["baseline"])
    monkeypatch.setattr(_native, "compiled_isas", lambda: ["baseline", "avx2"])
    reason = "'AVX2' is ignored: this processor has no such instruction set, accepted are baseline"
    with pytest.warns(UserWarning, match=f"^THINNED_ISA={reason}; thinned uses {_native.isa()}$"):
        assert native._force_isa("AVX2") == reason
