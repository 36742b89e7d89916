"""A repair returns what the original did, keeps only what helps, and leaves no trace."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import eigendamage as ed
from eigendamage.batch import Batch
from eigendamage.batches import Batches
from eigendamage.calls import call
from eigendamage.errors import DataError, LayerError, MismatchError, NonFiniteError
from eigendamage.layers import (
    FORMS,
    ConvGeometry,
    find_channels,
    find_layers,
    slice_channels,
    trace,
)
from eigendamage.plan import Plan
from eigendamage.surgery import Repairs, repair_model
from eigendamage.surgery._lockstep import Twins, anew, held_bytes, lockstep, together
from tests.cases import CASES, Case

CPU = torch.device("cpu")
ALL = 10_000  # positions: every one of them


def batches(x: Tensor, size: int = 32) -> list[Batch]:
    return list(Batches(list(x.split(size)), CPU))


def fitted_on(case: Case) -> list[Batch]:
    return batches(case.data(64)[0])


def held_out(case: Case) -> list[Batch]:
    return batches(case.data(32, seed=1)[0])


@lru_cache
def curvature_of(name: str) -> ed.Curvature:
    case = CASES[name]
    return ed.estimate_curvature(case.model(), [case.data(8)[0]], progress=False)


def factored(case: Case, form: str, keep: float = 0.6) -> nn.Module:
    """The case's model with that part of the rows and columns of every layer in its eigenbasis."""
    curvature = curvature_of(case.name)
    layers: dict[str, ed.LayerPlan] = {}
    for name, known in curvature.items():
        o, i = known.shape.outputs, known.shape.inputs
        rows = tuple(range(o - max(1, round(keep * o)), o))
        columns = tuple(range(i - max(1, round(keep * i)), i))
        layers[name] = ed.LayerPlan(
            action=ed.EigenBlock(rows=rows, columns=columns, form=form),
            price=0.0,
            shape=(o, i, known.shape.offsets),
            macs=(0.0, 0.0),
            parameters=(0, 0),
        )
    plan = Plan(
        method="eigendamage",
        budget=ed.Budget(ratio=0.5),
        layers=layers,
        left_alone={},
        macs=(0.0, 0.0),
        parameters=(0, 0),
    )
    return ed.apply_plan(case.model(), plan, curvature)


def form_of(case: Case) -> str:
    """One of the forms, in turn: all geometries and all forms are met, not all pairs of them."""
    return FORMS[list(CASES).index(case.name) % len(FORMS)]


def repaired(small: nn.Module, case: Case, **options: object) -> Repairs:
    defaults: dict[str, object] = {
        "held_out": held_out(case),
        "curvature": curvature_of(case.name),
        "progress": False,
    }
    return repair_model(small, case.model(), fitted_on(case), **(defaults | options))


def noisy(model: nn.Module) -> nn.Module:
    """A copy with noise on every weight."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return copied


class Caught:
    """The inputs or outputs of one layer over batches."""

    def __init__(self, model: nn.Module, name: str, data: Iterable[Batch]) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        layer = model.get_submodule(name)
        handle = layer.register_forward_hook(self._hook)
        with torch.no_grad():
            for batch in data:
                call(model, batch)
        handle.remove()

    def _hook(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.inputs.append(args[0].clone())
        self.outputs.append(output.clone())


def rows(tensors: list[Tensor], convolutional: bool) -> Tensor:
    """Every position of every example as a row."""
    joined = torch.cat(tensors)
    return (joined.movedim(1, -1) if convolutional else joined).flatten(0, -2)


def relative_error(mine: Tensor, its: Tensor, S: Tensor) -> float:
    spread = its - its.mean(0)
    left = mine - its
    return float((left @ S * left).sum() / (spread @ S * spread).sum())


def test_the_last_layers_reported_errors_are_the_measured_ones(case: Case) -> None:
    small, held = factored(case, form_of(case)), held_out(case)
    before = copy.deepcopy(small)
    found = repaired(small, case, positions=ALL)
    last = list(found)[-1]
    layer, was = small.get_submodule(last), before.get_submodule(last)
    conv = find_layers(small).compressible[last].geometry is not None
    S = curvature_of(case.name)[last].S if last in curvature_of(case.name) else None
    its = rows(Caught(case.model(), last, held).outputs, conv)
    S = torch.eye(its.shape[1]).double() if S is None else S
    caught = Caught(small, last, held)
    old = [was(x).detach() for x in caught.inputs]
    assert relative_error(rows(old, conv), its, S) == pytest.approx(found[last].before, rel=1e-6)
    after = relative_error(rows(caught.outputs, conv), its, S)
    if found[last].accepted:
        assert after == pytest.approx(found[last].after, rel=1e-6)
        assert after < found[last].before
    else:
        assert after == pytest.approx(found[last].before, rel=1e-6)
        assert all(
            torch.equal(a, b) for a, b in zip(layer.parameters(), was.parameters(), strict=True)
        )


def after_noise(case: Case, form: str) -> tuple[Tensor, Tensor]:
    """What a network of full rank returns, its layers repaired after noise, and the original."""
    original, small = case.model(), factored(case, form, keep=1.0)
    ran = trace(original, find_layers(original).compressible, fitted_on(case)[0]).layers
    once = [name for name, layer in ran.items() if layer.calls == 1]
    for name in once:
        small.get_submodule(name).load_state_dict(noisy(small.get_submodule(name)).state_dict())
    x = held_out(case)[0]
    wanted = call(original, x).detach()
    assert float((call(small, x).detach() - wanted).norm()) > 1e-2 * float(wanted.norm())
    found = repaired(small, case, ridge=1e-9)
    assert list(found) == once
    assert found[once[0]].accepted
    return call(small, x).detach(), wanted


def test_full_rank_layers_are_restored(case: Case) -> None:
    returned, wanted = after_noise(case, form_of(case))
    torch.testing.assert_close(returned, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["residual", "tokens", "conv pointwise strided"])
def test_full_rank_layers_of_every_form_are_restored(name: str, form: str) -> None:
    returned, wanted = after_noise(CASES[name], form)
    torch.testing.assert_close(returned, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["fc", "tokens", "residual", "shared", "conv same"])
def test_both_strategies_agree_to_the_bit(name: str) -> None:
    case = CASES[name]
    form = form_of(case)
    one, other = factored(case, form), factored(case, form)
    reports = [
        repaired(one, case, positions=5, max_memory=2**40),
        repaired(other, case, positions=5, max_memory=0),
    ]
    assert dict(reports[0]) == dict(reports[1])
    assert reports[0].skipped == reports[1].skipped
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["conv strided", "conv pointwise padded", "fc"])
def test_no_descent_on_the_stages_finds_a_better_layer(name: str, form: str) -> None:
    case = CASES[name]
    small = factored(case, form)
    # Judged by what it was fitted on, a repair is always accepted.
    repaired(small, case, layers=["0"], ridge=0.0, curvature=None, positions=ALL,
             held_out=fitted_on(case))  # fmt: skip
    x = torch.cat([b.args[0] for b in fitted_on(case)])
    target = case.model().get_submodule("0")(x).detach()
    layer = small.get_submodule("0")
    assert isinstance(layer, nn.Sequential)
    found = float((layer(x) - target).square().sum().detach())
    first = 1 if form == "three" or (form == "merge_out" and _has_reach(layer[-1])) else 0
    for seed in range(2):
        torch.manual_seed(seed)
        free = [p for stage in list(layer)[first:] for p in stage.parameters()]
        with torch.no_grad():
            for p in free:
                p.add_(0.3 * seed * torch.randn_like(p))
        search = torch.optim.LBFGS(free, max_iter=30, line_search_fn="strong_wolfe")

        def closure(search: torch.optim.LBFGS = search) -> Tensor:
            search.zero_grad()
            loss = (layer(x) - target).square().sum()
            loss.backward()
            return loss

        search.step(closure)
        assert float(closure().detach()) >= found * (1 - 1e-6) - 1e-9


def _has_reach(stage: nn.Module) -> bool:
    return isinstance(stage, nn.Conv2d) and not ConvGeometry.of(stage).is_pointwise


def test_a_refit_that_does_not_carry_over_is_not_kept() -> None:
    case = CASES["fc"]
    small = factored(case, "merge_in", keep=0.9)
    before = copy.deepcopy(small.state_dict())
    few = batches(case.data(2)[0])
    found = repair_model(
        small, case.model(), few, held_out=held_out(case), curvature=None, ridge=0.0,
        layers=["0"], progress=False,
    )  # fmt: skip
    assert not found["0"].accepted
    assert found["0"].after >= found["0"].before
    assert "held-out" in str(found["0"].reason)
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


@pytest.mark.parametrize("name", ["fc", "tokens", "residual", "shared", "conv same"])
def test_a_copy_of_the_original_stays_as_it_is(name: str) -> None:
    case = CASES[name]
    for dtype in (torch.float32, torch.float64):
        original = case.model().to(dtype)
        x, y = (case.data(12, seed=s)[0] for s in (0, 1))
        x, y = (v.to(dtype) if v.is_floating_point() else v for v in (x, y))
        small = copy.deepcopy(original)
        found = repair_model(
            small, original, batches(x), held_out=batches(y), curvature=None, progress=False
        )
        assert not any(r.accepted for r in found.values())
        for a, b in zip(small.parameters(), original.parameters(), strict=True):
            assert torch.equal(a, b)


class Sliced(nn.Module):
    """Two convolutions and a head; the first can lose outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.two, self.head = nn.Conv2d(8, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.norm(self.one(x)))
        return self.head(torch.relu_(self.two(x)).mean((2, 3)))


def sliced() -> tuple[nn.Module, nn.Module, list[Batch], list[Batch], list[int]]:
    torch.manual_seed(0)
    original, kept = Sliced().double().eval(), [0, 2, 3, 7]
    small = copy.deepcopy(original)
    slice_channels(small.one, outputs=kept, name="one")
    slice_channels(small.norm, outputs=kept, name="norm")
    slice_channels(small.two, inputs=kept, name="two")
    x = CASES["residual"].data(96)[0]
    return original, small, batches(x[:64]), batches(x[64:]), kept


def test_the_readers_of_removed_channels_make_up_for_them() -> None:
    original, small, data, held, kept = sliced()
    norms = {k: v.clone() for k, v in small.norm.state_dict().items()}
    curvature = ed.estimate_curvature(original, [data[0].args[0]], progress=False)

    def lost() -> float:
        with torch.no_grad():
            return float(sum((call(small, b) - call(original, b)).square().sum() for b in held))

    before = lost()
    found = repair_model(
        small, original, data, held_out=held, curvature=curvature, outputs={"one": kept},
        progress=False,
    )  # fmt: skip
    assert list(found) == ["one", "two", "head"]
    assert found["one"].reason == "it returns what the original's layer does, to rounding"
    assert found["two"].accepted
    assert found["two"].after < 0.8 * found["two"].before
    assert lost() < 0.8 * before
    assert all(torch.equal(v, norms[k]) for k, v in small.norm.state_dict().items())


@pytest.mark.parametrize("outputs", [{}, {"one": [0, 1]}, {"one": [0, 1, 2, 8]}])
def test_unknown_outputs_are_refused(outputs: dict[str, list[int]]) -> None:
    original, small, data, held, _ = sliced()
    with pytest.raises(MismatchError, match=r"'one' has 4 outputs, the original's 8"):
        repair_model(
            small, original, data, held_out=held, curvature=None, outputs=outputs, progress=False
        )


def test_what_cannot_be_repaired_is_said() -> None:
    case = CASES["shared"]
    found = repaired(factored(case, "three"), case, layers=["first", "twice", "named"])
    assert list(found) == ["first"]
    assert "runs 2 times" in found.skipped["twice"]
    with pytest.raises(MismatchError, match="'third'"):
        repaired(case.model(), case, layers=["third"])
    mixed = CASES["mixed"]
    assert "grouped" in repaired(mixed.model(), mixed, layers=["depthwise"]).skipped["depthwise"]
    same = torch.ones(4, 7, dtype=torch.float64)
    fc = CASES["fc"]
    constant = repaired(noisy(fc.model()), fc, held_out=batches(same))
    assert all("same for all held-out inputs" in why for why in constant.skipped.values())
    assert len(constant.skipped) == 3


def test_a_depthwise_layer_is_left() -> None:
    case, small = CASES["conv padded"], CASES["conv padded"].model()
    assert isinstance(small, nn.Sequential)
    small[0] = ed.FactoredConv2d(
        nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False),
        nn.Conv2d(3, 4, 1, bias=False),
    ).double()  # fmt: skip
    found = repaired(small, case)
    assert "depthwise" in found.skipped["0"]
    assert list(found) == ["4"]


def test_stages_are_balanced_and_parameters_stay_what_they_were() -> None:
    case = CASES["conv strided"]
    small = factored(case, "three").float().to(memory_format=torch.channels_last)
    original = case.model().float()
    for parameter in small[0][1].parameters():
        parameter.requires_grad_(False)
    before = [(id(p), p.dtype, p.stride(), p.requires_grad) for p in small.parameters()]
    x, y = (case.data(48, seed=s)[0].float() for s in (0, 1))
    found = repair_model(
        small, original, batches(x), held_out=batches(y), curvature=None, progress=False
    )
    assert found["0"].accepted
    norms = torch.stack([stage.weight.norm() for stage in small[0]])
    torch.testing.assert_close(norms, norms.mean().expand(3))
    after = [(id(p), p.dtype, p.stride(), p.requires_grad) for p in small.parameters()]
    assert after == before
    assert all(p.grad is None for p in small.parameters())


class Failing(nn.Module):
    """Runs until it is told not to."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(7, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.calls, self.last = 0, 10**6
        self.error: BaseException = RuntimeError("broken on purpose")

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = torch.tanh(self.two(torch.tanh(self.one(x))))
        if self.calls > self.last:
            raise self.error
        return self.three(x)


def failing() -> tuple[Failing, Failing, list[Batch], list[Batch]]:
    torch.manual_seed(0)
    original = Failing().double()
    small = noisy(original)
    assert isinstance(small, Failing)
    small.two.eval()
    original.one.eval()
    return (
        small,
        original,
        batches(torch.randn(48, 7).double(), 16),
        batches(torch.randn(32, 7).double(), 16),
    )


class Traces:
    """Everything that a repair must leave as it was."""

    def __init__(self, *models: nn.Module) -> None:
        self._models = models
        self._before = self._state()

    def _state(self) -> list[object]:
        modules = [m for model in self._models for m in model.modules()]
        return [
            [m.training for m in modules],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules],
            [p.grad is None and p.requires_grad for m in modules for p in m.parameters()],
            threading.active_count(),
            torch.is_grad_enabled(),
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),
            torch.backends.mha.get_fastpath_enabled(),
        ]

    def check(self) -> None:
        assert self._state() == self._before


@pytest.mark.parametrize("name", ["fc", "tokens", "residual", "shared", "conv same"])
def test_it_leaves_no_trace(name: str) -> None:
    case = CASES[name]
    small, original = factored(case, form_of(case)).train(), case.model()
    seen = Traces(small, original)
    weights = [p.clone() for p in original.parameters()]
    for max_memory in (2**40, 0):
        repair_model(
            small, original, fitted_on(case), held_out=held_out(case), curvature=None,
            max_memory=max_memory, progress=False,
        )  # fmt: skip
        seen.check()
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), weights, strict=True))


@pytest.mark.parametrize("max_memory", [2**40, 0])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("error", [RuntimeError("on purpose"), KeyboardInterrupt()])
def test_a_failure_in_a_network_undoes_everything(
    max_memory: int, which: int, error: BaseException
) -> None:
    small, original, data, held = failing()
    broken = (small, original)[which]
    # The first call is a trace; the second strategy gets to the end from its third layer on.
    broken.last, broken.error = (3 if max_memory else 13), error
    seen = Traces(small, original)
    before = copy.deepcopy(small.state_dict())
    expected = ed.LayerError if isinstance(error, RuntimeError) else type(error)
    with pytest.raises(expected):
        repair_model(
            small, original, data, held_out=held, curvature=None, max_memory=max_memory,
            progress=False,
        )  # fmt: skip
    seen.check()
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


@pytest.mark.parametrize("max_memory", [2**40, 0])
@pytest.mark.parametrize("how", ["closed", "dropped", "interrupted", "skipped"])
def test_a_generator_left_halfway_cleans_up(max_memory: int, how: str) -> None:
    small, original, data, held = failing()
    seen = Traces(small, original)
    steps = lockstep(
        twins(small, original, [data, held]), traces_of(small, original, data), max_memory
    )
    name, pairs = next(steps)
    next(pairs)
    if how == "closed":
        steps.close()
    elif how == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            steps.throw(KeyboardInterrupt())
    elif how == "skipped":  # of the first layer only one pair was looked at
        assert [(n, len(list(p))) for n, p in steps] == [("two", 5), ("three", 5)]
    del steps, pairs
    seen.check()
    assert name == "one"


def twins(small: nn.Module, original: nn.Module, parts: list[Iterable[Batch]]) -> Twins:
    return Twins(small, original, ["one", "two", "three"], parts)


def traces_of(small: nn.Module, original: nn.Module, data: list[Batch]) -> list[ed.layers.Trace]:
    return [trace(m, find_layers(m).compressible, data[0]) for m in (small, original)]


def test_each_network_runs_once_if_memory_allows_and_once_a_layer_if_not() -> None:
    for enough, runs in ((True, 1), (False, 3)):
        small, original, data, held = failing()
        both = twins(small, original, [data, held])
        traces = traces_of(small, original, data)
        needed = held_bytes(both, traces)
        small.calls = original.calls = 0
        for _, pairs in lockstep(both, traces, needed if enough else needed - 1):
            assert len(list(pairs)) == 5
        assert small.calls == original.calls == runs * 5


@pytest.mark.parametrize("strategy", [together, anew])
def test_a_change_of_a_layer_is_seen_by_the_next(strategy: object) -> None:
    small, original, data, _ = failing()
    for name, pairs in strategy(twins(small, original, [data])):
        for batch, pair in zip(data, pairs, strict=True):
            x = batch.args[0]
            stages = {"one": x, "two": torch.tanh(original.one(x))}
            stages["three"] = torch.tanh(original.two(stages["two"]))
            torch.testing.assert_close(pair.x, stages[name].detach())
            torch.testing.assert_close(pair.y, original.get_submodule(name)(stages[name]).detach())
        small.get_submodule(name).load_state_dict(original.get_submodule(name).state_dict())


class Choosing(Failing):
    """Leaves a layer out, or runs it twice, where the first input is large."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.one(x))
        for _ in range(self.times if float(x[0, 0]) > 50 else 1):
            h = torch.tanh(self.two(h))
        return self.three(h)


@pytest.mark.parametrize("times", [0, 2])
def test_layers_that_depend_on_the_input_are_named(times: int) -> None:
    torch.manual_seed(0)
    original = Choosing(times).double()
    small, x = noisy(original), torch.randn(32, 7).double()
    x[20, 0] = 100.0
    x[16, 0] = 100.0
    seen = Traces(small, original)
    with pytest.raises(LayerError, match=r"'two'.*(did not run|where layer)|Leave it out"):
        repair_model(
            small, original, batches(x, 16), held_out=batches(x[:8]), curvature=None, progress=False
        )
    seen.check()
    found = repair_model(
        small, original, batches(x, 16), held_out=batches(x[:8]), curvature=None, progress=False,
        layers=["one", "three"],
    )  # fmt: skip
    assert list(found) == ["one", "three"]


class Overflowing(Failing):
    """Returns infinities from its second layer on."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.two(self.one(x) * (1e308 if float(x[0, 0]) > 50 else 1.0) * 1e10)
        return self.three(h)


@pytest.mark.parametrize("where", ["data", "held_out"])
def test_numbers_that_are_not_finite_name_the_layer(where: str) -> None:
    torch.manual_seed(0)
    original = Overflowing().double()
    small, x = noisy(original), torch.randn(8, 7).double()
    bad = x.clone()
    bad[0, 0] = 100.0
    before = copy.deepcopy(small.state_dict())
    data, held = ([x, bad], [x]) if where == "data" else ([x], [bad])
    with pytest.raises(NonFiniteError, match="layer 'two'"):
        repair_model(
            small, original, [b for v in data for b in batches(v)],
            held_out=[b for v in held for b in batches(v)], curvature=None, progress=False,
        )  # fmt: skip
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


def test_data_of_any_form_gives_the_same_repair() -> None:
    case = CASES["residual"]

    def once(data: list[Batch]) -> Iterator[Batch]:
        yield from data

    models = [factored(case, "three") for _ in range(3)]
    repaired(models[0], case)
    x, y = case.data(64)[0], case.data(32, seed=1)[0]
    forms = [
        (once(fitted_on(case)), once(held_out(case))),
        (Batches(list(x.split(32)), CPU), Batches(list(y.split(32)), CPU)),
    ]
    for model, (data, held) in zip(models[1:], forms, strict=True):
        repair_model(
            model, case.model(), data, held_out=held, curvature=curvature_of("residual"),
            progress=False,
        )  # fmt: skip
        for a, b in zip(model.parameters(), models[0].parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("missing", ["data", "held_out"])
def test_both_parts_of_the_data_are_needed(missing: str) -> None:
    case = CASES["fc"]
    parts = {"data": fitted_on(case), "held_out": held_out(case), missing: []}
    with pytest.raises(DataError, match=f"^{missing} has no batch"):
        repair_model(
            case.model(), case.model(), parts["data"], held_out=parts["held_out"], curvature=None
        )


@pytest.mark.parametrize("max_memory", [2**40, 0])
def test_the_callers_autocast_holds_in_every_forward_pass(max_memory: int) -> None:
    case = CASES["conv padded"]
    original, small = case.model().float(), factored(case, "three").float()
    seen: list[bool] = []
    small[1].register_forward_hook(
        lambda _m, args, _y: seen.append(args[0].dtype == torch.bfloat16)
    )
    x, y = (case.data(32, seed=s)[0].float() for s in (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = repair_model(
            small, original, batches(x), held_out=batches(y), curvature=None, progress=False,
            max_memory=max_memory,
        )  # fmt: skip
        assert found["0"].accepted
        # The cache of autocast must not hold weights from before the repair.
        inside = small[0](x)
    assert seen
    assert all(seen)
    torch.testing.assert_close(inside.float(), small[0](x), atol=0.05, rtol=0.05)


class _ByBatch(nn.Module):
    """A layer that runs for large batches only."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.extra = nn.Linear(6, hidden), nn.Linear(8, 8)
        self.last = nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.last(self.extra(h) if len(x) > 8 else h)


@pytest.mark.parametrize("memory", [0, 2**30])
def test_a_layer_that_fails_on_a_later_batch_is_named_and_weights_stay(memory: int) -> None:
    small = _ByBatch(hidden=6).eval()  # as if channels were gone that 'extra' reads
    before = copy.deepcopy(small.state_dict())
    x = torch.randn(40, 6)
    data = [*batches(x[:8], 8), *batches(x[8:], 16)]
    with pytest.raises(
        LayerError, match=r"'extra': it fails on inputs of shape .*one form and size"
    ) as told:
        repair_model(
            small,
            _ByBatch().eval(),
            data,
            held_out=batches(x, 8),
            curvature=None,
            outputs={"first": range(6)},
            max_memory=memory,
            progress=False,
        )
    assert isinstance(told.value.__cause__, RuntimeError)
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())


def test_a_layer_that_runs_for_large_batches_only_is_seen() -> None:
    data = list(torch.randn(72, 6, generator=torch.Generator().manual_seed(0)).split([16, 8] * 3))
    graph = find_channels(_ByBatch().eval(), batches(data[0])[0])
    assert [m.module for m in graph.groups["first"].readers] == ["extra"]
    result = ed.compress(_ByBatch().eval(), data, budget=ed.Budget(macs=0.8), progress=False)
    for x in data:  # of both sizes
        assert result.model(x).shape == (len(x), 4)
