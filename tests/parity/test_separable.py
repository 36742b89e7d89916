"""The depthwise separable variant against the official code's numbers, its CP factors given.

A CP is not unique, so the recorded factors are taken and everything around them is ours: rotation,
core, stages, module. The official bias is one more input of the value 1/K, which the tests add.
"""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from eigendamage.layers import FactoredConv2d, Layer, find_layers
from eigendamage.plan.prices.eigendamage import rotated_weight
from eigendamage.plan.prices.eigendamage_dw import CP, cp_core
from eigendamage.surgery._factor import depthwise_stages, factored_module
from tests.parity.comparing import assert_close
from tests.parity.networks import HERE, outputs_of
from tests.parity.test_parity import BiasAsChannel, Case, View, case_of

RUNS = [("emp", "0.5"), ("emp", "0.7"), ("true", "0.5"), ("true", "0.7")]
every_run = pytest.mark.parametrize(("kind", "ratio"), RUNS)


@functools.cache
def recorded() -> tuple[dict[str, Tensor], dict]:
    with safe_open(HERE / "golden_vgglike_separable.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["facts"])["runs"]


def separable(kind: str, ratio: str) -> list[str]:
    """The layers that became depthwise: those that were replaced and have a kernel."""
    prefix = f"{kind}_ratio_{ratio}/"
    names = {n.removeprefix(prefix) for n in recorded()[0] if n.startswith(prefix)}
    return sorted(n.removesuffix("/U") for n in names if n.endswith("/U"))


def theirs(kind: str, ratio: str, layer: str) -> tuple[Tensor, CP]:
    """The core that the official code decomposed, (r_o, r_i, K), and the CP that it found."""
    tensors = recorded()[0]
    core, U, S, V = (tensors[f"{kind}_ratio_{ratio}/{layer}/{w}"] for w in ("W_star", *"USV"))
    return core.transpose(1, 2), CP(U, S, V)


def kept(case: Case, ratio: str, layer: str) -> tuple[list[int], list[int]]:
    """The rows and columns, which are those of the variant with a dense core."""
    decided = case.decided(ratio)["layers"][layer]
    return decided["kept_out"], decided["kept_in"]


def in_their_signs(view: View, rows: list[int], columns: list[int], core: Tensor) -> View:
    """The view with its eigenvectors, whose signs are arbitrary, turned to where the core is."""
    ours = rotated_weight(view.weight, view.Q_S, view.Q_A)[rows][:, columns]
    left, _, right = torch.linalg.svd((ours * core).sum(2))
    Q_S, Q_A = view.Q_S.clone(), view.Q_A.clone()
    Q_S[:, rows] *= left[:, 0].sign()
    Q_A[:, columns] *= right[0].sign()
    return replace(view, Q_S=Q_S, Q_A=Q_A)


class WithBiasChannel(nn.Module):
    """A layer behind one more input channel of the value 1/K, as the official code has its bias."""

    def __init__(self, layer: nn.Module, taps: int) -> None:
        super().__init__()
        self.layer, self.taps = layer, taps

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.cat([x, torch.full_like(x[:, :1], 1 / self.taps)], 1))


def homogeneous_layer(old: nn.Conv2d, view: View) -> Layer:
    """The layer without a bias, which has become an input."""
    inputs = view.weight.shape[1]
    conv = nn.Conv2d(
        inputs,
        old.out_channels,
        old.kernel_size,
        old.stride,
        old.padding,
        bias=False,
        dtype=torch.float64,
    )
    return find_layers(conv).compressible[""]


@every_run
def test_the_core_that_was_decomposed(kind, ratio):
    case = case_of("vgglike", kind)
    assert separable(kind, ratio)
    for name in separable(kind, ratio):
        core, cp = theirs(kind, ratio, name)
        rows, columns = kept(case, ratio, name)
        view = in_their_signs(case.views[name], rows, columns, core)
        ours = rotated_weight(view.weight, view.Q_S, view.Q_A)[rows][:, columns]
        assert_close(ours, core, 1e-9)
        assert cp.rank == min(len(rows), len(columns))
        error = float((cp.tensor() - core).norm() / core.norm())
        recorded_error = recorded()[1][f"{kind}_ratio_{ratio}"]["errors"][name]
        assert error == pytest.approx(recorded_error, rel=1e-9)


@every_run
def test_our_decomposition_is_as_good(kind, ratio):
    """Both are local minima, of which neither is always the better one."""
    for name in separable(kind, ratio):
        core, cp = theirs(kind, ratio, name)
        ours = cp_core(core, cp.rank)
        assert (ours.tensor() - core).norm() <= 1.03 * (cp.tensor() - core).norm()


@every_run
def test_outputs(kind, ratio):
    case = case_of("vgglike", kind)
    facts = recorded()[1][f"{kind}_ratio_{ratio}"]
    pruned = copy.deepcopy(case.model)
    left = case.curvature.parameters
    for name in facts["replaced"]:
        old, view = pruned.get_submodule(name), case.views[name]
        rows, columns = kept(case, ratio, name)
        left -= case.curvature[name].shape.dense().parameters
        if isinstance(old, nn.Linear):  # it has no kernel, so its block stays as it is
            new: nn.Module = BiasAsChannel(old, view.projected(rows, columns))
            left += len(rows) * len(columns) + len(columns) * view.weight.shape[1]
            left += len(rows) * view.weight.shape[0]
        else:
            assert isinstance(old, nn.Conv2d)
            core, cp = theirs(kind, ratio, name)
            view = in_their_signs(view, rows, columns, core)
            stages = depthwise_stages(cp, view.Q_S, view.Q_A, rows, columns)
            new = factored_module(homogeneous_layer(old, view), stages)
            assert isinstance(new, FactoredConv2d)
            assert new.layout == ("depthwise", cp.rank, cp.rank)
            left += sum(p.numel() for p in new.parameters())
            new = new if old.bias is None else WithBiasChannel(new, view.weight.shape[2])
        pruned.set_submodule(name, new)
    assert left == facts["n_params"]
    found = outputs_of(pruned, case.golden.inputs)
    assert_close(found, recorded()[0][f"{kind}_ratio_{ratio}/outputs"], 1e-9)


def test_every_layer_with_a_kernel_is_among_them():
    found = {name for kind, ratio in RUNS for name in separable(kind, ratio)}
    assert found == {"feature.0", "feature.4", "feature.7"}
