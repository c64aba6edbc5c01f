"""`thinned uncertainty`: what it writes, what it refuses, and what is left when it is stopped."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from pages import words
from process import PATIENCE
from thinned.cli import app
from thinned.compare.loading import model_of
from thinned.montecarlo import Prediction, predict
from thinned.montecarlo import calibration as scores

MODELS = '''
import time
from pathlib import Path
import torch
from torch import nn

def classifier():
    torch.manual_seed(1)
    print("a word of the model")
    return nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Dropout(0.25), nn.Linear(16, 4)).double()

def regressor():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Dropout(0.25), nn.Linear(16, 1)).double()

class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.variance = regressor(), regressor()
    def forward(self, x):
        return self.mean(x), self.variance(x).exp()

def curve():
    return nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Dropout(0.25), nn.Linear(16, 1))

def several():
    return nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Dropout(0.25), nn.Linear(16, 2))

def words():
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Dropout(0.25), nn.Linear(12, 4))

def images():
    return nn.Sequential(nn.Dropout(0.25), nn.Conv2d(3, 2, 1))

class Stuck(nn.Module):
    """Ends neither with an exception nor ever at an example of nines."""
    def __init__(self):
        super().__init__()
        self.net = classifier()
    def forward(self, x):
        if (x == 99).any():
            Path("stuck").touch()
            time.sleep(3600)
        if (x == 77).any():
            raise ArithmeticError("enough of it")
        return self.net(x)

class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = classifier()
    def forward(self, x):
        return self.net(x) * (torch.rand_like(x[:, :1]) > 0.5)

def without():
    return nn.Linear(3, 4)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with models and data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(MODELS)
    rng = np.random.default_rng(0)
    x, labels, y = rng.normal(size=(20, 3)), rng.integers(0, 4, 20), rng.normal(size=20)
    np.savez("data.npz", x=x, y=labels)
    np.savez("other.npz", inputs=x, numbers=y, pairs=rng.normal(size=(20, 2)), line=x[:, :1])
    np.savez("only_x.npz", x=x)
    table(Path("data.csv"), ["a", "b", "c", "kind"], np.c_[x, labels])
    return tmp_path


def table(path: Path, names: list[str], rows: Any) -> None:
    np.savetxt(path, rows, delimiter=",", header=",".join(names), comments="", fmt="%.17g")


def command(*arguments: str) -> Result:
    options = ["--samples", "20"]
    return CliRunner().invoke(app, ["uncertainty", *options, *arguments])


def rows(path: str = "predictions.csv") -> dict[str, torch.Tensor]:
    """The columns of the file."""
    with Path(path).open(newline="") as file:
        names, *lines = csv.reader(file)
    return {
        name: torch.tensor([float(line[i]) for line in lines], dtype=torch.float64)
        for i, name in enumerate(names)
    }


def predicted(model: str, data: str, name: str = "x", **options: Any) -> Prediction:
    x = torch.from_numpy(np.load(data)[name])
    return predict(model_of(f"models.py:{model}"), x, 20, **options)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, check_dtype=False)  # 9 digits


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_classification(batch_size: int) -> None:
    result = command("models.py:classifier", "data.npz", "--batch-size", str(batch_size), "--seed", "3")
    assert result.exit_code == 0, result.output
    want, found = predicted("classifier", "data.npz", seed=3), rows()
    for name in ("label", "max_probability", "predictive_entropy", "expected_entropy"):
        close(found[name], getattr(want, name))
    for name in ("mutual_information", "variation_ratio", "draws"):
        close(found[name], getattr(want, name))
    close(torch.stack([found[f"probability_{i}"] for i in range(4)], 1), want.mean)
    close(found["standard_error"], want.standard_error[torch.arange(20), want.label])
    assert found["id"].tolist() == list(range(20))
    assert found["target"].tolist() == np.load("data.npz")["y"].tolist()
    labels = torch.from_numpy(np.load("data.npz")["y"])
    ece = scores.expected_calibration_error(want.mean, labels)
    assert f"accuracy {(want.label == labels).double().mean():.3g}" in result.stdout
    assert f"ECE {ece:.3g}" in result.stdout


@pytest.mark.usefixtures("folder")
def test_regression() -> None:
    arrays = "--x", "inputs", "--y", "numbers", "--task", "regression", "--json"
    result = command("models.py:regressor", "other.npz", *arrays)
    assert result.exit_code == 0, result.output
    want, found = predicted("regressor", "other.npz", "inputs", task="regression"), rows()
    assert list(found) == ["id", "target", "mean", "std", "standard_error", "draws"]
    for name in ("mean", "std", "standard_error"):
        close(found[name], getattr(want, name)[:, 0])
    y = torch.from_numpy(np.load("other.npz")["numbers"])
    close(found["target"], y)
    told = json.loads(result.stdout)
    rmse = scores.root_mean_squared_error(want.mean[:, 0], y)
    inside = scores.interval_coverage(want.mean[:, 0], want.variance[:, 0], y, levels=[0.9])
    assert told["scores"]["RMSE"] == pytest.approx(rmse)
    assert told["scores"]["coverage 90%"] == pytest.approx(float(inside.observed))
    assert [row["id"] for row in told["least certain"]] == want.std[:, 0].argsort(descending=True)[
        :10
    ].tolist()


@pytest.mark.usefixtures("folder")
def test_regression_with_a_variance_and_with_several_outputs() -> None:
    assert command("models.py:Noisy", "only_x.npz", "--task", "regression").exit_code == 0
    want, found = predicted("Noisy", "only_x.npz", task="regression"), rows()
    assert want.aleatoric is not None
    close(found["aleatoric"], want.aleatoric[:, 0])
    arrays = "--x", "inputs", "--y", "pairs", "--task", "regression", "--html", "page.html"
    assert command("models.py:several", "other.npz", *arrays).exit_code == 0
    assert {"mean_0", "mean_1", "std_1", "target_0", "target_1"} <= rows().keys()


@pytest.mark.usefixtures("folder")
def test_a_table_gives_what_the_arrays_give() -> None:
    command("models.py:classifier", "data.npz")
    want = Path("predictions.csv").read_text()
    assert command("models.py:classifier", "data.csv", "--target", "kind").exit_code == 0
    assert Path("predictions.csv").read_text() == want
    table(Path("turned.csv"), ["kind", "a"], np.c_[[1, 2], [0.5, 0.25]])
    result = command("models.py:curve", "turned.csv", "--target", "kind", "--task", "regression")
    assert (result.exit_code, rows()["target"].tolist()) == (0, [1, 2])


@pytest.mark.usefixtures("folder")
def test_integers_stay_integers_for_an_embedding() -> None:
    ids = np.arange(18).reshape(6, 3) % 9
    np.savez("words.npz", x=ids)
    table(Path("words.csv"), ["a", "b", "c"], ids)
    for data in ("words.npz", "words.csv"):
        assert command("models.py:words", data).exit_code == 0
        assert command("models.py:classifier", data).exit_code == 0


@pytest.mark.usefixtures("folder")
def test_weights() -> None:
    model = model_of("models.py:regressor")
    nn.init.constant_(model[-1].bias, 40.0)  # type: ignore[index, arg-type, union-attr]
    torch.save(model.state_dict(), "weights.pt")
    arguments = "models.py:regressor", "only_x.npz", "--task", "regression", "--weights"
    assert command(*arguments, "weights.pt").exit_code == 0
    assert rows()["mean"].min() > 30
    assert_refused(command(*arguments, "nowhere.pt"), "cannot read nowhere.pt: there is no such file")
    assert_refused(command(*arguments, "models.py"), "models.py holds no state_dict")
    Path("cut.pt").write_bytes(Path("weights.pt").read_bytes()[:1000])
    assert_refused(command(*arguments, "cut.pt"), "cut.pt holds no state_dict")
    for wrong in ({"wrong": torch.zeros(1)}, torch.zeros(1)):
        torch.save(wrong, "wrong.pt")
        assert_refused(command(*arguments, "wrong.pt"), "the weights in wrong.pt do not fit the model")


def assert_refused(result: Result, why: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert why in result.stderr
    message = result.stderr.replace("a word of the model\n", "")
    assert message.count("\n") == 1
    assert message.startswith("thinned uncertainty: ")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("", "data is empty"),
        ("a,b,c\n", "has no examples: its inputs have shape (0, 3)"),
        ("a,b,c\n1,2,3\n4,5\n", "line 3: 2 cells, but 3 columns"),
        ("a,b,c\n1,2,3\n4,abc,6\n", "line 3, column 'b': 'abc' is no number"),
        ("a,b,c\n1,2,\n", "line 2, column 'c': the cell is empty"),
        ("a,b,c\n1,nan,3\n4,5,inf\n", "column 'b': example 0 is nan, and 2 such cells"),
        ("1,2,3\n4,5,6\n", "the first line must name the columns"),
        ("a,b,a\n4,5,6\n", "more than one column 'a'"),
    ],
)
def test_tables_that_are_refused(data: str, why: str, folder: Path) -> None:
    (folder / "data").with_suffix(".csv").write_text(data)
    assert_refused(command("models.py:classifier", "data.csv"), why.replace("data is", "data.csv is"))
    assert not (folder / "predictions.csv").exists()


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"z": np.ones((2, 3))}, "has no array 'x'; it has z"),
        ({"x": np.float64(1)}, "has no dimension"),
        ({"x": np.ones((0, 3))}, "has no examples"),
        ({"x": np.full((2, 3), np.nan)}, "array 'x' has nan at (0, 0), and 6 such"),
        ({"x": np.ones((2, 3)), "y": np.ones(3)}, "2 examples in 'x', but targets of shape (3,)"),
        ({"x": np.array([["a"]])}, "must hold numbers, but has dtype <U1"),
        ({"x": np.array([[None]], object)}, "must hold numbers, but has dtype object"),
        ({"x": np.ones((2, 3)), "y": np.array([0.0, 1.5])}, "that of example 1 is 1.5; for other targets"),
        ({"x": np.ones((2, 3)), "y": np.array([-1, 0])}, "that of example 0 is -1"),
        ({"x": np.ones((2, 3)), "y": np.ones((2, 2))}, "one for each example, got targets of shape (2, 2)"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_arrays_that_are_refused(arrays: dict[str, Any], why: str) -> None:
    np.savez("data.npz", **arrays)
    assert_refused(command("models.py:classifier", "data.npz"), why)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["classifier", "missing.npz"], "cannot read missing.npz: there is no such file"),
        (["classifier", "data.txt"], "accepted are .npz and .csv"),
        (["classifier", "damaged.npz"], "cannot read damaged.npz"),
        (["classifier", "single.npz"], "cannot read single.npz: it is no archive"),
        (["classifier", "flipped.npz"], "cannot read flipped.npz"),
        (["classifier", "folder.npz"], "cannot read folder.npz: IsADirectoryError"),
        (["classifier", "data.csv", "--target", "kinds"], "no column 'kinds'; did you mean kind?"),
        (["classifier", "data.csv", "--y", "kind"], "--y has no meaning for data.csv"),
        (["classifier", "data.npz", "--target", "y"], "--target has no meaning for data.npz"),
        (["classifier", "data.npz", "--y", "z"], "has no array 'z'"),
        (["classifier", "data.npz", "--task", "ranking"], "task must be"),
        (["classifier", "data.npz", "--method", "lucky"], "method must be"),
        (["classifier", "data.npz", "--until", "-1"], "until must be above 0"),
        (["classifier", "data.npz", "--until", "variance=1"], "until knows no statistic 'variance'"),
        (["classifier", "data.npz", "--until", "soon"], "--until 'soon' is not understood"),
        (["classifier", "data.npz", "--inject", "tail"], "--inject 'tail' is not understood"),
        (["classifier", "data.npz", "--inject", "0.5"], "--inject '0.5' is not understood"),
        (["classifier", "data.npz", "--inject", "=0.5"], "--inject '=0.5' is not understood"),
        (
            ["classifier", "data.npz", "--inject", "9=0.5"],
            "no module of this Sequential is at a path like '9'",
        ),
        (["classifier", "data.npz", "--inject", "3=1.5"], "1.5"),
        (["without", "data.npz"], "this Linear drops nowhere"),
        (["nothing", "data.npz"], "has nothing called 'nothing'"),
        (["classifier", "data.npz", "--output", "no/p.csv"], "there is no directory no"),
        (["classifier", "data.npz", "--html", "no/p.html"], "there is no directory no"),
        (["classifier", "data.csv", "--output", "./data.csv"], "must be different files"),
        (["classifier", "data.csv", "--html", "predictions.csv"], "must be different files"),
    ],
)
def test_arguments_that_are_refused(arguments: list[str], why: str, folder: Path) -> None:
    (folder / "damaged.npz").write_bytes(b"PK\x03\x04nonsense")
    with (folder / "single.npz").open("wb") as file:
        np.save(file, np.ones((2, 3)))
    np.savez_compressed("flipped.npz", x=np.random.default_rng(0).normal(size=(9, 3)))
    flipped = bytearray((folder / "flipped.npz").read_bytes())
    flipped[150] ^= 255
    (folder / "flipped.npz").write_bytes(flipped)
    (folder / "folder.npz").mkdir()
    before = (folder / "data.csv").read_text()
    model, *others = arguments
    assert_refused(command(f"models.py:{model}", *others), why)
    assert (folder / "data.csv").read_text() == before
    assert not (folder / "predictions.csv").exists()


@pytest.mark.usefixtures("folder")
def test_one_draw_has_no_uncertainty() -> None:
    result = command("models.py:classifier", "data.npz", "--samples", "1")
    assert (result.exit_code, result.stdout) == (2, "")


@pytest.mark.parametrize(
    ("model", "y", "why"),
    [
        ("classifier", np.full(20, 4), "the model has 4 classes, 0..3, but the target of example 0 is 4"),
        ("Stuck", np.zeros(20), "ArithmeticError: enough of it"),
        ("images", np.zeros(20), "RuntimeError"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_an_error_keeps_the_finished_rows(model: str, y: Any, why: str) -> None:
    x = np.load("data.npz")["x"]
    x[15] = 77
    np.savez("data.npz", x=x, y=y)
    result = command(f"models.py:{model}", "data.npz", "--batch-size", "6", "--html", "page.html")
    kept = 12 if model == "Stuck" else 0
    assert result.exit_code == 1
    assert why in result.stderr
    assert f"predictions.csv has the rows of the first {kept} examples" in result.stderr
    assert len(Path("predictions.csv").read_text().splitlines()) == (13 if kept else 0)
    assert not Path("page.html").exists()


@pytest.mark.usefixtures("folder")
def test_a_shape_that_has_no_room_in_a_row() -> None:
    np.savez("images.npz", x=np.ones((2, 3, 4, 4), np.float32))
    result = command("models.py:images", "images.npz")
    assert result.exit_code == 1
    assert "a row has room for a list of numbers, but the model gives each example those of" in result.stderr


def test_ctrl_c_keeps_the_finished_rows(folder: Path) -> None:
    x = np.load("data.npz")["x"]
    x[15] = 99
    np.savez("data.npz", x=x)
    # A process in the background would ignore the signal.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from thinned.cli import main; main()"
    )
    options = ["--samples", "20", "--batch-size", "6"]
    with subprocess.Popen(
        [sys.executable, "-c", code, "uncertainty", *options, "models.py:Stuck", "data.npz"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as process:
        while not (folder / "stuck").exists() and process.poll() is None:
            time.sleep(0.05)
        written = Path("predictions.csv").read_text()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, errors
    assert output == ""
    assert Path("predictions.csv").read_text() == written
    assert errors.splitlines()[-1] == (
        "thinned uncertainty: interrupted; predictions.csv has the rows of the first 12 examples"
    )
    assert "Traceback" not in errors
    np.savez("first.npz", x=x[:12])
    close(rows()["predictive_entropy"], predicted("Stuck", "first.npz").predictive_entropy)


@pytest.mark.usefixtures("folder")
def test_until_and_inject_and_consistent() -> None:
    until = "--until", "0.02", "--samples", "200"
    assert command("models.py:classifier", "data.npz", *until).exit_code == 0
    draws = rows()["draws"]
    assert 40 <= draws.min() < 200
    assert rows()["standard_error"].max() <= 0.02
    assert command("models.py:classifier", "data.npz", *until, "--html", "page.html").exit_code == 0
    assert Path("page.html").read_text().count("<th>draws</th>") == 2
    assert command("models.py:without", "data.npz", "--inject", "*=0.5", "--json").exit_code == 0
    inject = command("models.py:classifier", "data.npz", "--inject", "head", "--json", "--html", "page.html")
    sites = json.loads(inject.stdout)["sites"]
    assert [(site["path"], site["p"]) for site in sites] == [("2", "0.25"), ("3", "0.1")]
    assert "3 put before Linear 0.1" in words(Path("page.html").read_text())
    assert (
        command("models.py:classifier", "data.npz", "--consistent", "--method", "independent").exit_code == 0
    )
    want = predicted("classifier", "data.npz", consistent=True, method="independent")
    close(rows()["max_probability"], want.max_probability)


@pytest.mark.usefixtures("folder")
def test_what_the_model_prints_and_what_no_key_reaches_go_to_standard_error() -> None:
    result = command("models.py:ByHand", "data.npz", "--json")
    assert result.exit_code == 0
    json.loads(result.stdout)
    assert "a word of the model" in result.stderr
    assert "no key reaches torch.rand_like at ''" in result.stderr


ANCHORS = ["scores", "pictures", "examples", "dropout", "run"]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "said", "pictures"),
    [
        (["classifier", "data.npz"], ["accuracy: ", "NLL: ", "ECE: ", "Brier: "], 3),
        (["classifier", "only_x.npz"], ["Scores need targets"], 1),
        (
            ["regressor", "other.npz", "--x", "inputs", "--y", "numbers", "--task", "regression"],
            ["RMSE: ", "coverage 90%: ", "The model predicts no variance of the noise."],
            3,
        ),
        (["curve", "other.npz", "--x", "line", "--y", "numbers", "--task", "regression"], ["RMSE"], 4),
        (["curve", "other.npz", "--x", "line", "--task", "regression"], ["Scores need targets"], 2),
    ],
)
def test_page(arguments: list[str], said: list[str], pictures: int) -> None:
    model, *others = arguments
    result = command(f"models.py:{model}", *others, "--html", "a page.html")
    assert result.exit_code == 0, result.output
    page = Path("a page.html").read_text(encoding="utf-8")
    text = words(page)
    assert all(part in text for part in said)
    assert page.count("<svg") == pictures
    assert "2 torch.nn.Dropout 0.25" in text
    assert "“vmap”." in text
    assert f"uncertainty models.py:{model} {others[0]}" in text
    assert "--html 'a page.html'" in text
    assert f"torch {torch.__version__.split('+')[0]}" in text
    assert "seed 0" in text
    assert page.count("<th>draws</th>") == 0
    assert re.findall(r'<a href="#(\w+)"', page) == ANCHORS == re.findall(r'<h2 id="(\w+)"', page)
    for elsewhere in ("<script", "<link", "src=", "@import", "url(http"):
        assert elsewhere not in page
    assert re.findall(r'(?<!xlink:)href="(?!#)', page) == []


@pytest.mark.usefixtures("folder")
def test_without_draws() -> None:
    options = "--task", "regression", "--method", "moments", "--html", "page.html"
    result = command("models.py:regressor", "only_x.npz", *options)
    assert result.stdout.startswith("20 examples of only_x.npz, computed without draws\n")
    close(rows()["std"], predicted("regressor", "only_x.npz", task="regression", method="moments").std[:, 0])
    text = words(Path("page.html").read_text())
    assert "without draws" in text
    assert "The draws were" not in text
    assert "0 times" not in text


@pytest.mark.usefixtures("folder")
def test_wrong_labels_are_marked() -> None:
    command("models.py:classifier", "data.npz", "--html", "page.html")
    found, shown = rows(), Path("page.html").read_text()
    order = found["predictive_entropy"].argsort()
    wrong = (found["label"] != found["target"])[torch.cat([order[:10], order[-10:]])]
    assert shown.count('<td class="wrong">') == int(wrong.sum()) > 0
