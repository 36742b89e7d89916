"""A call that is stopped anywhere: the model is as it was, no hook and no part of a file stay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eigendamage as ed
from eigendamage.curvature import preserved_random_state
from tests.hard.odd_calls import fingerprint
from tests.hard.test_bad_numbers import network

WAYS: dict[str, dict[str, Any]] = {
    "auto, polished": {"polish": 1, "refine": 0},
    "rounds": {
        "method": "magnitude",
        "rounds": 2,
        "epochs": 1,
        "finetuning": ed.FinetuneConfig(held_out=0.0),
    },
}
POINTS = 3


class Stopping:
    """Batches, of which one of a long count is an error instead; 0 for none."""

    def __init__(self, at: int = 0, error: BaseException | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self._batches = [
            (torch.randn(4, 2, 6, 6, generator=generator), torch.arange(4) % 3) for _ in range(5)
        ]
        self._at, self._error = at, error
        self.taken = 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._batches:
            self.taken += 1
            if self.taken == self._at and self._error is not None:
                raise self._error
            yield batch


def _compress(model: torch.nn.Module, data: Stopping, way: str, folder: Path) -> ed.Compressed:
    where = {"directory": folder / "rounds"} if "rounds" in WAYS[way] else {}
    return ed.compress(
        model, data, budget=ed.Budget(macs=0.6), progress=False, **WAYS[way], **where
    )


def _open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
@pytest.mark.parametrize("way", list(WAYS))
def test_stopped_anywhere_nothing_is_left(way: str, tmp_path: Path) -> None:
    model = network().train()
    model[3].bias.requires_grad_(False)
    whole = Stopping()
    expected = _compress(model, whole, way, tmp_path / "whole")
    before, files, state = fingerprint(model), _open_files(), torch.get_rng_state()
    for point in range(POINTS):
        at = 1 + point * (whole.taken - 1) // (POINTS - 1)
        folder = tmp_path / str(at)
        if point % 2:
            with pytest.raises(ed.DataError, match=r"at batch . with OSError: unplugged"):
                _compress(model, Stopping(at, OSError("unplugged")), way, folder)
        else:
            with pytest.raises(KeyboardInterrupt):
                _compress(model, Stopping(at, KeyboardInterrupt()), way, folder)
        assert fingerprint(model) == before, at
        assert torch.equal(torch.get_rng_state(), state), at
        assert _open_files() == files, at
        assert not [p for p in folder.rglob("*") if ".part" in p.name], at
    with preserved_random_state():
        again = _compress(model, Stopping(), way, folder)  # goes on from the last stop
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, expected.model.state_dict()[name]), name
