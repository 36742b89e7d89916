"""Every method: what it plans is what is built, and what it cannot do it says."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import eigendamage as ed
from eigendamage.plan import (
    METHODS,
    CarrierPlan,
    Channels,
    DepthwiseBlock,
    LayerView,
    Mask,
    WeightMethod,
    needs,
    variant_of,
)
from eigendamage.plan.prices import kron_obd
from eigendamage.plan.prices._quadratic import quadratic
from tests.networks import NETWORKS
from tests.random_networks import Block, RandomNetwork

ALL = ("patches", "gradients", "channels")
MASKS = tuple(name for name, method in METHODS.items() if isinstance(method, WeightMethod))
WITHOUT = (("auto", "channels"),)  # it does without them, and says so
NO_RISE = ("c-obs", "taylor", "slimming", "magnitude", "random")
WAYS = tuple(
    (name, variant)
    for name, method in METHODS.items()
    for variant in list(getattr(method, "variants", {})) or [None]
)


def _takes(method: str, unit: str) -> bool:
    """Whether a method has budgets of this unit."""
    if method in MASKS:
        return unit == "ratio"
    return method != "auto" or unit != "ratio"


@functools.cache
def _known(name: str) -> tuple[nn.Module, Tensor, ed.Curvature]:
    """A network of the table with all that a method can need; nothing here changes it."""
    network = NETWORKS[name]
    model, x = network.model(), network.inputs()
    curvature = ed.estimate_curvature(model, [x], also=ALL, fisher="exact", progress=False)
    return model, x, curvature


@functools.cache
def _wide() -> tuple[nn.Module, Tensor, ed.Curvature]:
    """A network that is wide enough for every kind of method."""
    blocks = (Block("projected sum", 20, 2), Block("depthwise", 24, 1), Block("sum", 16, 1))
    network = RandomNetwork(stem=16, blocks=blocks, head="flattened", bias=True, seed=0)
    model, x = network.model().double(), network.inputs(8).double()
    curvature = ed.estimate_curvature(model, [x], also=ALL, fisher="exact", progress=False)
    return model, x, curvature


def _budget(method: str) -> ed.Budget:
    return ed.Budget(ratio=0.4) if method in MASKS else ed.Budget(macs=0.6)


def _plan(method: str, variant: str | None = None, **options: object) -> ed.Plan:
    if not options:
        return _usual_plan(method, variant)
    model, _, curvature = _wide()
    options = {"budget": _budget(method), **options}
    return ed.make_plan(model, curvature, method=method, variant=variant, **options)


@functools.cache
def _usual_plan(method: str, variant: str | None) -> ed.Plan:
    return _plan(method, variant, budget=_budget(method))


def _costly(method: str, unit: str) -> list[pytest.MarkDecorator]:
    """The slow methods are counted by one unit; by the others it takes as long again."""
    again = method in ("auto", "eigendamage-dw") and unit != "macs"
    return [pytest.mark.slow] if again else []


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    ours, its = one.state_dict(), other.state_dict()
    return ours.keys() == its.keys() and all(torch.equal(v, its[k]) for k, v in ours.items())


@pytest.mark.parametrize(
    ("method", "variant", "unit"),
    [
        pytest.param(*way, unit, marks=_costly(way[0], unit))
        for way in WAYS
        for unit in ("macs", "params", "ratio")
        if _takes(way[0], unit)
    ],
)
def test_the_plan_says_what_the_applied_model_costs(
    method: str, variant: str | None, unit: str
) -> None:
    model, x, curvature = _wide()
    for limit in (0.75, 0.4):
        budget = ed.Budget(**{unit: limit})
        plan = ed.make_plan(model, curvature, budget, method=method, variant=variant)
        small = ed.apply_plan(model, plan, curvature)
        before, after = ed.count(model, x), ed.count(small, x)
        assert plan.macs == pytest.approx((before.macs, after.macs), rel=1e-12)
        assert plan.parameters == (before.parameters, after.parameters)
        if unit == "macs":
            assert after.macs <= limit * before.macs
        elif unit == "params":
            assert after.parameters <= limit * before.parameters
        for name, layer in plan.layers.items():
            cost = after.layers.get(name)
            if cost is not None:  # masked layers are no longer counted one by one
                assert layer.macs[1] == pytest.approx(cost.macs), name
                assert layer.parameters[1] == cost.parameters, name
        assert small(x).shape == model(x).shape


@pytest.mark.parametrize("network", list(NETWORKS))
@pytest.mark.parametrize("method", ["kron-obs", "c-obd", "random"])
def test_channels_of_every_kind_of_network_are_counted_right(method: str, network: str) -> None:
    model, x, curvature = _known(network)
    for budget in (ed.Budget(macs=0.6), ed.Budget(params=0.5), ed.Budget(ratio=0.3)):
        plan = ed.make_plan(model, curvature, budget, method=method)
        small = ed.apply_plan(model, plan, curvature)
        after = ed.count(small, x)
        assert plan.macs[1] == pytest.approx(after.macs, rel=1e-12)
        assert plan.parameters[1] == after.parameters
        assert bool(torch.isfinite(small(x)).all())
        for name, carrier in plan.carriers.items():
            module = small.get_submodule(name)
            states = [p for p in (*module.parameters(), *module.buffers()) if p.ndim > 0]
            assert {len(p) for p in states} == {len(carrier.kept)}


@pytest.mark.parametrize("method", MASKS)
def test_masks_keep_the_size_and_say_so(method: str) -> None:
    model, x, curvature = _wide()
    for budget in (ed.Budget(macs=0.5), ed.Budget(params=0.5)):
        with pytest.raises(ed.BudgetError, match=r"neither smaller nor faster.*Budget\(ratio"):
            ed.make_plan(model, curvature, budget, method=method)
    plan = _plan(method)
    assert plan.macs[0] == plan.macs[1] == ed.count(model, x).macs
    assert plan.parameters[0] == plan.parameters[1]
    assert any("neither smaller nor faster" in note for note in plan.notes)
    assert all(layer.macs[0] == layer.macs[1] for layer in plan.layers.values())


@pytest.mark.parametrize("method", MASKS)
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_a_ratio_masks_that_share_of_the_weights(method: str, ratio: float) -> None:
    torch.manual_seed(0)
    # Saturating nothing: no weight is worth exactly zero, so there are no ties.
    model = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5))
    model.double()
    x = torch.randn(40, 9).double()
    curvature = ed.estimate_curvature(
        model, [x], also=("patches", "gradients"), fisher="exact", progress=False
    )
    plan = ed.make_plan(model, curvature, ed.Budget(ratio=ratio), method=method, max_ratio=0.999)
    gone = sum(
        int((~layer.action.keep(layer.shape)).sum())
        for layer in plan.layers.values()
        if isinstance(layer.action, Mask)
    )
    size = sum(m.weight.numel() for m in model if isinstance(m, nn.Linear))
    assert gone == int(ratio * size) + 1  # the unit that the threshold is taken from goes too


@pytest.mark.parametrize("method", list(METHODS))
def test_what_a_method_needs_is_all_that_it_needs(method: str) -> None:
    model, x, _ = _wide()
    wanted = needs(method)
    enough = ed.estimate_curvature(model, [x], also=wanted, progress=False)
    assert ed.make_plan(model, enough, _budget(method), method=method).changed
    for left_out in wanted:
        if (method, left_out) in WITHOUT:
            continue
        less = ed.estimate_curvature(
            model, [x], also=[w for w in wanted if w != left_out], progress=False
        )
        with pytest.raises(ed.EigenDamageError, match=f"'{method}' needs {left_out}") as error:
            ed.make_plan(model, less, _budget(method), method=method)
        assert f"also={wanted!r}" in str(error.value)


def test_auto_without_channels_allocates_the_layers_and_says_so() -> None:
    model, x, _ = _wide()
    curvature = ed.estimate_curvature(model, [x], also=("patches",), progress=False)
    plan = ed.make_plan(model, curvature, _budget("auto"), method="auto")
    assert plan.changed
    assert not plan.carriers
    assert any("channels are not on the menu" in note for note in plan.notes)


def test_auto_takes_sizes_alone() -> None:
    for budget in (ed.Budget(ratio=0.5), ed.Budget(loss=0.1)):
        with pytest.raises(ed.BudgetError, match=f"a budget of {budget} says no size"):
            _plan("auto", budget=budget)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "auto"])
def test_latency_and_loss_are_for_what_allocates(method: str) -> None:
    for budget in (ed.Budget(latency=0.5), ed.Budget(loss=0.1), ed.Budget(macs=0.5, latency=0.5)):
        with pytest.raises(ed.BudgetError, match=f"is for method='auto', not for '{method}'"):
            _plan(method, budget=budget)


@pytest.mark.parametrize(
    "method", ["auto", "eigendamage", "eigendamage-dw", "kron-obs", "magnitude"]
)
def test_several_sizes_hold_together(method: str) -> None:
    asked = {"macs": 0.6, "params": 0.35, "bytes": 0.5}
    plan = _plan(method, budget=ed.Budget(**asked))
    assert all(plan.left(unit) <= limit * (1 + 1e-12) for unit, limit in asked.items())
    small = ed.apply_plan(_wide()[0], plan, _wide()[2])
    size = sum(p.numel() * p.element_size() for p in small.parameters())
    assert plan.bytes is not None
    assert plan.bytes[1] == size
    # One of them is what binds: without it more would be left.
    loose = _plan(method, budget=ed.Budget(macs=0.6))
    assert loose.left("params") > 0.35
    assert plan.price is None or loose.price <= plan.price * (1 + 1e-9)


def test_unknown_methods_and_variants_name_the_known() -> None:
    model, _, curvature = _wide()
    for ask in (
        needs,
        lambda m: variant_of(m, None),
        lambda m: _plan(m, budget=ed.Budget(macs=0.5)),
    ):
        with pytest.raises(ed.EigenDamageError, match="'magic' is unknown") as error:
            ask("magic")
        assert all(name in str(error.value) for name in METHODS)
    with pytest.raises(ed.EigenDamageError, match=r"'kron-obd' has no variant 'joint'.*official"):
        _plan("kron-obd", "joint")
    with pytest.raises(ed.EigenDamageError, match="it has no variants"):
        ed.make_plan(model, curvature, ed.Budget(macs=0.5), method="eigendamage", variant="joint")


def test_variants_differ_and_the_default_is_the_first() -> None:
    for method in ("kron-obs", "kron-obd"):
        variants = list(METHODS[method].variants)
        plans = [_plan(method, variant) for variant in variants]
        assert [p.variant for p in plans] == variants
        assert _plan(method) == plans[0]
        assert len({p.model_dump_json(exclude={"variant"}) for p in plans}) == len(plans)
    assert _plan("magnitude").variant is None


@pytest.mark.parametrize("method", list(METHODS))
def test_only_a_rise_of_the_loss_is_called_a_price(method: str) -> None:
    plan = _plan(method)
    if method in NO_RISE:
        assert plan.price is None
        assert all(layer.price is None for layer in plan.layers.values())
    else:
        assert plan.price is not None
        assert plan.price > 0
        kept = [layer.price for layer in plan.layers.values() if not layer.changes]
        assert all(price == 0 for price in kept)


def test_random_is_a_matter_of_its_seed() -> None:
    first, again, other = (_plan("random", seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.carriers != other.carriers
    before = torch.get_rng_state()
    _plan("random", seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_slimming_without_batch_norm_has_nothing_to_go_by() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 4)
    )
    x = torch.randn(4, 3, 8, 8)
    curvature = ed.estimate_curvature(model, [x], also=("channels",), progress=False)
    with pytest.raises(ed.NothingToCompressError, match=r"channels of 0.*nothing that this method"):
        ed.make_plan(model, curvature, ed.Budget(macs=0.5), method="slimming")
    assert ed.make_plan(model, curvature, ed.Budget(macs=0.5), method="magnitude").changed


def test_slimming_leaves_groups_without_batch_norm_and_says_so() -> None:
    model, _, curvature = _known("mobilenet")
    plan = ed.make_plan(model, curvature, ed.Budget(macs=0.8), method="slimming")
    for block in (1, 2):
        reason = plan.left_alone[f"channels of trunk.{block}.excite.reduce"]
        assert "nothing that this method prices" in reason


@pytest.mark.parametrize(
    ("pattern", "group"),
    [
        ("trunk.1.conv1", "trunk.1.conv1"),  # producer
        ("trunk.1.bn1", "trunk.1.conv1"),  # carrier
        ("trunk.1.conv2", "trunk.1.conv1"),  # reader
        ("trunk.2.shortcut.0", "trunk.2.conv2"),  # second producer
        ("trunk.1.bn2", "trunk.0.0"),  # carrier of a sum
        ("head", "trunk.2.conv2"),
    ],
)
@pytest.mark.parametrize("method", ["kron-obs", "slimming", "magnitude"])
def test_a_pattern_keeps_every_group_that_the_module_is_in(
    method: str, pattern: str, group: str
) -> None:
    model, _, curvature = _known("resnet")
    plan = ed.make_plan(model, curvature, ed.Budget(ratio=0.5), method=method, ignore=[pattern])
    assert f"'{pattern}' is left alone on request" in plan.left_alone[f"channels of {group}"]
    assert plan.changed
    assert pattern not in plan.changed
    assert pattern not in plan.carriers
    producers, carriers, _ = NETWORKS["resnet"].groups[group]
    assert not carriers & set(plan.carriers)
    for name in producers & set(plan.layers):
        action = plan.layers[name].action
        if isinstance(action, Channels):  # it may lose inputs, which are of another group
            assert action.outputs == tuple(range(plan.layers[name].shape[0]))


@pytest.mark.parametrize("method", ["obs", "eigendamage"])
def test_a_pattern_keeps_a_layer(method: str) -> None:
    plan = _plan(method, ignore="stem.*")
    assert not plan.layers["stem.0"].changes
    assert "on request" in plan.layers["stem.0"].action.reason
    with pytest.raises(ed.EigenDamageError, match="'zzz' matches no layer"):
        _plan(method, ignore="zzz")


def test_ignoring_everything_leaves_nothing() -> None:
    for method in ("eigendamage", "kron-obd", "obd"):
        with pytest.raises(ed.NothingToCompressError, match="on request"):
            _plan(method, ignore="*")


@pytest.mark.parametrize(("method", "variant"), WAYS)
def test_a_plan_from_disk_builds_the_same_model(
    method: str, variant: str | None, tmp_path: Path
) -> None:
    model, _, curvature = _wide()
    plan = _plan(method, variant)
    plan.save(tmp_path / "plan.json")
    ed.save_curvature(curvature, tmp_path / "c.safetensors")
    loaded = ed.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    built = ed.apply_plan(model, plan, curvature)
    assert _same_weights(built, ed.apply_plan(model, loaded, curvature))
    later = ed.apply_plan(model, loaded, ed.load_curvature(tmp_path / "c.safetensors"))
    torch.testing.assert_close(later.state_dict(), built.state_dict(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["kron-obs", "obd", "eigendamage-dw", "eigendamage"])
def test_plans_that_were_tampered_with_are_refused(method: str, tmp_path: Path) -> None:
    model, _, curvature = _wide()
    plan = _plan(method)
    plan.save(tmp_path / "plan.json")
    name = plan.changed[0]
    changes: dict[str, list[object]] = {
        "outputs": [[], [0, 0], [0, 999], [-1]],
        "inputs": [[], [0, 0], [0, 999], [-1]],
        "rows": [[], [0, 0], [999], [-1]],
        "columns": [[], [1, 1], [999]],
        "kept": ["", "!", "AAAA", "eJxjAAAAAQAB"],
        "rank": [0, -1],
        "damping": [-1.0, "many"],
        "repair": ["magic"],
        "kind": ["magic"],
        "form": ["magic"],
        "extra": [1],
    }
    raw = json.loads((tmp_path / "plan.json").read_text())
    action = raw["layers"][name]["action"]
    tried = 0
    for key, values in changes.items():
        for value in values if key in action or key == "extra" else []:
            broken = json.loads(json.dumps(raw))
            broken["layers"][name]["action"][key] = value
            (tmp_path / "plan.json").write_text(json.dumps(broken))
            with pytest.raises((ed.FileFormatError, ed.MismatchError)):
                ed.apply_plan(model, ed.Plan.load(tmp_path / "plan.json"), curvature)
            tried += 1
    assert tried > 4


def test_masks_of_another_size_or_endless_ones_are_refused() -> None:
    keep = torch.rand(4, 3, 9) > 0.5
    mask = Mask.of(keep, "none", 0.0)
    assert torch.equal(mask.keep((4, 3, 9)), keep)
    for shape in ((4, 3, 8), (5, 3, 9), (400, 3, 9)):
        with pytest.raises(ed.MismatchError, match="is not of"):
            mask.keep(shape)
    bomb = Mask.of(torch.ones(1000, 1000, 8, dtype=torch.bool), "none", 0.0)
    assert len(bomb.kept) < 10_000
    with pytest.raises(ed.MismatchError, match="is not of 8 weights"):
        bomb.keep((2, 2, 2))


def test_a_plan_of_another_model_is_refused() -> None:
    model, _, curvature = _known("resnet")
    plan = ed.make_plan(model, curvature, ed.Budget(ratio=0.4), method="magnitude")
    name = next(iter(plan.carriers))
    carrier = plan.carriers[name]
    for wrong, words in (
        (CarrierPlan(kept=carrier.kept, channels=99), "the plan is for 99"),
        (CarrierPlan(kept=(0, 99), channels=carrier.channels), "distinct indices below"),
        (CarrierPlan(kept=(), channels=carrier.channels), "distinct indices below"),
        (CarrierPlan(kept=(1, 1), channels=carrier.channels), "distinct indices below"),
    ):
        other = plan.model_copy(update={"carriers": {**plan.carriers, name: wrong}})
        with pytest.raises(ed.MismatchError, match=words) as error:
            ed.apply_plan(model, other, curvature)
        assert f"'{name}'" in str(error.value)
    for path in ("trunk.9", "trunk", "trunk.1"):
        other = plan.model_copy(update={"carriers": {path: carrier}})
        with pytest.raises(ed.MismatchError, match=f"'{path}'"):
            ed.apply_plan(model, other, curvature)
    foreign, _, known = _known("preresnet")
    with pytest.raises(ed.MismatchError):
        ed.apply_plan(foreign, plan, known)
    with pytest.raises(ed.MismatchError):
        ed.apply_plan(ed.apply_plan(model, plan, curvature), plan, curvature)


def test_depthwise_blocks_are_planned_where_there_is_a_kernel() -> None:
    plan = _plan("eigendamage-dw", budget=ed.Budget(macs=0.3))
    kinds = {name: type(layer.action) for name, layer in plan.layers.items() if layer.changes}
    assert DepthwiseBlock in kinds.values()
    for name, kind in kinds.items():
        assert kind is (DepthwiseBlock if plan.layers[name].shape[2] > 1 else ed.EigenBlock)


class Ghost(nn.Module):
    """Half of the features made of the other half by a depthwise layer, all scaled by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.primary = nn.Conv2d(3, 12, 1)
        self.cheap = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.reduce, self.expand = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.reader, self.head = nn.Conv2d(24, 10, 1), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.primary(x))
        both = torch.cat([first, torch.relu(self.cheap(first))], 1)
        scale = torch.sigmoid(self.expand(torch.relu(self.reduce(both.mean((2, 3), keepdim=True)))))
        return self.head(torch.relu(self.reader(both * scale)).mean((2, 3)))


@pytest.mark.parametrize("method", ["kron-obs", "magnitude"])
def test_what_carries_blocks_of_outputs_is_counted_once(method: str) -> None:
    torch.manual_seed(0)
    # In a module of its own, as where networks are built of blocks.
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), Ghost()).eval()
    data = list(torch.randn(24, 3, 6, 6).split(8))
    result = ed.compress(
        model, data, budget=ed.Budget(macs=0.6), method=method, recalibrate=False, progress=False
    )
    (group,) = [g for g in result.curvature.channels.groups.values() if g.has_blocks]
    assert [member.module for member in group.carriers] == ["2.cheap"]
    assert result.plan.macs[1] == ed.count(result.model, data).macs <= 0.6 * result.plan.macs[0]


def test_channels_of_the_zoos_residual_networks_can_be_removed() -> None:
    torch.manual_seed(0)
    model, x = ed.zoo.resnet20(width=8).double().eval(), torch.randn(4, 3, 8, 8).double()
    curvature = ed.estimate_curvature(model, [x], also=("channels",), progress=False)
    plan = ed.make_plan(model, curvature, ed.Budget(macs=0.7), method="magnitude")
    small = ed.apply_plan(model, plan, curvature)
    assert ed.count(small, x).macs == pytest.approx(plan.macs[1])
    # The blocks' inner channels, at the least, hang together with nothing else.
    assert all(f"layer{k}.{b}.conv1" in plan.changed for k in (1, 2) for b in (0, 1, 2))


def test_what_the_official_code_computes_may_be_negative_and_is_no_rise() -> None:
    """Σ(w²A) is below zero where inputs of opposite sign weigh most: a linear bottleneck, say."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 12, bias=False), nn.Linear(12, 4)).double()
    with torch.no_grad():
        model[0].weight[:, 0] *= 10
    x = torch.randn(64, 1, dtype=torch.float64) @ torch.tensor([[1.0, -3.0]], dtype=torch.float64)
    curvature = ed.estimate_curvature(model, [x], also=("patches", "channels"), progress=False)
    for method in ("kron-obd", "kron-obs"):
        for limit in (0.3, 0.6, 0.9):
            plan = ed.make_plan(
                model, curvature, ed.Budget(params=limit), method=method, variant="official"
            )
            assert plan.price is None
            assert plan.parameters[1] <= limit * plan.parameters[0]
    views = _official_prices(model, curvature)
    assert min(float(v.min()) for v in views) < 0, "or this shows nothing"


def _official_prices(model: nn.Module, curvature: ed.Curvature) -> list[Tensor]:
    found = []
    for name, layer in ed.find_layers(model).compressible.items():
        view = LayerView(name, layer.weight(), layer.bias(), curvature[name], 1e-3)
        found.append(kron_obd.official_row_prices(view.W, view.S, view.A))
    return found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "random", "form": "three"}, "is for eigendamage"),
        ({"method": "eigendamage", "rank_by": "price"}, "methods that remove channels"),
        ({"method": "random", "rank_by": "price_per_cost"}, "rank_by='price_per_cost' needs"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, str], said: str) -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    curvature = ed.estimate_curvature(
        model, [torch.randn(8, 6)], also=("channels",), progress=False
    )
    with pytest.raises(ed.EigenDamageError, match=said):
        ed.make_plan(model, curvature, ed.Budget(params=0.8), **options)


def test_readers_that_are_factored_are_priced_as_they_are_left() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    x = torch.randn(200, 8)
    first = ed.compress(
        model,
        [x],
        budget=ed.Budget(params=0.6),
        method="eigendamage",
        ignore="0",
        recalibrate=False,
        progress=False,
    )
    assert "2" in first.plan.changed
    curvature = ed.estimate_curvature(
        first.model, [x], also=("patches", "channels"), progress=False
    )
    plan = ed.make_plan(
        first.model, curvature, ed.Budget(params=0.8), method="kron-obs", damping=1e-6
    )
    action = plan.layers["2"].action
    assert len(action.inputs) < 16
    assert action.repair == "none"
    layer = ed.find_layers(first.model).compressible["2"]
    view = LayerView("2", layer.weight(), layer.bias(), curvature["2"], 1e-6)
    X = view.W.clone()
    gone = [c for c in range(16) if c not in action.inputs]
    X[:, gone] = 0
    assert plan.layers["2"].price == pytest.approx(quadratic(view.W, X, view.S, view.A), rel=1e-6)
    assert plan.layers["0"].price == 0


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"slimming"}))
def test_a_curvature_that_is_zero_everywhere_ranks_nothing(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 3))
    with torch.no_grad():
        model[-1].weight.mul_(1e9)  # sure of everything
    x = torch.randn(16, 6)
    curvature = ed.estimate_curvature(model, [x], also=ALL, progress=False)
    assert not any(layer.S.any() for layer in curvature.values())
    if method in ("auto", "magnitude", "random"):
        plan = ed.make_plan(model, curvature, ed.Budget(macs=0.9), method=method)
        assert plan.changed
    else:
        with pytest.raises(ed.DataError, match=r"all 3 layers is exactly zero.*choose at random"):
            ed.make_plan(model, curvature, _budget(method), method=method)
