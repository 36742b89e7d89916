"""The command line, run in process and as a program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import eigendamage as ed
from eigendamage import zoo
from eigendamage.cli import _demo, app
from eigendamage.errors import MissingFileError, NotAFolderError
from eigendamage.zoo._registry import MODELS

runner = CliRunner()
_COMPRESS = ("compress", "--model", "zoo:demo_network", "--batch-size", "32")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few bundled images as an .npz of the form the command reads."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(
        path,
        train_images=rng.integers(0, 255, (96, 28, 28), dtype=np.uint8),
        train_labels=rng.integers(0, 10, 96),
        test_images=rng.integers(0, 255, (40, 28, 28), dtype=np.uint8),
        test_labels=rng.integers(0, 10, 40),
        mean=np.array([0.286]),
        std=np.array([0.353]),
    )
    return path


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrow network under the demo network's name."""
    monkeypatch.setattr(zoo, "demo_network", narrow_network)
    monkeypatch.setitem(MODELS, "demo_network", narrow_network)


def narrow_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    ).eval()


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "eigendamage", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.usefixtures("narrow")
def test_compress_writes_everything_that_rebuilds_the_model(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    done = runner.invoke(
        app,
        [
            "compress",
            "--model",
            "zoo:demo_network",
            "--macs",
            "0.5",
            "--method",
            "eigendamage",
            "--batch-size",
            "32",
            "--json",
            "--data",
            str(images),
            "--out",
            str(out),
        ],
    )
    assert done.exit_code == 0, done.output
    report = ed.Report.load(out / "report.json")
    assert report.macs[1] <= 0.5 * report.macs[0]
    assert (report.asked, list(report.spectra)) == ({"macs": 0.5}, list(report.layers))
    assert report.command is not None
    assert report.command.split()[0] == "eigendamage"
    assert (out / "report.html").read_text(encoding="utf-8") == ed.report_page(report)
    assert report.measured_examples == 40
    assert json.loads(done.stdout[done.stdout.index("{") :])["method"] == "eigendamage"

    plan = ed.Plan.load(out / "plan.json")
    curvature = ed.load_curvature(out / "curvature.safetensors")
    again = ed.apply_plan(zoo.demo_network(), plan, curvature)
    again.load_state_dict(load_file(out / "model.safetensors"))
    small = ed.load(zoo.demo_network(), out)
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())
    x = zoo.load_images(images, "test").images
    found = ed.evaluate(small, [x], reference=zoo.demo_network(), progress=False)
    assert found.divergence == pytest.approx(report.final.divergence, rel=1e-4)
    assert sorted(p.name for p in out.iterdir()) == [
        "curvature.safetensors",
        "model.safetensors",
        "plan.json",
        "report.html",
        "report.json",
        "structure.json",
    ]


@pytest.mark.usefixtures("narrow")
def test_a_folder_in_which_a_run_is_at_work_is_refused_until_all_is_written(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "small"
    command = [*_COMPRESS, "--method", "eigendamage", "--data", str(images), "--out", str(out)]
    meanwhile: list[BaseException | None] = []

    def save(*given: Any) -> None:
        meanwhile.append(runner.invoke(app, [*command, "--macs", "0.8"]).exception)
        ed.save(*given)

    monkeypatch.setattr("eigendamage.cli._compress.save", save)
    done = runner.invoke(app, [*command, "--macs", "0.5", "--quiet"])
    assert done.exit_code == 0, done.output
    assert isinstance(meanwhile[0], ed.FileError)
    assert f"another run is at work in {out}" in str(meanwhile[0])
    plan = ed.Plan.load(out / "plan.json")
    assert plan.budget.limits == {"macs": 0.5}
    # It makes no folder that nothing is written to.
    failed = runner.invoke(app, [*command[:-1], str(tmp_path / "none"), "--macs", "0.0001"])
    assert isinstance(failed.exception, ed.BudgetError)
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("command", ["compress", "sweep"])
def test_a_folder_that_is_no_folder_any_more_is_told(
    command: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "small"
    module = sys.modules[f"eigendamage.cli._{command}"]
    work = getattr(module, command)

    def gone(*given: Any, **options: Any) -> Any:
        done = work(*given, **options)
        if out.exists():
            out.rmdir()
        out.write_text("mine", encoding="utf-8")
        return done

    monkeypatch.setattr(module, command, gone)
    budget = {"compress": "--macs", "sweep": "--budgets"}[command]
    given = ["--model", "zoo:demo_network", "--data", str(images), "--out", str(out), "--quiet"]
    given += ["--method", "eigendamage"] if command == "compress" else []
    failed = runner.invoke(app, [command, *given, budget, "0.5"])
    assert isinstance(failed.exception, NotAFolderError)
    assert f"cannot make the folder {out}: a file is in its place" in str(failed.exception)
    assert out.read_text(encoding="utf-8") == "mine"


@pytest.mark.usefixtures("narrow")
def test_images_without_a_test_split_hold_out_a_tenth(images: Path, tmp_path: Path) -> None:
    single = tmp_path / "one.npz"
    with np.load(images) as arrays:
        np.savez(single, images=arrays["train_images"], mean=arrays["mean"], std=arrays["std"])
    done = runner.invoke(
        app,
        [
            "compress",
            "--model",
            "zoo:demo_network",
            "--params",
            "0.5",
            "--method",
            "eigendamage",
            "--data",
            str(single),
            "--out",
            str(tmp_path / "o"),
        ],
    )
    assert done.exit_code == 0, done.output
    report = ed.Report.load(tmp_path / "o" / "report.json")
    assert (report.examples, report.measured_examples) == (86, 10)
    assert report.final.accuracy is None
    assert "held out" in " ".join(done.output.split())


def test_models_and_data_from_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def net():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(),\n"
        "                               torch.nn.Linear(32, 32), torch.nn.ReLU(),\n"
        "                               torch.nn.Linear(32, 3))\n"
        "def data():\n"
        "    return [torch.randn(16, 8)], [(torch.randn(8, 8), torch.tensor([0, 1, 2, 0] * 2))]\n"
        "not_callable = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["compress", "--data", "mine:data", "--params", "0.6", "--out", "out"]
    arguments += ["--method", "eigendamage"]
    done = runner.invoke(app, [*arguments, "--model", "mine:net", "--quiet"])
    assert done.exit_code == 0, done.output
    assert ed.Report.load(tmp_path / "out" / "report.json").measured_examples == 8
    for wrong, words in (
        ("nowhere:net", "no module"),
        ("mine:other", "no 'other'"),
        ("mine:not_callable", "not callable"),
        ("zoo:nothing", "no network"),
        ("plainname", "expected zoo:NAME"),
        ("mine:data", "must return a torch.nn.Module"),
    ):
        failed = runner.invoke(app, [*arguments, "--model", wrong])
        assert isinstance(failed.exception, ed.EigenDamageError)
        assert words in str(failed.exception)


def test_errors_are_one_line_and_bad_input_is_three(tmp_path: Path) -> None:
    done = _run(
        *("compress", "--model", "zoo:resnet20", "--data", str(tmp_path / "none")),
        *("--out", str(tmp_path / "out"), "--macs", "0.5"),
    )
    assert done.returncode == 3
    *notes, error = done.stderr.splitlines()
    assert error.startswith("eigendamage: there is no data at")
    assert [note for note in notes if "the weights of zoo:resnet20 are random" in note] == notes
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_usage_errors_exit_with_two_and_version_is_told() -> None:
    assert runner.invoke(app, ["compress"]).exit_code == 2
    assert runner.invoke(app, ["--version"]).stdout.strip() == ed.__version__


@pytest.fixture
def small_demo(narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo on few images and a narrow network."""
    few = {s: zoo.fashion_mnist(s).take(slice(0, 50)) for s in ("train", "test")}
    monkeypatch.setattr(zoo, "fashion_mnist", lambda split: few[split])


@pytest.mark.usefixtures("small_demo")
def test_demo_at_three_budgets(tmp_path: Path) -> None:
    out = tmp_path / "demo.json"
    done = runner.invoke(app, ["demo", "--out", str(out), "--quiet"])
    assert done.exit_code == 0, done.output
    budgets = json.loads(out.read_text())["budgets"]
    assert len(budgets) == 3
    for entry, fraction in zip(budgets, (0.7, 0.5, 0.35), strict=True):
        assert list(entry) == ["auto", "eigendamage"]
        for method, found in entry.items():
            report = found["report"]
            before, after = report["macs"]
            assert report["method"] == method
            assert after <= fraction * before
            assert (report["repaired"] is not None) == (method == "auto")
            assert (report["recalibrated"] is not None) == (method == "eigendamage")
            assert found["finetuned"] is None
    page = (tmp_path / "demo-report.html").read_text(encoding="utf-8")
    left = [entry["auto"]["report"]["macs"][1] / before for entry in budgets]
    assert all(f"with {100 * fraction:.1f} % of the MACs" in page for fraction in left)
    sharing = [found["report"]["seconds"] for entry in budgets for found in entry.values()]
    assert ["curvature" in seconds for seconds in sharing] == [True] + 5 * [False]
    assert "…" not in done.output  # eighty columns are enough for the table
    assert "tuned" not in done.output


@pytest.mark.usefixtures("small_demo")
def test_demo_with_training_fits_eighty_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_demo, "BUDGETS", (0.6,))
    out = tmp_path / "demo.json"
    done = runner.invoke(app, ["demo", "--out", str(out), "--quiet", "--finetuning"])
    assert done.exit_code == 0, done.output
    (entry,) = json.loads(out.read_text())["budgets"]
    assert all(0 < found["finetuned"]["accuracy"] <= 1 for found in entry.values())
    assert "…" not in done.output
    assert "tuned" in done.output


def test_demo_refuses_a_folder_that_is_not_there_before_it_starts(tmp_path: Path) -> None:
    done = runner.invoke(app, ["demo", "--out", str(tmp_path / "none" / "demo.json")])
    assert isinstance(done.exception, MissingFileError)
    assert "does not exist; make it" in str(done.exception)


def test_a_module_under_two_names_and_an_output_that_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "twice.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a = torch.nn.Linear(16, 16)\n"
        "        self.b = self.a\n"
        "        self.head = torch.nn.Linear(16, 3)\n"
        "    def forward(self, x):\n"
        "        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))\n"
        "def data():\n"
        "    return [torch.randn(16, 16)]\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["compress", "--model", "twice:Net", "--data", "twice:data", "--params", "0.7"]
    arguments += ["--method", "eigendamage"]
    done = runner.invoke(app, [*arguments, "--out", "out", "--quiet"])
    assert done.exit_code == 0, done.output
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert {n.replace("b.", "a.") for n in names if n.startswith("b.")} <= names
    (tmp_path / "file").write_text("")
    refused = runner.invoke(app, [*arguments, "--out", "file"])
    assert isinstance(refused.exception, NotAFolderError)
    assert "is a file; give a folder" in str(refused.exception)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    refused = runner.invoke(app, [*arguments, "--out", "other"])
    assert isinstance(refused.exception, ed.FileError)
    assert "cannot be written to; give a folder" in str(refused.exception)


@pytest.mark.usefixtures("narrow")
def test_compare_writes_a_table_a_plot_and_json_and_goes_on(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "compared"
    few = ["--data", str(images), "--out", str(out), "--batch-size", "32", "--budgets", "0.6"]
    few += ["--train-examples", "64"]
    first = runner.invoke(app, ["compare", "--methods", "magnitude", *few])
    assert first.exit_code == 0, first.output
    assert "60% of the MACs" in first.output
    assert (out / "comparison.png").stat().st_size > 10_000
    second = runner.invoke(app, ["compare", "--methods", "magnitude,random,obd", "--json", *few])
    assert second.exit_code == 0, second.output
    comparison = ed.Comparison.load(out / "comparison.json")
    assert [row.method for row in comparison.rows] == ["magnitude", "random", "obd"]
    assert comparison == ed.Comparison.model_validate_json(second.stdout)
    assert comparison.settings.train_batches == 2
    assert comparison.measured_examples == 40
    assert all(row.tuned is not None and row.tuned.accuracy is not None for row in comparison.rows)


def test_compare_refuses_what_it_does_not_know(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "compared"
    options = ["compare", "--data", str(images), "--out", str(out)]
    done = runner.invoke(app, [*options, "--methods", "magic"])
    assert done.exit_code == 2
    assert "method 'magic' is unknown" in done.output
    assert not out.exists()
    assert runner.invoke(app, [*options, "--budgets", "half"]).exit_code == 2
    outside = runner.invoke(app, [*options, "--methods", "random", "--budgets", "2"])
    assert outside.exit_code == 2
    assert "macs is 2.0" in outside.output


@pytest.mark.usefixtures("narrow")
def test_compress_by_masks_says_that_nothing_is_saved(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    arguments = [*_COMPRESS, "--method", "obd", "--ratio", "0.5"]
    arguments += ["--data", str(images), "--out", str(out)]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "neither smaller nor faster" in " ".join(done.output.split())
    plan = ed.Plan.load(out / "plan.json")
    rebuilt = ed.apply_plan(
        zoo.demo_network(), plan, ed.load_curvature(out / "curvature.safetensors")
    )
    saved = load_file(out / "model.safetensors")
    assert {n: t.shape for n, t in rebuilt.state_dict().items()} == {
        n: t.shape for n, t in saved.items()
    }
