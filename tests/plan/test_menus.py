"""Plans by method auto: the least price on the menu, within every budget, as surgery makes them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import eigendamage as ed
from eigendamage.plan import (
    ACTIONS,
    METHODS,
    AutoMethod,
    Channels,
    EigenBlock,
    Keep,
    LowRank,
    Menus,
    WeightMethod,
)
from eigendamage.plan._methods import BlockMethod, ChannelMethod
from tests.cases import CASES
from tests.networks import NETWORKS

FRACTIONS = tuple(tenths / 10 for tenths in range(2, 10))
NAMES = ("vgg, flattened", "residual")
EXAMPLES = 20
# Without these no two groups share a layer: auto and kron-obs may take the same ones.
APART = {"vgg, flattened": ("4",), "residual": ("shortcut",)}


class Priced:
    """A network with its curvature and menus, made once."""

    def __init__(self, name: str, ignore: tuple[str, ...] = ()) -> None:
        torch.set_num_threads(1)
        case = CASES.get(name)
        self.model = (case or NETWORKS[name]).model()
        generator = torch.Generator().manual_seed(2)
        size = (7, 6) if case else (8, 8)
        self.x = torch.randn(EXAMPLES, 3, *size, generator=generator, dtype=torch.float64)
        also = ("patches", "gradients", "channels")
        self.curvature = ed.estimate_curvature(
            self.model, [self.x], also=also, ignore=ignore, progress=False
        )
        self.menus = ed.make_menus(self.model, self.curvature, progress=False)
        self.known: dict[ed.Budget, ed.Plan] = {}

    def best(self, budget: ed.Budget) -> ed.Plan:
        """By method auto with all actions, made once."""
        if budget not in self.known:
            self.known[budget] = self.plan(budget)
        return self.known[budget]

    def plan(
        self,
        budget: ed.Budget,
        *,
        actions: tuple[str, ...] = ACTIONS,
        floors: dict[str, float] | None = None,
        menus: Menus | None = None,
    ) -> ed.Plan:
        """By method auto."""
        return ed.make_plan(
            self.model,
            self.curvature,
            budget,
            actions=actions,
            floors=floors,
            menus=menus or self.menus,
        )

    def built(self, plan: ed.Plan) -> nn.Module:
        return ed.apply_plan(self.model, plan, self.curvature)


_priced = functools.cache(Priced)


@pytest.fixture(
    scope="session", params=[pytest.param(NAMES[0], marks=pytest.mark.slow), *NAMES[1:]]
)
def priced(request: pytest.FixtureRequest) -> Priced:
    """Each network in turn; the groups of the first are a chain, those of the others overlap."""
    return _priced(request.param)


@pytest.fixture(scope="session")
def chain() -> Priced:
    return _priced("vgg, flattened")


@pytest.fixture(scope="session", params=APART)
def apart(request: pytest.FixtureRequest) -> Priced:
    return _priced(request.param, APART[request.param])


def _sizes(model: nn.Module, x: Tensor) -> dict[str, float]:
    """MACs, parameters and bytes as torch counts them."""
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        model(x)
    return {
        "macs": flops.get_total_flops() / 2,
        "params": sum(p.numel() for p in model.parameters()),
        "bytes": sum(p.nbytes for p in model.parameters()),
    }


def _left(before: nn.Module, after: nn.Module, x: Tensor) -> dict[str, float]:
    whole, rest = _sizes(before, x), _sizes(after, x)
    return {unit: rest[unit] / whole[unit] for unit in whole}


def _single_methods(kind: tuple[type, ...]) -> Iterator[tuple[str, str | None]]:
    """Methods of a kind, with all their variants, but for auto and those that only mask."""
    for name, method in METHODS.items():
        if isinstance(method, kind):
            for variant in getattr(method, "variants", {None: None}):
                yield name, variant if len(getattr(method, "variants", ())) > 1 else None


def _cheaper_than_auto(priced: Priced, unit: str, kinds: tuple[type, ...]) -> tuple[int, list[str]]:
    """How many plans of other methods were held against auto's, and those of a lower price."""
    compared, cheaper = 0, []
    for method, variant in _single_methods(kinds):
        for fraction in FRACTIONS:
            budget = ed.Budget(**{unit: fraction})
            try:
                other = ed.make_plan(
                    priced.model, priced.curvature, budget, method=method, variant=variant
                )
            except (ed.BudgetError, ed.NothingToCompressError):
                continue
            if other.price is None:
                break  # its measure is not a rise of the loss, at any budget
            compared += 1
            mine = priced.best(budget).price
            if mine > other.price * (1 + 1e-9):
                cheaper.append(f"{budget}: {method} {variant} {other.price:.4g}, auto {mine:.4g}")
    return compared, cheaper


# The price is the least.


def test_no_single_action_is_cheaper_and_every_budget_holds(priced: Priced) -> None:
    met = 0
    for fraction in FRACTIONS:
        budget = ed.Budget(macs=fraction)
        alone: list[ed.Plan] = []
        for action in ACTIONS:
            try:
                alone.append(priced.plan(budget, actions=(action,)))
            except ed.BudgetError:
                continue
        if not alone:
            continue
        met += 1
        plan = priced.best(budget)
        assert plan.price <= min(other.price for other in alone) * (1 + 1e-9)
        for one in (plan, *alone):
            assert _left(priced.model, priced.built(one), priced.x)["macs"] <= fraction
    assert met >= 7


def test_no_method_of_the_eigenbasis_is_cheaper(priced: Priced) -> None:
    compared, cheaper = _cheaper_than_auto(priced, "macs", (BlockMethod,))
    assert compared >= 10
    assert cheaper == []


def test_no_method_of_channels_is_cheaper_where_groups_share_no_layer(apart: Priced) -> None:
    assert apart.menus.groups.keys() == apart.menus.graph.groups.keys()
    compared, cheaper = _cheaper_than_auto(apart, "params", (ChannelMethod,))
    assert compared >= 10
    assert cheaper == []


def test_no_method_of_channels_is_cheaper_where_groups_share_layers(priced: Priced) -> None:
    assert priced.menus.groups.keys() < priced.menus.graph.groups.keys()
    compared, cheaper = _cheaper_than_auto(priced, "macs", (ChannelMethod,))
    assert compared >= 10
    assert cheaper == []


def test_every_method_is_held_against_auto_or_has_no_size_to_be_held() -> None:
    kinds = (BlockMethod, ChannelMethod)
    held = {name for name, _ in _single_methods(kinds)}
    rest = {name for name, m in METHODS.items() if isinstance(m, AutoMethod | WeightMethod)}
    assert held | rest == set(METHODS)


def test_a_harder_budget_is_never_cheaper(priced: Priced) -> None:
    prices = [priced.best(ed.Budget(macs=fraction)).price for fraction in FRACTIONS]
    assert all(harder >= milder for harder, milder in pairwise(prices))
    assert prices[0] > prices[-1] > 0


# Budgets.


def test_several_budgets_all_hold_and_cost_more_than_each_alone(priced: Priced) -> None:
    limits = {"macs": 0.6, "params": 0.5, "bytes": 0.55}
    together = priced.plan(ed.Budget(**limits))
    left = _left(priced.model, priced.built(together), priced.x)
    assert all(left[unit] <= limit for unit, limit in limits.items())
    for unit, limit in limits.items():
        alone = priced.plan(ed.Budget(**{unit: limit}))
        assert together.price >= alone.price * (1 - 1e-9)


class _MixedTypes(nn.Module):
    """A float32 trunk, and Linear layers in float64 of which one has no bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.wide = nn.Linear(8, 16, bias=False).double()
        self.head = nn.Linear(16, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3))
        return self.head(torch.relu(self.wide(x.double())))


@pytest.fixture(scope="session")
def mixed() -> tuple[nn.Module, Tensor, ed.Curvature, Menus]:
    torch.set_num_threads(1)
    model = _MixedTypes().eval()
    x = torch.randn(EXAMPLES, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    curvature = ed.estimate_curvature(model, [x], also=("patches", "channels"), progress=False)
    return model, x, curvature, ed.make_menus(model, curvature, progress=False)


@pytest.mark.parametrize("fraction", [0.4, 0.6, 0.8])
@pytest.mark.parametrize("actions", [ACTIONS, ("channels",), ("low-rank",)])
def test_bytes_are_counted_by_data_type(
    mixed: tuple[nn.Module, Tensor, ed.Curvature, Menus],
    fraction: float,
    actions: tuple[str, ...],
) -> None:
    model, x, curvature, menus = mixed
    found: dict[str, ed.Plan] = {}
    for unit in ("bytes", "params"):
        budget = ed.Budget(**{unit: fraction})
        plan = ed.make_plan(model, curvature, budget, menus=menus, actions=actions)
        sizes = _sizes(ed.apply_plan(model, plan, curvature), x)
        assert plan.bytes == (_sizes(model, x)["bytes"], sizes["bytes"])
        assert plan.left(unit) <= fraction
        assert sizes[unit] <= fraction * _sizes(model, x)[unit]
        found[unit] = plan
    assert found["bytes"].left("bytes") != found["bytes"].left("params")


def test_a_budget_of_bytes_is_not_one_of_parameters(
    mixed: tuple[nn.Module, Tensor, ed.Curvature, Menus],
) -> None:
    model, _, curvature, menus = mixed
    plans = [
        ed.make_plan(model, curvature, budget, menus=menus)
        for budget in (ed.Budget(bytes=0.6), ed.Budget(params=0.6))
    ]
    assert plans[0].layers != plans[1].layers


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (ed.Budget(macs=0.001), "the least that can be reached is"),
        (ed.Budget(macs=0.5, params=0.001), "each alone"),
        (ed.Budget(latency=0.5), "needs a table of measured latencies"),
        (ed.Budget(loss=0.1), "says no size"),
        (ed.Budget(ratio=0.5), "says no size"),
    ],
)
def test_what_cannot_be_met_or_allocated_is_refused(
    chain: Priced, budget: ed.Budget, message: str
) -> None:
    with pytest.raises(ed.BudgetError, match=message):
        chain.plan(budget)


def test_the_least_that_is_named_can_be_reached(chain: Priced) -> None:
    with pytest.raises(ed.BudgetError) as refused:
        chain.plan(ed.Budget(macs=0.001))
    least = float(str(refused.value).split("reached is ")[1].split(" of")[0])
    assert chain.plan(ed.Budget(macs=least + 1e-4)).left("macs") == pytest.approx(least, abs=1e-4)
    with pytest.raises(ed.BudgetError):
        chain.plan(ed.Budget(macs=least - 1e-4))


def test_inputs_that_hardly_vary_are_priced() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
    inputs = 1 + 1e-4 * torch.randn(64, 6)  # their variance is less than the rounding of A
    curvature = ed.estimate_curvature(model, [inputs], also=("patches",), progress=False)
    prices = ed.make_menus(model, curvature, progress=False).layers["0"].options.prices
    assert (prices >= 0).all()
    assert prices.max() > 0


class Doubled(nn.Linear):
    """A layer that does something else with its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_budget_that_cannot_be_met_names_what_cannot_be_cut() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        Doubled(6, 12), nn.ReLU(), Doubled(12, 8), nn.Linear(8, 6), nn.Linear(6, 3)
    )
    curvature = ed.estimate_curvature(model, [torch.randn(8, 6)], also=("patches",), progress=False)
    why = r"'0' and 1 more cannot be cut: Doubled overrides the forward of Linear\. Where you can"
    with pytest.raises(ed.BudgetError, match=why):
        ed.make_plan(model, curvature, ed.Budget(macs=0.3))


# What else may be said.


def test_floors_hold_for_factored_layers_and_for_channels(priced: Priced) -> None:
    names = list(priced.menus.layers)
    free = priced.plan(ed.Budget(macs=0.4))
    most = min(names, key=lambda n: free.layers[n].macs[1] / free.layers[n].macs[0])
    assert free.layers[most].macs[1] < 0.5 * free.layers[most].macs[0]
    for actions in (ACTIONS, ("channels",)):
        plan = priced.plan(ed.Budget(macs=0.8), actions=actions, floors={"*": 0.3, most: 0.6})
        assert plan.changed
        for name in names:
            before, after = plan.layers[name].macs
            assert after >= (0.6 if name == most else 0.3) * before


def test_a_floor_for_no_layer_is_refused(chain: Priced) -> None:
    with pytest.raises(ed.EigenDamageError, match=r"floors: the pattern 'x\*' matches no layer"):
        chain.plan(ed.Budget(macs=0.7), floors={"x*": 0.5})


@pytest.mark.parametrize("actions", [ACTIONS, ("channels",)])
def test_layers_that_a_pattern_names_stay_bit_for_bit(
    priced: Priced, actions: tuple[str, ...]
) -> None:
    ignored = list(priced.menus.layers)[1]
    menus = ed.make_menus(priced.model, priced.curvature, ignore=ignored, progress=False)
    plan = priced.plan(ed.Budget(params=0.9), actions=actions, menus=menus)
    assert plan.changed
    assert isinstance(plan.layers[ignored].action, Keep)
    before, after = (m.get_submodule(ignored) for m in (priced.model, priced.built(plan)))
    assert type(before) is type(after)
    assert all(
        torch.equal(value, after.state_dict()[key]) for key, value in before.state_dict().items()
    )


def test_a_layer_that_the_menus_ignore_stays_in_the_middle_of_a_chain() -> None:
    """Groups before it still meet in a layer; those that hold it are nobody's."""
    torch.manual_seed(0)
    widths = (3, 8, 10, 12, 12)
    convolutions = [
        module
        for inputs, outputs in pairwise(widths)
        for module in (nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU())
    ]
    rest = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    model = nn.Sequential(*convolutions, *rest).double()
    x = torch.randn(EXAMPLES, 3, 8, 8, dtype=torch.float64)
    curvature = ed.estimate_curvature(model, [x], also=("patches", "channels"), progress=False)
    menus = ed.make_menus(model, curvature, ignore="6", progress=False)
    for fraction in (0.6, 0.8):
        plan = ed.make_plan(
            model, curvature, ed.Budget(params=fraction), menus=menus, actions=("channels",)
        )
        assert plan.changed
        assert isinstance(plan.layers["6"].action, Keep)


def test_the_classifier_keeps_its_outputs_and_is_never_factored(priced: Priced) -> None:
    (head,) = priced.curvature.classifier
    for fraction in FRACTIONS:
        plan = priced.best(ed.Budget(macs=max(fraction, 0.3)))
        action = plan.layers[head].action
        assert isinstance(action, Keep | Channels)
        if isinstance(action, Channels):
            assert len(action.outputs) == plan.layers[head].shape[0]


@pytest.mark.parametrize("actions", [(a,) for a in ACTIONS] + [("low-rank", "channels")])
def test_only_actions_that_are_allowed_are_taken(priced: Priced, actions: tuple[str, ...]) -> None:
    kinds = {"low-rank": LowRank, "blocks": EigenBlock, "channels": Channels}
    allowed = tuple(kinds[action] for action in actions)
    plan = priced.plan(ed.Budget(params=0.7), actions=actions)
    taken = [plan.layers[name].action for name in plan.changed]
    assert taken
    assert all(isinstance(action, allowed) for action in taken)
    own = ed.make_menus(priced.model, priced.curvature, actions=actions, progress=False)
    assert priced.plan(ed.Budget(params=0.7), menus=own).price == pytest.approx(plan.price)


@pytest.mark.parametrize("fraction", [0.35, 0.6, 0.8])
def test_ranks_and_channels_are_multiples_or_whole(fraction: float) -> None:
    torch.manual_seed(0)
    wide = (12, 16)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 5),
    ).double()
    x = torch.randn(EXAMPLES, 3, 8, 8, dtype=torch.float64)
    curvature = ed.estimate_curvature(model, [x], also=("patches", "channels"), progress=False)
    menus = ed.make_menus(model, curvature, multiple=4, progress=False)
    plan = ed.make_plan(model, curvature, ed.Budget(macs=fraction), menus=menus)
    sides: list[int] = []
    for name in plan.changed:
        action, (outputs, inputs, _) = plan.layers[name].action, plan.layers[name].shape
        match action:
            case LowRank():
                basis = action.directions(inputs)
                sides += [action.rank, inputs if basis is None else basis.shape[1]]
            case EigenBlock():
                sides += [len(action.rows), len(action.columns)]
            case Channels():
                sides += [n for n in (len(action.outputs), len(action.inputs)) if n != outputs]
    assert any(side not in wide for side in sides)
    assert all(side % 4 == 0 or side in (3, 5) for side in sides), sides
    any_rank = ed.make_plan(model, curvature, ed.Budget(macs=fraction))
    assert plan.price >= any_rank.price * (1 - 1e-9)


def test_unknown_options_are_refused(chain: Priced) -> None:
    with pytest.raises(ed.EigenDamageError, match="no action is given"):
        ed.make_menus(chain.model, chain.curvature, actions=(), progress=False)
    with pytest.raises(ed.EigenDamageError, match="multiple is 0"):
        ed.make_menus(chain.model, chain.curvature, multiple=0, progress=False)
    with pytest.raises(ed.NothingToCompressError, match="every compressible layer is kept"):
        ed.make_menus(chain.model, chain.curvature, ignore="*", progress=False)
    with pytest.raises(ed.MismatchError, match="another curvature"):
        ed.make_plan(
            chain.model,
            copy.copy(chain.curvature),
            ed.Budget(macs=0.5),
            menus=chain.menus,
        )


# Without channels.


def test_channels_that_were_not_traced_are_not_on_the_menu_and_a_note_says_so() -> None:
    model, (x, _) = CASES["residual"].model(), CASES["residual"].data(EXAMPLES)
    curvature = ed.estimate_curvature(model, [x], also=("patches",), progress=False)
    plan = ed.make_plan(model, curvature, ed.Budget(macs=0.6))
    assert plan.notes[0].startswith("channels are not on the menu: which of them go together")
    assert plan.changed
    assert not any(isinstance(layer.action, Channels) for layer in plan.layers.values())


def test_a_network_without_groups_is_planned_without_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Flatten(), nn.Softmax(-1), nn.Linear(12, 4)).double()
    x = torch.randn(EXAMPLES, 8, dtype=torch.float64)
    curvature = ed.estimate_curvature(model, [x], also=("patches", "channels"), progress=False)
    menus = ed.make_menus(model, curvature, progress=False)
    assert menus.groups == {}
    assert menus.notes[0].startswith("channels are not on the menu: ")
    plan = ed.make_plan(model, curvature, ed.Budget(params=0.8), menus=menus)
    assert plan.notes == menus.notes
    assert isinstance(plan.layers["0"].action, LowRank | EigenBlock)


# What a plan makes.


def test_the_same_inputs_give_the_same_plan_whatever_was_planned_before(priced: Priced) -> None:
    budget = ed.Budget(macs=0.55)
    fresh = ed.make_menus(priced.model, priced.curvature, progress=False)
    assert priced.plan(budget, menus=fresh) == priced.plan(budget) == priced.plan(budget)


@pytest.fixture(scope="session")
def one_group() -> Priced:
    """A chain of which the middle stays: its first layer has no channels to lose, the last has."""
    return _priced("vgg, flattened", APART["vgg, flattened"])


def _both_kinds(priced: Priced) -> ed.Plan:
    """A plan with channels and with low rank."""
    plan = priced.plan(ed.Budget(macs=0.7, params=0.6), actions=("low-rank", "channels"))
    assert {LowRank, Channels} <= {type(layer.action) for layer in plan.layers.values()}
    return plan


def test_a_plan_of_channels_and_low_rank_survives_the_disk(
    one_group: Priced, tmp_path: Path
) -> None:
    plan = _both_kinds(one_group)
    plan.save(tmp_path / "plan.json")
    again = ed.Plan.load(tmp_path / "plan.json")
    assert again == plan
    one, other = one_group.built(plan).state_dict(), one_group.built(again).state_dict()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_what_is_built_is_what_was_counted_and_the_model_is_as_it_was(one_group: Priced) -> None:
    plan = _both_kinds(one_group)
    model = copy.deepcopy(one_group.model)
    next(model.children()).train()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    small = ed.apply_plan(model, plan, one_group.curvature)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    mine, theirs = ({p.data_ptr() for p in m.parameters()} for m in (model, small))
    assert not mine & theirs
    counted = ed.count(small.eval(), one_group.x)
    assert (counted.macs, counted.parameters) == (plan.macs[1], plan.parameters[1])
    sizes = _sizes(small, one_group.x)
    assert counted.macs * len(one_group.x) == sizes["macs"]
    assert plan.bytes[1] == sizes["bytes"]


def test_a_network_that_is_sure_of_everything_loses_no_more_than_it_has_to() -> None:
    """Its Fisher is zero, and every change free; what alters the outputs least is taken."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[-1].weight.mul_(1e9)
    x = torch.randn(16, 3, 8, 8)
    also = ("patches", "channels")
    curvature = ed.estimate_curvature(model, [x], also=also, progress=False)
    assert not any(layer.S.any() for layer in curvature.values())
    menus = ed.make_menus(model, curvature, progress=False)
    for fraction in (0.9, 0.7, 0.5):
        plan = ed.make_plan(model, curvature, ed.Budget(macs=fraction), menus=menus)
        assert fraction - 0.2 < plan.left("macs") <= fraction
        assert plan.price < 1e-9
        assert "do not depend on 3 of 3 layers ('0', '2', '6')" in plan.notes[0]
