"""Fine-tuning in two processes: the same weights in both, those of one with two batches a step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import eigendamage as ed
from tests.ranks import together


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(18, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 2, 3, 3, generator=generator), torch.randint(3, (4,), generator=generator))
        for _ in range(9)  # the ninth fills no step of two
    ]


def original() -> nn.Module:
    model = network()
    with torch.no_grad():
        model[-1].weight.mul_(3.0)  # type: ignore[operator]
    return model


CONFIG = ed.FinetuneConfig(epochs=2, held_out=0.0, checkpoint_every=0.0)


def train(folder: Path) -> None:
    model = network()
    done = ed.finetune(
        model,
        batches(),
        CONFIG,
        original=original(),
        held_out=batches()[:2],
        checkpoint=folder / "state.pt",
        progress=False,
    )
    rank = torch.distributed.get_rank()
    torch.save({"state": model.state_dict(), "scores": done.scores}, folder / f"{rank}.pt")


def fail_in_one(folder: Path) -> None:
    data: Any = batches()
    if torch.distributed.get_rank() == 1:
        data[3] = (torch.randn(4, 5), data[3][1])  # of no shape that the model takes
    model = network()
    before = copy.deepcopy(model.state_dict())
    try:
        ed.finetune(model, data, CONFIG, progress=False)
    except ed.ProcessError as error:
        (folder / f"{torch.distributed.get_rank()}.txt").write_text(str(error))
        same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        raise SystemExit(3 if same else 4) from error


def test_two_processes_take_the_steps_of_one_with_twice_the_batches(tmp_path: Path) -> None:
    assert together(train, tmp_path) == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = network()
    config = ed.FinetuneConfig(epochs=2, held_out=0.0, accumulate=2)
    # The ninth batch fills no step of two processes.
    done = ed.finetune(
        alone,
        batches()[:8],
        config,
        original=original(),
        held_out=batches()[:2],
        progress=False,
    )
    for name, value in alone.state_dict().items():
        assert torch.equal(found[0]["state"][name], found[1]["state"][name])
        torch.testing.assert_close(found[0]["state"][name], value, rtol=1e-4, atol=1e-6)
    assert found[0]["scores"] == found[1]["scores"]
    torch.testing.assert_close(torch.tensor(found[0]["scores"]), torch.tensor(done.scores))


def test_an_error_in_one_process_ends_both_and_leaves_the_weights(tmp_path: Path) -> None:
    assert together(fail_in_one, tmp_path) == [3, 3]
    told = (tmp_path / "1.txt").read_text()
    assert "fine-tuning failed in process 1 of 2: the model cannot run on inputs of shape" in told
    assert "fine-tuning failed in process 0 of 2" in (tmp_path / "0.txt").read_text()
