"""Softmax cross-entropy: of classes, of tokens, of the tokens that come next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from eigendamage.batch import Batch, tensors_in
from eigendamage.calls import logits_of
from eigendamage.curvature._head import PredictiveHead, checked, uniform_where, widened
from eigendamage.errors import LossError

IGNORED_LABEL = -100


class CrossEntropy(PredictiveHead):
    """Softmax cross-entropy; the classes are axis 1, or the last of (batch, tokens, classes)."""

    def per_example(self, output: Any, batch: Batch) -> Tensor:
        logits = widened(self._classes_last(logits_of(output)))
        target = self._labels(logits, batch)
        if target.is_floating_point():
            losses = -(target * logits.log_softmax(-1)).sum(-1)
            losses = losses * self.counted(losses.shape, batch)
        else:
            losses = F.cross_entropy(
                logits.flatten(0, -2),
                target.flatten(),
                ignore_index=IGNORED_LABEL,
                reduction="none",
            ).reshape(target.shape)
        return losses.reshape(batch.size, -1).sum(1)

    def _rise(self, reference: Tensor, logits: Tensor, batch: Batch) -> Tensor:
        p = self._classes_last(reference).double().log_softmax(-1)
        q = self._classes_last(logits).double().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        return (kl * self.counted(kl.shape, batch)).reshape(batch.size, -1).sum(1)

    def terms(self, logits: Tensor, batch: Batch) -> int:
        return max(1, self.draws(logits, batch))

    def quadratic(self, logits: Tensor, tangent: Tensor, batch: Batch) -> Tensor:
        # ½ vᵀ (diag(p) − p pᵀ) v is half the variance of v under p.
        p = self._classes_last(logits).double().softmax(-1)
        v = self._classes_last(tangent).double()
        spread = v - (p * v).sum(-1, keepdim=True)
        variance = (p * spread.square()).sum(-1)
        counted = self.counted(variance.shape, batch)
        return 0.5 * (variance * counted).reshape(batch.size, -1).sum(1)

    def sampled(self, logits: Tensor, batch: Batch, random: torch.Generator) -> Tensor:
        p = self._classes_last(logits).softmax(-1)
        counted = self.counted(p.shape[:-1], batch)
        uniform = uniform_where(counted, random)
        cumulative = p.double().cumsum(-1)
        drawn = (cumulative < uniform.unsqueeze(-1)).sum(-1).clamp_max(p.shape[-1] - 1)
        v = p - F.one_hot(drawn, p.shape[-1]).to(p.dtype)
        return self._as_output(v * counted.unsqueeze(-1))

    def draws(self, logits: Tensor, batch: Batch) -> int:
        return int(self.counted(self._classes_last(logits).shape[:-1], batch).sum())

    def observed(self, logits: Tensor, batch: Batch) -> Tensor:
        z = self._classes_last(logits)
        p = z.softmax(-1)
        target = self._labels(z, batch)
        if target.is_floating_point():
            v = p * target.sum(-1, keepdim=True) - target
            return self._as_output(v * self.counted(v.shape[:-1], batch).unsqueeze(-1))
        kept = target != IGNORED_LABEL
        v = p - F.one_hot(target.where(kept, 0), p.shape[-1]).to(p.dtype)
        return self._as_output(v * kept.unsqueeze(-1))

    def passes(self, logits: Tensor) -> int:
        return logits[0].numel()

    def expected(self, logits: Tensor, batch: Batch) -> Iterator[Tensor]:
        # diag(p) − p pᵀ = Σ_c p_c (e_c − p)(e_c − p)ᵀ; positions draw their labels independently.
        p = self._classes_last(logits).softmax(-1)
        flat = p.reshape(batch.size, -1, p.shape[-1])
        counted = self.counted(p.shape[:-1], batch).reshape(batch.size, -1, 1)
        for t in range(flat.shape[1]):
            for c in range(flat.shape[2]):
                v = torch.zeros_like(flat)
                v[:, t] = -flat[:, t]
                v[:, t, c] += 1
                v[:, t] *= flat[:, t, c, None].sqrt() * counted[:, t]
                yield self._as_output(v.reshape(p.shape))

    @staticmethod
    def _classes_last(logits: Tensor) -> Tensor:
        if logits.ndim < 2:
            raise LossError(
                f"cross_entropy needs outputs of shape (batch, classes) or (batch, tokens, "
                f"classes) or (batch, classes, height, width); found {tuple(logits.shape)}"
            )
        return logits.movedim(1, -1) if logits.ndim > 3 else logits

    @staticmethod
    def _as_output(v: Tensor) -> Tensor:
        return v.movedim(-1, 1) if v.ndim > 3 else v

    def target(self, batch: Batch) -> Tensor | None:
        """The labels of a batch as they are given; None if there are none."""
        return batch.target

    def counted(self, positions: torch.Size, batch: Batch) -> Tensor:
        """Which positions count, of that shape: no padded tokens and no ignored labels."""
        target, tokens = self.target(batch), batch.counted
        counted = torch.ones(positions, dtype=torch.bool, device=_device_of(batch))
        if target is not None and target.shape == positions and not target.is_floating_point():
            counted &= target != IGNORED_LABEL
        return counted & tokens if tokens is not None and tokens.shape == positions else counted

    def has_target(self, batch: Batch) -> bool:
        return self.target(batch) is not None

    def predictions(
        self, output: Any, batch: Batch
    ) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"] | None]:
        """How many positions of each example count, and how many of them are predicted right.

        The second is None where the labels are none, or probabilities.
        """
        logits = self._classes_last(logits_of(output))
        counted = self.counted(logits.shape[:-1], batch)
        target, totals = self.target(batch), counted.reshape(batch.size, -1).sum(1)
        if target is None or target.is_floating_point():
            return totals, None
        right = (logits.argmax(-1) == target) & counted
        return totals, right.reshape(batch.size, -1).sum(1)

    def _labels(self, logits: Tensor, batch: Batch) -> Tensor:
        """Class indices as int64, or soft labels, checked against outputs with classes last.

        What does not count has the ignored label.
        """
        target = checked(self.target(batch))
        soft = target.is_floating_point()
        expected = logits.shape if soft else logits.shape[:-1]
        if target.shape != expected:
            raise LossError(
                f"labels have shape {tuple(target.shape)}, but outputs with classes last have "
                f"shape {tuple(logits.shape)}; expected labels of shape {tuple(expected)}"
            )
        if soft:
            return target
        target = target.long().masked_fill(~self.counted(target.shape, batch), IGNORED_LABEL)
        seen = target[target != IGNORED_LABEL]
        if seen.numel() and (int(seen.min()) < 0 or int(seen.max()) >= logits.shape[-1]):
            raise LossError(
                f"labels range from {int(seen.min())} to {int(seen.max())}, but the model has "
                f"{logits.shape[-1]} outputs"
            )
        return target


class NextToken(CrossEntropy):
    """The loss of a causal language model: the output at a token predicts the token after it.

    Labels are the tokens themselves, or ``labels`` of the same shape, not shifted. The last
    position counts for nothing, nor do padded tokens, as what predicts or as what is predicted.
    """

    def target(self, batch: Batch) -> Tensor | None:
        tokens = _tokens(batch) if batch.target is None else batch.target
        if tokens is None:
            raise LossError(
                "loss='causal_lm' needs the tokens; give batches of token ids, dicts with "
                "'input_ids', or 'labels' of shape (batch, tokens) beside other inputs"
            )
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise LossError(
                f"loss='causal_lm' needs labels of shape (batch, tokens) that are integers; found "
                f"{tuple(tokens.shape)} of {tokens.dtype}"
            )
        counted = batch.counted
        if counted is not None and counted.shape == tokens.shape:
            tokens = tokens.masked_fill(~counted, IGNORED_LABEL)
        return F.pad(tokens[:, 1:], (0, 1), value=IGNORED_LABEL)

    def counted(self, positions: torch.Size, batch: Batch) -> Tensor:
        target = self.target(batch)
        if target is None or target.shape != positions:
            raise LossError(
                f"loss='causal_lm' needs one output a token: the outputs are of positions "
                f"{tuple(positions)}, the tokens {None if target is None else tuple(target.shape)}"
            )
        return super().counted(positions, batch)


def _tokens(batch: Batch) -> Tensor | None:
    """The token ids that a batch consists of; None if it does not."""
    found = batch.kwargs.get("input_ids", batch.args[0] if batch.args else None)
    whole = isinstance(found, Tensor) and not found.is_floating_point() and found.ndim == 2
    return found if whole else None


def _device_of(batch: Batch) -> torch.device:
    return tensors_in([*batch.args, *batch.kwargs.values()])[0].device
