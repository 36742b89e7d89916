"""Budgets, the global threshold, and plans on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import eigendamage as ed
from eigendamage.layers import FORMS, LayerShape
from eigendamage.plan._threshold import kept_above, threshold_at
from eigendamage.plan.prices.eigendamage import UnitPrices, rotated_weight, unit_prices
from tests.cases import CASES


def _wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 16, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 48),
        nn.ReLU(),
        nn.Linear(48, 10),
    ).eval()


@pytest.fixture(scope="module")
def wide() -> tuple[nn.Module, ed.Curvature]:
    model = _wide()
    x = torch.randn(48, 3, 8, 8)
    return model, ed.estimate_curvature(model, x.split(16), progress=False)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"macs": 0.5, "ratio": 0.5},
        {"loss": 0.1, "macs": 0.5},
        {"loss": 0.0},
        {"macs": 0.0},
        {"macs": 1.2},
        {"params": -1.0},
        {"ratio": 1.1},
        {"macs": float("nan")},
    ],
)
def test_budgets_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ed.BudgetError):
        ed.Budget(**wrong)


def test_a_budget_in_words_is_refused_in_one_line() -> None:
    with pytest.raises(ed.BudgetError) as error:
        ed.Budget(macs="0.5")  # type: ignore[arg-type]
    assert str(error.value) == "a budget is made of numbers: macs is '0.5'"


@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("limit", [0.9, 0.6, 0.4, 0.2])
@pytest.mark.parametrize("form", ["cheapest", "three"])
def test_budgets_hold_and_are_used(
    wide: tuple[nn.Module, ed.Curvature], unit: str, limit: float, form: str
) -> None:
    model, curvature = wide
    plan = ed.make_plan(
        model, curvature, ed.Budget(**{unit: limit}), method="eigendamage", form=form
    )
    before, after = plan.macs if unit == "macs" else plan.parameters
    assert after <= limit * before
    # The next milder threshold would not hold: no more than one unit's worth is wasted.
    assert after >= (limit - 0.12) * before
    counted = ed.count(ed.apply_plan(model, plan, curvature), torch.randn(2, 3, 8, 8))
    assert counted.macs == pytest.approx(plan.macs[1])
    assert counted.parameters == plan.parameters[1]
    for layer in plan.layers.values():
        cost = layer.macs if unit == "macs" else layer.parameters
        assert cost[1] < cost[0] if layer.changes else cost[1] == cost[0]


def test_a_budget_of_one_changes_nothing_and_says_so(
    wide: tuple[nn.Module, ed.Curvature],
) -> None:
    model, curvature = wide
    for budget in (ed.Budget(macs=1.0), ed.Budget(params=1.0), ed.Budget(ratio=0.0)):
        plan = ed.make_plan(model, curvature, budget, method="eigendamage")
        assert not plan.changed
        assert plan.price == 0
        assert "stays as is" in plan.notes[0]


def test_an_impossible_budget_names_the_best_possible(
    wide: tuple[nn.Module, ed.Curvature],
) -> None:
    model, curvature = wide
    with pytest.raises(ed.BudgetError, match=r"smallest that can be reached is 0\.\d+") as error:
        ed.make_plan(model, curvature, ed.Budget(macs=0.001), method="eigendamage")
    best = float(str(error.value).split("reached is ")[1].split(" ")[0])
    plan = ed.make_plan(model, curvature, ed.Budget(macs=best + 1e-4), method="eigendamage")
    assert plan.macs[1] <= (best + 1e-4) * plan.macs[0]


def test_a_ratio_too_mild_to_shrink_anything_is_an_error(
    wide: tuple[nn.Module, ed.Curvature],
) -> None:
    model, curvature = wide
    with pytest.raises(ed.NothingToCompressError, match=r"mildest ratio .* about 0\.\d+") as error:
        ed.make_plan(model, curvature, ed.Budget(ratio=0.005), method="eigendamage")
    needed = float(str(error.value).split("about ")[1])
    assert ed.make_plan(
        model, curvature, ed.Budget(ratio=min(1.0, needed + 0.01)), method="eigendamage"
    ).changed


def test_more_is_removed_as_the_budget_falls(wide: tuple[nn.Module, ed.Curvature]) -> None:
    model, curvature = wide
    plans = [
        ed.make_plan(model, curvature, ed.Budget(macs=m), method="eigendamage")
        for m in (0.8, 0.6, 0.4, 0.2)
    ]
    prices = [p.price for p in plans]
    ratios = [p.ratio or 0.0 for p in plans]
    assert prices == sorted(prices)
    assert ratios == sorted(ratios)
    assert prices[0] > 0


def test_the_classifier_is_kept(wide: tuple[nn.Module, ed.Curvature]) -> None:
    model, curvature = wide
    plan = ed.make_plan(model, curvature, ed.Budget(macs=0.3), method="eigendamage")
    assert isinstance(plan.layers["11"].action, ed.Keep)
    assert "classifier" in plan.layers["11"].action.reason


def test_ignored_layers_are_kept(wide: tuple[nn.Module, ed.Curvature]) -> None:
    model, curvature = wide
    plan = ed.make_plan(model, curvature, ed.Budget(params=0.8), method="eigendamage", ignore=["2"])
    assert isinstance(plan.layers["2"].action, ed.Keep)
    assert "request" in plan.layers["2"].action.reason
    with pytest.raises(ed.EigenDamageError, match="matches no layer"):
        ed.make_plan(model, curvature, ed.Budget(params=0.8), method="eigendamage", ignore="zzz")


def test_two_stages_never_cost_more_than_three(wide: tuple[nn.Module, ed.Curvature]) -> None:
    model, curvature = wide
    for limit in (0.7, 0.4):
        cheap = ed.make_plan(model, curvature, ed.Budget(macs=limit), method="eigendamage")
        three = ed.make_plan(
            model, curvature, ed.Budget(macs=limit), method="eigendamage", form="three"
        )
        assert cheap.price <= three.price
        forms = {
            p.action.form for p in three.layers.values() if isinstance(p.action, ed.EigenBlock)
        }
        assert forms == {"three"}


def test_prices_by_lambda_and_by_products_differ(wide: tuple[nn.Module, ed.Curvature]) -> None:
    model, curvature = wide
    by_lambda = ed.make_plan(model, curvature, ed.Budget(macs=0.5), method="eigendamage")
    by_products = ed.make_plan(
        model, curvature, ed.Budget(macs=0.5), method="eigendamage", eigenvalues="kfac"
    )
    assert by_lambda.price != by_products.price
    x = torch.randn(16, 3, 8, 8)
    products = ed.estimate_curvature(model, [x], eigenvalues="kfac", progress=False)
    with pytest.raises(ed.EigenDamageError, match="needs λ"):
        ed.make_plan(
            model, products, ed.Budget(macs=0.5), method="eigendamage", eigenvalues="ekfac"
        )


def test_only_a_classifier_is_nothing_to_compress() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    curvature = ed.estimate_curvature(model, [torch.randn(8, 8)], progress=False)
    with pytest.raises(ed.NothingToCompressError, match="classifier"):
        ed.make_plan(model, curvature, ed.Budget(macs=0.5), method="eigendamage")


def test_a_curvature_of_another_model_is_refused(wide: tuple[nn.Module, ed.Curvature]) -> None:
    _, curvature = wide
    other = _wide()
    other[2] = nn.Conv2d(24, 30, 3, stride=2, padding=1)
    with pytest.raises(ed.MismatchError, match="'2'"):
        ed.make_plan(other, curvature, ed.Budget(macs=0.5), method="eigendamage")


def test_unknown_methods_and_limits_are_refused(wide: tuple[nn.Module, ed.Curvature]) -> None:
    model, curvature = wide
    for wrong in ({"method": "magic"}, {"max_ratio": 1.0}):
        with pytest.raises(ed.EigenDamageError, match=next(iter(wrong))):
            ed.make_plan(model, curvature, ed.Budget(macs=0.5), **wrong)


def test_max_ratio_keeps_that_much_of_every_side(wide: tuple[nn.Module, ed.Curvature]) -> None:
    model, curvature = wide
    plan = ed.make_plan(
        model, curvature, ed.Budget(ratio=1.0), method="eigendamage", max_ratio=0.5, form="three"
    )
    for name, layer in plan.layers.items():
        if isinstance(layer.action, ed.EigenBlock):
            o, i, _ = layer.shape
            assert len(layer.action.rows) >= o - int(0.5 * o) - 1, name
            assert len(layer.action.columns) >= i - int(0.5 * i) - 1, name
            assert len(layer.action.rows) >= o / 2 - 1


def test_kept_units_are_the_dearest_and_at_least_one() -> None:
    price = torch.tensor([3.0, 1.0, 2.0, 0.0], dtype=torch.float64)
    assert kept_above(price, 1.0, 0.95) == (0, 2)
    assert kept_above(price, 9.0, 0.95) == (0,)
    assert kept_above(price, 9.0, 0.5) == (0,)
    assert kept_above(price, 9.0, 0.25) == (0, 2)
    assert kept_above(torch.zeros(3).double(), 0.0, 0.95) == (0,)


def test_threshold_counts_rows_and_columns_of_all_layers() -> None:
    loss = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    units = torch.cat([UnitPrices(scale * loss, (2, 2)).units for scale in (1, 10)])
    # rows 3, 7 and columns 4, 6; ten times that
    assert threshold_at(units, 0.0) < 0
    assert threshold_at(units, 0.25) == 6
    assert threshold_at(units, 1.0) == 70


def test_block_price_is_the_loss_outside_the_block() -> None:
    weight, q_s, q_a = (
        torch.randn(5, 4, 3).double(),
        torch.linalg.qr(torch.randn(5, 5).double()).Q,
        torch.linalg.qr(torch.randn(4, 4).double()).Q,
    )
    lam = torch.rand(5, 4, 3).double()
    rows, columns = torch.tensor([0, 3]), torch.tensor([1, 2])
    rotated = rotated_weight(weight, q_s, q_a)
    kept = torch.zeros_like(rotated)
    for r in rows:
        for c in columns:
            kept[r, c] = rotated[r, c]
    expected = 0.5 * ((rotated - kept).square() * lam).sum()
    price = unit_prices(weight, q_s, q_a, lam).of_block(rows, columns)
    assert price == pytest.approx(float(expected))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("offsets", [1, 9])
def test_factored_cost_is_that_of_its_stages(form: str, offsets: int) -> None:
    shape = LayerShape(12, 8, offsets, True, 64.0, 16.0)
    cost = shape.factored(5, 3, form)
    stages = {
        "three": [(8 * 3, 64), (3 * 5 * offsets, 16), (5 * 12, 16)],
        "merge_in": [(8 * 5 * offsets, 16), (5 * 12, 16)],
        "merge_out": [(8 * 3, 64), (3 * 12 * offsets, 16)],
    }[form]
    assert cost.macs == sum(w * t for w, t in stages)
    assert cost.parameters == sum(w for w, _ in stages) + 12


def test_plan_round_trip_and_broken_files(
    wide: tuple[nn.Module, ed.Curvature], tmp_path: Path
) -> None:
    model, curvature = wide
    plan = ed.make_plan(model, curvature, ed.Budget(macs=0.5), method="eigendamage")
    path = tmp_path / "plan.json"
    plan.save(path)
    assert ed.Plan.load(path) == plan
    raw = json.loads(path.read_text())
    for change, words in (
        ({"version": 2}, "version"),
        ({"macs": "many"}, "macs"),
        ({"extra": 1}, "extra"),
        ({"macs": [-1.0, 2.0]}, "macs"),
        ({"budget": {"macs": 0.5, "ratio": 0.5}}, "ratio stands alone; found macs, ratio"),
        ({"budget": {}}, "a budget is empty"),
        ({"budget": {"watts": 1.0}}, "plan"),
    ):
        path.write_text(json.dumps({**raw, **change}))
        with pytest.raises(ed.FileFormatError, match=words):
            ed.Plan.load(path)
    for text in ("[" * 100_000, "1" * 6_000, '{"version": ' + "9" * 6_000 + "}"):
        path.write_text(text)
        with pytest.raises(ed.FileFormatError):
            ed.Plan.load(path)
    path.write_text("{")
    with pytest.raises(ed.FileFormatError, match="not a plan"):
        ed.Plan.load(path)


def test_token_layers_are_planned_too() -> None:
    case = CASES["tokens"]
    model, (x, _) = case.model(), case.data(8)
    curvature = ed.estimate_curvature(model, [x], progress=False)
    plan = ed.make_plan(model, curvature, ed.Budget(macs=0.8), method="eigendamage")
    assert plan.changed
    assert plan.macs[0] == 5 * (6 * 10 + 10 * 6 + 6 * 4)


def test_without_the_real_output_layer_no_other_is_taken_for_it() -> None:
    model = _wide()
    curvature = ed.estimate_curvature(
        model, [torch.randn(16, 3, 8, 8)], ignore=["11"], progress=False
    )
    assert curvature.classifier == ()
    softened = nn.Sequential(model, nn.Softmax(1))
    found = ed.estimate_curvature(softened, [torch.randn(16, 3, 8, 8)], progress=False)
    assert found.classifier == ("0.11",)
