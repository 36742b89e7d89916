"""Several processes of one group compute what one does, and fail together."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import eigendamage as ed
from eigendamage import distributed
from eigendamage.cli import app
from tests.ranks import LOOPBACK, together

MOMENTS = (
    "S", "A", "mean", "S_eigenvalues", "A_eigenvalues", "patches", "patch_mean", "diagonal",
    "bias_diagonal", "gates",
)  # fmt: skip
IN_BASIS = ("Q_S", "Q_A", "eigenvalues")


def network(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(6, 4, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 9, 10),
        nn.Tanh(),
        nn.Linear(10, 4),
    ).to(dtype)


def batches(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Five batches, the last of which is short: the second of two processes gets two."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(67, 3, 8, 8, generator=random, dtype=torch.float64).to(dtype)
    y = torch.randint(0, 4, (67,), generator=random)
    return list(zip(x.split(15), y.split(15), strict=True))


def curvature(dtype: torch.dtype = torch.float64, **options: Any) -> ed.Curvature:
    also = ("patches", "gradients")
    return ed.estimate_curvature(
        network(dtype), batches(dtype), also=also, patch_positions=8, progress=False, **options
    )


CURVATURES: dict[str, Callable[[], ed.Curvature]] = {
    "float64": curvature,
    "float32": lambda: curvature(torch.float32),
    "one batch": lambda: curvature(fisher="empirical", max_examples=10),
    "streamed": lambda: curvature(layers_per_pass=2, fisher="exact", max_examples=20),
}


def compressed(**options: Any) -> ed.Compressed:
    settings = {"budget": ed.Budget(macs=0.6), "progress": False, **options}
    return ed.compress(network(), batches(), **settings)


def results() -> dict[str, Any]:
    """What the processes compute together, to be compared."""
    auto = compressed()
    return {
        "curvatures": {name: make() for name, make in CURVATURES.items()},
        "plan": auto.plan.model_dump_json(),
        "state": auto.model.state_dict(),
        "method": compressed(method="kron-obs").plan.model_dump_json(),
        "decided": distributed.decided(distributed.rank),
        "from first": distributed.from_first(distributed.rank()),
    }


def everything(folder: Path) -> None:
    """All that the tests look at, from one start of the processes; the second dies at the end."""
    rank = distributed.rank()
    torch.save(results(), folder / f"{rank}.results")
    for name, attempt in attempts(rank).items():
        start = time.monotonic()
        said = "nothing"
        try:
            attempt()
        except (ed.EigenDamageError, ValueError) as error:
            said = f"{type(error).__name__}: {error}"
        torch.save((said, time.monotonic() - start), folder / f"{rank}.{name}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    together(everything, made)
    return made


@pytest.fixture(scope="module")
def of_two(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.results", weights_only=False) for rank in range(2)]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("which", "tolerance", "in_basis"),
    # Eigenvectors, and λ with them, turn by the error over the gap between eigenvalues.
    [
        ("float64", 1e-10, 1e-10),
        ("float32", 1e-6, 1e-2),
        ("one batch", 1e-10, 1e-10),
        ("streamed", 1e-10, 1e-10),
    ],
)
def test_curvature_is_that_of_one_process(
    of_two: list[dict[str, Any]], which: str, tolerance: float, in_basis: float
) -> None:
    alone = CURVATURES[which]()
    together = of_two[0]["curvatures"][which]
    assert list(together) == list(alone)
    assert together.examples == alone.examples
    for name, expected in alone.items():
        found = together[name]
        assert (found.examples, found.positions) == (expected.examples, expected.positions)
        for what in (*MOMENTS, *IN_BASIS):
            a, b = getattr(found, what), getattr(expected, what)
            assert (a is None) == (b is None)
            if a is not None:
                assert a.dtype == b.dtype
                allowed = in_basis if what in IN_BASIS else tolerance
                assert difference(a, b) < allowed, (name, what)
        trace = expected.eigenvalues.sum()
        assert difference(found.eigenvalues.sum(), trace) < tolerance


def test_all_processes_have_the_same_bits(of_two: list[dict[str, Any]]) -> None:
    first, second = of_two
    for which, mine in first["curvatures"].items():
        for name, layer in mine.items():
            its = second["curvatures"][which][name]
            for what in (*MOMENTS, *IN_BASIS):
                a, b = getattr(layer, what), getattr(its, what)
                assert (a is None and b is None) or torch.equal(a, b), (which, name, what)
    assert first["plan"] == second["plan"]
    assert first["method"] == second["method"]
    assert list(first["state"]) == list(second["state"])
    assert all(torch.equal(a, second["state"][name]) for name, a in first["state"].items())
    assert [first["decided"], second["decided"]] == [0, 0]
    assert [first["from first"], second["from first"]] == [0, 0]


def test_the_plan_is_that_of_one_process(of_two: list[dict[str, Any]]) -> None:
    for which, alone in (("plan", compressed()), ("method", compressed(method="kron-obs"))):
        found = ed.Plan.model_validate_json(of_two[0][which])
        expected = alone.plan
        assert expected.changed
        assert found.macs == expected.macs
        assert found.parameters == expected.parameters
        for name, layer in expected.layers.items():
            same = {"basis"}  # holds numbers that were refined from ones that differ by rounding
            action = found.layers[name].action
            assert action.model_dump(exclude=same) == layer.action.model_dump(exclude=same)
            assert found.layers[name].price == pytest.approx(layer.price, rel=1e-5)


class Stumbling(nn.Module):
    """The network, which in one of the processes fails at its own second batch of a pass."""

    def __init__(self, stumble: Callable[[], None]) -> None:
        super().__init__()
        self.network = network()
        self.stumble = stumble

    def forward(self, x: Tensor) -> Tensor:
        at_second = x.shape[0] == 15 and torch.equal(x, batches()[3][0])
        if at_second and distributed.rank() == 1:
            self.stumble()
        return self.network(x)


def fall() -> None:
    raise ValueError("no legs")


def die() -> None:
    os._exit(3)


def attempts(rank: int) -> dict[str, Callable[[], object]]:
    """What goes wrong in one of the processes, or in all."""
    known = curvature()
    reordered = batches()[::-1] if rank else batches()
    return {
        "raises": lambda: ed.estimate_curvature(Stumbling(fall), batches(), progress=False),
        "seed": lambda: curvature(seed=rank),
        "order": lambda: ed.estimate_curvature(network(), reordered, progress=False),
        "weights": lambda: ed.estimate_curvature(network(seed=rank), batches(), progress=False),
        "calls": lambda: compressed() if rank else ed.make_menus(network(), known),
        "budget": lambda: compressed(budget=ed.Budget(macs=1e-6), curvature=known),
        "dies": lambda: ed.estimate_curvature(Stumbling(die), batches(), progress=False),
    }


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("raises", ("ProcessError: process 1 of 2 failed", "ValueError: no legs")),
        ("seed", ("MismatchError: the options",) * 2),
        ("order", ("MismatchError: the first batches",) * 2),
        ("weights", ("MismatchError: the weights",) * 2),
        ("calls", ("ProcessError: process 0 is at", "ProcessError: process 1 is at")),
        ("budget", ("BudgetError: a budget of",) * 2),
        ("dies", ("ProcessError: another of the 2 processes ended", None)),
    ],
)
def test_what_goes_wrong_is_told_in_all_processes(
    folder: Path, what: str, told: tuple[str, str | None]
) -> None:
    for rank, expected in enumerate(told):
        file = folder / f"{rank}.{what}"
        assert file.exists() == (expected is not None)
        if expected is not None:
            said, seconds = torch.load(file)
            assert said.startswith(expected)
            assert seconds < 10


MODULE = """
import torch
import eigendamage as ed
from tests.test_distributed import network

def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 3, 21), network(torch.float32))

def images():
    return list(ed.zoo.fashion_mnist("train").images[:70].split(16))
"""


def test_torchrun_writes_the_plan_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "of_ranks.py").write_text(MODULE)
    arguments = [
        "compress", "--model", "of_ranks:net", "--data", "of_ranks:images",
        "--macs", "0.6", "--no-calibrate", "--no-repair",
    ]  # fmt: skip
    torchrun = [
        "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
    ]  # fmt: skip
    root = str(Path(__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, *sys.path]),
        "OMP_NUM_THREADS": "1",
        **LOOPBACK,
    }

    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "eigendamage", *arguments, "--out", "two"],
        cwd=tmp_path, env=environment, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Written to two.") == 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    alone = CliRunner().invoke(app, [*arguments, "--out", "one", "--quiet"])
    assert alone.exit_code == 0, alone.output
    one, two = (ed.Plan.load(tmp_path / out / "plan.json") for out in ("one", "two"))
    assert one.changed
    assert one.macs == two.macs
    for name, layer in one.layers.items():
        mine, its = (plan.layers[name].action for plan in (one, two))
        assert mine.model_dump(exclude={"basis"}) == its.model_dump(exclude={"basis"})
        assert two.layers[name].price == pytest.approx(layer.price, rel=1e-3)
    left = {f.name for f in (tmp_path / "two").iterdir()}
    assert left == {
        *("model.safetensors", "structure.json", "plan.json", "report.json", "report.html"),
        "curvature.safetensors",
    }


def test_other_commands_are_refused_in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eigendamage.cli._processes.world", lambda: 2)
    refused = CliRunner().invoke(app, ["demo"])
    assert isinstance(refused.exception, ed.EigenDamageError)
    assert "start it without torchrun" in str(refused.exception)


def test_work_is_shared_out_by_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.shared_out([3.0, 1.0]) == [0, 0]
    monkeypatch.setattr(distributed, "world", lambda: 3)
    assert distributed.shared_out([1.0, 7.0, 4.0, 3.0, 1.0]) == [2, 0, 1, 2, 1]
    assert list(distributed.dealt(range(7))) == [(0, 1, 2), (3, 4, 5), (6,)]
