"""C-OBD, C-OBS, Kron-OBD and Kron-OBS against the official research code's numbers.

README.md says where these are from. With N examples, M batches of equal size and a layer's T
positions, what the official code works with is, in terms of ours:

    factors as recorded      m_aa = M/T · A         m_gg = M·T · S
    C-OBD                    fisher_sum = N · F     importance = 2 N · price, F + 1e-10/N for F
    C-OBS                    A/T and T·S inverted   importance = 2 · price
    Kron-OBD                 one batch of N         importance = 2 · price
    Kron-OBS                 M/T · A, T·S inverted  importance = 2 M · price

Its inverses have absolute cut-offs, so `official_inverse` is given the factors at that scale. A is
over whole patches with a last coordinate 1 for a bias, the bias is the last column of W, and no
importance has our factor ½. The Kron methods' importances use Σ(w²A) where the paper says wᵀAw.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eigendamage import estimate_curvature
from eigendamage.plan._threshold import kept_above, threshold_at
from eigendamage.plan.prices import c_obd, c_obs, kron_obd, kron_obs
from eigendamage.plan.prices._inverse import official_inverse
from eigendamage.plan.prices._quadratic import quadratic
from tests.parity.comparing import assert_close, every_kind, every_network, every_ratio, falls_back
from tests.parity.networks import Golden, outputs_of
from tests.reference import patches_by_unfold

METHODS = ("c_obd", "c_obs", "kron_obd", "kron_obs")
# An official residual block puts its channels in the order of a Python set of their indices, and
# their reader takes them as sorted. Here that set is [11, 0, 3]: the classifier's columns 0 and 3
# get each other's channel. In every other recorded network the two orders agree.
SWAPPED = {("resnet_small", "kron_obs", "0.5"): ("linear", [0, 3])}

every_method = pytest.mark.parametrize("method", METHODS)


@dataclass(frozen=True, eq=False)
class View:
    """A layer as the official code sees it: a matrix with the bias as its last column."""

    module: nn.Module
    W: Tensor
    S: Tensor
    A: Tensor
    positions: int

    @property
    def S_inverse(self) -> Tensor:
        return official_inverse(self.positions * self.S)

    @property
    def A_inverse(self) -> Tensor:
        return official_inverse(self.A / self.positions)


@dataclass(frozen=True, eq=False)
class Case:
    """One network with its factors, beside what the official code found."""

    golden: Golden
    kind: str
    model: nn.Module
    views: dict[str, View]

    @property
    def batches(self) -> int:
        return self.golden.facts["batches"]

    @property
    def classifier(self) -> str:
        """The last layer: its units count for the threshold, but all of them stay."""
        return list(self.views)[-1]

    def decided(self, method: str, ratio: str) -> dict:
        return self.golden.facts["channels"][self.kind][method][ratio]

    def outputs(self, method: str, ratio: str) -> Tensor:
        return self.golden[f"{self.kind}/{method}/ratio_{ratio}/outputs"]

    def theirs(self, method: str, name: str, what: str) -> Tensor:
        return self.golden[f"{self.kind}/{method}/{name}/{what}"]

    def pruned(self, kept: dict[str, list[int]]) -> dict[str, list[int]]:
        """The output channels that go, in the layers where any does."""
        every = {name: range(len(self.views[name].W)) for name in kept}
        gone = {name: [r for r in every[name] if r not in kept[name]] for name in kept}
        return {name: rows for name, rows in gone.items() if rows}


@functools.cache
def case_of(network: str, kind: str) -> Case:
    golden = Golden.read(network)
    model = golden.model()
    curvature = estimate_curvature(
        model,
        golden.data(kind),
        loss="cross_entropy",
        fisher="empirical",
        eigenvalues="kfac",
        progress=False,
    )
    inputs = inputs_of(model, golden.inputs)
    views = {}
    for name, known in curvature.items():
        module = model.get_submodule(name)
        weight = module.weight.detach().flatten(1)
        bias = module.bias
        W = weight if bias is None else torch.cat([weight, bias.detach()[:, None]], 1)
        A, positions = full_moment(inputs[name], module)
        views[name] = View(module, W, known.S, A, positions)
    return Case(golden, kind, model, views)


def inputs_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each Linear and Conv2d is given."""
    found: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(
            lambda _, args, __, name=name: found.__setitem__(name, args[0].detach())
        )
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    outputs_of(model, x)
    for hook in hooks:
        hook.remove()
    return found


def full_moment(x: Tensor, module: nn.Module) -> tuple[Tensor, int]:
    """A = 1/(N T) Σ a aᵀ over whole patches, a 1 below them where there is a bias, and T."""
    is_conv = isinstance(module, nn.Conv2d)
    patches = patches_by_unfold(x, module).flatten(1, 2) if is_conv else x.unsqueeze(2)
    if module.bias is not None:
        patches = torch.cat([patches, torch.ones_like(patches[:, :1])], 1)
    every = patches.transpose(0, 1).flatten(1)
    return every @ every.T / every.shape[1], patches.shape[2]


@functools.cache
def fisher_diagonals(network: str, kind: str) -> dict[str, Tensor]:
    """1/N Σ_n G_n² of every parameter, by one backward pass an example."""
    golden = Golden.read(network)
    model = golden.model()
    named = dict(model.named_parameters())
    squares = [torch.zeros_like(p) for p in named.values()]
    for inputs, labels in golden.data(kind):
        for x, y in zip(inputs.split(1), labels.split(1), strict=True):
            gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(named.values()))
            for total, gradient in zip(squares, gradients, strict=True):
                total.add_(gradient.square())
    return {name: square / len(golden.inputs) for name, square in zip(named, squares, strict=True)}


def diagonals_of(case: Case, name: str) -> tuple[Tensor, Tensor | None]:
    """The Fisher's diagonal over a layer's weight, (o, i, K), and over its bias."""
    found = fisher_diagonals(case.golden.network, case.kind)
    weight = found[f"{name}.weight"]
    return weight.reshape(*weight.shape[:2], -1), found.get(f"{name}.bias")


@functools.cache
def importances(network: str, kind: str, method: str) -> dict[str, Tensor]:
    """The official importances of each layer's filters, out of our prices."""
    case = case_of(network, kind)
    found = {}
    for name, view in case.views.items():
        T, M, N = view.positions, case.batches, len(case.golden.inputs)
        if method == "c_obd":
            weight, bias = view.module.weight.detach(), view.module.bias
            weight = weight.reshape(*weight.shape[:2], -1)
            diagonal, bias_diagonal = diagonals_of(case, name)
            price = c_obd.row_prices(
                weight,
                None if bias is None else bias.detach(),
                diagonal + 1e-10 / N,
                None if bias_diagonal is None else bias_diagonal + 1e-10 / N,
            )
            found[name] = 2 * N * price
        elif method == "c_obs":
            found[name] = 2 * c_obs.row_prices(view.W, view.S_inverse, view.A_inverse)
        elif method == "kron_obd":
            found[name] = 2 * kron_obd.official_row_prices(view.W, view.S, view.A)
        else:
            A = view.A / T
            found[name] = 2 * M * kron_obs.official_row_prices(view.W, view.S_inverse, A)
    return found


@every_network
@every_kind
def test_factors(network, kind):
    case = case_of(network, kind)
    for name, view in case.views.items():
        M, T = case.batches, view.positions
        assert_close(M / T * view.A, case.golden[f"full/{name}/m_aa"], 1e-11)
        assert_close(M * T * view.S, case.golden[f"{kind}/{name}/m_gg"], 1e-11)


@every_network
@every_kind
def test_diagonal_fisher(network, kind):
    case = case_of(network, kind)
    for name in case.views:
        weight, bias = diagonals_of(case, name)
        ours = (
            weight.flatten(1) if bias is None else torch.cat([weight.flatten(1), bias[:, None]], 1)
        )
        theirs = case.theirs("c_obd", name, "fisher_sum")
        assert_close(len(case.golden.inputs) * ours, theirs, 1e-11)


@every_network
@every_kind
@every_method
def test_importances(network, kind, method):
    case = case_of(network, kind)
    for name, ours in importances(network, kind, method).items():
        theirs = case.theirs(method, name, "out_imp")
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12 * float(theirs.max()))


@every_network
@every_kind
def test_importances_by_the_papers_formula(network, kind):
    """wᵀAw, as in the paper and in our prices, and not what the official code has instead."""
    case = case_of(network, kind)
    for name, view in case.views.items():
        A = view.A / view.positions
        obd = 2 * kron_obd.row_prices(view.W, view.S, view.A)
        obs = 2 * case.batches * kron_obs.row_prices(view.W, view.S_inverse, A)
        for method, ours in (("kron_obd", obd), ("kron_obs", obs)):
            theirs = case.theirs(method, name, "CORRECTED_out_imp")
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12 * float(theirs.max()))
            official = case.theirs(method, name, "out_imp")
            assert not torch.allclose(theirs, official, rtol=1e-2)


@every_network
@every_kind
@every_method
@every_ratio
def test_threshold_and_kept_channels(network, kind, method, ratio):
    """All filters of all layers against one threshold; the fallback to index 0 is theirs."""
    case = case_of(network, kind)
    prices, decided = importances(network, kind, method), case.decided(method, ratio)
    threshold = threshold_at(torch.cat(list(prices.values())), float(ratio))
    assert threshold == pytest.approx(decided["threshold"], rel=1e-9)
    assert list(decided["kept"]) == list(case.views)
    for name, price in prices.items():
        limit = case.golden.facts["max_ratio"]
        ours = kept_above(price, threshold, limit)
        if name == case.classifier:
            assert decided["kept"][name] == list(range(len(price)))
        elif len(ours) == 1 or falls_back(price, threshold, limit):
            assert decided["kept"][name] == [0]
            assert ours == (int(price.argmax()),)
        else:
            assert list(ours) == decided["kept"][name]


def after_surgery(case: Case, method: str, kept: dict[str, list[int]]) -> dict[str, Tensor]:
    """W of each layer that loses filters, in full size, as the official code repairs it."""
    repaired = {}
    for name, pruned in case.pruned(kept).items():
        view = case.views[name]
        if method == "c_obs":
            repaired[name] = c_obs.update(view.W, view.S_inverse, view.A_inverse, pruned)
        elif method == "kron_obs":
            repaired[name] = kron_obs.one_at_a_time_update(view.W, view.S_inverse, pruned)
        else:
            repaired[name] = view.W
    return repaired


@every_network
@every_kind
@pytest.mark.parametrize("method", ["c_obs", "kron_obs"])
@every_ratio
def test_weights_after_surgery(network, kind, method, ratio):
    """The rows that stay; where none goes nothing changes, which the extraction checked."""
    case = case_of(network, kind)
    kept = case.decided(method, ratio)["kept"]
    repaired = after_surgery(case, method, kept)
    assert repaired
    for name, W in repaired.items():
        prefix = f"{kind}/{method}/ratio_{ratio}/{name}"
        theirs = [case.golden[f"{prefix}/weight"].flatten(1)]
        if f"{prefix}/bias" in case.golden.tensors:
            theirs.append(case.golden[f"{prefix}/bias"][:, None])
        assert_close(W[kept[name]], torch.cat(theirs, 1), 1e-9)


@every_network
@every_kind
@every_ratio
def test_joint_update(network, kind, ratio):
    """The optimum for the rows that stay, and that the official repair costs more than it."""
    case = case_of(network, kind)
    kept = case.decided("kron_obs", ratio)["kept"]
    for name, one_at_a_time in after_surgery(case, "kron_obs", kept).items():
        view, rows = case.views[name], kept[name]
        columns = range(view.W.shape[1])
        ours = torch.zeros_like(view.W)
        ours[rows] = kron_obs.joint_update(view.W, view.S, view.A, rows, columns, 0.0)
        theirs = case.golden[f"{kind}/kron_obs/ratio_{ratio}/{name}/CORRECTED_joint_Wb"]
        assert_close(ours[rows], theirs, 1e-6)  # theirs has a little damping
        official = torch.zeros_like(ours)
        official[rows] = one_at_a_time[rows]
        assert quadratic(view.W, ours, view.S, view.A) <= quadratic(
            view.W, official, view.S, view.A
        ) * (1 + 1e-9)


def put(module: nn.Module, W: Tensor) -> None:
    """Write a matrix with the bias in its last column into a layer."""
    with torch.no_grad():
        if module.bias is not None:
            module.bias.copy_(W[:, -1])
            W = W[:, :-1]
        module.weight.copy_(W.reshape(module.weight.shape))


def norm_after(network: str, name: str) -> str | None:
    """The batch norm that a layer's output goes through, by the names of these networks."""
    if network == "vgglike":
        return {"feature.0": "feature.1", "feature.4": "feature.5"}.get(name)
    if name in ("conv1", "linear"):
        return {"conv1": "bn"}.get(name)
    return name.replace("downsample.0", "bn3").replace("conv", "bn")


def zeroed(case: Case, method: str, kept: dict[str, list[int]]) -> nn.Module:
    """A copy of the network after surgery: a channel that is gone is zero after its batch norm."""
    model = copy.deepcopy(case.model)
    for name, W in after_surgery(case, method, kept).items():
        rows = case.pruned(kept)[name]
        put(model.get_submodule(name), W.index_fill(0, torch.tensor(rows), 0.0))
        after = norm_after(case.golden.network, name)
        if after is not None:
            norm = model.get_submodule(after)
            with torch.no_grad():
                norm.weight[rows] = 0
                norm.bias[rows] = 0
    return model


@every_network
@every_kind
@every_method
@every_ratio
def test_outputs_of_the_pruned_network(network, kind, method, ratio):
    case = case_of(network, kind)
    model = zeroed(case, method, case.decided(method, ratio)["kept"])
    theirs = case.outputs(method, ratio)
    if (network, method, ratio) in SWAPPED:
        name, columns = SWAPPED[network, method, ratio]
        assert not torch.allclose(outputs_of(model, case.golden.inputs), theirs, rtol=0.1)
        weight = model.get_submodule(name).weight.detach()
        weight[:, columns] = weight[:, columns[::-1]]
    assert_close(outputs_of(model, case.golden.inputs), theirs, 1e-9)


@every_kind
@every_method
@every_ratio
def test_the_small_network_really_built(kind, method, ratio):
    """Of the network without shortcuts, where a layer's kept outputs are the next one's inputs."""
    case = case_of("vgglike", kind)
    decided = case.decided(method, ratio)
    model = copy.deepcopy(case.model)
    repaired = after_surgery(case, method, decided["kept"])
    inputs = list(range(3))
    for name, outputs in decided["kept"].items():
        W = repaired.get(name, case.views[name].W)
        model.set_submodule(name, narrow(model.get_submodule(name), W, outputs, inputs))
        after = str(int(name.rpartition(".")[2]) + 1) if name != "classifier" else ""
        if isinstance(getattr(model.feature, after, None), nn.BatchNorm2d):
            narrow_norm(getattr(model.feature, after), outputs)
        inputs = outputs
    assert sum(p.numel() for p in model.parameters()) == decided["n_params"]
    assert_close(outputs_of(model, case.golden.inputs), case.outputs(method, ratio), 1e-9)


def narrow(old: nn.Module, W: Tensor, outputs: list[int], inputs: list[int]) -> nn.Module:
    """A smaller layer of these rows and input channels of W, whose last column is the bias."""
    bias = old.bias is not None
    weight = W[:, : W.shape[1] - bias].reshape(old.weight.shape)[outputs][:, inputs]
    sizes = len(inputs), len(outputs)
    if isinstance(old, nn.Linear):
        new: nn.Module = nn.Linear(*sizes, bias=bias)
    else:
        new = nn.Conv2d(*sizes, old.kernel_size, old.stride, old.padding, bias=bias)
    put(new.double(), torch.cat([weight.flatten(1), W[outputs][:, W.shape[1] - bias :]], 1))
    return new


def narrow_norm(norm: nn.BatchNorm2d, channels: list[int]) -> None:
    """Keep these channels of a batch norm, in place."""
    for what in ("weight", "bias"):
        setattr(norm, what, nn.Parameter(getattr(norm, what).detach()[channels]))
    for what in ("running_mean", "running_var"):
        setattr(norm, what, getattr(norm, what)[channels])
    norm.num_features = len(channels)
