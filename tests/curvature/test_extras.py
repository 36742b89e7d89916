"""Patches, gradients and channels: what a curvature can hold beside S, A and λ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from eigendamage import (
    Budget,
    Curvature,
    EigenDamageError,
    FileFormatError,
    MismatchError,
    apply_plan,
    estimate_curvature,
    load_curvature,
    make_plan,
    save_curvature,
)
from tests.cases import CASES, Case
from tests.networks import NETWORKS
from tests.reference import example_gradients, patches_by_unfold

ALL = ("patches", "gradients", "channels")
GRADIENTS = ("diagonal", "bias_diagonal", "gates")
Data = list[tuple[Tensor, Tensor]]


def _curvature(model: nn.Module, data: Data, **options: object) -> Curvature:
    chosen = {"fisher": "empirical", "patch_positions": None, "progress": False}
    return estimate_curvature(model, data, **{**chosen, **options})


def _assert_same(one: Curvature, other: Curvature, what: tuple[str, ...]) -> None:
    assert list(one) == list(other)
    for name in one:
        for part in what:
            ours, its = getattr(one[name], part), getattr(other[name], part)
            assert (ours is None) == (its is None), (name, part)
            if ours is not None:
                torch.testing.assert_close(ours, its, rtol=1e-10, atol=1e-14)


def _inputs(model: nn.Module, names: list[str], x: Tensor) -> dict[str, list[Tensor]]:
    """What each layer reads, call by call."""
    seen: dict[str, list[Tensor]] = defaultdict(list)
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: seen[name].append(args[0].detach().clone())
        )
        for name in names
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


def test_patches_equal_unfolded_ones(case: Case) -> None:
    model, (x, y) = case.model(), case.data(7)
    curvature = _curvature(model, [(x[:3], y[:3]), (x[3:], y[3:])], also=("patches",))
    assert curvature.extras == ("patches",)
    for name, inputs in _inputs(model, list(curvature), x).items():
        known, module = curvature[name], model.get_submodule(name)
        if known.shape.offsets == 1:
            assert known.patches is None
            assert known.patch_mean is None
            rows = known.A, known.mean
        else:
            columns = [patches_by_unfold(each, module).flatten(1, 2) for each in inputs]
            patches = torch.cat([c.transpose(1, 2).flatten(0, 1) for c in columns])
            rows = patches.T @ patches / len(patches), patches.mean(0)
            torch.testing.assert_close(known.patches, rows[0])
            torch.testing.assert_close(known.patch_mean, rows[1])
        factor = known.patch_factor(name)
        assert factor.dtype == torch.float64
        if module.bias is None:
            torch.testing.assert_close(factor, rows[0])
        else:
            torch.testing.assert_close(factor[:-1, :-1], rows[0])
            torch.testing.assert_close(factor[-1, :-1], rows[1])
            torch.testing.assert_close(factor[:-1, -1], rows[1])
            assert float(factor[-1, -1]) == 1.0


def test_the_channel_factor_is_the_mean_of_the_patch_factors_blocks(case: Case) -> None:
    model, (x, y) = case.model(), case.data(5)
    for known in _curvature(model, [(x, y)], also=("patches",)).values():
        if known.patches is None or known.patch_mean is None:
            continue
        i, K = known.shape.inputs, known.shape.offsets
        by_tap = known.patches.reshape(i, K, i, K).diagonal(dim1=1, dim2=3)
        torch.testing.assert_close(by_tap.mean(2), known.A)
        torch.testing.assert_close(known.patch_mean.reshape(i, K).mean(1), known.mean)


def test_without_patches_the_error_says_how_to_get_them() -> None:
    case = CASES["mixed"]
    curvature = _curvature(case.model(), [case.data(3)])
    assert curvature["conv"].patches is None
    with pytest.raises(EigenDamageError, match=r"'conv'.*also=\('patches',\)"):
        curvature["conv"].patch_factor("conv")
    # Where there is one kernel offset A is the patches' moment, estimated or not.
    assert curvature["token"].patch_factor("token").shape == (9, 9)


@pytest.mark.parametrize("name", ["mixed", "conv uneven"])
def test_sampled_positions_are_unbiased(name: str) -> None:
    case = CASES[name]
    model, data = case.model(), [case.data(6)]

    def run(**options: object) -> Curvature:
        return _curvature(model, data, also=("patches",), eigenvalues="kfac", **options)

    seeds = 40
    whole = run()
    draws = [run(patch_positions=3, seed=seed) for seed in range(seeds)]
    for layer, known in whole.items():
        if known.patches is None:
            continue
        for what in ("patches", "patch_mean"):
            samples = torch.stack([getattr(d[layer], what) for d in draws])
            # Within five standard errors of the mean over the seeds, every entry of it.
            error = samples.std(0) / seeds**0.5
            off = (samples.mean(0) - getattr(known, what)).abs()
            assert bool((error > 0).any())
            assert bool((off <= 5 * error + 1e-12).all()), (layer, what)


def test_sampled_positions_do_not_depend_on_batches_or_streaming() -> None:
    for name in ("residual", "mixed", "shared"):
        case = CASES[name]
        model, (x, y) = case.model(), case.data(11)
        options = {"also": ("patches",), "patch_positions": 5}
        whole = _curvature(model, [(x, y)], **options)
        ragged = _curvature(model, list(zip(x.split(4), y.split(4), strict=True)), **options)
        streamed = _curvature(model, [(x, y)], layers_per_pass=1, **options)
        assert any(known.patches is not None for known in whole.values())
        for other in (ragged, streamed):
            _assert_same(whole, other, ("patches", "patch_mean"))
        again = _curvature(model, [(x, y)], seed=1, **options)
        assert any(
            not torch.equal(known.patches, again[n].patches)
            for n, known in whole.items()
            if known.patches is not None
        )


def test_as_many_positions_as_there_are_is_all_of_them() -> None:
    case = CASES["mixed"]
    model, data = case.model(), [case.data(4)]
    whole = _curvature(model, data, also=("patches",))
    # 7 × 6 pixels: no draw is needed, and none is made.
    enough = _curvature(model, data, also=("patches",), patch_positions=42)
    _assert_same(whole, enough, ("patches", "patch_mean"))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_gradients_equal_a_loop_over_examples(case: Case, fisher: str) -> None:
    model, (x, y) = case.model(), case.data(5)
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    curvature = _curvature(model, batches, fisher=fisher, also=("gradients",))
    labels = y if fisher == "empirical" else None
    for name, known in curvature.items():
        module = model.get_submodule(name)
        weight, bias = module.weight, module.bias
        G = torch.stack(list(example_gradients(model, weight, x, labels)))
        expected = G.square().sum(0).reshape(known.eigenvalues.shape) / len(x)
        torch.testing.assert_close(known.diagonal, expected)
        along = (G * weight.detach()).flatten(2).sum(2)
        if bias is not None:
            g = torch.stack(list(example_gradients(model, bias, x, labels)))
            torch.testing.assert_close(known.bias_diagonal, g.square().sum(0) / len(x))
            along = along + g * bias.detach()
        torch.testing.assert_close(known.gates, along.square().sum(0) / len(x))


def test_a_layer_without_bias_has_a_bias_diagonal_of_zero(case: Case) -> None:
    model = case.model()
    for name, known in _curvature(model, [case.data(4)], also=("gradients",)).items():
        if model.get_submodule(name).bias is None:
            assert not bool(known.bias_diagonal.any()), name


def test_the_diagonal_sums_to_the_trace_that_eigenvalues_sum_to(case: Case) -> None:
    for fisher in ("mc", "exact", "empirical"):
        curvature = _curvature(case.model(), [case.data(6)], fisher=fisher, also=("gradients",))
        for known in curvature.values():
            torch.testing.assert_close(known.diagonal.sum(), known.eigenvalues.sum())


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_extras_do_not_depend_on_batches_or_streaming(case: Case, fisher: str) -> None:
    model, (x, y) = case.model(), case.data(7)
    options = {"also": ("patches", "gradients"), "fisher": fisher}
    whole = _curvature(model, [(x, y)], **options)
    what = ("patches", "patch_mean", *GRADIENTS)
    for size in (1, 3):
        ragged = list(zip(x.split(size), y.split(size), strict=True))
        _assert_same(whole, _curvature(model, ragged, **options), what)
    for layers in (1, 2):
        _assert_same(whole, _curvature(model, [(x, y)], layers_per_pass=layers, **options), what)


def test_extras_leave_the_rest_of_the_curvature_as_it_is(case: Case) -> None:
    model, data = case.model(), [case.data(5)]
    plain = _curvature(model, data, fisher="mc")
    more = _curvature(model, data, fisher="mc", also=("gradients", "patches"))
    assert (plain.extras, more.extras) == ((), ("patches", "gradients"))
    for name in plain:
        for what in ("S", "A", "mean", "Q_S", "Q_A", "eigenvalues"):
            assert torch.equal(getattr(plain[name], what), getattr(more[name], what))


def test_shards_merge_to_the_whole(case: Case) -> None:
    model, (x, y) = case.model(), case.data(8)
    options = {"also": ("patches", "gradients")}
    parts = [_curvature(model, [part], **options) for part in ((x[:3], y[:3]), (x[3:], y[3:]))]
    whole = _curvature(model, [(x, y)], **options)
    merged = parts[0].merge(parts[1])
    assert merged.extras == whole.extras
    _assert_same(merged, whole, ("patches", "patch_mean", *GRADIENTS))
    with pytest.raises(MismatchError, match="extras"):
        parts[0].merge(_curvature(model, [(x, y)], also=("patches",)))


def test_shards_that_know_other_channels_do_not_merge() -> None:
    network = NETWORKS["resnet"]
    model, x = network.model(), network.inputs()
    one = estimate_curvature(model, [x], also=("channels",), progress=False)
    assert one.channels is not None
    assert one.merge(one).channels == one.channels
    first = next(iter(one.channels.groups))
    fewer = {k: v for k, v in one.channels.groups.items() if k != first}
    other = replace(one, channels=one.channels.model_copy(update={"groups": fewer}))
    with pytest.raises(MismatchError, match="differ in channels"):
        one.merge(other)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_everything_survives_a_file(name: str, tmp_path: Path) -> None:
    network = NETWORKS[name]
    before = estimate_curvature(network.model(), [network.inputs()], also=ALL, progress=False)
    assert before.channels is not None
    assert before.channels.groups
    save_curvature(before, tmp_path / "c.safetensors")
    after = load_curvature(tmp_path / "c.safetensors")
    assert after.channels == before.channels
    assert after.extras == before.extras == ALL
    for layer in before:
        for what in ("patches", "patch_mean", *GRADIENTS):
            ours, its = getattr(before[layer], what), getattr(after[layer], what)
            assert (ours is None and its is None) or torch.equal(ours, its)


def test_ranks_survive_a_file_and_impossible_ones_are_refused(tmp_path: Path) -> None:
    case = CASES["residual"]
    model, data = case.model(), [case.data(6)]
    dense = _curvature(model, data)
    small = apply_plan(
        model, make_plan(model, dense, Budget(ratio=0.5), method="eigendamage", form="three"), dense
    )
    before = _curvature(small, data)
    assert any(known.ranks != tuple(known.eigenvalues.shape[:2]) for known in before.values())
    path = tmp_path / "c.safetensors"
    save_curvature(before, path)
    after = load_curvature(path)
    assert {n: c.ranks for n, c in after.items()} == {n: c.ranks for n, c in before.items()}
    for wrong in ((0, 3), (6, 99), (-1, 3)):
        bad = replace(
            before, layers={**before.layers, "stem": replace(before["stem"], ranks=wrong)}
        )
        save_curvature(bad, path)
        with pytest.raises(FileFormatError, match=r"'stem'.*ranks"):
            load_curvature(path)


@pytest.mark.parametrize(
    ("what", "change", "words"),
    [
        ("patches", lambda t: t[:-1].contiguous(), "shape"),
        ("patches", lambda t: t * float("nan"), "NaN"),
        ("patch_mean", lambda t: t.long(), "floating-point"),
        ("diagonal", lambda t: -t - 1, "negative"),
        ("bias_diagonal", lambda t: -t - 1, "negative"),
        ("gates", lambda t: -t - 1, "negative"),
        ("gates", lambda t: t.unsqueeze(0), "shape"),
    ],
)
def test_broken_extras_in_a_file_are_refused(
    what: str, change: Callable[[Tensor], Tensor], words: str, tmp_path: Path
) -> None:
    case = CASES["mixed"]
    path = tmp_path / "c.safetensors"
    save_curvature(_curvature(case.model(), [case.data(4)], also=("patches", "gradients")), path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors[f"conv:{what}"] = change(tensors[f"conv:{what}"])
    save_file(tensors, path, metadata=header)
    with pytest.raises(FileFormatError, match=words) as error:
        load_curvature(path)
    assert f"'{what}' of layer 'conv'" in str(error.value)


def test_a_file_without_the_extras_that_its_header_names_is_refused(tmp_path: Path) -> None:
    case = CASES["mixed"]
    plain = _curvature(case.model(), [case.data(4)])
    for extra in ALL:
        save_curvature(replace(plain, extras=(extra,)), tmp_path / "c")
        with pytest.raises(FileFormatError, match=extra):
            load_curvature(tmp_path / "c")


def test_nothing_of_the_model_or_the_random_state_is_touched() -> None:
    network = NETWORKS["mobilenet"]
    model, x = network.model().train(), network.inputs()
    model.trunk[0].eval()
    model.head.weight.requires_grad_(False)
    model(x).sum().backward()

    def state() -> list[object]:
        return [
            {k: v.clone() for k, v in model.state_dict().items()},
            {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        ]

    def flags() -> list[object]:
        modules = list(model.modules())
        return [
            [m.training for m in modules],
            [p.requires_grad for p in model.parameters()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules],
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),
            torch.is_grad_enabled(),
        ]

    before, marked = state(), flags()
    curvature = estimate_curvature(model, [x], also=ALL, patch_positions=3, progress=False)
    assert curvature.channels is not None
    torch.testing.assert_close(state(), before, rtol=0, atol=0)
    assert flags() == marked


def test_the_order_of_wishes_does_not_matter() -> None:
    case = CASES["fc"]
    curvature = _curvature(case.model(), [case.data(4)], also=("gradients", "patches"))
    assert curvature.extras == ("patches", "gradients")


def test_wishes_that_cannot_be_meant_are_refused() -> None:
    case = CASES["fc"]
    model, data = case.model(), [case.data(4)]
    with pytest.raises(EigenDamageError, match="also='magic' is unknown; known are patches, grad"):
        # A generator: the types of a tuple's items are checked before the library can.
        estimate_curvature(model, data, also=(w for w in ("patches", "magic")), progress=False)
    for count in (0, -3):
        with pytest.raises(EigenDamageError, match=f"patch_positions is {count}"):
            _curvature(model, data, also=("patches",), patch_positions=count)


def test_a_basis_gives_its_patches_and_has_to_have_them() -> None:
    case = CASES["mixed"]
    model, (x, y) = case.model(), case.data(8)
    one, other = [(x[:4], y[:4])], [(x[4:], y[4:])]
    with pytest.raises(MismatchError, match="basis given was estimated without"):
        _curvature(model, other, basis=_curvature(model, one), also=("patches",))
    basis = _curvature(model, one, also=("patches",))
    shared = _curvature(model, other, basis=basis, also=("patches", "gradients"))
    _assert_same(shared, basis, ("patches", "patch_mean", "S", "A"))
    # Gradients are of the data given, as λ is.
    alone = _curvature(model, other, also=("gradients",))
    _assert_same(shared, alone, GRADIENTS)
