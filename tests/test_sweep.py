"""sweep: many budgets by one curvature, as data, as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from matplotlib import rc_context
from rich.console import Console
from torch import Tensor, nn

import eigendamage as ed
from eigendamage.report import SweepRow
from tests.cases import CASES

_SIZES = tuple(ed.Budget(macs=fraction) for fraction in (0.9, 0.7, 0.5))
_OUT_OF_REACH = ed.Budget(macs=0.001)


def _model() -> nn.Module:
    return CASES["residual"].model().float()


def _batches(examples: int = 20) -> list[tuple[Tensor, Tensor]]:
    x, y = CASES["residual"].data(examples)
    return list(zip(x.float().split(4), y.split(4), strict=True))


def _unlabeled() -> list[Tensor]:
    return [x for x, _ in _batches()]


def _without_time(rows: Sequence[SweepRow]) -> list[SweepRow]:
    return [row.model_copy(update={"seconds": 0.0}) for row in rows]


def _printed(sweep: ed.Sweep) -> str:
    text = StringIO()
    ed.print_sweep(sweep, Console(file=text, width=80))
    assert "…" not in text.getvalue()  # eighty columns are enough
    return text.getvalue()


@pytest.fixture(scope="module")
def measured() -> ed.Sweep:
    """Three budgets and one that cannot be met; one of them measured."""
    torch.set_num_threads(1)
    return ed.sweep(
        _model(),
        _batches(),
        budgets=(*_SIZES, _OUT_OF_REACH),
        measure=[_SIZES[1], _OUT_OF_REACH],
        refine=2,
        progress=False,
    )


def test_prices_rise_as_budgets_fall_and_budgets_hold() -> None:
    """By prices as they are, without a calibration that changes them on the way."""
    model = _model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen: list[SweepRow] = []
    found = ed.sweep(
        model,
        _unlabeled(),
        budgets=_SIZES,
        calibrate=False,
        repair=False,
        refine=0,
        actions=["low-rank", "blocks"],
        progress=False,
        on_row=seen.append,
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert tuple(seen) == found.rows
    assert [row.budget for row in found.rows] == ["macs 0.9", "macs 0.7", "macs 0.5"]
    for row, budget in zip(found.rows, _SIZES, strict=True):
        assert row.macs is not None
        assert row.macs <= budget.macs
        assert (row.calibrated, row.measured, row.error) == (None, None, None)
    for milder, harder in pairwise(found.rows):
        assert milder.priced - milder.gap <= harder.priced
    assert found.rows[0].priced < found.rows[-1].priced
    assert found.measured_on == "data"
    assert (found.examples, found.measured_examples) == (20, 20)
    assert found.original.accuracy is None


def test_every_row_is_what_compress_says_of_that_budget() -> None:
    options = {"calibrate": False, "refine": 0, "actions": ["low-rank"], "progress": False}
    test = _batches(8)
    for repair in (True, False):
        [row] = ed.sweep(
            _model(),
            _unlabeled(),
            budgets=[_SIZES[2]],
            measure="all",
            eval_data=test,
            repair=repair,
            **options,
        ).rows
        whole = ed.compress(
            _model(), _unlabeled(), budget=_SIZES[2], eval_data=test, repair=repair, **options
        )
        assert row.priced == whole.plan.price
        assert row.parameters == whole.plan.left("params")
        assert row.measured == whole.report.final


def test_only_what_is_asked_for_is_measured(measured: ed.Sweep) -> None:
    mild, middle, hard, _ = measured.rows
    assert mild.measured is None
    assert hard.measured is None
    assert middle.measured is not None
    assert middle.measured.divergence > 0
    assert middle.measured.accuracy is not None
    assert measured.original.divergence is None
    assert measured.original.loss is not None
    assert measured.measured_on == "held_out"
    assert measured.examples + measured.measured_examples == 20
    assert all(row.calibrated is not None for row in (mild, middle, hard))


def test_a_budget_out_of_reach_is_a_row_with_the_reason(measured: ed.Sweep) -> None:
    row = measured.rows[-1]
    assert row.error is not None
    assert "can be reached" in row.error
    assert (row.macs, row.priced, row.measured) == (None, None, None)
    assert f"{row.budget}: {row.error}" in " ".join(_printed(measured).split())


def test_it_is_kept_as_json_and_shown(measured: ed.Sweep, tmp_path: Path) -> None:
    measured.save(tmp_path / "sweep.json")
    assert ed.Sweep.load(tmp_path / "sweep.json") == measured
    table = _printed(measured)
    for row in measured.rows[:3]:
        [line] = [line for line in table.splitlines() if line.startswith(row.budget + " ")]
        assert f"{row.priced:.3g}" in line
        assert f"{row.macs:.1%}" in line
    assert f"{measured.rows[1].measured.divergence:.3g}" in table


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_plot_is_a_file_of_its_kind(measured: ed.Sweep, tmp_path: Path, kind: str) -> None:
    ed.plot_sweep(measured, tmp_path / f"sweep.{kind}")
    start = (tmp_path / f"sweep.{kind}").read_bytes()[:400]
    assert {"png": b"\x89PNG", "svg": b"<svg"}[kind] in start
    nothing = measured.model_copy(update={"rows": measured.rows[-1:]})
    with pytest.raises(ed.NothingToCompressError, match="no budget of the sweep could be met"):
        ed.plot_sweep(nothing, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_plot_of_latencies_is_against_latency(measured: ed.Sweep, tmp_path: Path) -> None:
    rows = [row.model_copy(update={"latency": row.macs}) for row in measured.rows]
    for sweep, across in (
        (measured, "MACs left"),
        (measured.model_copy(update={"rows": tuple(rows)}), "latency left"),
    ):
        with rc_context({"svg.fonttype": "none"}):
            ed.plot_sweep(sweep, tmp_path / "sweep.svg")
        drawn = (tmp_path / "sweep.svg").read_text()
        assert [left for left in ("MACs left", "latency left") if left in drawn] == [across]


def test_same_seed_same_sweep(measured: ed.Sweep) -> None:
    again = ed.sweep(
        _model(),
        iter(_batches()),
        budgets=(*_SIZES, _OUT_OF_REACH),
        measure=[_SIZES[1]],
        refine=2,
        progress=False,
    )
    assert _without_time(again.rows) == _without_time(measured.rows)


def test_one_curvature_is_enough_and_a_budget_of_loss_is_searched_for() -> None:
    model = _model()
    curvature = ed.estimate_curvature(model, _unlabeled(), also=ed.needs("auto"), progress=False)
    found = ed.sweep(
        model,
        _unlabeled(),
        budgets=[ed.Budget(loss=0.05)],
        measure="all",
        curvature=curvature,
        calibrate=False,
        refine=0,
        progress=False,
    )
    [row] = found.rows
    assert row.macs < 1
    assert row.measured.divergence <= 0.05
    assert "curvature" not in found.seconds
    with pytest.raises(ed.MismatchError, match="'cross_entropy', not of 'mse'"):
        ed.sweep(model, _unlabeled(), curvature=curvature, loss="mse", progress=False)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"budgets": ()}, ed.BudgetError, "at least one budget"),
        ({"budgets": [ed.Budget(ratio=0.5)]}, ed.BudgetError, "no budget of ratio 0.5"),
        ({"measure": [ed.Budget(macs=0.33)]}, ed.BudgetError, "macs 0.33 is not in the sweep"),
        ({"latency_batch": 0}, ed.EigenDamageError, "latency_batch is 0"),
        ({"multiple": 0}, ed.EigenDamageError, "multiple is 0"),
        ({"damping": -1.0}, ed.EigenDamageError, "damping is -1.0"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        ed.sweep(_model(), _unlabeled(), progress=False, **options)
