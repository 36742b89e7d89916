"""What a pass holds is bounded, and low precision and checkpointing change little or nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import eigendamage as ed
from eigendamage.curvature._memory import bytes_of

LAYERS = ("0", "2", "5")
MOMENTS = ("S", "A", "mean", "eigenvalues", "patches", "diagonal", "gates")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(16, 24, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24 * 9, 5),
    )


def inputs(count: int = 30) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Counted:
    """Batches that know how often they were gone through to the end."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches
        self.passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.batches
        self.passes += 1


def test_max_memory_takes_more_passes_for_the_same_result() -> None:
    data = Counted(list(inputs().split(8)))
    whole = ed.estimate_curvature(network(), data, also=("patches",), progress=False)
    assert data.passes == 2
    # The last layer alone: S, and A with that of one batch. The two before it fit in together.
    needed = 4 * (5**2 + 2 * 216**2)
    data.passes = 0
    less = ed.estimate_curvature(
        network(), data, also=("patches",), max_memory=needed, progress=False
    )
    assert data.passes == 4
    for name in LAYERS:
        for what in ("S", "A", "patches", "Q_S", "eigenvalues"):
            a, b = getattr(whole[name], what), getattr(less[name], what)
            assert (a is None and b is None) or torch.equal(a, b)
    data.passes = 0
    ed.estimate_curvature(network(), data, also=("patches",), max_memory="1GB", progress=False)
    assert data.passes == 2
    with pytest.raises(ed.EigenDamageError, match=r"layer '2' alone needs 170 KB, .* 100 KB"):
        ed.estimate_curvature(
            network(), data, also=("patches",), max_memory="100 kB", progress=False
        )


def test_kept_inputs_count() -> None:
    # Q_S, Q_A and λ of the first layer, and 64 positions of 3 inputs for each example.
    limit = 4 * (16**2 + 3**2 + 16 * 27 + 20 * 3 * 64)
    ignore = ("2", "5")
    ed.estimate_curvature(network(), inputs(20), max_memory=limit, ignore=ignore, progress=False)
    with pytest.raises(ed.EigenDamageError, match="layer '0' alone needs 18"):
        ed.estimate_curvature(network(), inputs(21), max_memory=limit, ignore=ignore)


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GB", 2 * 10**9), ("1.5 MiB", 3 * 2**19), ("10", 10), (7, 7), ("3kb", 3000)],
)
def test_bytes_have_units(text: int | str, count: int) -> None:
    assert bytes_of(text) == count


@pytest.mark.parametrize("text", ["", "2 horses", "-1GB", 0, "GB"])
def test_what_is_no_memory_is_refused(text: int | str) -> None:
    with pytest.raises(ed.EigenDamageError, match="max_memory is"):
        ed.estimate_curvature(network(), inputs(), max_memory=text)


def test_max_memory_and_layers_per_pass_exclude_each_other() -> None:
    with pytest.raises(ed.EigenDamageError, match="not both"):
        ed.estimate_curvature(network(), inputs(), max_memory=10**9, layers_per_pass=1)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_bfloat16_weights_keep_sums_in_float32() -> None:
    exact = ed.estimate_curvature(
        network(), inputs(), fisher="exact", also=("patches", "gradients"), progress=False
    )
    found = ed.estimate_curvature(
        network().bfloat16(),
        inputs().bfloat16(),
        fisher="exact",
        also=("patches", "gradients"),
        progress=False,
    )
    for name in LAYERS:
        assert found[name].S.dtype == found[name].eigenvalues.dtype == torch.float32
        for what in MOMENTS:
            a, b = getattr(found[name], what), getattr(exact[name], what)
            # bfloat16 has 8 bits; float32 would be nearer than 1e-6.
            assert (a is None and b is None) or 1e-6 < difference(a, b) < 0.01


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        return checkpoint(self.layers[1:], x, use_reentrant=False)


@pytest.mark.parametrize("size", [30, 7])
def test_checkpointing_reads_the_same_positions(size: int) -> None:
    plain = ed.estimate_curvature(
        network().double(),
        inputs().double(),
        also=("patches", "gradients"),
        patch_positions=4,
        progress=False,
    )
    found = ed.estimate_curvature(
        Checkpointed().double(),
        inputs().double().split(size),
        also=("patches", "gradients"),
        patch_positions=4,
        progress=False,
    )
    for name in LAYERS:
        for what in MOMENTS:
            a, b = getattr(found[f"layers.{name}"], what), getattr(plain[name], what)
            assert (a is None and b is None) or difference(a, b) < 1e-12, (name, what)


def test_a_bfloat16_model_is_compressed_as_one() -> None:
    small = ed.compress(
        network().bfloat16(), inputs(60).bfloat16().split(20), budget=ed.Budget(macs=0.6),
        progress=False,
    )  # fmt: skip
    assert {p.dtype for p in small.model.parameters()} == {torch.bfloat16}
    assert small.report.final.divergence < 0.01
