"""The quadratic against J Δθ by torch.func, one layer's divergence against a model rebuilt."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import eigendamage as ed
from eigendamage.batch import as_batch
from eigendamage.curvature import head_of
from eigendamage.curvature._head import PredictiveHead
from eigendamage.errors import DataError, LossError, MismatchError, NonFiniteError, ShapeError
from eigendamage.layers import evaluating, find_layers
from eigendamage.measure import Change, divergences_alone, joint_quadratic, planned_changes
from eigendamage.measure import _alone as alone
from eigendamage.surgery._factor import factored_module
from tests.cases import CASES, Case
from tests.networks import NETWORKS

LOSSES = ("cross_entropy", "mse", "bce")


def _changes(model: nn.Module, size: float = 0.1, seed: int = 1) -> dict[str, Change]:
    """Random steps of every layer; where a layer has no bias, some get one."""
    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, Change] = {}
    for index, (name, layer) in enumerate(find_layers(model).compressible.items()):
        W, b = layer.weight(), layer.bias()
        W = W + size * torch.randn(W.shape, generator=generator, dtype=W.dtype)
        step = size * torch.randn(layer.outputs, generator=generator, dtype=W.dtype)
        new = (step if b is None else b + step) if index % 2 == 0 else None
        changes[name] = Change(W, new)
    return changes


def _with_biases(model: nn.Module) -> nn.Module:
    """A copy in which every layer has a bias, zero where it had none."""
    model = copy.deepcopy(model)
    for layer in find_layers(model).compressible.values():
        if layer.bias() is None:
            layer.module.bias = nn.Parameter(layer.weight().new_zeros(layer.outputs))
    return model


def _changed(model: nn.Module, changes: dict[str, Change]) -> nn.Module:
    """The model with the changes written into its weights."""
    model = _with_biases(model)
    with torch.no_grad():
        for name, change in changes.items():
            module = model.get_submodule(name)
            module.weight.copy_(change.weight.reshape(module.weight.shape))
            if change.bias is not None:
                module.bias.copy_(change.bias)
    return model


def _reference(
    model: nn.Module, changes: dict[str, Change], x: Tensor, loss: str = "cross_entropy"
) -> float:
    """½ δzᵀ H δz with δz by torch.func and H by differentiating the divergence twice."""
    model = _with_biases(model)
    old = {n: p.detach() for n, p in model.named_parameters()}
    new = {n: p.detach() for n, p in _changed(model, changes).named_parameters()}
    steps = {n: new[n] - old[n] for n in old}
    z, dz = jvp(lambda p: functional_call(model, p, (x,)), (old,), (steps,))
    total = 0.0
    for z_n, v in zip(z, dz, strict=True):
        H = torch.func.hessian(lambda q, z_n=z_n: _divergence(z_n, q, loss))(z_n)
        total += float(0.5 * v.flatten() @ H.reshape(v.numel(), v.numel()) @ v.flatten())
    return total / len(x)


def _divergence(p: Tensor, q: Tensor, loss: str) -> Tensor:
    """Of one example, in torch's own words."""
    if loss == "cross_entropy":
        return F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True)
    if loss == "mse":
        return F.mse_loss(q, p)
    return F.binary_cross_entropy_with_logits(q, p.sigmoid())


def test_quadratic_is_that_of_the_jacobian(case: Case) -> None:
    model, (x, _) = case.model(), case.data(5)
    changes = _changes(model)
    found = joint_quadratic(model, changes, [x[:3], x[3:]], progress=False)
    assert found == pytest.approx(_reference(model, changes, x), rel=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["tokens", "residual"])
def test_quadratic_of_each_loss(name: str, loss: str) -> None:
    model, (x, _) = CASES[name].model(), CASES[name].data(4)
    changes = _changes(model)
    found = joint_quadratic(model, changes, [x], loss=loss, progress=False)
    assert found == pytest.approx(_reference(model, changes, x, loss), rel=1e-9)


@pytest.mark.parametrize("name", ["fc", "tokens", "residual", "mixed", "shared"])
def test_quadratic_is_the_divergence_of_a_small_change(name: str) -> None:
    """The ratio goes to 1 linearly in the size of the step."""
    model, (x, _) = CASES[name].model(), CASES[name].data(6)
    errors: list[float] = []
    for size in (1e-3, 1e-4):
        changes = _changes(model, size)
        predicted = joint_quadratic(model, changes, [x], progress=False)
        measured = ed.evaluate(
            _changed(model, changes), [x], reference=model, progress=False
        ).divergence
        assert predicted is not None
        assert measured is not None
        errors.append(abs(measured / predicted - 1))
    assert errors[0] < 0.1
    assert errors[1] < 0.2 * errors[0] + 1e-5


class _Attention(nn.Module):
    """Patches, a transformer block by nn.MultiheadAttention, one by sdpa, pads, cats and pools."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.qkv = nn.Linear(8, 24)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Dropout(0.5), nn.Linear(12, 8))
        self.norms = nn.Sequential(nn.GroupNorm(2, 8), nn.BatchNorm2d(8), nn.SiLU(inplace=True))
        self.conv = nn.Conv2d(16, 6, 3, bias=False)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        n, c, h, w = x.shape
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        q, k, v = self.qkv(tokens).reshape(n, h * w, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + self.mlp(tokens + read)
        again = self.norms(tokens.transpose(1, 2).reshape(n, c, h, w).contiguous())
        x = F.relu_(self.conv(F.pad(torch.cat([x, again], 1), (1, 1, 1, 1))))
        x = F.max_pool2d(x, 2, 1)
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


def test_quadratic_through_attention_norms_and_pools() -> None:
    torch.manual_seed(0)
    model = _Attention().double().train()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    changes = _changes(model)
    assert {"qkv", "mlp.0", "conv", "head"} <= set(changes)
    found = joint_quadratic(model, changes, [x], progress=False)
    assert model.training
    with evaluating(model), sdpa_kernel(SDPBackend.MATH):
        assert found == pytest.approx(_reference(model, changes, x), rel=1e-9)


def test_labels_only_mask() -> None:
    case = CASES["tokens"]
    model, (x, y) = case.model(), case.data(6)
    changes = _changes(model)
    labelled = joint_quadratic(model, changes, [(x, y)], progress=False)
    assert labelled == joint_quadratic(model, changes, [x], progress=False)
    y[:, 2:] = -100
    masked = joint_quadratic(model, changes, [(x, y)], progress=False)
    # Earlier tokens do not read later ones, so cutting them off is the same as not counting them.
    assert masked == pytest.approx(joint_quadratic(model, changes, [x[:, :2]], progress=False))
    [alone_masked] = divergences_alone(model, {"all": [changes]}, [(x, y)], progress=False)["all"]
    [alone_cut] = divergences_alone(model, {"all": [changes]}, [x[:, :2]], progress=False)["all"]
    assert alone_masked == pytest.approx(alone_cut)


def _factored(model: nn.Module) -> nn.Module:
    """A copy of which every layer but the head is factored at full rank."""
    model = copy.deepcopy(model)
    for name, layer in list(find_layers(model).compressible.items()):
        if name == "head":
            continue
        W = layer.weight()
        stages = [torch.eye(layer.inputs).double(), W, torch.eye(layer.outputs).double()]
        if layer.geometry is None or layer.geometry.is_pointwise:
            stages = [W[:, :, 0], torch.eye(layer.outputs).double()]
        new = factored_module(layer, stages)
        for path in layer.names:
            setattr(model, path, new)
    return model


@pytest.mark.parametrize("name", ["residual", "mixed", "shared"])
def test_factored_layers_are_layers(name: str) -> None:
    model, (x, _) = CASES[name].model(), CASES[name].data(5)
    factored, changes = _factored(model), _changes(model)
    assert isinstance(factored.get_submodule(next(iter(changes))), nn.Sequential)
    expected = joint_quadratic(model, changes, [x], progress=False)
    assert joint_quadratic(factored, changes, [x], progress=False) == pytest.approx(expected)
    several = {n: [{n: change}] for n, change in changes.items()}
    found = divergences_alone(factored, several, [x], progress=False)
    measured = divergences_alone(model, several, [x], progress=False)
    assert {n: f[0] for n, f in found.items()} == pytest.approx(
        {n: f[0] for n, f in measured.items()}
    )


def test_each_change_alone_is_measured_as_in_a_model_rebuilt(case: Case) -> None:
    model, (x, _) = case.model(), case.data(5)
    small, large = _changes(model), _changes(model, 0.3, seed=2)
    last = next(reversed(small))
    variants = {name: [{name: small[name]}, {name: large[name]}] for name in small}
    variants["first and last"] = [{last: large[last], next(iter(small)): small[next(iter(small))]}]
    variants["none"] = [{}]
    found = divergences_alone(model, variants, [x[:3], x[3:]], progress=False)
    assert list(found) == list(variants)
    for name, several in variants.items():
        for measured, changes in zip(found[name], several, strict=True):
            expected = ed.evaluate(
                _changed(model, changes), [x], reference=model, progress=False
            ).divergence
            assert measured == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert found["none"] == [0.0]


@pytest.mark.parametrize("room", [0, 3000, 10_000])
def test_less_room_for_outputs_changes_nothing(room: int) -> None:
    case = CASES["residual"]
    model, (x, _) = case.model(), case.data(5)
    variants = {name: [{name: change}] for name, change in _changes(model).items()}
    expected = divergences_alone(model, variants, [x], progress=False)
    with mock.patch.object(alone, "_MOST_BYTES", room):
        assert divergences_alone(model, variants, [x], progress=False) == expected


def test_activations_in_place_do_not_reach_kept_outputs() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.3, inplace=True), nn.Flatten(), nn.Linear(144, 3)]
    model, x = nn.Sequential(*layers).double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    change = {"3": _changes(model)["3"]}
    expected = ed.evaluate(_changed(model, change), [x], reference=model, progress=False).divergence
    found = divergences_alone(model, {"3": [change, change]}, [x], progress=False)
    assert found["3"] == pytest.approx([expected, expected])


def test_layers_before_the_change_are_not_computed_again() -> None:
    case = CASES["residual"]
    model, (x, _) = case.model(), case.data(4)
    runs: list[str] = []
    convolution = F.conv2d

    def counting(*args: object, **kwargs: object) -> Tensor:
        runs.append("conv")
        return convolution(*args, **kwargs)

    change = {"conv2": _changes(model)["conv2"]}
    with (
        mock.patch.object(F, "conv2d", counting),
        mock.patch.object(type(model.stem), "_conv_forward", _unfused),
    ):
        divergences_alone(model, {"conv2": [change, change]}, [x], progress=False)
    assert len(runs) == 4 + 2 * 2  # stem, conv1, conv2, shortcut; then conv2 and shortcut twice


def _unfused(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)


@pytest.mark.parametrize("loss", LOSSES)
def test_alone_and_quadratic_agree_on_small_changes(loss: str) -> None:
    model, (x, _) = CASES["mixed"].model(), CASES["mixed"].data(6)
    for name, change in _changes(model, 1e-5).items():
        predicted = joint_quadratic(model, {name: change}, [x], loss=loss, progress=False)
        [measured] = divergences_alone(
            model, {name: [{name: change}]}, [x], loss=loss, progress=False
        )[name]
        assert measured == pytest.approx(predicted, rel=1e-2)


@pytest.mark.parametrize("name", ["resnet", "vgg, flattened", "densenet"])
def test_removed_channels_are_changes_of_their_readers(name: str) -> None:
    """The changes written into the original give the function of the model that lost channels."""
    model, x = NETWORKS[name].model(), NETWORKS[name].inputs()
    curvature = ed.estimate_curvature(model, [x], also=("channels",), progress=False)
    plan = ed.make_plan(model, curvature, ed.Budget(macs=0.7), method="magnitude")
    smaller = ed.apply_plan(model, plan, curvature)
    changes = planned_changes(model, smaller, plan)
    assert changes
    torch.testing.assert_close(_changed(model, changes)(x), smaller(x))


@pytest.mark.parametrize("method", ["eigendamage", "obd"])
def test_changes_of_blocks_and_masks_make_the_planned_model(method: str) -> None:
    case = CASES["mixed"]
    model, (x, _) = case.model(), case.data(12)
    also = ("gradients",) if method == "obd" else ()
    curvature = ed.estimate_curvature(model, [x], also=also, progress=False)
    budget = ed.Budget(ratio=0.4) if method == "obd" else ed.Budget(macs=0.7)
    plan = ed.make_plan(model, curvature, budget, method=method)
    smaller = ed.apply_plan(model, plan, curvature)
    changes = planned_changes(model, smaller, plan)
    assert set(changes) == set(plan.changed)
    torch.testing.assert_close(_changed(model, changes)(x), smaller(x))


def _planned() -> tuple[nn.Module, nn.Module, ed.Plan]:
    case = CASES["residual"]
    model, (x, _) = case.model(), case.data(8)
    curvature = ed.estimate_curvature(model, [x], progress=False)
    plan = ed.make_plan(model, curvature, ed.Budget(macs=0.8), method="eigendamage")
    return model, ed.apply_plan(model, plan, curvature), plan


def test_repairs_of_kept_layers_are_changes() -> None:
    model, smaller, plan = _planned()
    assert "head" not in plan.changed
    assert "head" not in planned_changes(model, smaller, plan)
    with torch.no_grad():
        smaller.head.bias += 1
    change = planned_changes(model, smaller, plan)["head"]
    torch.testing.assert_close(change.bias, smaller.head.bias.detach())
    torch.testing.assert_close(change.weight[:, :, 0], model.head.weight.detach())
    smaller.head = nn.Linear(8, 5, bias=False).double()
    change = planned_changes(model, smaller, plan)["head"]
    torch.testing.assert_close(change.bias, torch.zeros(5).double())


def test_a_model_of_another_plan_is_refused() -> None:
    model, smaller, plan = _planned()
    smaller.head = nn.Linear(7, 5).double()
    with pytest.raises(MismatchError, match=r"'head' .* \(5, 7, 1\) .* \(5, 8, 1\)"):
        planned_changes(model, smaller, plan)
    smaller.head = nn.Identity()
    with pytest.raises(MismatchError, match=r"'head' .* Identity without a weight"):
        planned_changes(model, smaller, plan)
    del smaller.head
    with pytest.raises(MismatchError, match="no layer 'head'"):
        planned_changes(model, smaller, plan)


class _NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2


class _Around(nn.Module):
    """A layer, and something that has no forward-mode derivative, or hides it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "operation":
            return _NoDerivative.apply(self.first(x))
        if self.how == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.last(self.norm(self.first(x)))
        if self.how == "layout":
            image = self.first(x)[:, :, None, None].expand(-1, -1, 2, 2)
            norm = nn.GroupNorm(2, 4, dtype=x.dtype)
            return norm(image.contiguous(memory_format=torch.channels_last)).mean((2, 3))
        if self.how == "checkpoint":
            return checkpoint(self.first, x, use_reentrant=True)
        with torch.inference_mode():
            return self.first(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("how", ["operation", "checkpoint", "inference mode", "autocast", "layout"])
def test_none_where_there_is_no_forward_derivative(how: str) -> None:
    model, x = _Around(how), torch.randn(5, 3)
    assert joint_quadratic(model, _changes(model), [x], progress=False) is None
    assert not _hooks(model)
    assert joint_quadratic(model, {}, [x], progress=False) == 0


def test_autocast_around_does_not_matter() -> None:
    model, x = CASES["residual"].model().float(), CASES["residual"].data(4)[0].float()
    changes = {n: Change(c.weight.float()) for n, c in _changes(model.double()).items()}
    expected = joint_quadratic(model.float(), changes, [x], progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert joint_quadratic(model, changes, [x], progress=False) == expected


class _Broken(nn.Module):
    """Fails in the second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 2:
            raise RuntimeError("a batch of two")
        return self.last(self.drop(self.first(x)))


def _hooks(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    ]


@pytest.mark.parametrize("sizes", [(3, 3), (3, 2)], ids=["done", "broken off"])
def test_nothing_is_left_behind(sizes: tuple[int, int]) -> None:
    model = _Broken().double().train()
    model.last.eval()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()

    def data() -> Iterator[Tensor]:
        for n in sizes:
            yield torch.randn(n, 3, dtype=torch.float64)

    changes = _changes(model)
    for measure in (
        lambda: joint_quadratic(model, changes, data(), progress=False),
        lambda: divergences_alone(model, {"all": [changes]}, data(), progress=False),
    ):
        if 2 in sizes:
            with pytest.raises(DataError, match=r"\(2, 3\) \(batch 1\): a batch of two"):
                measure()
        else:
            measure()
        assert not _hooks(model)
        assert [m.training for m in model.modules()] == [True, True, True, False]
        assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        torch.autograd.forward_ad.enter_dual_level()  # refused if a level were still open
        torch.autograd.forward_ad.exit_dual_level()
        assert torch.equal(torch.get_rng_state(), random)


def test_a_forward_of_the_instance_survives() -> None:
    model, (x, _) = CASES["fc"].model(), CASES["fc"].data(4)
    own = model[0].forward
    model[0].forward = own
    divergences_alone(model, {"0": [{"0": _changes(model)["0"]}]}, [x], progress=False)
    assert vars(model[0])["forward"] is own


def test_max_examples_are_the_first_ones() -> None:
    model, (x, _) = CASES["fc"].model(), CASES["fc"].data(8)
    changes = _changes(model)
    cut = joint_quadratic(model, changes, [x[:3], x[3:]], max_examples=5, progress=False)
    assert cut == pytest.approx(joint_quadratic(model, changes, [x[:5]], progress=False))
    several = {"all": [changes]}
    part = divergences_alone(model, several, [x[:3], x[3:]], max_examples=5, progress=False)
    assert part["all"] == pytest.approx(
        divergences_alone(model, several, [x[:5]], progress=False)["all"]
    )


def test_what_does_not_fit_is_refused() -> None:
    model, (x, _) = CASES["mixed"].model(), CASES["mixed"].data(3)
    W = find_layers(model).compressible["fc"].weight()
    for wrong, error, message in (
        ({"nowhere": Change(W)}, MismatchError, "'nowhere' .* no such layer"),
        ({"depthwise": Change(torch.zeros(8, 1, 9))}, MismatchError, "'depthwise' .* grouped"),
        ({"fc": Change(W[:, :-1])}, ShapeError, r"'fc': .* \(6, 6, 1\); expected \(6, 7, 1\)"),
    ):
        with pytest.raises(error, match=message):
            joint_quadratic(model, wrong, [x], progress=False)
        with pytest.raises(error, match=message):
            divergences_alone(model, {"it": [wrong]}, [x], progress=False)


def test_a_function_as_loss_is_refused() -> None:
    model, (x, _) = CASES["fc"].model(), CASES["fc"].data(3)
    with pytest.raises(LossError, match=r"multi_margin_loss is a function.*cross_entropy"):
        joint_quadratic(model, {}, [x], loss=F.multi_margin_loss, progress=False)
    with pytest.raises(LossError, match=r"multi_margin_loss is a function.*cross_entropy"):
        divergences_alone(model, {}, [x], loss=F.multi_margin_loss, progress=False)


def test_outputs_that_are_not_finite_are_refused() -> None:
    model, (x, _) = CASES["fc"].model(), CASES["fc"].data(3)
    change = _changes(model)["2"]
    broken = {"2": Change(change.weight * torch.inf)}
    with pytest.raises(NonFiniteError, match="derivative along the changes"):
        joint_quadratic(model, broken, [x], progress=False)
    with pytest.raises(NonFiniteError, match="variant 1 of 'mine'"):
        divergences_alone(model, {"mine": [{"2": change}, broken]}, [x], progress=False)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_heads_quadratic_is_its_exact_cotangents(loss: str) -> None:
    """Σ ½ (v · cotangent)² over those that the exact Fisher back-propagates."""
    head = head_of(loss)
    assert isinstance(head, PredictiveHead)
    generator = torch.Generator().manual_seed(0)
    z, v = (torch.randn(3, 2, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    batch = as_batch(z, 0, z.device)
    expected = sum(0.5 * (v * c).sum((1, 2)).square() for c in head.expected(z, batch))
    torch.testing.assert_close(head.quadratic(z, v, batch), expected)
