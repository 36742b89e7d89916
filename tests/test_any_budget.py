"""Any network, method and budget: a model that meets the budget and trains, or a clear error."""

from __future__ import annotations

import math
import re
from collections import Counter

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import eigendamage as ed
from eigendamage.plan import METHODS, WeightMethod
from tests.random_networks import RandomNetwork, networks

EXAMPLES = 8
NETWORKS = 2


def _ways() -> list[tuple[str, str | None]]:
    """Every method, with every variant that it can be asked for."""
    ways: list[tuple[str, str | None]] = []
    for name, method in METHODS.items():
        variants = list(getattr(method, "variants", {})) or [None]
        ways += [(name, variant) for variant in variants]
    return ways


WAYS = _ways()


def _budget(method: str, unit: str, limit: float) -> ed.Budget:
    if isinstance(METHODS[method], WeightMethod):
        return ed.Budget(ratio=limit)
    return ed.Budget(**{unit: limit})


def _masked(model: nn.Module) -> tuple[int, int]:
    """Zeros and sizes of all masks."""
    masks = [b for name, b in model.named_buffers() if name.endswith("weight_mask")]
    return sum(int((m == 0).sum()) for m in masks), sum(m.numel() for m in masks)


def _refuse_more_than_is_asked(error: ed.BudgetError, budget: ed.Budget) -> None:
    """The error says what can be reached, and that is more than what was asked for."""
    reached = re.search(r"(?:smallest|least) that can be reached is (\d+\.\d+) of", str(error))
    assert reached is not None, str(error)
    (limit,) = budget.limits.values()
    assert float(reached[1]) >= limit - 1e-4


def _meets(model: nn.Module, small: nn.Module, plan: ed.Plan, x: Tensor) -> None:
    before, after = ed.count(model, x), ed.count(small, x)
    assert math.isclose(before.macs, plan.macs[0])
    assert before.parameters == plan.parameters[0]
    assert math.isclose(after.macs, plan.macs[1])
    assert after.parameters == plan.parameters[1]
    limits = plan.budget.limits
    if "macs" in limits:
        assert after.macs <= limits["macs"] * before.macs * (1 + 1e-12)
    elif "params" in limits:
        assert after.parameters <= limits["params"] * before.parameters
    else:
        zeros, size = _masked(small)
        assert 0 < zeros < size  # weights that are equally cheap go together, so more than asked


def _trains(small: nn.Module, x: Tensor, expected: torch.Size) -> None:
    output = small(x)
    assert output.shape == expected
    assert bool(torch.isfinite(output).all())
    small.train()
    optimizer = torch.optim.SGD(small.parameters(), lr=1e-3)
    F.cross_entropy(small(x), torch.arange(len(x)) % output.shape[1]).backward()
    gradients = [p.grad for p in small.parameters() if p.grad is not None]
    assert gradients
    assert all(bool(torch.isfinite(g).all()) for g in gradients)
    optimizer.step()
    assert bool(torch.isfinite(small.eval()(x)).all())


def test_any_budget_is_met_or_refused() -> None:
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=NETWORKS,
        phases=(Phase.generate,),  # shrinking takes minutes; what failed prints as what rebuilds it
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        network=networks(),
        asked=st.lists(
            st.tuples(st.sampled_from(("macs", "params")), st.floats(0.2, 0.9)),
            min_size=len(WAYS),
            max_size=len(WAYS),
        ),
    )
    def holds(network: RandomNetwork, asked: list[tuple[str, float]]) -> None:
        model, x = network.model(), network.inputs(EXAMPLES)
        expected = model(x).shape
        curvature = ed.estimate_curvature(
            model, [x], also=("patches", "gradients", "channels"), progress=False
        )
        for (method, variant), (unit, limit) in zip(WAYS, asked, strict=True):
            budget = _budget(method, unit, limit)
            note(f"{method} {variant} {budget}")
            try:
                plan = ed.make_plan(model, curvature, budget, method=method, variant=variant)
            except ed.BudgetError as error:
                outcomes["refused"] += 1
                _refuse_more_than_is_asked(error, budget)
                continue
            except ed.NothingToCompressError as error:
                outcomes["nothing"] += 1
                assert str(error)
                continue
            outcomes["met"] += 1
            small = ed.apply_plan(model, plan, curvature)
            _meets(model, small, plan, x)
            _trains(small, x, expected)

    holds()
    total = sum(outcomes.values())
    assert total >= NETWORKS * len(WAYS)
    assert outcomes["met"] > 0.7 * total, outcomes
