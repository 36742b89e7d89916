"""Polish: it learns from the original, leaves batch norms alone, and keeps the best pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigendamage as ed
from eigendamage.batch import Batch, as_batch
from eigendamage.batches import Batches
from eigendamage.training import Training, polish
from eigendamage.training._layout import channels_last

CPU = torch.device("cpu")


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    ).eval()
    with torch.no_grad():
        model[-1].weight.mul_(10.0)  # type: ignore[operator]
    return model


def images(count: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 1, 6, 6, generator=generator) for _ in range(count)]


def held_divergence(model: nn.Module, original: nn.Module, data: list[Tensor]) -> float:
    found = ed.evaluate(model, data, reference=original, progress=False).divergence
    assert found is not None
    return found


def test_it_lowers_the_divergence_and_keeps_the_best_pass() -> None:
    original = network()
    small = ed.compress(
        original, images(4), budget=ed.Budget(macs=0.5), method="eigendamage", progress=False
    ).model
    before = copy.deepcopy(small)
    fit, held = list(Batches(images(12), CPU)), list(Batches(images(4, seed=2), CPU))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    done = polish(
        small,
        original,
        fit,
        held_out=held,
        config=ed.PolishConfig(passes=5, batch_size=16, learning_rate=0.01),
        progress=False,
    )
    assert torch.equal(state, torch.get_rng_state())
    assert len(done.losses) == 5
    assert len(done.scores) == 6
    assert done.scores[done.best] == min(done.scores)
    held_inputs = [b.args[0] for b in held]
    assert done.scores[0] == pytest.approx(held_divergence(before, original, held_inputs))
    assert done.scores[done.best] == pytest.approx(
        held_divergence(small, original, held_inputs), rel=1e-5
    )
    assert done.scores[done.best] < 0.9 * done.scores[0]
    # Batch norm ran as in evaluation: its statistics are what they were.
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(small[1], name), getattr(before[1], name))
    assert not small.training


def polished(small: nn.Module, original: nn.Module, **settings: Any) -> Training:
    features = settings.pop("features", ())
    return polish(
        small,
        original,
        list(Batches(images(4), CPU)),
        held_out=list(Batches(images(2, seed=2), CPU)),
        features=features,
        config=ed.PolishConfig(passes=20, batch_size=16, learning_rate=0.02, **settings),
        progress=False,
    )


def worse(original: nn.Module) -> nn.Module:
    small = copy.deepcopy(original)
    noise = torch.randn(12, 8, 3, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        small[3].weight.add_(0.1 * noise)  # type: ignore[operator]
    return small


def test_outputs_of_layers_are_learned_where_they_are_named() -> None:
    original = network()

    def unlike(features: tuple[str, ...], weight: float) -> float:
        small = worse(original)
        polished(small, original, features=features, feature_weight=weight)
        x = torch.cat(images(2))
        with torch.no_grad():
            return float((small[:4](x) - original[:4](x)).norm())  # type: ignore[operator]

    assert unlike(("3",), 1e4) < 0.9 * unlike((), 1e4)
    assert unlike(("3",), 0.0) == unlike((), 1e4)


def test_held_out_inputs_are_augmented_as_the_others_are() -> None:
    original = network()
    small = worse(original)
    before = copy.deepcopy(small)

    def brighter(x: Tensor, draws: torch.Generator) -> Tensor:
        return x + 0.5

    done = polished(small, original, augment=brighter)
    seen = [x + 0.5 for x in images(2, seed=2)]
    assert done.scores[0] == pytest.approx(held_divergence(before, original, seen), rel=1e-5)


@pytest.mark.parametrize("method", ["auto", "eigendamage"])
def test_compress_polishes_and_says_what_it_gained(method: str) -> None:
    model = network()

    def run(polish: int | ed.PolishConfig) -> ed.Compressed:
        return ed.compress(
            model,
            images(10),
            budget=ed.Budget(macs=0.5),
            method=method,
            polish=polish,
            eval_data=images(6, seed=3),
            progress=False,
        )

    plain, polished = run(0), run(4)
    assert plain.report.polished is None
    report = polished.report
    assert report.polish is not None
    assert len(report.polish.losses) == 4
    assert report.seconds["polish"] > 0
    assert report.final is report.polished
    # What it is after the repair, or batch norm's, is told as without a polish.
    if method == "auto":  # for others nothing is held out of the curvature without a polish
        assert polished.plan == plain.plan
        assert report.repaired == plain.report.repaired
    assert report.final.divergence == pytest.approx(
        held_divergence(polished.model, model, images(6, seed=3)), rel=1e-5
    )


def test_a_polish_that_makes_it_clearly_worse_is_left_out() -> None:
    model = network()
    result = ed.compress(
        model,
        images(10),
        budget=ed.Budget(macs=0.5),
        polish=ed.PolishConfig(passes=1, learning_rate=3.0, clip=1.0),
        progress=False,
    )
    assert result.report.polished is None
    assert result.report.polish is not None
    assert any("the polish was left out" in note for note in result.report.notes)
    assert result.report.final is result.report.repaired


def test_inputs_of_other_forms_are_polished_too() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x) * scale))

    torch.manual_seed(0)
    original = Pair().eval()
    small = copy.deepcopy(original)
    with torch.no_grad():
        small.a.weight.add_(0.3 * torch.randn(12, 6))
    data = [{"x": torch.randn(5, 6), "scale": torch.rand(5, 1) + 1} for _ in range(6)]
    batches = list(Batches(data, CPU))
    done = polish(
        small,
        original,
        batches[:5],
        held_out=batches[5:],
        config=ed.PolishConfig(passes=5, learning_rate=0.01),
        progress=False,
    )
    assert done.losses[-1] < done.losses[0]
    with pytest.raises(ed.EigenDamageError, match="augment= changes inputs that are one tensor"):
        polish(
            small,
            original,
            batches,
            held_out=batches,
            config=ed.PolishConfig(augment=ed.crops_and_flips()),
            progress=False,
        )


def test_crops_and_flips_move_pixels_and_make_none() -> None:
    x = torch.arange(1.0, 2 * 3 * 8 * 8 + 1).reshape(2, 3, 8, 8)
    generator = torch.Generator().manual_seed(0)
    seen: set[bool] = set()
    for _ in range(20):
        moved = ed.crops_and_flips(2)(x, generator)
        assert moved.shape == x.shape
        for before, after in zip(x, moved, strict=True):
            values = after[after != 0]
            assert set(values.tolist()) <= set(before.flatten().tolist())
            assert len(values) >= 3 * 6 * 6
            row = after[0][after[0].abs().sum(1) > 0][0]
            row = row[row != 0]
            seen.add(bool(row[0] > row[1]))
            # All channels move together.
            torch.testing.assert_close((after[1] - after[0])[after[0] != 0].unique().numel(), 1)
    assert seen == {True, False}


def test_what_cannot_be_is_refused() -> None:
    model = network()
    for field, value in (("passes", 0), ("batch_size", 0), ("learning_rate", 0.0)):
        arguments: dict[str, Any] = {field: value}
        with pytest.raises(ed.EigenDamageError, match=field if field != "passes" else "passes"):
            ed.compress(
                model,
                images(8),
                budget=ed.Budget(macs=0.5),
                polish=ed.PolishConfig(**arguments),
                method="eigendamage",
                progress=False,
            )
    with pytest.raises(ed.LossError, match="polish needs a loss with a divergence"):
        ed.compress(
            model,
            [(x, torch.zeros(8, dtype=torch.long)) for x in images(8)],
            budget=ed.Budget(macs=0.5),
            polish=1,
            method="eigendamage",
            loss=nn.functional.cross_entropy,
            fisher="empirical",
            progress=False,
        )


class Reshaped(nn.Module):
    """Reads what a convolution returns by ``view``, which only runs in rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 5, 3, padding=1)
        self.head = nn.Linear(180, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).view(len(x), 180))


class Strided(nn.Module):
    """Returns something else in another memory format."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.as_strided(y, (len(x), 3), (180, 1))


@pytest.mark.parametrize(
    ("other", "chosen"), [(None, True), (Reshaped, False), (Strided, False)], ids=str
)
def test_convolutions_run_in_channels_last_where_nothing_changes(other: Any, chosen: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 4, 6, 6)
    batch = as_batch(x, 0, CPU)
    networks = [nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3))]
    networks += [] if other is None else [other()]
    before = [
        (p, p.data_ptr(), p.stride(), p.detach().clone()) for n in networks for p in n.parameters()
    ]
    first = networks[0][0].weight
    with channels_last([n.eval() for n in networks], [batch]):
        assert first.is_contiguous(memory_format=torch.channels_last) is chosen
        assert networks[0](x).is_contiguous(memory_format=torch.channels_last) is chosen
        for network in networks:
            network(x).sum().backward()
    for parameter, place, stride, value in before:
        assert (parameter.data_ptr(), parameter.stride()) == (place, stride)
        assert torch.equal(parameter, value)
    with pytest.raises(ZeroDivisionError), channels_last(networks, [batch]):
        raise ZeroDivisionError
    assert first.is_contiguous()


def test_polish_in_channels_last_is_polish_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    original = network().double()
    batches = list(Batches([x.double() for x in images(4)], CPU))
    found: list[tuple[dict[str, Tensor], Training]] = []
    for available in (True, False):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda a=available: a)
        model = network(1).double()
        config = ed.PolishConfig(passes=2, learning_rate=1e-2)
        done = polish(
            model, original, batches[:3], held_out=batches[3:], config=config, progress=False
        )
        found.append((model.state_dict(), done))
    (mine, fast), (its, plain) = found
    assert fast.scores == pytest.approx(plain.scores, rel=1e-9)
    for name, value in its.items():
        torch.testing.assert_close(mine[name], value, msg=name)
        assert mine[name].stride() == value.stride()


def assert_it_helps(model: nn.Module, original: nn.Module, batches: list[Batch]) -> None:
    config = ed.PolishConfig(passes=2, learning_rate=1e-2)
    done = polish(model, original, batches[:3], held_out=batches[3:], config=config, progress=False)
    assert done.scores[-1] < done.scores[0]


class Pooled(nn.Module):
    """Reads large images by ``view``, and small ones in a way that runs in any format."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 5, 3, padding=1)
        self.head = nn.Linear(80, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.adaptive_avg_pool2d(self.conv(x), 4)
        return self.head(y.flatten(1) if x.shape[-1] < 9 else y.view(len(x), 80))


def test_a_shape_that_does_not_run_in_channels_last_keeps_all_in_rows() -> None:
    torch.manual_seed(0)
    original, model = Pooled().eval(), Pooled().eval()
    sizes = (6, 6, 12, 6)
    batches = [as_batch(torch.randn(4, 4, s, s), 0, CPU) for s in sizes]
    assert_it_helps(model, original, batches)


def test_a_frozen_model_is_polished_and_frozen_again() -> None:
    original, model = network().requires_grad_(False), network(1).requires_grad_(False)
    batches = list(Batches(images(4), CPU))
    assert_it_helps(model, original, batches)
    assert not any(p.requires_grad for p in (*model.parameters(), *original.parameters()))
