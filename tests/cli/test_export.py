"""eigendamage export: what compress wrote becomes a file that runs without this package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import eigendamage as ed
from eigendamage import cli

runner = CliRunner()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "small"
    result = ed.compress(
        ed.zoo.demo_network(),
        [ed.zoo.fashion_mnist("train").images[:32]],
        budget=ed.Budget(macs=0.5),
        method="eigendamage",
        recalibrate=False,
        progress=False,
    )
    ed.save(result, folder)
    return folder


def call(saved: Path, *rest: str) -> tuple[int, str, BaseException | None]:
    done = runner.invoke(cli.app, ["export", str(saved), "--model", "zoo:demo_network", *rest])
    return done.exit_code, done.stdout, done.exception


def test_a_saved_folder_is_exported_and_compared(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain"
    code, said, _ = call(
        saved, "--data", "zoo:fashion-mnist", "--format", "plain", "--out", str(out), "--json"
    )
    assert code == 0
    told = json.loads(said)
    assert told["max_difference"] < 1e-4
    assert told["path"] == str(out)
    assert {f.name for f in out.iterdir()} >= {"model.py", "model.safetensors"}


def test_random_inputs_of_a_shape_do(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.pt2"
    code, said, _ = call(saved, "--shape", "1x28x28", "--format", "torch.export", "--out", str(out))
    assert code == 0
    assert "any batch size" in said
    assert out.is_file()


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        (("--shape", "1x0x28"), "--shape: it is '1x0x28'"),
        ((), "give --data or --shape"),
        (("--shape", "1x28x28", "--data", "zoo:fashion-mnist"), "give --data or --shape"),
    ],
)
def test_inputs_are_asked_for_clearly(
    saved: Path, tmp_path: Path, rest: tuple[str, ...], words: str
) -> None:
    out = tmp_path / "x.onnx"
    done = runner.invoke(
        cli.app,
        ["export", str(saved), "--model", "zoo:demo_network", "--out", str(out), *rest],
    )
    assert done.exit_code != 0
    assert words in f"{done.exception} {done.output}"
    assert not out.exists()
