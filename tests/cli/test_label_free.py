"""A folder of images without labels is enough for everything, training included."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

import eigendamage as ed
from eigendamage import zoo
from eigendamage.cli import app

_SOURCE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, stride=2), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    ).eval()
    with torch.no_grad():
        model[-1].weight.mul_(20.0)
    return model
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sixty real images as files, in one folder, with no class to tell."""
    (tmp_path / "tiny_net.py").write_text(_SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    images = tmp_path / "images"
    images.mkdir()
    pixels = zoo.fashion_mnist("train").images[:60, 0]
    pixels = ((pixels * 0.353 + 0.286) * 255).round().clamp(0, 255).byte().numpy()
    for index, image in enumerate(pixels):
        Image.fromarray(image).convert("RGB").save(images / f"{index}.png")
    return images


def _compress(folder: Path, *options: str) -> tuple[Result, ed.Report]:
    arguments = ["compress", "--model", "tiny_net:net", "--data", str(folder), "--out", "out"]
    done = CliRunner().invoke(
        app, [*arguments, "--macs", "0.5", "--batch-size", "8", "--no-calibrate", *options]
    )
    assert done.exit_code == 0, (done.output, done.exception)
    return done, ed.Report.load("out/report.json")


def test_polish_is_the_default_and_is_told_apart(folder: Path) -> None:
    done, report = _compress(folder, "--actions", "low-rank")
    assert report.polish is not None
    assert len(report.polish.losses) == 6
    assert report.original.accuracy is None
    assert report.seconds["polish"] > 0
    if report.polished is not None:
        assert f"polished, {report.seconds['polish']:.0f} s" in done.output
    assert report.final.divergence is not None


def test_rounds_of_distillation_need_no_labels(folder: Path) -> None:
    done, report = _compress(folder, "--actions", "low-rank", "--rounds", "2", "--epochs", "2")
    assert report.polish is None
    assert len(report.rounds) == 2
    assert report.finetuned is not None
    assert report.finetuned.accuracy is None
    assert report.finetuned.divergence is not None
    for one in report.rounds:
        assert one.training is not None
        assert len(one.training.losses) == 2
    assert "fine-tuned" in done.output
    assert report.macs[1] <= 0.5 * report.macs[0]
    assert ed.Plan.load("out/plan.json").changed
    assert sorted(p.name for p in Path("out/rounds").iterdir()) == [
        "round-1",
        "round-2",
        "run.json",
    ]
