"""Padded tokens count for nothing: a padded batch is worth what its sequences are one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eigendamage as ed
from eigendamage.batches import Batches
from eigendamage.curvature import head_of
from eigendamage.surgery import repair_model

LENGTHS = (5, 2, 7, 1, 4)
VOCABULARY = 6


class TokenModel(nn.Module):
    """One head of attention, which heeds the mask, a Linear by token, and a head by token."""

    def __init__(self, outputs: int = VOCABULARY) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.qkv = nn.Linear(8, 24)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, outputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        q, k, v = self.qkv(x).chunk(3, -1)
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        if attention_mask is not None:
            seen = seen & (attention_mask != 0)[:, None, :]
            seen = seen | torch.eye(x.shape[1], dtype=torch.bool)
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.head(x + torch.tanh(self.mix(x)))


class PooledModel(TokenModel):
    """The same with one prediction an example, from the mean of its tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        tokens = super().forward(input_ids, attention_mask)
        if attention_mask is None:
            return tokens.mean(1)
        weight = attention_mask.to(tokens).unsqueeze(-1)
        return (tokens * weight).sum(1) / weight.sum(1)


def model_of(kind: Callable[[], nn.Module] = TokenModel) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (1, t), generator=generator) for t in LENGTHS]


def padded(rows: list[Tensor], labels: list[Tensor] | None = None) -> dict[str, Tensor]:
    """One batch; what it is padded with is a token like others."""
    longest = max(r.shape[1] for r in rows) + 1
    batch = {
        "input_ids": torch.cat([F.pad(r, (0, longest - r.shape[1]), value=3) for r in rows]),
        "attention_mask": torch.cat(
            [F.pad(torch.ones_like(r), (0, longest - r.shape[1])) for r in rows]
        ),
    }
    if labels is not None:
        batch["labels"] = torch.cat([F.pad(y, (0, longest - y.shape[1]), value=2) for y in labels])
    return batch


def alone(rows: list[Tensor], labels: list[Tensor] | None = None) -> list[dict[str, Tensor]]:
    if labels is None:
        return [{"input_ids": r} for r in rows]
    return [{"input_ids": r, "labels": y} for r, y in zip(rows, labels, strict=True)]


def assert_same(a: ed.Curvature, b: ed.Curvature) -> None:
    assert list(a) == list(b)
    for name in a:
        for what in ("S", "A", "mean", "diagonal", "gates"):
            mine, its = getattr(a[name], what), getattr(b[name], what)
            torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-14)
        assert a[name].positions == b[name].positions == sum(LENGTHS)
        torch.testing.assert_close(
            a[name].eigenvalues.sum(), b[name].eigenvalues.sum(), rtol=1e-10, atol=1e-14
        )


@pytest.mark.parametrize("fisher", ["mc", "exact"])
@pytest.mark.parametrize("loss", ["cross_entropy", "causal_lm", "mse", "bce"])
def test_a_padded_batch_has_the_curvature_of_its_sequences(loss: str, fisher: str) -> None:
    model, rows = model_of(), sequences()
    options = {"loss": loss, "fisher": fisher, "also": ("gradients",), "progress": False}
    one_by_one = ed.estimate_curvature(model, alone(rows), **options)
    together = ed.estimate_curvature(model, [padded(rows)], **options)
    assert_same(together, one_by_one)
    # λ itself, in one basis
    basis = {**options, "also": (), "basis": one_by_one}
    lam = ed.estimate_curvature(model, [padded(rows)], **basis)
    for name in lam:
        torch.testing.assert_close(
            lam[name].eigenvalues, one_by_one[name].eigenvalues, rtol=1e-10, atol=1e-14
        )


def test_labels_of_padded_tokens_count_for_nothing() -> None:
    model, rows = model_of(), sequences()
    labels = [(r + 1) % VOCABULARY for r in rows]
    labels[2][0, 3] = -100
    options = {"fisher": "empirical", "also": ("gradients",), "progress": False}
    one_by_one = ed.estimate_curvature(model, alone(rows, labels), **options)
    assert_same(ed.estimate_curvature(model, [padded(rows, labels)], **options), one_by_one)


def test_one_prediction_an_example_leaves_padded_tokens_out_of_its_layers() -> None:
    model, rows = model_of(PooledModel), sequences()
    options = {"fisher": "exact", "also": ("gradients",), "progress": False}
    one_by_one = ed.estimate_curvature(model, alone(rows), **options)
    assert_same(ed.estimate_curvature(model, [padded(rows)], **options), one_by_one)


@pytest.mark.parametrize("loss", ["cross_entropy", "causal_lm", "mse", "bce"])
def test_measurements_leave_padded_tokens_out(loss: str) -> None:
    model, rows = model_of(), sequences()
    other = model_of()
    with torch.no_grad():
        other.mix.weight.mul_(0.5)
    labels = None if loss != "cross_entropy" else [(r + 1) % VOCABULARY for r in rows]
    found = [
        ed.evaluate(other, data, loss=loss, reference=model, progress=False)
        for data in (alone(rows, labels), [padded(rows, labels)])
    ]
    assert found[0].divergence == pytest.approx(found[1].divergence, rel=1e-10)
    assert found[0].divergence > 0
    if loss in ("cross_entropy", "causal_lm"):
        assert found[0].loss == pytest.approx(found[1].loss, rel=1e-10)
        assert found[0].accuracy == found[1].accuracy
        assert found[0].positions == found[1].positions
    changes = {"mix": ed.measure.Change(other.mix.weight.detach().unsqueeze(2))}
    quadratics = [
        ed.joint_quadratic(model, changes, data, loss=loss, progress=False)
        for data in (alone(rows), [padded(rows)])
    ]
    assert quadratics[0] == pytest.approx(quadratics[1], rel=1e-10)


@pytest.mark.parametrize("positions", [64, 3])
def test_a_repair_leaves_padded_tokens_out(positions: int) -> None:
    model, rows = model_of(), sequences()
    curvature = ed.estimate_curvature(model, alone(rows), progress=False)
    repaired = []
    for data in (alone(rows), [padded(rows)]):
        small = model_of()
        with torch.no_grad():
            small.qkv.weight.mul_(0.7)
        batches = list(Batches(data, torch.device("cpu")))
        repair_model(
            small, model, batches, held_out=batches, curvature=curvature,
            positions=positions, progress=False,
        )  # fmt: skip
        repaired.append(small)
    assert not torch.equal(repaired[0].qkv.weight, 0.7 * model.qkv.weight)
    for mine, its in zip(*(m.parameters() for m in repaired), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-8, atol=1e-10)


def test_the_next_token_is_what_a_causal_model_predicts() -> None:
    """The loss is the sum over tokens of −log p(next), as Hugging Face has it but for the mean."""
    model, rows = model_of(), sequences()
    head = head_of("causal_lm")
    (batch,) = Batches([padded(rows)], torch.device("cpu"))
    output = model(**batch.kwargs).detach()
    losses = head.per_example(output, batch)
    for n, row in enumerate(rows):
        log_p = output[n].log_softmax(-1)
        expected = -sum(log_p[t, row[0, t + 1]] for t in range(row.shape[1] - 1))
        torch.testing.assert_close(losses[n], torch.as_tensor(expected).double())
    found = ed.evaluate(model, [padded(rows)], loss="causal_lm", progress=False)
    assert found.positions == sum(LENGTHS) - len(LENGTHS)
    assert found.loss_per_position == pytest.approx(float(losses.sum()) / found.positions)


def test_labels_of_a_causal_model_come_before_its_tokens() -> None:
    model, row = model_of(), sequences()[0]
    hidden = row.clone()
    hidden[0, :3] = -100  # a prompt: only what follows is to be predicted
    whole = ed.evaluate(model, [row], loss="causal_lm", progress=False)
    after = ed.evaluate(model, [(row, hidden)], loss="causal_lm", progress=False)
    assert whole.positions == 4
    assert after.positions == 2
    assert 0 < after.loss < whole.loss


def test_a_causal_loss_needs_one_output_a_token() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ed.LossError, match="needs the tokens"):
        ed.estimate_curvature(model, torch.randn(4, 3), loss="causal_lm", progress=False)
    with pytest.raises(ed.LossError, match="one output a token"):
        ed.estimate_curvature(
            PooledModel(), torch.randint(6, (4, 3)), loss="causal_lm", progress=False
        )


def _ignored(rows: Tensor) -> dict[str, Tensor]:
    return {"input_ids": rows, "labels": torch.full_like(rows, -100)}


def _masked(rows: Tensor) -> dict[str, Tensor]:
    return {"input_ids": rows, "attention_mask": torch.zeros_like(rows)}


class _FirstToken(TokenModel):
    """One prediction an example, which is there though every token is masked."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(input_ids, attention_mask)[:, 0]


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("loss", ["cross_entropy", "causal_lm"])
def test_labels_that_are_all_ignored_are_refused(loss: str, fisher: str) -> None:
    rows = torch.arange(24).reshape(4, 6) % VOCABULARY
    with pytest.raises(ed.DataError, match=r"no position of the 8 examples counts.*all -100"):
        ed.estimate_curvature(
            model_of(), [_ignored(rows)] * 2, loss=loss, fisher=fisher, progress=False
        )
    labelled = {"input_ids": rows, "labels": rows}
    found = ed.estimate_curvature(
        model_of(), [_ignored(rows), labelled], loss=loss, fisher=fisher, progress=False
    )
    assert all(bool(layer.S.any()) for layer in found.values())


@pytest.mark.parametrize("kind", [TokenModel, _FirstToken])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce"])
def test_a_mask_that_leaves_no_token_is_refused(kind: Callable[[], nn.Module], loss: str) -> None:
    rows = torch.arange(24).reshape(4, 6) % VOCABULARY
    with pytest.raises(ed.DataError, match="attention_mask excludes every token"):
        ed.estimate_curvature(model_of(kind), [_masked(rows)], loss=loss, progress=False)


def test_texts_of_one_token_have_none_to_predict() -> None:
    with pytest.raises(ed.DataError, match="one token each"):
        ed.estimate_curvature(
            model_of(), [torch.tensor([[1], [2]])], loss="causal_lm", progress=False
        )
