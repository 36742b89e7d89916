"""Latency: how calls are timed, what a table says between its points, what is kept on disk."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from eigendamage.errors import (
    DataError,
    EigenDamageError,
    FileFormatError,
    LayerError,
    MismatchError,
)
from eigendamage.layers import FactoredConv2d, FactoredLinear, LayerShape, find_layers
from eigendamage.layers import trace as traced
from eigendamage.measure import (
    Latency,
    _latency,
    _latency_cache,
    _sites,
    _timing,
    latency,
    measure_latency_table,
    time_together,
)
from eigendamage.plan import LatencyTable
from eigendamage.plan._latency import (
    Conditions,
    FormTimes,
    TimedForm,
    TimedLayer,
    TimeGrid,
    grids_to_measure,
)
from tests.cases import CASES, CONVOLUTIONS

CPU = torch.device("cpu")
HERE = Conditions(
    device="a", torch="2", threads=1, dtype="float32", memory_format="contiguous", batch=1
)


def _grid(ranks_out: tuple[int, ...], ranks_in: tuple[int, ...], ms: object) -> TimeGrid:
    rows = tuple(tuple(float(x) for x in row) for row in np.asarray(ms))
    return TimeGrid(ranks_out=ranks_out, ranks_in=ranks_in, milliseconds=rows)


def _table(dense: TimeGrid, whole: float = 10.0, calls: int = 1) -> LatencyTable:
    layer = TimedLayer(milliseconds=calls * dense.milliseconds[-1][-1], calls=("k",) * calls)
    return LatencyTable(
        conditions=HERE, whole=whole, layers={"a.b": layer}, entries={"k": {"dense": dense}}
    )


# What a table says.


def test_a_table_is_exact_at_its_points_linear_between_and_flat_outside() -> None:
    ms = [[5.0, 2.0, 4.0], [1.0, 3.0, 8.0]]  # not rising: nothing may be smoothed
    table = _table(_grid((8, 16), (4, 8, 16), ms))
    for row, out in enumerate((8, 16)):
        for column, into in enumerate((4, 8, 16)):
            assert table.milliseconds("a.b", "dense", out, into) == ms[row][column]
    assert table.milliseconds("a.b", "dense", 8, 12) == pytest.approx(3.0)
    assert table.milliseconds("a.b", "dense", 10, 8) == pytest.approx(2.25)
    assert table.milliseconds("a.b", "dense", 12, 6) == pytest.approx((5 + 2 + 1 + 3) / 4)
    assert table.milliseconds("a.b", "dense", 1, 1) == 5.0
    assert table.milliseconds("a.b", "dense", 99, 99) == 8.0


@pytest.mark.parametrize("form", ["three", "merge_in", "merge_out"])
def test_times_proportional_to_macs_are_met_at_every_rank(form: TimedForm) -> None:
    """The MACs of a form are bilinear in its ranks, so interpolation adds no error to them."""
    shape = LayerShape(32, 24, 9, True, 100.0, 25.0)
    ranks_out, ranks_in = grids_to_measure(32, 24, 9, 8)[form]

    def macs(out: int, into: int) -> float:
        return 7.0 + shape.factored(out, into, form).macs  # type: ignore[arg-type]

    grid = _grid(ranks_out, ranks_in, [[macs(o, i) for i in ranks_in] for o in ranks_out])
    out = np.arange(8, 33).reshape(-1, 1)
    into = np.arange(8, 25)
    found = grid.at(out, into)
    expected = [[macs(int(o), int(i)) for i in into] for o in out[:, 0]]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_many_ranks_at_once_are_those_one_by_one_and_broadcast() -> None:
    table = _table(_grid((2, 4, 8), (3, 6), [[1, 2], [3, 5], [4, 9]]), calls=2)
    rng = np.random.default_rng(0)
    out, into = rng.integers(1, 12, (5, 1)), rng.integers(1, 12, (1, 7))
    found = table.milliseconds_at("a.b", "dense", out, into)
    assert found.shape == (5, 7)
    for a in range(5):
        for b in range(7):
            one = table.milliseconds("a.b", "dense", int(out[a, 0]), int(into[0, b]))
            assert found[a, b] == one
    assert table.milliseconds("a.b", "dense", 8, 6) == 18.0  # it is called twice
    assert table.milliseconds_at("a.b", "dense", np.array([], int), np.array([], int)).shape == (0,)


def test_the_rest_is_what_the_layers_leave_and_never_negative() -> None:
    grid = _grid((2,), (3,), [[4.0]])
    assert _table(grid).rest == 6.0
    assert _table(grid, calls=2).rest == 2.0
    assert _table(grid, calls=3).rest == 0.0


def test_what_was_not_measured_is_refused_by_name() -> None:
    table = _table(_grid((2,), (3,), [[4.0]]))
    with pytest.raises(MismatchError, match=r"no layer 'a\.c', it has a\.b"):
        table.milliseconds("a.c", "dense", 1, 1)
    with pytest.raises(MismatchError, match=r"'a\.b' was not measured in the form 'three'"):
        table.milliseconds_at("a.b", "three", np.array([1]), np.array([1]))


def test_a_table_survives_the_disk_and_a_broken_one_does_not(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    table = _table(_grid((2, 4), (3,), [[1.0], [2.0]]))
    table.save(file)
    assert LatencyTable.load(file) == table
    text = file.read_text()
    for old, new in (
        ('"version": 1', '"version": 2'),
        ('"calls": [\n', '"calls": [\n"lost",\n'),
        ("2.0", "-2.0"),
        ("2.0", "NaN"),
    ):
        assert old in text
        file.write_text(text.replace(old, new))
        with pytest.raises(FileFormatError):
            LatencyTable.load(file)


@pytest.mark.parametrize(
    ("ranks_out", "ranks_in"), [((4, 2), (3,)), ((2, 2), (3,)), ((2,), (3,)), ((), (3,))]
)
def test_a_grid_has_rising_ranks_and_a_time_for_each(
    ranks_out: tuple[int, ...], ranks_in: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"ranks of a grid must rise|rows of"):
        TimeGrid(ranks_out=ranks_out, ranks_in=ranks_in, milliseconds=((1.0,), (2.0,)))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 15, 16, 17, 24, 40, 64, 100, 512])
@pytest.mark.parametrize("multiple", [1, 8, 16])
def test_ranks_to_measure_are_multiples_up_to_the_whole_side(size: int, multiple: int) -> None:
    step = multiple if size >= 2 * multiple else max(1, size // 4)
    for form, (ranks_out, ranks_in) in grids_to_measure(size, size, 9, multiple).items():
        for ranks in (ranks_out, ranks_in):
            assert ranks[-1] == size
            assert list(ranks) == sorted(set(ranks))
            assert len(ranks) <= 5
            assert all(rank % step == 0 for rank in ranks[:-1])
        assert (ranks_in == (size,)) == (form == "merge_in" or size == 1)
        assert (ranks_out == (size,)) == (form == "merge_out" or size == 1)
    assert set(grids_to_measure(size, size, 1, multiple)) == {"dense", "merge_in"}


# How calls are timed.


def test_calls_take_turns_in_another_order_in_every_round() -> None:
    order: list[str] = []
    calls: list[Callable[[], object]] = [lambda n=name: order.append(n) for name in "abcdef"]
    before = np.random.get_state()[1].tolist()
    times = time_together(calls, device=CPU, rounds=20, min_seconds=0.0)
    assert np.random.get_state()[1].tolist() == before
    assert "".join(order[:12]) == "abcdefabcdef"  # untimed
    rounds = ["".join(order[start : start + 6]) for start in range(12, len(order), 6)]
    assert len(rounds) == 20
    assert all(sorted(each) == list("abcdef") for each in rounds)
    assert len(set(rounds)) > 10
    assert len({each[0] for each in rounds}) > 3
    assert len(times) == 6


def test_a_short_call_is_repeated_within_a_sample() -> None:
    count = 0

    def short() -> None:
        nonlocal count
        count += 1

    (ms,) = time_together([short], device=CPU, rounds=4, min_seconds=1e-3)
    assert count > 4 * 10  # unless both runs beforehand were interrupted
    assert 0 < ms < 1  # of one call, not of the sample


def test_meanwhile_neither_gradients_nor_garbage_collection() -> None:
    seen: list[tuple[bool, bool]] = []

    def look() -> None:
        seen.append((gc.isenabled(), torch.is_grad_enabled()))

    assert gc.isenabled()
    time_together([look], device=CPU, rounds=1, min_seconds=0.0)
    assert set(seen) == {(False, False)}
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        time_together([lambda: 1 / 0], device=CPU)
    assert gc.isenabled()
    gc.disable()
    try:
        time_together([look], device=CPU, rounds=1)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_ten_times_the_work_takes_longer() -> None:
    x = torch.randn(200, 200)

    def work(times: int) -> Callable[[], object]:
        return lambda: [x @ x for _ in range(times)]

    slow, fast = time_together([work(10), work(1)], device=CPU)
    assert slow > fast
    once, often = (nn.Sequential(*(nn.Linear(200, 200) for _ in range(n))) for n in (1, 10))
    found = latency([often, once], x, batch=64)
    assert found[0].median > found[1].median
    assert all(time.spread >= 0 for time in found)


@pytest.mark.parametrize("rounds", [0, -1])
def test_no_rounds_are_refused(rounds: int) -> None:
    with pytest.raises(EigenDamageError, match="rounds is"):
        time_together([lambda: None], device=CPU, rounds=rounds)
    with pytest.raises(EigenDamageError, match="rounds is"):
        latency([nn.Linear(2, 2)], torch.ones(1, 2), batch=1, rounds=rounds)


# Whole models.


class _Watched(nn.Module):
    """Notes the inputs that it gets, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.dropout = nn.Dropout(0.5)
        self.seen: list[Tensor] = []
        self.modes: set[bool] = set()
        self.fused: set[bool] = set()

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        self.seen.append(x)
        self.modes.add(self.training)
        self.fused.add(torch.backends.mha.get_fastpath_enabled())
        torch.rand(1)
        return self.dropout(self.linear(x if scale is None else x * scale))


@pytest.mark.parametrize(("batch", "rows"), [(1, [0]), (3, [0, 1, 2]), (7, [0, 1, 2, 0, 1, 2, 0])])
def test_the_first_examples_are_run_over_again_if_they_are_few(batch: int, rows: list[int]) -> None:
    x = torch.arange(6.0).reshape(3, 2)
    model = _Watched()
    latency([model], iter([(x, torch.zeros(3)), (x + 9, torch.zeros(3))]), batch=batch, rounds=1)
    assert all(torch.equal(seen, x[rows]) for seen in model.seen)


def test_models_are_left_as_they_were() -> None:
    model = _Watched()
    model.linear.eval()
    hook = model.register_forward_hook(lambda *_: None)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    latency([model], torch.ones(3, 2), batch=2, rounds=1)
    measure_latency_table(
        model,
        torch.ones(3, 2),
        layers=find_layers(model).compressible,
        rounds=1,
        cache=Path("/dev/null"),
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert model.modes == {False}
    assert model.fused == {True}  # what is timed is what runs when it is deployed
    assert torch.backends.mha.get_fastpath_enabled()
    assert [m.training for m in model.modules()] == [True, False, True]
    assert list(model._forward_hooks) == [hook.id]
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_dicts_of_tensors_with_the_same_batch_axis() -> None:
    model = _Watched()
    data = [{"x": torch.ones(2, 2), "scale": torch.ones(2, 1), "labels": torch.ones(2)}]
    assert isinstance(latency([model], data, batch=5, rounds=1)[0], Latency)
    assert {tuple(seen.shape) for seen in model.seen} == {(5, 2)}
    whole = [{"x": torch.ones(2, 2), "scale": torch.ones(1)}]
    latency([model], whole, batch=2, rounds=1)  # nothing to cut or to repeat
    with pytest.raises(DataError, match=r"'scale' is of shape \(1,\).*give batches of 3"):
        latency([model], whole, batch=3, rounds=1)
    with pytest.raises(DataError, match=r"'scale' is of NoneType"):
        latency([model], [{"x": torch.ones(2, 2), "scale": None}], batch=3, rounds=1)


def test_data_that_cannot_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _Watched()
    with pytest.raises(DataError, match=r"cannot run on inputs of shape \(1, 5\)"):
        latency([model], torch.ones(1, 5), batch=1)
    with pytest.raises(DataError, match="a batch of 0 examples"):
        latency([model], torch.ones(1, 2), batch=0)
    with pytest.raises(DataError, match="no example"):
        latency([model], [], batch=1)
    monkeypatch.setattr(_timing, "device_of", lambda model: next(model.parameters()).device)
    with pytest.raises(EigenDamageError, match="on cpu and meta"):
        latency([model, nn.Linear(2, 2, device="meta")], torch.ones(1, 2), batch=1)
    assert latency([], torch.ones(1, 2), batch=1) == []
    assert model.training


# Tables that are measured.


def _measure(
    model: nn.Module, x: Tensor, cache: Path, batch: int = 2, multiple: int = 2, rounds: int = 1
) -> LatencyTable:
    return measure_latency_table(
        model,
        x,
        layers=find_layers(model).compressible,
        batch=batch,
        multiple=multiple,
        cache=cache,
        rounds=rounds,
        progress=False,
    )


@pytest.mark.parametrize("name", ["fc", "tokens", "residual", "mixed", "shared", "conv same"])
def test_every_layer_has_its_forms_and_the_sum_is_the_whole(name: str, tmp_path: Path) -> None:
    model, (x, _) = CASES[name].model(), CASES[name].data(3)
    table = _measure(model, x, tmp_path)
    layers = find_layers(model).compressible
    assert set(table.layers) == set(layers)
    for path, layer in layers.items():
        forms: list[TimedForm] = ["dense", "merge_in"]
        forms += ["merge_out", "three"] if layer.offsets > 1 else []
        for key in table.layers[path].calls:
            assert set(table.entries[key]) == set(forms)
        now = table.milliseconds(path, "dense", layer.outputs, layer.inputs)
        assert table.layers[path].milliseconds == pytest.approx(now)
        for form in forms:  # a merged side is of no effect
            merged = form.removeprefix("merge_")
            same = [table.milliseconds(path, form, o, i) for o, i in ((2, 2), (2, 1), (1, 2))]
            assert merged != "in" or same[0] == same[1]
            assert merged != "out" or same[0] == same[2]
    summed = sum(layer.milliseconds for layer in table.layers.values())
    assert table.rest == pytest.approx(max(0.0, table.whole - summed))
    assert table.conditions.batch == 2
    assert table.conditions.dtype == "float64"
    assert LatencyTable.model_validate_json(table.model_dump_json()) == table


@pytest.mark.parametrize("name", ["fc", "tokens", *(f"conv {name}" for name in CONVOLUTIONS)])
def test_what_is_timed_is_what_a_plan_would_build(name: str) -> None:
    model, (x, _) = CASES[name].model(), CASES[name].data(2)
    layers = find_layers(model).compressible
    batch = _timing.examples_of(x, 2, CPU)
    shapes = traced(model, layers, batch).layers
    for layer_name, (site,) in _sites.sites_of(model, layers, batch).items():
        layer, shape = layers[layer_name], shapes[layer_name].shape
        expected = layer.module(site.inputs(layer.inputs, "contiguous"))
        for form, (ranks_out, ranks_in) in grids_to_measure(
            layer.outputs, layer.inputs, layer.offsets, 1
        ).items():
            for out in ranks_out:
                for into in ranks_in:
                    variant = _latency._variant(layer, form, out, into, "contiguous")
                    dense = form == "dense"
                    inputs = site.inputs(into if dense else layer.inputs, "contiguous")
                    with FlopCounterMode(display=False) as counter, torch.no_grad():
                        y = variant(inputs)
                    if dense:
                        macs = shape.dense().macs * out * into / layer.outputs / layer.inputs
                        assert y.numel() * layer.outputs == expected.numel() * out
                    else:
                        macs = shape.factored(out, into, form).macs
                        assert y.shape == expected.shape
                    assert counter.get_total_flops() / 4 == pytest.approx(macs)
                    assert y.dtype == expected.dtype
                    assert (variant.bias is None) == (layer.bias() is None)


def test_layers_of_one_shape_share_their_times(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4, bias=bias) for bias in (True, True, False)))
    table = _measure(model, torch.ones(1, 4), tmp_path)
    keys = [table.layers[name].calls for name in "012"]
    assert keys[0] == keys[1] != keys[2]
    assert len(table.entries) == 2


def test_a_layer_that_runs_twice_counts_twice(tmp_path: Path) -> None:
    case = CASES["shared"]
    table = _measure(case.model(), case.data(2)[0], tmp_path)
    first, second = table.layers["twice"].calls
    assert first == second
    one = table.entries[first]["dense"].milliseconds[-1][-1]
    assert table.milliseconds("twice", "dense", 5, 5) == pytest.approx(2 * one)


def test_factored_layers_are_timed_as_they_are(tmp_path: Path) -> None:
    """Also depthwise ones, which no plan can ask the table for."""
    torch.manual_seed(0)
    depthwise = FactoredConv2d(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 6, 1)
    )
    linear = FactoredLinear(nn.Linear(6, 2), nn.Linear(2, 3), nn.Linear(3, 5))
    model = nn.Sequential(depthwise, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    table = _measure(model, torch.randn(2, 3, 5, 5), tmp_path)
    assert set(table.layers) == {"0", "3"}
    for name, (o, i) in {"0": (6, 3), "3": (5, 6)}.items():
        assert table.layers[name].milliseconds != table.milliseconds(name, "dense", o, i)
    assert set(table.entries[table.layers["0"].calls[0]]) == set(grids_to_measure(6, 3, 9, 8))


def test_memory_format_is_that_within_the_model(tmp_path: Path) -> None:
    case = CASES["residual"]
    model, x = case.model(), case.data(3)[0]
    assert _measure(model, x, tmp_path).conditions.memory_format == "contiguous"
    model.to(memory_format=torch.channels_last)
    assert _measure(model, x, tmp_path).conditions.memory_format == "channels_last"
    layers = find_layers(model).compressible
    sites = _sites.sites_of(model, layers, _timing.examples_of(x, 2, CPU))
    last = sites["conv2"][0].inputs(8, "channels_last")
    variant = _latency._variant(layers["conv2"], "three", 4, 4, "channels_last")
    assert _sites._is_channels_last(last)
    assert _sites._is_channels_last(variant(last))
    assert _sites._is_channels_last(
        next(_latency._dense(layers["conv2"], 4, 4, "channels_last").parameters())
    )
    images = torch.randn(3, 3, 4, 5).to(memory_format=torch.channels_last)
    for count in (2, 5):
        assert _sites._is_channels_last(_timing.examples_of(images, count, CPU).args[0])


def test_autocast_is_another_dtype() -> None:
    assert _sites.conditions_of(CPU, [], 1).dtype == "float32"
    with torch.autocast("cpu", torch.bfloat16):
        assert _sites.conditions_of(CPU, [], 1).dtype == "bfloat16"


def test_layers_that_do_not_run_or_differ_in_dtype_are_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(3, 3)})
    model.forward = model["used"].forward  # type: ignore[method-assign]
    with pytest.raises(LayerError, match="layer 'used': it does not run"):
        _measure(model, torch.ones(1, 3), tmp_path)

    class Mixed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x).double())

    mixed = Mixed(nn.Linear(3, 3), nn.Linear(3, 3).double())
    with pytest.raises(LayerError, match=r"layer '1': it is of torch\.float64"):
        _measure(mixed, torch.ones(1, 3), tmp_path)
    with pytest.raises(EigenDamageError, match="multiple is 0"):
        _measure(mixed, torch.ones(1, 3), tmp_path, multiple=0)
    assert not list(tmp_path.iterdir())


# What is kept on disk.


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the layers whose forms were measured."""
    measured: list[str] = []
    original = _latency._measured

    def spy(site: _latency._Site, *rest: object) -> FormTimes:
        measured.append(site.key)
        return original(site, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(_latency, "_measured", spy)
    return measured


X = torch.ones(1, 6)


def _two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))


def test_a_second_call_measures_no_layer_again(groups: list[str], tmp_path: Path) -> None:
    model = _two_layers()
    folder = tmp_path / "to be" / "made"
    first = _measure(model, X, folder)
    assert len(groups) == 2
    second = _measure(model, X, folder)
    assert len(groups) == 2
    assert set(first.entries) == set(second.entries)
    for key, forms in second.entries.items():  # the same but for one factor
        ratio = [
            np.divide(forms[form].milliseconds, first.entries[key][form].milliseconds).ravel()
            for form in forms
        ]
        np.testing.assert_allclose(np.concatenate(ratio), ratio[0][0], rtol=1e-12)
    larger = nn.Sequential(*_two_layers(), nn.Linear(4, 3))
    _measure(larger, X, folder)
    assert len(groups) == 3
    _measure(larger, X, folder, multiple=1)  # other ranks
    assert len(groups) == 6
    assert len(list(folder.iterdir())) == 1


def test_other_conditions_have_a_file_of_their_own(groups: list[str], tmp_path: Path) -> None:
    model = _two_layers()
    for batch in (1, 2):
        _measure(model, X, tmp_path, batch=batch)
    _measure(model.double(), X.double(), tmp_path)
    assert len(groups) == 6
    assert len(list(tmp_path.iterdir())) == 3
    file = next(iter(tmp_path.iterdir()))
    text = file.read_text()
    for other in tmp_path.iterdir():  # a file under a wrong name
        other.write_text(text.replace('"threads": 1', '"threads": 99'))
    _measure(model, X.double(), tmp_path)
    assert len(groups) == 8


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"version": 1}', "\x00"])
def test_a_file_that_is_no_cache_is_measured_anew(
    groups: list[str], tmp_path: Path, damage: str
) -> None:
    model = _two_layers()
    _measure(model, X, tmp_path)
    (file,) = tmp_path.iterdir()
    good = file.read_text()
    file.write_text(damage)
    _measure(model, X, tmp_path)
    assert len(groups) == 4
    document = json.loads(file.read_text())
    assert set(document["entries"]) == set(groups)
    file.write_text(good.replace('"version": 1', '"version": 2'))
    _measure(model, X, tmp_path)
    assert len(groups) == 6
    assert list(tmp_path.iterdir()) == [file]


def test_without_a_place_to_write_nothing_is_kept(groups: list[str], tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("mine")
    for folder in (occupied, occupied / "below"):
        for _ in range(2):
            _measure(_two_layers(), X, folder)
    assert len(groups) == 8
    assert occupied.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [occupied]


def test_the_folder_is_that_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EIGENDAMAGE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def folder(given: Path | None = None) -> Path | None:
        file = _latency_cache.cache_file(given, HERE)
        return file and file.parent

    assert folder(tmp_path / "given") == tmp_path / "given"
    assert folder() == tmp_path / "own"
    monkeypatch.setenv("EIGENDAMAGE_CACHE", "")
    assert folder() == tmp_path / "xdg" / "eigendamage"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert folder() == tmp_path / "home" / ".cache" / "eigendamage"

    def nobody() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", nobody)
    assert folder() is None
    _latency_cache.store(None, HERE, "k", {})
    assert _latency_cache.stored(None, HERE) == {}


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "cache.json"
    times: FormTimes = {"dense": _grid((1, 2), (1,), [[1.0], [2.0]])}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: _latency_cache.store(file, HERE, str(n), times), range(40)))
    assert set(_latency_cache.stored(file, HERE)) == {str(n) for n in range(40)}
    assert list(tmp_path.iterdir()) == [file]


def test_slow_groups_get_fewer_rounds_but_five() -> None:
    def sleep() -> None:
        time.sleep(0.002)

    for budget, expected in ((1e-4, 5), (60.0, 9)):
        samples = _timing.samples_of([sleep], CPU, 9, max_seconds=budget)
        assert samples.shape == (expected, 1)
    assert _timing.samples_of([sleep], CPU, 3, max_seconds=1e-4).shape == (3, 1)
