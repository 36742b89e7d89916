"""Channels that go and weights that are masked: what is written into the modules that stay."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import eigendamage as ed
from eigendamage.plan import Channels, LayerView, Mask, repaired
from eigendamage.plan.prices._quadratic import quadratic
from tests.networks import NETWORKS

ALL = ("patches", "gradients", "channels")
REPAIRS = ("none", "rows", "columns", "both", "rows one at a time", "c-obs")
DAMPING = 1e-2


def _plain() -> nn.Module:
    """Layers with and without bias, with a kernel, without one, and behind a flattening."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 7, (3, 2), stride=2, bias=False),
        nn.ReLU(),
        nn.Conv2d(7, 5, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(60, 8),
        nn.ReLU(),
        nn.Linear(8, 4),
    )


@functools.cache
def _known() -> tuple[nn.Module, Tensor, ed.Curvature]:
    model, x = _plain().double(), torch.randn(30, 3, 8, 8).double()
    curvature = ed.estimate_curvature(
        model, [x], also=ALL, patch_positions=None, fisher="exact", progress=False
    )
    return model, x, curvature


def _channel_plan(repair: str) -> ed.Plan:
    """A plan that removes the same channels whatever the repair."""
    model, _, curvature = _known()
    plan = ed.make_plan(model, curvature, ed.Budget(macs=0.5), method="magnitude")
    layers = {
        name: layer.model_copy(
            update={
                "action": layer.action.model_copy(update={"repair": repair, "damping": DAMPING})
            }
        )
        if isinstance(layer.action, Channels)
        else layer
        for name, layer in plan.layers.items()
    }
    return plan.model_copy(update={"layers": layers})


def _view(name: str) -> LayerView:
    model, _, curvature = _known()
    layer = ed.find_layers(model).compressible[name]
    return LayerView(name, layer.weight(), layer.bias(), curvature[name], DAMPING)


def _matrix(module: nn.Module) -> Tensor:
    """A module's weight as (o, iK), with its bias as the last column."""
    flat = module.weight.detach().flatten(1)
    return flat if module.bias is None else torch.cat([flat, module.bias.detach()[:, None]], 1)


@pytest.mark.parametrize("repair", REPAIRS)
def test_modules_hold_what_the_repair_computes(repair: str) -> None:
    model, x, curvature = _known()
    plan = _channel_plan(repair)
    small = ed.apply_plan(model, plan, curvature)
    assert len(plan.changed) == 5
    for name in plan.changed:
        action = plan.layers[name].action
        assert isinstance(action, Channels)
        view = _view(name)
        X = repaired(view, action.outputs, view.kept_columns(action.inputs), action.repair)
        module = small.get_submodule(name)
        torch.testing.assert_close(_matrix(module), X, rtol=0, atol=0)
        assert module.weight.shape[:2] == (len(action.outputs), len(action.inputs))
        assert module.weight.shape[2:] == model.get_submodule(name).weight.shape[2:]
        if repair == "none":
            kept = model.get_submodule(name).weight[list(action.outputs)][:, list(action.inputs)]
            assert torch.equal(module.weight, kept)
    assert small(x).shape == (30, 4)


@pytest.mark.parametrize("repair", ["rows", "columns", "both"])
def test_repairs_lower_the_quadratic_that_they_minimise(repair: str) -> None:
    model, _, curvature = _known()
    plan = _channel_plan(repair)
    small = ed.apply_plan(model, plan, curvature)
    better = 0
    for name in plan.changed:
        action, view = plan.layers[name].action, _view(name)
        rows, columns = list(action.outputs), view.kept_columns(action.inputs)
        if repair == "rows":
            columns = list(range(view.W.shape[1]))
        if repair == "columns":
            rows = list(range(view.W.shape[0]))
        at = torch.tensor(rows)[:, None], torch.tensor(columns)
        bare = torch.zeros_like(view.W)
        bare[at] = view.W[at]
        X = torch.zeros_like(view.W)
        X[at] = repaired(view, rows, columns, repair)
        cost, least = (quadratic(view.W, M, view.S, view.A) for M in (bare, X))
        assert least <= cost
        better += least < 0.99 * cost
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):  # a minimum: no step from it costs less
            step = torch.zeros_like(X)
            step[at] = torch.randn(X[at].shape, generator=generator, dtype=X.dtype)
            moved = quadratic(view.W, X + 1e-3 * X.norm() * step, view.S, view.A)
            assert moved >= least
        # What is in the module is that minimum's kept part.
        kept = (
            torch.tensor(list(action.outputs))[:, None],
            torch.tensor(view.kept_columns(action.inputs)),
        )
        torch.testing.assert_close(_matrix(small.get_submodule(name)), X[kept])
    assert better >= 2


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_channels_that_others_predict_cost_their_reader_nothing(kernel: int, bias: bool) -> None:
    torch.manual_seed(0)
    first, reader = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, kernel, bias=bias)
    model = nn.Sequential(first, reader, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    model = model.append(nn.Linear(20, 4)).double()
    with torch.no_grad():  # channels 1 and 4 are sums of the others, and of a constant with a bias
        mixing = torch.randn(2, 4).double()
        kept, gone = [0, 2, 3, 5], [1, 4]
        first.weight[gone] = torch.einsum("pq,qikl->pikl", mixing, first.weight[kept])
        first.bias[gone] = mixing @ first.bias[kept] + (0.7 if bias else 0.0)
    x = torch.randn(40, 3, 8, 8).double()
    curvature = ed.estimate_curvature(
        model, [x], also=ALL, patch_positions=None, fisher="exact", progress=False
    )
    assert curvature.channels is not None
    template = ed.make_plan(model, curvature, ed.Budget(ratio=0.2), method="magnitude")
    layers = dict(template.layers)
    for name, outputs, inputs in (("0", kept, range(3)), ("1", range(5), kept)):
        action = Channels(
            outputs=tuple(outputs), inputs=tuple(inputs), repair="columns", damping=1e-12
        )
        layers[name] = layers[name].model_copy(update={"action": action})
    layers["5"] = layers["5"].model_copy(update={"action": ed.Keep(reason="kept")})
    plan = template.model_copy(update={"layers": layers, "carriers": {}})
    small = ed.apply_plan(model, plan, curvature)
    assert small[1].in_channels == 4
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-7)
    bare = {
        n: y.model_copy(update={"action": y.action.model_copy(update={"repair": "none"})})
        if isinstance(y.action, Channels)
        else y
        for n, y in layers.items()
    }
    worse = ed.apply_plan(model, plan.model_copy(update={"layers": bare}), curvature)
    assert float((worse(x) - model(x)).detach().abs().max()) > 1e-3


def _masked(method: str) -> tuple[ed.Plan, nn.Module]:
    model, _, curvature = _known()
    plan = ed.make_plan(model, curvature, ed.Budget(ratio=0.5), method=method)
    return plan, ed.apply_plan(model, plan, curvature)


@pytest.mark.parametrize("method", ["obs", "obd"])
def test_masks_are_torchs_own_and_hold_the_zeros(method: str) -> None:
    model, x, curvature = _known()
    plan, small = _masked(method)
    assert prune.is_pruned(small)
    assert not prune.is_pruned(model)
    changed_bias = False
    for name in plan.changed:
        module, action = small.get_submodule(name), plan.layers[name].action
        assert isinstance(action, Mask)
        assert prune.is_pruned(module)
        keep = action.keep(plan.layers[name].shape).reshape(module.weight.shape)
        assert torch.equal(module.weight_mask.bool(), keep)
        assert not bool(module.weight[~keep].any())
        before = model.get_submodule(name)
        if method == "obd":
            assert torch.equal(module.weight[keep], before.weight[keep])
        elif before.bias is not None:
            changed_bias |= not torch.equal(module.bias, before.bias)
    assert changed_bias == (method == "obs")
    other = ed.apply_plan(model, plan, curvature)
    assert torch.equal(other(x), small(x))


@pytest.mark.parametrize("method", ["obs", "obd"])
def test_zeros_outlast_training_and_the_masks_removal(method: str) -> None:
    _, x, _ = _known()
    plan, small = _masked(method)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    before = {n: small.get_submodule(n).weight_orig.clone() for n in plan.changed}
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(small(x), torch.arange(len(x)) % 4).backward()
        optimizer.step()
    trained = small(x).detach()
    for name in plan.changed:
        module = small.get_submodule(name)
        keep = plan.layers[name].action.keep(plan.layers[name].shape).reshape(module.weight.shape)
        assert not bool(module.weight[~keep].any())
        assert not torch.equal(module.weight_orig, before[name])
        prune.remove(module, "weight")
        assert isinstance(module.weight, nn.Parameter)
        assert not bool(module.weight[~keep].any())
    assert not prune.is_pruned(small)
    torch.testing.assert_close(small(x), trained)
    assert small.state_dict().keys() == _known()[0].state_dict().keys()


def test_a_masked_models_state_goes_into_another() -> None:
    model, x, curvature = _known()
    plan, small = _masked("obs")
    other = _plain().double()
    fresh = ed.apply_plan(other, plan.model_copy(update={"layers": plan.layers}), curvature)
    fresh.load_state_dict(small.state_dict())
    torch.testing.assert_close(fresh(x), small(x))
    names = set(small.state_dict()) - set(model.state_dict())
    assert names == {f"{n}.weight_{what}" for n in plan.changed for what in ("orig", "mask")}


def test_a_masked_model_cannot_be_masked_again_and_the_error_says_where() -> None:
    _, _, curvature = _known()
    plan, small = _masked("obd")
    with pytest.raises(ed.MismatchError, match=f"'{plan.changed[0]}'"):
        ed.apply_plan(small, plan, curvature)


METHODS = ("kron-obs", "c-obs", "obs", "obd", "magnitude", "eigendamage", "eigendamage-dw")


@pytest.mark.parametrize("method", METHODS)
def test_the_input_model_is_left_as_it_is_to_the_bit(method: str) -> None:
    network = NETWORKS["resnet"]
    model, x = network.model().train(), network.inputs()
    model(x).sum().backward()
    curvature = ed.estimate_curvature(model, [x], also=ALL, progress=False)
    before = copy.deepcopy(model)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    budget = ed.Budget(ratio=0.4)
    plan = ed.make_plan(model, curvature, budget, method=method)
    small = ed.apply_plan(model, plan, curvature)
    ours = {id(t) for t in (*model.parameters(), *model.buffers())}
    assert not any(id(t) in ours for t in (*small.parameters(), *small.buffers()))
    storage = {t.data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}
    assert not any(t.data_ptr() in storage for t in (*small.parameters(), *small.buffers()))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(1)
    assert str(model) == str(before)
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in grads)
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, grads[name])


@pytest.mark.parametrize("method", METHODS)
def test_dtype_modes_and_memory_format_are_kept(method: str) -> None:
    network = NETWORKS["resnet"]
    model = network.model().float().to(memory_format=torch.channels_last)
    model.train()
    model.trunk[1].eval()
    model.trunk[1].conv1.weight.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    x = network.inputs().float()
    curvature = ed.estimate_curvature(model, [x], also=ALL, progress=False)
    assert not model.trunk[1].conv1.weight.requires_grad
    plan = ed.make_plan(model, curvature, ed.Budget(ratio=0.5), method=method)
    small = ed.apply_plan(model, plan, curvature)
    for tensor in (*small.parameters(), *small.buffers()):
        assert tensor.dtype in (torch.float32, torch.int64)
        assert tensor.device == x.device
    for name, module in model.named_modules():
        assert small.get_submodule(name).training == module.training, name
    frozen = small.get_submodule("trunk.1.conv1")
    for name, parameter in frozen.named_parameters():
        assert not parameter.requires_grad, name
    assert all(p.requires_grad for p in small.trunk[0].parameters())
    wanted = {n: p.requires_grad for n, p in small.get_submodule("head").named_parameters()}
    assert wanted.pop("bias") is False
    assert list(wanted.values()) == [True]
    for module in small.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            weight = module.weight
            assert weight.is_contiguous(memory_format=torch.channels_last)


def test_repair_needs_the_layers_patches_and_says_so() -> None:
    model, x, curvature = _known()
    bare = {
        name: replace(layer, patches=None, patch_mean=None) for name, layer in curvature.items()
    }
    with pytest.raises(ed.EigenDamageError, match=r"layer '0'.*also=\('patches',\)"):
        ed.apply_plan(model, _channel_plan("both"), replace(curvature, layers=bare))
    unrepaired = ed.apply_plan(model, _channel_plan("none"), replace(curvature, layers=bare))
    assert unrepaired(x).shape == (30, 4)
