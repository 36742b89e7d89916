"""Budgets that are met by building and measuring: loss, latency; several shots and rounds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import eigendamage as ed
from eigendamage.compress import _latency_search, _prepare, _search, _timed
from eigendamage.compress._steps import Clock, Source
from eigendamage.layers import (
    FORMS,
    FactoredConv2d,
    FactoredLinear,
    Layer,
    LayerShape,
    find_layers,
)
from eigendamage.measure import Latency
from eigendamage.plan import Channels, LatencyTable
from eigendamage.plan._latency import (
    Conditions,
    FormTimes,
    TimedForm,
    TimedLayer,
    TimeGrid,
    grids_to_measure,
)

HERE = Conditions(
    device="a", torch="2", threads=1, dtype="float64", memory_format="contiguous", batch=1
)
PER_MAC = 1e-4  # milliseconds
MEASURED = ("low-rank", "channels")


def _model() -> nn.Module:
    """Wide enough for many sizes between any two budgets."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 20, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 24, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 8),
        nn.ReLU(),
        nn.Linear(8, 5),
    ).double()


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return list(torch.randn(100, 3, 8, 8, dtype=torch.float64, generator=generator).split(20))


@pytest.fixture(scope="session")
def curvature() -> ed.Curvature:
    """Of all but what `compress` holds out."""
    torch.set_num_threads(1)
    also = ("patches", "channels")
    return ed.estimate_curvature(_model(), _batches()[:4], also=also, progress=False)


def _compress(budget: ed.Budget, **options: object) -> ed.Compressed:
    return ed.compress(
        _model(),
        _batches(),
        budget=budget,
        **{"refine": 0, "calibrate": False, "progress": False, **options},
    )


def _divergence(model: nn.Module) -> float | None:
    """On the part that is held out: of five batches the last."""
    return ed.evaluate(model, _batches()[4:], reference=_model(), progress=False).divergence


# A loss.


@pytest.fixture(scope="session")
def halved(curvature: ed.Curvature) -> float:
    """What half the MACs cost by low rank alone."""
    result = _compress(ed.Budget(macs=0.5), curvature=curvature, actions=("low-rank",))
    return _divergence(result.model)


def test_the_divergence_stays_below_the_loss_and_more_of_it_leaves_no_more(
    curvature: ed.Curvature, halved: float
) -> None:
    left: list[float] = []
    for loss in (halved, 4 * halved):
        result = _compress(ed.Budget(loss=loss), curvature=curvature, actions=("low-rank",))
        assert _divergence(result.model) <= loss
        assert result.report.truth.measured <= loss
        left.append(result.plan.left("macs"))
    assert left[1] < left[0] < 1


def test_a_loss_that_cannot_be_met_names_the_nearest(curvature: ed.Curvature) -> None:
    with pytest.raises(ed.BudgetError, match="cannot be met: the nearest model") as refused:
        _compress(ed.Budget(loss=1e-13), curvature=curvature, actions=("low-rank",))
    nearest = float(str(refused.value).split("diverges by ")[1].split(" ")[0])
    assert 1e-13 < nearest < 1


def test_a_loss_needs_a_divergence() -> None:
    def own(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum(1)

    data = [(x, torch.zeros(len(x), 5, dtype=torch.float64)) for x in _batches()]
    with pytest.raises(ed.BudgetError, match="needs a loss with a divergence"):
        ed.compress(
            _model(),
            data,
            budget=ed.Budget(loss=0.1),
            loss=own,
            fisher="empirical",
            refine=0,
            progress=False,
        )


# A latency.


def _times(shape: LayerShape, form: TimedForm) -> TimeGrid:
    """Proportional to MACs."""
    ranks_out, ranks_in = grids_to_measure(shape.outputs, shape.inputs, shape.offsets, 1)[form]

    def macs(out: int, into: int) -> float:
        if form == "dense":
            return out * into * shape.offsets * shape.positions_out
        return shape.factored(out, into, form).macs

    rows = tuple(tuple(PER_MAC * macs(o, i) for i in ranks_in) for o in ranks_out)
    return TimeGrid(ranks_out=ranks_out, ranks_in=ranks_in, milliseconds=rows)


def _forms(shape: LayerShape) -> FormTimes:
    return {
        form: _times(shape, form)
        for form in ("dense", *FORMS)
        if form in grids_to_measure(shape.outputs, shape.inputs, shape.offsets, 1)
    }


def _table(curvature: ed.Curvature, rest: float = 0.0) -> LatencyTable:
    return _table_of(_model(), curvature, rest)


def _table_of(model: nn.Module, curvature: ed.Curvature, rest: float = 0.0) -> LatencyTable:
    layers = find_layers(model).compressible
    dense = {
        name: PER_MAC * layer.cost(curvature[name].shape).macs for name, layer in layers.items()
    }
    return LatencyTable(
        conditions=HERE,
        whole=sum(dense.values()) + rest,
        layers={name: TimedLayer(milliseconds=ms, calls=(name,)) for name, ms in dense.items()},
        entries={name: _forms(curvature[name].shape) for name in layers},
    )


def _device(
    monkeypatch: pytest.MonkeyPatch, curvature: ed.Curvature, *, overhead: float, told: float
) -> list[int]:
    """A device whose time is that of the MACs and an overhead, of which a table tells a part.

    Returns:
        The batch size of each timing.
    """
    batches: list[int] = []

    def table(
        _model: nn.Module, _data: object, *, layers: dict[str, Layer], batch: int, **_rest: object
    ) -> LatencyTable:
        assert layers.keys() <= curvature.keys()
        return _table(curvature, told)

    def latency(
        models: list[nn.Module], _data: object, *, batch: int, rounds: int
    ) -> list[Latency]:
        assert rounds > 0
        batches.append(batch)
        macs = [ed.count(model, _batches()[0]).macs for model in models]
        return [Latency(PER_MAC * m + overhead, 0.0) for m in macs]

    monkeypatch.setattr(_prepare, "measure_latency_table", table)
    monkeypatch.setattr(_timed, "latency", latency)
    return batches


@pytest.mark.parametrize("goal", [0.8, 0.6])
@pytest.mark.parametrize(("overhead", "told"), [(0.0, 0.0), (30.0, 30.0), (8.0, 0.0)])
def test_a_latency_is_met_and_not_far_undercut(
    monkeypatch: pytest.MonkeyPatch,
    curvature: ed.Curvature,
    goal: float,
    overhead: float,
    told: float,
) -> None:
    """Also where the whole takes longer than a table of its layers tells."""
    batches = _device(monkeypatch, curvature, overhead=overhead, told=told)
    result = _compress(
        ed.Budget(latency=goal),
        curvature=curvature,
        multiple=1,
        actions=MEASURED,
        latency_batch=3,
    )
    before, after = (ed.count(m, _batches()[0]).macs for m in (_model(), result.model))
    found = (PER_MAC * after + overhead) / (PER_MAC * before + overhead)
    assert 0.93 * goal <= found <= goal
    assert result.report.latency == pytest.approx(found)
    assert result.plan.budget == ed.Budget(latency=goal)
    assert set(batches) == {3}


def _slow_again(
    monkeypatch: pytest.MonkeyPatch, is_slow: Callable[[int, nn.Module], bool]
) -> list[float]:
    """Makes some models take a fifth more wherever they are timed at length.

    Args:
        monkeypatch: of what `_device` has put in the place of `latency`.
        is_slow: says by how many timings at length there were before, and by the model.

    Returns:
        The fractions that these timings find.
    """
    steady, found = _timed.latency, []

    def timed(models: list[nn.Module], data: object, **options: int) -> list[Latency]:
        before, after = steady(models, data, **options)
        if options["rounds"] == _timed.ROUNDS:
            return [before, after]
        after = Latency((1.2 if is_slow(len(found), models[1]) else 1.0) * after.median, 0.0)
        found.append(after.median / before.median)
        return [before, after]

    monkeypatch.setattr(_timed, "latency", timed)
    return found


@pytest.mark.parametrize("slow_from", [0, 1])
def test_a_model_that_is_slower_when_timed_once_more_is_told(
    monkeypatch: pytest.MonkeyPatch, curvature: ed.Curvature, slow_from: int
) -> None:
    _device(monkeypatch, curvature, overhead=0.0, told=0.0)
    found = _slow_again(monkeypatch, lambda number, _model: number >= slow_from)
    budget = ed.Budget(latency=0.7)
    result = _compress(budget, curvature=curvature, multiple=1, actions=("low-rank",))
    assert len(found) == 2  # before the repair, and for the report
    assert result.report.latency == found[1] > 0.7
    note = f"timed once more, the model takes {result.report.latency:.3f} of the latency"
    assert any(text.startswith(note) for text in result.report.notes)


def test_a_plan_that_is_slower_when_timed_again_gives_way_to_others(
    monkeypatch: pytest.MonkeyPatch, curvature: ed.Curvature
) -> None:
    def macs(model: nn.Module) -> float:
        return ed.count(model, _batches()[0]).macs

    _device(monkeypatch, curvature, overhead=0.0, told=0.0)
    options = {"curvature": curvature, "multiple": 1, "actions": MEASURED}
    steady = macs(_compress(ed.Budget(latency=0.7), **options).model)
    found = _slow_again(monkeypatch, lambda _number, model: macs(model) == steady)
    result = _compress(ed.Budget(latency=0.7), **options)
    assert macs(result.model) != steady
    assert result.report.latency == found[-1] <= 0.7 < max(found)


def test_of_plans_that_are_all_slower_when_timed_again_the_fastest_is_kept(
    monkeypatch: pytest.MonkeyPatch, curvature: ed.Curvature
) -> None:
    _device(monkeypatch, curvature, overhead=0.0, told=0.0)
    found = _slow_again(monkeypatch, lambda number, _model: True)
    options = {"curvature": curvature, "multiple": 1, "actions": MEASURED}
    result = _compress(ed.Budget(latency=0.7), **options)
    *again, last = found
    assert len(again) > 1
    assert result.report.latency == last == min(again) > 0.7


def test_all_actions_may_be_taken_for_a_latency(
    monkeypatch: pytest.MonkeyPatch, curvature: ed.Curvature
) -> None:
    """Blocks of layers without a kernel among them."""
    _device(monkeypatch, curvature, overhead=0.0, told=0.0)
    result = _compress(ed.Budget(latency=0.7), curvature=curvature, multiple=1)
    assert 0.93 * 0.7 <= result.report.latency <= 0.7


def test_latency_and_size_hold_together(
    monkeypatch: pytest.MonkeyPatch, curvature: ed.Curvature
) -> None:
    _device(monkeypatch, curvature, overhead=0.0, told=0.0)
    budget = ed.Budget(latency=0.7, params=0.4)
    result = _compress(budget, curvature=curvature, multiple=1, actions=MEASURED)
    assert result.report.latency <= 0.7
    assert result.plan.left("params") <= 0.4
    assert result.plan.budget == budget


def test_a_latency_below_all_that_was_built_names_the_best(
    monkeypatch: pytest.MonkeyPatch, curvature: ed.Curvature
) -> None:
    """A device that takes its time whatever it runs."""
    _device(monkeypatch, curvature, overhead=1e3, told=0.0)
    with pytest.raises(ed.BudgetError, match=r"the fastest model that was built takes (\S+) of"):
        _compress(ed.Budget(latency=0.8), curvature=curvature, multiple=1, actions=MEASURED)


def test_what_no_plan_meets_by_the_table_is_built_and_measured(
    monkeypatch: pytest.MonkeyPatch, curvature: ed.Curvature
) -> None:
    """A table that tells of a rest which the device does not have."""
    whole = PER_MAC * ed.count(_model(), _batches()[0]).macs
    _device(monkeypatch, curvature, overhead=0.0, told=2 * whole)
    result = _compress(ed.Budget(latency=0.52), curvature=curvature, multiple=1, actions=MEASURED)
    before, after = (ed.count(m, _batches()[0]).macs for m in (_model(), result.model))
    assert 0.93 * 0.52 <= after / before <= 0.52
    assert result.plan.budget == ed.Budget(latency=0.52)


def test_what_no_plan_meets_by_the_table_is_built_beside_other_limits_too(
    monkeypatch: pytest.MonkeyPatch, curvature: ed.Curvature
) -> None:
    whole = PER_MAC * ed.count(_model(), _batches()[0]).macs
    _device(monkeypatch, curvature, overhead=0.0, told=2 * whole)
    budget = ed.Budget(latency=0.52, params=0.4)
    result = _compress(budget, curvature=curvature, multiple=1, actions=MEASURED)
    assert result.report.latency <= 0.52
    assert result.plan.left("params") <= 0.4
    assert result.plan.budget == budget


def test_a_latency_below_the_fastest_that_can_be_planned_names_what_that_takes(
    monkeypatch: pytest.MonkeyPatch, curvature: ed.Curvature
) -> None:
    timed = _device(monkeypatch, curvature, overhead=1e3, told=1e3)
    with pytest.raises(ed.BudgetError, match=r"the fastest model that was built takes 0\.98\d of"):
        _compress(ed.Budget(latency=0.5), curvature=curvature, multiple=1, actions=MEASURED)
    assert len(timed) == 5  # all actions by the table, and channels alone by it and by MACs


def test_channels_alone_are_built_where_calls_of_low_rank_layers_cost_too_much(
    monkeypatch: pytest.MonkeyPatch, curvature: ed.Curvature
) -> None:
    _device(monkeypatch, curvature, overhead=0.0, told=0.0)
    steady = _timed.latency

    def each_call_costs(models: list[nn.Module], data: object, **options: int) -> list[Latency]:
        factored = [
            sum(isinstance(m, FactoredConv2d | FactoredLinear) for m in model.modules())
            for model in models
        ]
        times = steady(models, data, **options)
        return [
            Latency(time.median * (1 + n), 0.0) for time, n in zip(times, factored, strict=True)
        ]

    monkeypatch.setattr(_timed, "latency", each_call_costs)
    result = _compress(ed.Budget(latency=0.6), curvature=curvature, multiple=1, actions=MEASURED)
    assert result.report.latency <= 0.6
    changed = [layer.action.kind for layer in result.plan.layers.values() if layer.changes]
    assert changed
    assert set(changed) == {"channels"}


def test_a_table_that_is_wrong_about_the_model_is_not_all_that_plans_are_made_by(
    monkeypatch: pytest.MonkeyPatch, curvature: ed.Curvature
) -> None:
    """Of the same time the model that diverges least is taken, here one of channels alone."""
    _device(monkeypatch, curvature, overhead=0.0, told=0.0)
    right = _table(curvature)

    def wrong(*_args: object, **_options: object) -> LatencyTable:
        """It has the last convolution for nearly all of the time."""
        name = list(right.layers)[2]
        grids = {form: grid.scaled(100.0) for form, grid in right.entries[name].items()}
        slow = TimedLayer(milliseconds=100 * right.layers[name].milliseconds, calls=(name,))
        return right.model_copy(
            update={
                "whole": right.whole + 99 * right.layers[name].milliseconds,
                "layers": {**right.layers, name: slow},
                "entries": {**right.entries, name: grids},
            }
        )

    monkeypatch.setattr(_prepare, "measure_latency_table", wrong)
    budget = ed.Budget(latency=0.5)
    options = {"curvature": curvature, "multiple": 1, "actions": MEASURED}
    result = _compress(budget, **options)
    assert result.report.latency <= 0.5
    every = _latency_search._ways
    monkeypatch.setattr(_latency_search, "_ways", lambda *given: list(every(*given))[:1])
    by_table = _compress(budget, **options)
    assert _divergence(result.model) < 0.8 * _divergence(by_table.model)


def test_of_plans_that_are_fast_enough_the_two_cheapest_are_built_and_the_less_harmed_is_taken(
    monkeypatch: pytest.MonkeyPatch, curvature: ed.Curvature
) -> None:
    """Also where that is not the cheaper of the two."""
    _device(monkeypatch, curvature, overhead=0.0, told=0.0)
    seen = []

    def reversed_order(original: nn.Module, model: nn.Module, settings: object) -> float | None:
        seen.append(model)
        return 1.0 / len(seen)

    built = []
    make = _latency_search.built

    def counted(*given: object) -> object:
        built.append(make(*given))
        return built[-1]

    monkeypatch.setattr(_latency_search, "divergence", reversed_order)
    monkeypatch.setattr(_latency_search, "built", counted)
    result = _compress(ed.Budget(latency=0.8), curvature=curvature, multiple=1, actions=MEASURED)
    cheaper, dearer = built
    assert cheaper.plan.price <= dearer.plan.price
    assert cheaper.plan.layers != dearer.plan.layers
    assert result.plan.layers == dearer.plan.layers


def test_plans_of_the_same_actions_are_alike_whatever_their_price(curvature: ed.Curvature) -> None:
    budgets = (ed.Budget(macs=0.5), ed.Budget(macs=0.3))
    one, other = (ed.make_plan(_model(), curvature, b, refine=0, progress=False) for b in budgets)
    priced = {k: v.model_copy(update={"calibrated": 1.0}) for k, v in one.layers.items()}
    assert priced != one.layers
    assert _latency_search._alike(one, one.model_copy(update={"layers": priced}))
    assert not _latency_search._alike(one, other)


@pytest.mark.parametrize(
    ("timings", "fraction"),
    [
        ([0.8], 0.8),  # far above
        ([0.69, 0.68], 0.69),
        ([0.72, 0.71], 0.72),
        ([0.72, 0.69, 0.68], 0.69),
        ([0.69, 0.72, 0.71], 0.71),
    ],
)
def test_two_timings_of_at_most_three_have_to_agree(
    monkeypatch: pytest.MonkeyPatch,
    curvature: ed.Curvature,
    timings: list[float],
    fraction: float,
) -> None:
    left = iter(timings)
    monkeypatch.setattr(_timed, "fraction_of", lambda *_: next(left))
    plan = ed.make_plan(_model(), curvature, ed.Budget(macs=0.5), refine=0, progress=False)
    settings = SimpleNamespace(clock=Clock(), progress=False)
    source = Source(_model(), curvature, None)
    assert _latency_search.judged(source, plan, settings, None, 0.7) == fraction
    assert not list(left)


def test_every_model_that_is_timed_has_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], curvature: ed.Curvature
) -> None:
    _device(monkeypatch, curvature, overhead=0.0, told=0.0)
    again, judged, tried = _slow_again(monkeypatch, lambda *_: False), _latency_search.judged, []

    def counted(*args: object) -> float:
        tried.append(judged(*args))
        return tried[-1]

    monkeypatch.setattr(_latency_search, "judged", counted)
    _compress(ed.Budget(latency=0.7), curvature=curvature, actions=MEASURED, progress=True)
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("timed a model of")]
    said = sorted(float(line.split(": ")[1].split(" ")[0]) for line in lines)
    assert said == sorted(round(fraction, 3) for fraction in (*tried, *again[:-1]))
    assert len(tried) > len(again) > 1
    _compress(ed.Budget(latency=0.7), curvature=curvature, actions=MEASURED, progress=False)
    assert capsys.readouterr().err == ""


def test_a_limit_beside_the_latency_is_not_planned_for_again_and_again(
    monkeypatch: pytest.MonkeyPatch, curvature: ed.Curvature
) -> None:
    timed = _device(monkeypatch, curvature, overhead=0.0, told=0.0)
    plan, asked = _latency_search.planned, []

    def counted(source: object, budget: ed.Budget, settings: object) -> object:
        asked.append(budget)
        return plan(source, budget, settings)

    monkeypatch.setattr(_latency_search, "planned", counted)
    budget = ed.Budget(latency=0.9, macs=0.3)
    result = _compress(budget, curvature=curvature, multiple=1, actions=MEASURED)
    assert 0.25 < result.plan.left("macs") <= 0.3
    assert len(asked) <= 6  # of three ways
    assert len(timed) <= 8
    asked.clear()
    with pytest.raises(ed.BudgetError, match="can be reached"):
        _compress(
            ed.Budget(latency=0.6, macs=0.001),
            curvature=curvature,
            multiple=1,
            actions=MEASURED,
        )
    assert len(asked) == 3


def test_a_sweep_goes_on_with_all_that_was_on_the_menu(
    monkeypatch: pytest.MonkeyPatch, curvature: ed.Curvature
) -> None:
    """After a latency that channels alone, in any number, meet best."""
    _device(monkeypatch, curvature, overhead=0.0, told=0.0)
    steady = _timed.latency

    def low_rank_is_slow(models: list[nn.Module], data: object, **options: int) -> list[Latency]:
        times = steady(models, data, **options)
        slow = [any(isinstance(m, FactoredConv2d) for m in model.modules()) for model in models]
        return [Latency(t.median * (1 + n), 0.0) for t, n in zip(times, slow, strict=True)]

    monkeypatch.setattr(_timed, "latency", low_rank_is_slow)
    options = {"curvature": curvature, "actions": MEASURED, "calibrate": False, "refine": 0}
    sizes = [ed.Budget(latency=0.7), ed.Budget(macs=0.5)]
    both = ed.sweep(_model(), _batches(), budgets=sizes, progress=False, **options)
    alone = ed.sweep(_model(), _batches(), budgets=sizes[1:], multiple=8, progress=False, **options)
    assert both.rows[0].latency is not None
    assert both.rows[0].latency <= 0.7
    assert both.rows[1].priced == alone.rows[0].priced


def test_narrow_groups_may_have_any_number_of_channels_unless_multiples_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, curvature: ed.Curvature
) -> None:
    _device(monkeypatch, curvature, overhead=0.0, told=0.0)
    left = {
        multiple: [
            len(layer.action.outputs)
            for layer in _compress(
                ed.Budget(latency=0.8),
                curvature=curvature,
                multiple=multiple,
                actions=("channels",),
            ).plan.layers.values()
            if isinstance(layer.action, Channels)
        ]
        for multiple in (None, 4)
    }
    assert any(number % 4 for number in left[None])
    assert left[4]
    assert not any(number % 4 for number in left[4][:-1])


def test_a_refusal_says_the_least_that_was_measured(
    monkeypatch: pytest.MonkeyPatch, curvature: ed.Curvature
) -> None:
    """Also where the table knows of nothing that stands in the way."""
    _device(monkeypatch, curvature, overhead=60.0, told=0.0)
    with pytest.raises(ed.BudgetError) as refused:
        _compress(ed.Budget(latency=0.6), curvature=curvature, multiple=1, actions=MEASURED)
    assert copy.copy(refused.value).least == refused.value.least
    whole = PER_MAC * ed.count(_model(), _batches()[0]).macs
    assert 60 / (whole + 60) < refused.value.least["latency"] < 1.15 * 60 / (whole + 60)


def test_a_size_below_all_that_can_be_planned_is_refused_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch, curvature: ed.Curvature
) -> None:
    timed = _device(monkeypatch, curvature, overhead=0.0, told=0.0)
    budget = ed.Budget(latency=0.7, params=0.001)
    with pytest.raises(ed.BudgetError, match=r"latency 0\.7 cannot be met: the least .* params"):
        _compress(budget, curvature=curvature, multiple=1, actions=MEASURED)
    assert timed == []


# Shots and rounds.


def _stubbed(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    monkeypatch.setattr(_search, "divergence", lambda *_args: values.pop(0))


def _left(model: nn.Module) -> float:
    whole, rest = (ed.count(m, _batches()[0]).macs for m in (_model(), model))
    return rest / whole


@pytest.mark.parametrize("steps", [{"shots": 2}, {"rounds": 2}])
def test_steps_meet_the_budget_of_the_whole_and_are_listed(
    monkeypatch: pytest.MonkeyPatch, curvature: ed.Curvature, steps: dict[str, int]
) -> None:
    _stubbed(monkeypatch, [0.1, 0.2])  # the step, and doing without the one before
    result = _compress(ed.Budget(macs=0.5), curvature=curvature, **steps)
    assert _left(result.model) <= 0.5
    (first,) = result.earlier
    assert first.left("macs") <= 0.5**0.5
    assert result.plan.macs[0] == first.macs[1]
    assert result.report.macs[1] / result.report.macs[0] == pytest.approx(_left(result.model))
    assert result.report.predicted == pytest.approx(first.price + result.plan.price)


def test_rounds_take_back_a_step_that_makes_it_worse(
    monkeypatch: pytest.MonkeyPatch, curvature: ed.Curvature
) -> None:
    _stubbed(monkeypatch, [0.2, 0.1])
    result = _compress(ed.Budget(macs=0.5), curvature=curvature, rounds=2)
    at_once = _compress(ed.Budget(macs=0.5), curvature=curvature)
    assert result.earlier == ()
    assert result.plan.layers == at_once.plan.layers
    assert _left(result.model) <= 0.5
    mine, its = result.model.state_dict(), at_once.model.state_dict()
    assert all(torch.equal(value, its[key]) for key, value in mine.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 0}, "shots is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"shots": 2, "rounds": 2}, "give shots or rounds, not both"),
        ({"shots": 2, "method": "kron-obs"}, "are for method='auto'"),
    ],
)
def test_steps_that_cannot_be_meant_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ed.EigenDamageError, match=message):
        _compress(ed.Budget(macs=0.5), **options)


def test_channels_that_a_factored_layer_makes_are_not_timed_as_those_of_a_dense_one() -> None:
    """A table has no times of stages with fewer outputs, so they are not cut for time."""
    dense = _model()
    first = ed.compress(
        dense,
        _batches(),
        budget=ed.Budget(macs=0.7),
        actions=("low-rank",),
        multiple=1,
        progress=False,
    )
    factored = {name for name, layer in first.plan.layers.items() if layer.changes}
    model = first.model
    curvature = ed.estimate_curvature(
        model, _batches(), also=("patches", "channels"), progress=False
    )
    table = _table_of(model, curvature)
    menus = ed.make_menus(model, curvature, progress=False)
    makers = {name for group in menus.groups.values() for name in group.per_unit}
    assert makers & factored
    with pytest.raises(ed.BudgetError, match="least that can be reached"):
        ed.make_plan(
            model,
            curvature,
            ed.Budget(latency=0.95),
            actions=("channels",),
            menus=menus,
            latency=table,
        )
