"""What is promised of every call: options count, orders repeat, nothing of the caller's changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import eigendamage as ed
from eigendamage import errors
from eigendamage.batches import Batches
from eigendamage.compress._split import split
from eigendamage.measure import Evaluation

CPU = torch.device("cpu")


def _network(width: int = 24) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(10, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        *(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)),
    ).eval()


def _inputs(examples: int = 120) -> Tensor:
    return torch.randn(examples, 10, generator=torch.Generator().manual_seed(1))


def _data(examples: int = 120) -> list[Tensor]:
    return list(_inputs(examples).split(20))


def _shuffled(generator: torch.Generator | None = None) -> DataLoader[Any]:
    numbered = TensorDataset(torch.arange(60).float().unsqueeze(1))
    return DataLoader(numbered, batch_size=5, shuffle=True, generator=generator)


def _seen(batches: Any) -> list[float]:
    return [float(value) for batch in batches for value in batch.args[0]]


@pytest.mark.parametrize("own", [False, True])
def test_every_pass_over_a_loader_that_shuffles_has_the_same_order(own: bool) -> None:
    generator = torch.Generator().manual_seed(5) if own else None
    loader = _shuffled(generator)
    before = torch.get_rng_state(), None if generator is None else generator.get_state()
    first = _seen(Batches(loader, CPU))
    assert first != sorted(first)
    assert first == _seen(Batches(loader, CPU))
    assert torch.equal(torch.get_rng_state(), before[0])
    if generator is not None:
        assert torch.equal(generator.get_state(), before[1])


def test_what_a_loader_s_dataset_draws_is_the_same_in_every_pass() -> None:
    class Noisy(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> Tensor:
            return index + torch.rand(1)

    loader = DataLoader(Noisy(), batch_size=4, shuffle=True)
    passes = []
    for _ in range(2):
        torch.rand(3)  # something else draws in between
        passes.append(_seen(Batches(loader, CPU)))
    assert passes[0] == passes[1]


class ByEpoch(torch.utils.data.Sampler[int]):
    """Shuffles by the number of the epoch, which rises at the end of each, as accelerate's does."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 60

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.epoch)
        yield from torch.randperm(60, generator=generator).tolist()
        self.epoch += 1


def test_a_loader_that_counts_its_passes_is_told_the_first() -> None:
    numbered = TensorDataset(torch.arange(60).float().unsqueeze(1))
    batches = Batches(DataLoader(numbered, batch_size=5, sampler=ByEpoch()), CPU)
    assert _seen(batches) == _seen(batches)


class Unsteady:
    """Draws anew in every pass."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.randn(120, 10).split(20))


def test_data_that_is_another_in_every_pass_is_told() -> None:
    budget = ed.Budget(macs=0.7)
    result = ed.compress(_network(), Unsteady(), budget=budget, progress=False)
    assert any("did not begin with the same batch" in note for note in result.report.notes)
    steady = ed.compress(_network(), _data(), budget=budget, progress=False)
    assert not any("begin with" in note for note in steady.report.notes)


@pytest.mark.parametrize("form", ["loader", "images"])
def test_nothing_that_is_held_out_of_what_shuffles_is_fitted_on(form: str) -> None:
    numbered = ed.zoo.ImageSet(torch.arange(60).float().view(60, 1, 1, 1))
    data = _shuffled() if form == "loader" else numbered.batches(5, shuffle_seed=3)
    parts = split(data, CPU, None)
    assert parts.steady
    for _ in range(2):
        fitted, held_out = set(_seen(parts.fit)), set(_seen(parts.held_out))
        assert held_out
        assert not fitted & held_out
        assert len(fitted | held_out) == 60


@pytest.mark.parametrize("call", ["compress", "sweep", "preview"])
def test_the_caller_s_random_state_is_as_before(call: str) -> None:
    loader = DataLoader(_inputs(), batch_size=20, shuffle=True)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    if call == "sweep":
        ed.sweep(_network_kept(), loader, budgets=[ed.Budget(macs=0.7)], progress=False)
    else:
        verb = getattr(ed, call)
        verb(_network_kept(), loader, budget=ed.Budget(macs=0.7), progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def _network_kept() -> nn.Module:
    with torch.random.fork_rng():
        return _network()


def test_training_does_not_take_up_gradients_that_lie_around() -> None:
    batches = [(x, torch.arange(len(x)) % 4) for x in _data(60)]
    config = ed.FinetuneConfig(epochs=1, held_out=0.0, learning_rate=0.01)
    clean, dirty = _network(), _network()
    for parameter in dirty.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    for model in (clean, dirty):
        ed.finetune(model, batches, config, progress=False)
    torch.testing.assert_close(dirty.state_dict(), clean.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("steps", [{"shots": 2}, {"rounds": 2}])
@pytest.mark.parametrize("how", ["ignore", "the curvature"])
def test_what_is_left_alone_stays_so_in_every_step(steps: dict[str, int], how: str) -> None:
    model = _network()
    ignored = ["2"] if how == "the curvature" else []
    curvature = ed.estimate_curvature(
        model, _data(), also=("patches",), ignore=ignored, progress=False
    )
    result = ed.compress(
        model,
        _data(),
        budget=ed.Budget(macs=0.6),
        actions=("low-rank",),
        curvature=curvature,
        ignore=["2"] if how == "ignore" else [],
        progress=False,
        **steps,
    )
    assert type(result.model[2]) is nn.Linear
    assert type(result.model[4]) is not nn.Linear


def test_a_shot_that_leaves_less_than_it_had_to_is_no_failure() -> None:
    result = ed.compress(
        _network(16),
        _data(),
        budget=ed.Budget(macs=0.8),
        shots=8,
        multiple=4,
        progress=False,
    )
    assert result.report.macs[1] <= 0.8 * result.report.macs[0]
    assert len(result.earlier) + 1 < 8  # some shots had nothing to do


def test_lambda_in_a_given_basis_and_no_lambda_do_not_go_together() -> None:
    basis = ed.estimate_curvature(_network(), _data(), progress=False)
    with pytest.raises(errors.EigenDamageError, match="basis= is there to estimate λ"):
        ed.estimate_curvature(_network(), _data(), basis=basis, eigenvalues="kfac", progress=False)


def test_a_layer_whose_forward_was_replaced_on_it_is_left_alone() -> None:
    model = _network()
    plain = model[2].forward
    model[2].forward = lambda x: 3 * plain(x)
    result = ed.compress(model, _data(), budget=ed.Budget(macs=0.7), progress=False)
    assert "forward was replaced" in result.report.left_alone["2"]
    assert type(result.model[2]) is nn.Linear


def test_all_of_a_report_is_measured_on_as_many_examples() -> None:
    labelled = [(x, torch.arange(len(x)) % 4) for x in _data()]
    model = _network()
    result = ed.compress(
        model,
        labelled,
        budget=ed.Budget(macs=0.7),
        max_examples=60,
        epochs=1,
        finetuning=ed.FinetuneConfig(held_out=0.0, learning_rate=1e-3),
        progress=False,
    )
    assert result.report.measured_examples == 60
    assert result.report.finetuned is not None
    again = ed.evaluate(result.model, labelled, max_examples=60, progress=False)
    assert result.report.finetuned.loss == pytest.approx(again.loss)


def test_a_plan_says_what_was_asked_of_it_also_for_a_loss() -> None:
    budget = ed.Budget(loss=0.05)
    result = ed.compress(_network(), _data(), budget=budget, progress=False)
    assert result.plan.budget == budget


def test_calls_within_inference_mode_do_all_that_they_do_outside() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)),
    ).eval()
    images = list(torch.randn(60, 3, 6, 6).split(10))
    outside = ed.compress(model, images, budget=ed.Budget(macs=0.6), progress=False)
    with torch.inference_mode():
        inside = ed.compress(model, images, budget=ed.Budget(macs=0.6), progress=False)
    assert inside.plan == outside.plan
    assert not any(p.is_inference() for p in inside.model.parameters())
    torch.testing.assert_close(
        inside.model.state_dict(), outside.model.state_dict(), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"multiple": 16}, "multiple"),
        ({"actions": ("channels",)}, "actions"),
        ({"floors": {"*": 0.9}}, "floors"),
    ],
)
def test_options_of_auto_are_refused_for_other_methods(options: dict[str, Any], words: str) -> None:
    model = _network()
    curvature = ed.estimate_curvature(model, _data(), progress=False)
    with pytest.raises(errors.EigenDamageError, match=f"for method='auto' alone.*{words}"):
        ed.make_plan(model, curvature, ed.Budget(macs=0.7), method="eigendamage", **options)


@pytest.mark.parametrize("refine", [-3, 0.5])
def test_steps_of_refining_are_a_whole_number(refine: Any) -> None:
    model = _network()
    curvature = ed.estimate_curvature(model, _data(), also=("patches",), progress=False)
    with pytest.raises(errors.EigenDamageError, match="refine"):
        ed.make_plan(model, curvature, ed.Budget(macs=0.7), refine=refine)
    with pytest.raises(errors.EigenDamageError, match="multiple is 1"):
        ed.make_plan(model, curvature, ed.Budget(macs=0.7), multiple=1.5)  # type: ignore[arg-type]


def test_calibration_is_refused_where_there_is_none() -> None:
    with pytest.raises(errors.EigenDamageError, match=r"for method='auto' alone.*calibrate"):
        ed.compress(
            _network(),
            _data(),
            budget=ed.Budget(macs=0.7),
            method="eigendamage",
            calibrate=True,
            progress=False,
        )


def test_a_mask_that_is_added_to_scores_may_hide() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, src: Tensor, mask: Tensor) -> Tensor:
            h = F.scaled_dot_product_attention(src, src, src, attn_mask=mask)
            return self.last(self.first(h).relu()).mean(1)

    torch.manual_seed(0)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    data = [{"src": torch.randn(20, 5, 6), "mask": mask} for _ in range(6)]
    result = ed.compress(Masked().eval(), data, budget=ed.Budget(macs=0.8), progress=False)
    assert result.report.macs[1] < result.report.macs[0]
    data[0]["src"][0, 0, 0] = -torch.inf
    with pytest.raises(errors.NonFiniteError, match="'src' of batch 0 holds 1 NaN or infinite"):
        ed.evaluate(result.model, data, progress=False)
    data[0]["src"][0, 0, 0], data[1]["mask"] = 0.0, mask + torch.nan
    with pytest.raises(errors.NonFiniteError, match="'mask' of batch 1"):
        ed.evaluate(result.model, data, progress=False)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_a_loss_is_computed_in_single_precision_whatever_the_model_s(loss: Any) -> None:
    model = _network().bfloat16()
    x = _inputs(40).bfloat16()
    labels = F.one_hot(torch.arange(40) % 4, 4).float()
    with torch.no_grad():
        logits = model(x).float()
    measured = ed.evaluate(model, [(x, labels)], loss=loss, progress=False).loss
    if loss == "bce":
        expected = F.binary_cross_entropy_with_logits(logits, labels)
    else:
        expected = F.cross_entropy(logits, labels)
    assert measured == pytest.approx(float(expected), rel=1e-5)


def test_a_broken_language_model_has_an_infinite_perplexity() -> None:
    assert Evaluation(1, 1000.0, None, None, positions=1).perplexity == float("inf")


def test_a_mask_of_tokens_that_is_added_says_what_counts() -> None:
    hidden = torch.zeros(2, 4)
    hidden[1, 2:] = -torch.inf
    words = torch.ones(2, 4, dtype=torch.long)
    (batch,) = Batches([{"input_ids": words, "attention_mask": hidden}], CPU)
    assert batch.counted is not None
    assert batch.counted.tolist() == [[True] * 4, [True, True, False, False]]


def test_the_steps_one_by_one_within_inference_mode() -> None:
    model, data = _network(), _data()
    with torch.inference_mode():
        curvature = ed.estimate_curvature(model, data, also=("patches",), progress=False)
        plan = ed.make_plan(model, curvature, ed.Budget(macs=0.7))
        small = ed.apply_plan(model, plan, curvature)
        labelled = [(x, torch.arange(len(x)) % 4) for x in data]
        config = ed.FinetuneConfig(epochs=1, held_out=0.0, learning_rate=1e-3)
        ed.finetune(small, labelled, config, progress=False)
        dense = ed.densify(small)
    assert not any(p.is_inference() for p in (*small.parameters(), *dense.parameters()))


def test_a_curvature_loads_onto_a_device_by_either_of_its_names(tmp_path: Any) -> None:
    curvature = ed.estimate_curvature(_network(), _data(), progress=False)
    assert repr(curvature).startswith("Curvature of 4 layers on 120 examples")
    ed.save_curvature(curvature, tmp_path / "curvature.safetensors")
    loaded = ed.load_curvature(tmp_path / "curvature.safetensors", device=CPU)
    assert torch.equal(loaded["0"].S, curvature["0"].S)


def test_a_repair_takes_data_as_every_call_does() -> None:
    model = _network()
    data = _data()
    cut = ed.compress(
        model,
        data,
        budget=ed.Budget(macs=0.6),
        actions=("low-rank",),
        repair=False,
        calibrate=False,
        progress=False,
    ).model
    found = ed.repair_model(cut, model, data[:5], held_out=(x for x in data[5:]), progress=False)
    assert any(layer.after < layer.before for layer in found.values())


def test_a_budget_that_cannot_be_met_names_what_holds_the_most() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(2000, 8)
            self.rnn = nn.GRU(8, 32, batch_first=True)
            self.inner, self.head = nn.Linear(32, 16), nn.Linear(16, 3)

        def forward(self, words: Tensor) -> Tensor:
            return self.head(self.inner(self.rnn(self.words(words))[0]).relu()).mean(1)

    torch.manual_seed(0)
    words = list(torch.randint(0, 2000, (60, 6)).split(10))
    with pytest.raises(errors.BudgetError, match="'rnn' cannot be cut: GRU is not a Linear"):
        ed.compress(Tagger().eval(), words, budget=ed.Budget(macs=0.2), progress=False)
    whole = Tagger().eval()
    whole.position = nn.Parameter(torch.zeros(1, 8))  # which makes the model itself a culprit
    with pytest.raises(errors.BudgetError, match="'rnn' cannot be cut"):
        ed.compress(whole, words, budget=ed.Budget(macs=0.2), progress=False)
