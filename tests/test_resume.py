"""Rounds that are killed go on from their folder, and end as if they had not been."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import eigendamage as ed

_SOURCE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )

def data():
    g = torch.Generator().manual_seed(1)
    images = [(torch.randn(4, 1, 6, 6, generator=g), torch.randint(0, 4, (4,), generator=g))
              for _ in range(12)]
    return images, images[:2]
"""


def _command(out: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "eigendamage", "compress", "--model", "tiny:net"),
        *("--data", "tiny:data", "--macs", "0.5", "--rounds", "2", "--epochs", "1"),
        *("--no-calibrate", "--actions", "low-rank", "--quiet", "--out", str(out)),
    ]


def test_a_run_killed_with_signal_nine_ends_with_the_same_weights(tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(_SOURCE)
    subprocess.run(_command(tmp_path / "whole"), cwd=tmp_path, check=True)
    out = tmp_path / "killed"
    for seen in ("round-1/training.pt", "round-2/plan.json"):
        process = subprocess.Popen(_command(out), cwd=tmp_path)
        deadline = time.monotonic() + 120
        while not (out / "rounds" / seen).exists() and time.monotonic() < deadline:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (out / "model.safetensors").exists()
    subprocess.run(_command(out), cwd=tmp_path, check=True)
    whole, killed = (load_file(p / "model.safetensors") for p in (tmp_path / "whole", out))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    reports = [ed.Report.load(p / "report.json") for p in (tmp_path / "whole", out)]
    assert reports[0].rounds == reports[1].rounds
    assert reports[0].final == reports[1].final


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    ).eval()


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 1, 6, 6, generator=generator) for _ in range(6)]


@pytest.mark.parametrize("method", ["eigendamage", "kron-obs", "auto", "eigendamage-dw", "obd"])
def test_what_is_rebuilt_from_the_folder_is_what_was_built(tmp_path: Path, method: str) -> None:
    budget = ed.Budget(ratio=0.3) if method == "obd" else ed.Budget(macs=0.6)

    def run() -> ed.Compressed:
        return ed.compress(
            network(),
            batches(),
            budget=budget,
            method=method,
            rounds=1 if method == "obd" else 2,  # masks stay, and a masked layer is left alone
            epochs=1,
            directory=tmp_path / "rounds",
            progress=False,
        )

    first, again = run(), run()
    assert first.plan == again.plan
    x = batches()[0]
    assert torch.equal(first.model(x), again.model(x))
    assert first.report.rounds == again.report.rounds
    assert type(first.model[2]) is type(again.model[2])


def test_a_folder_of_another_call_is_refused(tmp_path: Path) -> None:
    def run(macs: float, epochs: int = 1, scale: float = 1.0) -> None:
        model = network()
        with torch.no_grad():
            model[0].weight.mul_(scale)  # type: ignore[operator]
        ed.compress(
            model,
            batches(),
            budget=ed.Budget(macs=macs),
            method="eigendamage",
            epochs=epochs,
            directory=tmp_path,
            progress=False,
        )

    run(0.6)
    for arguments, said in (
        ((0.7,), r"budget was macs 0\.6 and is now macs 0\.7"),
        ((0.6, 2), "finetuning was"),
        ((0.6, 1, 2.0), "the model's weights was"),
    ):
        with pytest.raises(ed.MismatchError, match=said):
            run(*arguments)  # type: ignore[arg-type]


@pytest.mark.slow
def test_functions_are_known_again_in_another_process(tmp_path: Path) -> None:
    source = """
import sys, torch, eigendamage as ed
from tests.test_resume import batches, network

ed.compress(
    network(), batches(), budget=ed.Budget(macs=0.6), method="eigendamage", epochs=1,
    polish=ed.PolishConfig(passes=1, augment=ed.crops_and_flips()), directory=sys.argv[1],
    progress=False,
)
"""
    for _ in range(2):
        subprocess.run([sys.executable, "-c", source, str(tmp_path / "rounds")], check=True)


def test_a_call_that_failed_at_once_claims_nothing(tmp_path: Path) -> None:
    def run(data: list[torch.Tensor]) -> None:
        ed.compress(
            network(),
            data,
            budget=ed.Budget(macs=0.6),
            method="eigendamage",
            epochs=1,
            directory=tmp_path,
            progress=False,
        )

    with pytest.raises(ed.EigenDamageError):
        run([torch.randn(4, 3, 6, 6)] * 6)  # of channels that the model does not take
    run(batches())
    with pytest.raises(ed.MismatchError, match="the data was"):
        run([x + 1 for x in batches()])
