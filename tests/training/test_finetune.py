"""Fine-tuning: what it minimises, what it keeps, what it leaves as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import eigendamage as ed
from eigendamage.batch import as_batch
from eigendamage.curvature import head_of
from eigendamage.training import Training, worsening
from eigendamage.training._feed import LoaderFeed, hold_out
from eigendamage.training._objective import Objective

CPU = torch.device("cpu")


def network(seed: int = 0, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, 3),
    ).eval()


def images(count: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 1, 6, 6, generator=generator)
    return x, (x.mean((1, 2, 3)) > 0).long() + (x[:, 0, 0, 0] > 0).long()


def loader(labels: bool = True, seed: int = 3) -> DataLoader[Any]:
    x, y = images()
    dataset = TensorDataset(x, y) if labels else TensorDataset(x)
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size=8, shuffle=True, generator=generator)


def same(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(v, other[k]) for k, v in a.state_dict().items())


def test_the_objective_is_the_mean_of_labels_and_distillation() -> None:
    original, model = network(0).double(), network(1).double()
    x, y = images()
    x = x.double()
    batch = as_batch((x, y), 0, CPU)
    z, q = original(x), model(x)
    t = 3.0
    kl = t**2 * F.kl_div(
        (q / t).log_softmax(1), (z / t).log_softmax(1), log_target=True, reduction="batchmean"
    )
    labels = F.cross_entropy(q, y)
    head = head_of("cross_entropy")

    def value(original: nn.Module | None, share: float, of: object = batch) -> Tensor:
        return Objective(head, original, temperature=t, label_share=share)(model, of)[0]  # type: ignore[arg-type]

    torch.testing.assert_close(value(None, 0.5), labels)
    torch.testing.assert_close(value(original, 0.3), 0.3 * labels + 0.7 * kl)
    torch.testing.assert_close(value(original, 1.0), labels)
    torch.testing.assert_close(value(original, 0.5, as_batch(x, 0, CPU)), kl)
    with pytest.raises(ed.DataError, match="needs the original"):
        value(None, 0.5, as_batch(x, 0, CPU))


def test_features_are_matched_relative_to_their_size() -> None:
    original, model = network(0).double(), network(1).double()
    x = images()[0].double()
    batch = as_batch(x, 0, CPU)
    head = head_of("cross_entropy")
    plain, _ = Objective(head, original)(model, batch)
    with_features, _ = Objective(head, original, features=("1", "4"), feature_weight=2.0)(
        model, batch
    )
    a, b = model[:2](x), original[:2](x)
    c, d = model[:5](x), original[:5](x)
    unlike = (a - b).square().sum() / b.square().sum() + (c - d).square().sum() / d.square().sum()
    torch.testing.assert_close(with_features, plain + 2.0 * unlike / 2)
    assert not any(m._forward_hooks for m in (*model.modules(), *original.modules()))
    with pytest.raises(ed.MismatchError, match="no module 'nowhere'"):
        Objective(head, original, features=("nowhere",))(model, batch)
    with pytest.raises(ed.MismatchError, match="lost no channels"):
        Objective(head, original, features=("1",))(network(1, width=6).double(), batch)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "constant"])
def test_training_lowers_the_loss(optimizer: Any, schedule: Any) -> None:
    model = network()
    config = ed.FinetuneConfig(
        epochs=4,
        optimizer=optimizer,
        schedule=schedule,
        learning_rate=0.05 if optimizer == "sgd" else 0.01,
        held_out=0.0,
    )
    done = ed.finetune(model, loader(), config, progress=False)
    assert done.losses[-1] < done.losses[0] - 0.05
    assert done.scores == ()
    assert done.best == 4


def test_accumulated_batches_make_the_step_of_one_large_batch() -> None:
    x, y = images(32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    one, many = copy.deepcopy(model), copy.deepcopy(model)
    large = [(x[:16], y[:16]), (x[16:], y[16:])]
    small = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 32, 4)]
    for which, data, accumulate in ((one, large, 1), (many, small, 4)):
        config = ed.FinetuneConfig(epochs=2, accumulate=accumulate, held_out=0.0)
        ed.finetune(which, data, config, progress=False)
    torch.testing.assert_close(one[1].weight, many[1].weight)
    assert not torch.equal(one[1].weight, model[1].weight)


def test_without_labels_the_original_is_learned() -> None:
    original, model = network(0), network(1)
    with torch.no_grad():
        original[-1].weight.mul_(8.0)  # type: ignore[operator]
    x = images()[0]
    before = ed.evaluate(model, [x], reference=original, progress=False).divergence
    config = ed.FinetuneConfig(epochs=8, learning_rate=0.05)
    done = ed.finetune(model, loader(labels=False), config, original=original, progress=False)
    after = ed.evaluate(model, [x], reference=original, progress=False).divergence
    assert before is not None
    assert after is not None
    assert after < 0.7 * before
    assert len(done.scores) == 9
    with pytest.raises(ed.DataError, match="give original="):
        ed.finetune(model, loader(labels=False), progress=False)


def test_the_best_epoch_is_kept_by_what_was_held_out_alone() -> None:
    model = network()
    config = ed.FinetuneConfig(epochs=6, learning_rate=0.3, schedule="constant", momentum=0.0)
    done = ed.finetune(model, loader(), config, progress=False)
    assert done.scores[done.best] == min(done.scores[1:])
    _, out = hold_out(loader(), config.held_out, config.seed)
    batches = [as_batch(raw, i, CPU) for i, raw in enumerate(out)]
    with torch.no_grad():
        losses = [F.cross_entropy(model(*b.args), b.target, reduction="sum") for b in batches]  # type: ignore[arg-type]
    mean = float(sum(losses)) / sum(b.size for b in batches)
    assert mean == pytest.approx(done.scores[done.best], rel=1e-5)


def test_training_that_makes_it_worse_says_so() -> None:
    model = network()
    ed.finetune(model, loader(), ed.FinetuneConfig(epochs=20), progress=False)
    ruinous = ed.FinetuneConfig(epochs=1, learning_rate=3.0, schedule="constant")
    with pytest.warns(UserWarning, match="worse on held-out data") as caught:
        done = ed.finetune(model, loader(), ruinous, progress=False)
    assert done.scores[1] > 1.1 * done.scores[0]
    (warning,) = caught
    assert warning.filename == __file__
    said = f"{done.scores[0]:.3g} before, {done.scores[1]:.3g} after epoch 1, the best of 1"
    assert said in str(warning.message)


@pytest.mark.parametrize(
    ("before", "after", "worse"),
    [
        (1.0, 1.2, True),
        (1.0, 1.08, False),
        (0.01, 0.03, False),
        (-2.0, -2.1, False),
        (-2, -1, True),
    ],
)
def test_a_score_is_worse_by_a_tenth_and_more_than_little(
    before: float, after: float, worse: bool
) -> None:
    done = Training(losses=(1.0,), scores=(before, after), best=1)
    assert (worsening(done, ed.FinetuneConfig(epochs=1)) is not None) == worse


def test_what_is_held_out_is_not_trained_on() -> None:
    x = torch.arange(40.0)[:, None]
    plain = DataLoader(TensorDataset(x), batch_size=4, shuffle=True, drop_last=True)
    for data, size in ((plain, 4), ([x[i : i + 4] for i in range(0, 40, 4)], 8)):
        rest, out = hold_out(data, 0.1 if size == 4 else 0.2, seed=0)
        left, held = (
            {float(v) for raw in part for v in as_batch(raw, 0, CPU).args[0].flatten()}
            for part in (rest, out)
        )
        assert len(held) == size
        assert not left & held
        assert left | held == set(map(float, range(40)))
    pictures = ed.zoo.ImageSet(x[:, :, None, None]).batches(4, shuffle_seed=0)
    rest, out = hold_out(pictures, 0.1, seed=0)
    assert not {float(v) for b in rest for v in b} & {float(v) for b in out for v in b}

    def stream() -> Iterator[Tensor]:
        yield x

    with pytest.raises(ed.DataError, match="cannot be divided"):
        hold_out(stream(), 0.1, seed=0)
    with pytest.raises(ed.DataError, match="too few to hold out"):
        hold_out([x], 0.1, seed=0)


def test_a_pass_depends_on_its_number_alone() -> None:
    data = loader()
    state = data.generator.get_state() if data.generator is not None else None
    feed = LoaderFeed(data, CPU, seed=5, rank=0, processes=1)
    first, second, again = ([b.args[0] for b in feed.batches(e)] for e in (0, 1, 0))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert state is not None
    assert data.generator is not None
    assert torch.equal(state, data.generator.get_state())
    halves = [LoaderFeed(data, CPU, seed=5, rank=r, processes=2) for r in (0, 1)]
    assert len(halves[0]) == len(feed) // 2
    dealt = [b.args[0] for pair in zip(*(h.batches(0) for h in halves), strict=True) for b in pair]
    assert all(torch.equal(a, b) for a, b in zip(first, dealt, strict=False))
    with pytest.raises(ed.DataError, match="each of 9 processes"):
        LoaderFeed(data, CPU, seed=0, rank=0, processes=9)


def test_stages_start_balanced_whatever_norms_they_come_with() -> None:
    model = network()
    x, y = images()
    small = ed.compress(
        model, [(x, y)], budget=ed.Budget(macs=0.6), method="eigendamage", progress=False
    ).model
    layers = [m for m in small.modules() if isinstance(m, ed.FactoredConv2d | ed.FactoredLinear)]
    assert layers
    crooked = copy.deepcopy(small)
    for layer in crooked.modules():
        if isinstance(layer, ed.FactoredConv2d | ed.FactoredLinear):
            with torch.no_grad():
                layer[0].weight.mul_(100.0)  # type: ignore[operator]
                layer[-1].weight.div_(100.0)  # type: ignore[operator]
    config = ed.FinetuneConfig(epochs=1, learning_rate=1e-12, weight_decay=0.0, held_out=0.0)
    ed.finetune(crooked, loader(), config, progress=False)
    for layer in crooked.modules():
        if isinstance(layer, ed.FactoredConv2d | ed.FactoredLinear):
            norms = [float(stage.weight.detach().norm()) for stage in layer]  # type: ignore[operator]
            assert max(norms) == pytest.approx(min(norms), rel=1e-4)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_nothing_else_is_changed(precision: Any) -> None:
    model, original = network(1), network(0)
    frozen = model[0].weight.requires_grad_(False)
    model[1].train()
    modes = [m.training for m in model.modules()]
    kept = frozen.clone()
    weights = copy.deepcopy(original.state_dict())
    hook = model[2].register_forward_hook(lambda *_: None)
    mine = Accelerator(cpu=True, gradient_accumulation_steps=3)
    torch.manual_seed(7)
    np.random.seed(7)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    config = ed.FinetuneConfig(epochs=1, precision=precision)
    ed.finetune(model, loader(), config, original=original, progress=False)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(frozen, kept)
    assert "forward" not in vars(model)
    assert all(torch.equal(weights[k], v) for k, v in original.state_dict().items())
    assert not original.training
    assert list(model[2]._forward_hooks) == [hook.id]
    assert all(p.grad is None for p in model.parameters())
    # A user's own accelerator keeps its settings.
    assert mine.gradient_accumulation_steps == 3
    assert mine.mixed_precision == "no"


def test_a_run_that_blows_up_leaves_the_weights() -> None:
    model = network()
    before = copy.deepcopy(model)
    config = ed.FinetuneConfig(epochs=3, learning_rate=1e30, schedule="constant")
    with pytest.raises(ed.NonFiniteError, match="lower the learning rate"):
        ed.finetune(model, loader(), config, progress=False)
    assert same(model, before)
    assert not model.training


class StoppedError(Exception):
    pass


class Breaks:
    """A loader that fails at a batch of a pass, as a process may."""

    def __init__(self, data: DataLoader[Any], epoch: int, batch: int) -> None:
        self._data = data
        self._at = epoch, batch
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._data)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self._data):
            if (self._epoch, index) == self._at:
                raise StoppedError
            yield batch


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("epoch", "batch"), [(0, 0), (0, 3), (1, 0), (2, 4)])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(
    tmp_path: Path, optimizer: Any, epoch: int, batch: int
) -> None:
    held = [images()]
    x, y = images()

    def data() -> DataLoader[Any]:
        return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)

    config = ed.FinetuneConfig(
        epochs=3, optimizer=optimizer, learning_rate=0.01, checkpoint_every=0.0, accumulate=2
    )
    whole = network()
    once = ed.finetune(whole, data(), config, held_out=held, progress=False)
    torch.manual_seed(99)  # what a caller drew before must not matter
    model, file = network(), tmp_path / "state.pt"
    torch.manual_seed(100)
    with pytest.raises(ed.DataError, match="StoppedError"):
        ed.finetune(
            model,
            Breaks(data(), epoch, batch),
            config,
            held_out=held,
            checkpoint=file,
            progress=False,
        )
    assert file.exists() == (epoch > 0 or batch > 1)
    again = ed.finetune(model, data(), config, held_out=held, checkpoint=file, progress=False)
    assert again == once
    assert same(model, whole)
    # Done is done: the state is taken up once more, and nothing is trained.
    fresh = network()
    assert (
        ed.finetune(fresh, data(), config, held_out=held, checkpoint=file, progress=False) == once
    )
    assert same(fresh, whole)
    assert list(tmp_path.iterdir()) == [file]


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    ed.finetune(network(), loader(), ed.FinetuneConfig(), checkpoint=file, progress=False)
    with pytest.raises(ed.MismatchError, match=r"learning_rate was 0\.02 and is now 0\.03"):
        ed.finetune(
            network(),
            loader(),
            ed.FinetuneConfig(learning_rate=0.03),
            checkpoint=file,
            progress=False,
        )
    with pytest.raises(ed.MismatchError, match="the weights was"):
        ed.finetune(network(1), loader(), checkpoint=file, progress=False)
    file.write_bytes(b"no state")
    with pytest.raises(ed.FileFormatError, match="not the state of a training run"):
        ed.finetune(network(), loader(), checkpoint=file, progress=False)


def test_a_state_of_an_earlier_version_is_refused_with_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    torch.save({"version": 1, "identity": {}}, file)
    with pytest.raises(ed.FileFormatError, match=r"of version 1, .* reads 2; remove it .*rounds"):
        ed.finetune(network(), loader(), checkpoint=file, progress=False)
    torch.save({"weights": torch.ones(2)}, file)
    with pytest.raises(ed.FileFormatError, match="says no version"):
        ed.finetune(network(), loader(), checkpoint=file, progress=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("accumulate", 0),
        ("learning_rate", 0.0),
        ("optimizer", "adam"),
        ("schedule", "step"),
        ("precision", "fp8"),
        ("momentum", 1.0),
        ("held_out", 1.0),
        ("label_share", 1.5),
        ("clip", 0.0),
        ("weight_decay", -1.0),
        ("temperature", 0.0),
    ],
)
def test_a_wrong_field_is_named(field: str, value: Any) -> None:
    config = ed.FinetuneConfig()
    object.__setattr__(config, field, value)  # as where no type checker sees it
    with pytest.raises(ed.EigenDamageError, match=f"{field} is '?{value}"):
        ed.finetune(network(), loader(), config, progress=False)


def test_nothing_to_train_is_refused() -> None:
    model = network().requires_grad_(False)
    with pytest.raises(ed.EigenDamageError, match="no parameter of the model is trainable"):
        ed.finetune(model, loader(), progress=False)
    with pytest.raises(ed.LossError, match="can only be distilled"):
        ed.finetune(network(), loader(), original=network(1), loss=F.cross_entropy, progress=False)


@pytest.mark.parametrize("distilled", [False, True])
def test_labels_that_are_all_ignored_are_refused(distilled: bool, tmp_path: Path) -> None:
    x, y = images(16)
    ignored = [(part, torch.full((8,), -100)) for part in x.split(8)]
    labelled = list(zip(x.split(8), y.split(8), strict=True))
    config = ed.FinetuneConfig(held_out=0.0)
    model, file = network(), tmp_path / "state.pt"
    before = copy.deepcopy(model)

    def tune(data: list[Any], **options: Any) -> ed.Training:
        original = network(1) if distilled else None
        return ed.finetune(model, data, config, original=original, progress=False, **options)

    with pytest.raises(ed.DataError, match=r"no position of the training data counts.*epoch 1.*"):
        tune(ignored, checkpoint=file)
    with pytest.raises(ed.DataError, match=r"no position of the held-out data counts"):
        tune(labelled, held_out=ignored, checkpoint=file)
    assert same(model, before)
    assert not file.exists()
    assert len(tune([*ignored, *labelled], held_out=[ignored[0], labelled[0]]).losses) == 1


def test_mixed_precision_ends_near_full_precision() -> None:
    full, mixed = network(), network()
    config = ed.FinetuneConfig(epochs=3, learning_rate=0.05)
    expected = ed.finetune(full, loader(), config, progress=False)
    done = ed.finetune(mixed, loader(), replace(config, precision="bf16"), progress=False)
    assert mixed[0].weight.dtype == torch.float32
    assert done.losses != expected.losses
    assert done.losses == pytest.approx(expected.losses, rel=0.05)
    with pytest.raises(ed.EigenDamageError, match="'fp16' needs a GPU"):
        ed.finetune(full, loader(), replace(config, precision="fp16"), progress=False)


def test_the_start_competes_only_where_nobody_has_seen_the_answers() -> None:
    original, model = network(0), network(0)
    config = ed.FinetuneConfig(epochs=2, learning_rate=0.5, schedule="constant")
    without = ed.finetune(model, loader(labels=False), config, original=original, progress=False)
    assert without.scores[0] == pytest.approx(0.0, abs=1e-9)
    assert without.best == 0
    assert same(model, original)
    assert ed.finetune(network(), loader(), config, progress=False).best >= 1


def test_an_average_of_the_weights_is_what_is_kept() -> None:
    x, y = images(32)
    data = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 32, 8)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    config = ed.FinetuneConfig(
        epochs=1, schedule="constant", learning_rate=0.1, momentum=0.0, weight_decay=0.0,
        held_out=0.0, average=0.5,
    )  # fmt: skip
    mean = model[1].weight.detach().clone()
    slow = copy.deepcopy(model)
    for inputs, labels in data:
        slow.zero_grad()
        F.cross_entropy(slow(inputs), labels).backward()
        with torch.no_grad():
            for parameter in slow.parameters():
                parameter.sub_(0.1 * parameter.grad)  # type: ignore[operator]
        mean = 0.5 * mean + 0.5 * slow[1].weight.detach()
    ed.finetune(model, data, config, progress=False)
    torch.testing.assert_close(model[1].weight.detach(), mean)


def test_weights_that_are_lost_in_the_last_step_are_noticed() -> None:
    model = network()
    before = copy.deepcopy(model)
    config = ed.FinetuneConfig(
        held_out=0.0, schedule="constant", learning_rate=1e38, weight_decay=10.0
    )
    with pytest.raises(ed.NonFiniteError, match="lower the learning rate"):
        ed.finetune(model, [images()], config, progress=False)
    assert same(model, before)


def test_padding_has_no_part_in_features() -> None:
    torch.manual_seed(0)
    original, model = (nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double() for _ in range(2))
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

    class Called(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.inner(x)

    def loss(inputs: Tensor) -> Tensor:
        objective = Objective(head_of("cross_entropy"), Called(original), features=("inner.0",))
        batch = as_batch({"x": inputs, "attention_mask": mask}, 0, CPU)
        return objective(Called(model), batch)[0]

    other = x.clone()
    other[0, 3:] = 100.0
    torch.testing.assert_close(loss(x), loss(other))


def test_other_data_is_another_run(tmp_path: Path) -> None:
    file, config = tmp_path / "state.pt", ed.FinetuneConfig(held_out=0.0)
    x, y = images()

    def run(shift: float, **options: Any) -> None:
        data = [(x[i : i + 8] + shift, y[i : i + 8]) for i in range(0, 48, 8)]
        ed.finetune(network(), data, config, checkpoint=file, progress=False, **options)

    run(0.0)
    with pytest.raises(ed.MismatchError, match="the first batch was"):
        run(1.0)
    with pytest.raises(ed.MismatchError, match="the original's weights was none"):
        run(0.0, original=network(1))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ed.finetune(network(), [(x, y)], config, checkpoint=tmp_path / "no" / "s", progress=False)


def test_an_original_with_other_outputs_is_refused() -> None:
    with pytest.raises(ed.MismatchError, match="the original"):
        ed.finetune(
            nn.Linear(6, 3),
            [torch.randn(4, 6) for _ in range(10)],
            original=nn.Linear(6, 1),
            progress=False,
        )
