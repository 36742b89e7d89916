"""The losses that the curvature knows, and a user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from eigendamage.batches import Batch, logits_of
from eigendamage.curvature._head import Fisher, Head, PredictiveHead, Seed, target_of
from eigendamage.errors import LossError, NonFiniteError

LossFunction = Callable[[Any, Tensor], Tensor]
Loss = Literal["cross_entropy", "mse", "bce"] | LossFunction

IGNORED_LABEL = -100


class CrossEntropy(PredictiveHead):
    """Softmax cross-entropy; the classes are axis 1, or the last of (batch, tokens, classes)."""

    def per_example(self, output: Any, batch: Batch) -> Tensor:
        logits = self._classes_last(logits_of(output))
        target = self._labels(logits, batch)
        if target.is_floating_point():
            losses = -(target * logits.log_softmax(-1)).sum(-1)
        else:
            wide = logits if logits.dtype == torch.float64 else logits.float()
            losses = F.cross_entropy(
                wide.flatten(0, -2),
                target.flatten(),
                ignore_index=IGNORED_LABEL,
                reduction="none",
            ).reshape(target.shape)
        return losses.reshape(batch.size, -1).sum(1)

    def divergence(self, reference: Tensor, logits: Tensor, batch: Batch) -> Tensor:
        p = self._classes_last(reference).double().log_softmax(-1)
        q = self._classes_last(logits).double().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        return (kl * self._mask(kl, batch)).reshape(batch.size, -1).sum(1)

    def terms(self, logits: Tensor, batch: Batch) -> int:
        one_each = self._classes_last(logits)[..., 0]
        return max(1, int(self._mask(one_each, batch).sum()))

    def quadratic(self, logits: Tensor, tangent: Tensor, batch: Batch) -> Tensor:
        # ½ vᵀ (diag(p) − p pᵀ) v is half the variance of v under p.
        p = self._classes_last(logits).double().softmax(-1)
        v = self._classes_last(tangent).double()
        spread = v - (p * v).sum(-1, keepdim=True)
        variance = (p * spread.square()).sum(-1)
        return 0.5 * (variance * self._mask(variance, batch)).reshape(batch.size, -1).sum(1)

    def sampled(self, logits: Tensor, batch: Batch, random: torch.Generator) -> Tensor:
        p = self._classes_last(logits).softmax(-1)
        # One uniform number a position, drawn in data order on the CPU: the labels do not depend
        # on how the data is cut into batches, nor on the device.
        uniform = torch.rand(p.shape[:-1], generator=random, dtype=torch.float64).to(p.device)
        cumulative = p.double().cumsum(-1)
        drawn = (cumulative < uniform.unsqueeze(-1)).sum(-1).clamp_max(p.shape[-1] - 1)
        v = p - F.one_hot(drawn, p.shape[-1]).to(p.dtype)
        return self._as_output(v * self._mask(v[..., 0], batch).unsqueeze(-1))

    def draws(self, logits: Tensor) -> int:
        return self._classes_last(logits)[..., 0].numel()

    def observed(self, logits: Tensor, batch: Batch) -> Tensor:
        z = self._classes_last(logits)
        p = z.softmax(-1)
        target = self._labels(z, batch)
        if target.is_floating_point():
            return self._as_output(p * target.sum(-1, keepdim=True) - target)
        kept = target != IGNORED_LABEL
        v = p - F.one_hot(target.where(kept, 0), p.shape[-1]).to(p.dtype)
        return self._as_output(v * kept.unsqueeze(-1))

    def passes(self, logits: Tensor) -> int:
        return logits[0].numel()

    def expected(self, logits: Tensor, batch: Batch) -> Iterator[Tensor]:
        # diag(p) − p pᵀ = Σ_c p_c (e_c − p)(e_c − p)ᵀ; positions draw their labels independently.
        p = self._classes_last(logits).softmax(-1)
        flat = p.reshape(batch.size, -1, p.shape[-1])
        mask = self._mask(p[..., 0], batch).reshape(batch.size, -1, 1)
        for t in range(flat.shape[1]):
            for c in range(flat.shape[2]):
                v = torch.zeros_like(flat)
                v[:, t] = -flat[:, t]
                v[:, t, c] += 1
                v[:, t] *= flat[:, t, c, None].sqrt() * mask[:, t]
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

    @staticmethod
    def _mask(like: Tensor, batch: Batch) -> Tensor:
        """1 for positions that count: labels that are not ignored, tokens that are not padding."""
        target = batch.target
        if target is not None and target.shape == like.shape and not target.is_floating_point():
            return (target != IGNORED_LABEL).to(like.dtype)
        attention = batch.kwargs.get("attention_mask")
        if isinstance(attention, Tensor) and attention.shape == like.shape:
            return (attention != 0).to(like.dtype)
        return torch.ones_like(like)

    @staticmethod
    def _labels(logits: Tensor, batch: Batch) -> Tensor:
        """Class indices as int64, or soft labels, checked against outputs with classes last."""
        target = target_of(batch)
        soft = target.is_floating_point()
        expected = logits.shape if soft else logits.shape[:-1]
        if target.shape != expected:
            raise LossError(
                f"labels have shape {tuple(target.shape)}, but outputs with classes last have "
                f"shape {tuple(logits.shape)}; expected labels of shape {tuple(expected)}"
            )
        if soft:
            return target
        target = target.long()
        seen = target[target != IGNORED_LABEL]
        if seen.numel() and (int(seen.min()) < 0 or int(seen.max()) >= logits.shape[-1]):
            raise LossError(
                f"labels range from {int(seen.min())} to {int(seen.max())}, but the model has "
                f"{logits.shape[-1]} outputs"
            )
        return target


class SquaredError(PredictiveHead):
    """Mean squared error over an example's outputs; the Hessian is 2/D times the identity."""

    def per_example(self, output: Any, batch: Batch) -> Tensor:
        logits = logits_of(output)
        return (
            (logits - _same_shape(target_of(batch), logits))
            .square()
            .reshape(batch.size, -1)
            .mean(1)
        )

    def divergence(self, reference: Tensor, logits: Tensor, batch: Batch) -> Tensor:
        return (logits.double() - reference.double()).square().reshape(batch.size, -1).mean(1)

    def quadratic(self, logits: Tensor, tangent: Tensor, batch: Batch) -> Tensor:
        return tangent.double().square().reshape(batch.size, -1).mean(1)

    def sampled(self, logits: Tensor, batch: Batch, random: torch.Generator) -> Tensor:
        uniform = torch.rand(logits.shape, generator=random, dtype=torch.float64)
        tiny = torch.finfo(torch.float64).tiny
        normal = torch.special.ndtri(uniform.clamp_min(tiny)).to(logits)
        return normal * (2 / logits[0].numel()) ** 0.5

    def draws(self, logits: Tensor) -> int:
        return logits.numel()

    def observed(self, logits: Tensor, batch: Batch) -> Tensor:
        return (logits - _same_shape(target_of(batch), logits)) * (2 / logits[0].numel())

    def passes(self, logits: Tensor) -> int:
        return logits[0].numel()

    def expected(self, logits: Tensor, batch: Batch) -> Iterator[Tensor]:
        outputs = logits[0].numel()
        yield from _one_at_a_time(torch.full_like(logits, (2 / outputs) ** 0.5))


class BinaryCrossEntropy(PredictiveHead):
    """Independent Bernoulli outputs, averaged over an example's outputs."""

    def per_example(self, output: Any, batch: Batch) -> Tensor:
        logits = logits_of(output)
        target = _same_shape(target_of(batch), logits).to(logits.dtype)
        losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return losses.reshape(batch.size, -1).mean(1)

    def divergence(self, reference: Tensor, logits: Tensor, batch: Batch) -> Tensor:
        p, q = reference.double(), logits.double()
        positive = p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q))
        negative = (-p).sigmoid() * (F.logsigmoid(-p) - F.logsigmoid(-q))
        return (positive + negative).reshape(batch.size, -1).mean(1)

    def quadratic(self, logits: Tensor, tangent: Tensor, batch: Batch) -> Tensor:
        p = logits.double().sigmoid()
        variance = p * (1 - p) * tangent.double().square()
        return 0.5 * variance.reshape(batch.size, -1).mean(1)

    def sampled(self, logits: Tensor, batch: Batch, random: torch.Generator) -> Tensor:
        p = logits.sigmoid()
        uniform = torch.rand(p.shape, generator=random, dtype=torch.float64).to(p.device)
        return (p - (uniform < p).to(p.dtype)) / logits[0].numel() ** 0.5

    def draws(self, logits: Tensor) -> int:
        return logits.numel()

    def observed(self, logits: Tensor, batch: Batch) -> Tensor:
        target = _same_shape(target_of(batch), logits).to(logits.dtype)
        return (logits.sigmoid() - target) / logits[0].numel()

    def passes(self, logits: Tensor) -> int:
        return logits[0].numel()

    def expected(self, logits: Tensor, batch: Batch) -> Iterator[Tensor]:
        p = logits.sigmoid()
        yield from _one_at_a_time((p * (1 - p) / logits[0].numel()).sqrt())


class CustomLoss(Head):
    """A user's own function of (output, target). Only its gradients are known, so only empirical.

    It returns the losses of the examples, (n,), or one number: their mean or sum, as told.
    """

    def __init__(self, function: LossFunction, reduction: Literal["mean", "sum"]) -> None:
        self.function = function
        self.reduction = reduction

    def seeds(
        self, output: Any, batch: Batch, fisher: Fisher, random: torch.Generator
    ) -> Iterator[Seed]:
        if fisher != "empirical":
            raise LossError(
                f"fisher='{fisher}' needs a predictive distribution, which a function does not "
                f"give; use loss='cross_entropy', 'mse' or 'bce', or fisher='empirical'"
            )
        total = self.per_example(output, batch).sum()
        if not bool(torch.isfinite(total)):
            raise NonFiniteError("the loss is NaN or infinite; check the weights and the labels")
        if not total.requires_grad:
            raise LossError("the loss does not depend on any layer that can be compressed")
        yield Seed(total, torch.ones_like(total), more=False)

    def per_example(self, output: Any, batch: Batch) -> Tensor:
        losses = self.function(output, target_of(batch))
        if losses.ndim == 0:
            scale = batch.size if self.reduction == "mean" else 1
            return (losses * scale / batch.size).expand(batch.size)
        if losses.shape[0] != batch.size:
            raise LossError(
                f"the loss function returned shape {tuple(losses.shape)} for {batch.size} "
                f"examples; return one loss an example, or one number"
            )
        return losses.reshape(batch.size, -1).sum(1)


def loss_name(loss: Loss) -> str:
    """The name of a loss, or of the function or class that it is."""
    return loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)


def head_of(loss: Loss, reduction: Literal["mean", "sum"] = "mean") -> Head:
    """The head for what a user names as loss.

    Raises:
        LossError: if the name is unknown.
    """
    if isinstance(loss, str):
        heads = {"cross_entropy": CrossEntropy, "mse": SquaredError, "bce": BinaryCrossEntropy}
        if loss not in heads:
            raise LossError(f"loss '{loss}' is unknown; known are {', '.join(heads)} or a function")
        return heads[loss]()
    declared = getattr(loss, "reduction", reduction)
    if declared not in ("mean", "sum", "none"):
        raise LossError(f"the loss has reduction '{declared}'; expected mean, sum or none")
    if not callable(loss):
        raise LossError(f"loss must be a name or a function, found {type(loss).__name__}")
    return CustomLoss(loss, "sum" if declared == "sum" else "mean")


def _same_shape(target: Tensor, logits: Tensor) -> Tensor:
    if target.shape == logits.shape:
        return target
    if target.numel() == logits.numel() and target.shape[0] == logits.shape[0]:
        return target.reshape(logits.shape)
    raise LossError(
        f"targets have shape {tuple(target.shape)}, outputs {tuple(logits.shape)}; they must match"
    )


def _one_at_a_time(values: Tensor) -> Iterator[Tensor]:
    """For each output of an example, a tensor that is zero but for ``values`` there."""
    flat = values.reshape(values.shape[0], -1)
    for d in range(flat.shape[1]):
        v = torch.zeros_like(flat)
        v[:, d] = flat[:, d]
        yield v.reshape(values.shape)
