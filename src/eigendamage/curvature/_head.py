"""What is back-propagated: the kinds of Fisher, for each loss.

Every kind is a list of cotangents v of the model's output such that Σ v vᵀ is, in expectation or
exactly, the matrix wanted there: the Hessian of the loss with respect to the output for ``mc`` and
``exact`` (it equals the Fisher of the predictive distribution, scaled as the loss is), the outer
product of the data's own gradients for ``empirical``. The loss of an example is

- ``cross_entropy``: summed over its positions (tokens, pixels), masked ones left out;
- ``causal_lm``: the same, where the output at a token predicts the next one;
- ``mse``: the mean over its outputs, as ``torch.nn.functional.mse_loss``;
- ``bce``: the mean over its outputs, as ``binary_cross_entropy_with_logits``.

Padded tokens, those that ``attention_mask`` excludes, count for nothing in any of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from eigendamage.batch import Batch
from eigendamage.calls import logits_of, output_tensors
from eigendamage.errors import LossError, MismatchError, NonFiniteError

Fisher = Literal["mc", "exact", "empirical"]

_MOST_PASSES = 65_536


@dataclass(frozen=True)
class Seed:
    """One backward pass: the tensor to start from, its cotangent, and whether more will follow."""

    start: Tensor
    cotangent: Tensor
    more: bool


class Head(ABC):
    """A loss as the curvature sees it."""

    def starts(self, output: Any) -> list[Tensor]:
        """The tensors of a model's output that the loss may be taken of.

        Raises:
            LossError: if there is none.
        """
        return output_tensors(output)

    def has_target(self, batch: Batch) -> bool:
        """Whether the loss of a batch can be measured: whether it has labels."""
        return batch.target is not None

    def positions(self, output: Any, batch: Batch) -> int:
        """How many positions of a batch's outputs count: all but ignored and padded ones."""
        return batch.size

    def counting(self, output: Any, batch: Batch) -> int:
        """`positions`, and none at all where every token of the batch is padding."""
        tokens = batch.counted
        return 0 if tokens is not None and not bool(tokens.any()) else self.positions(output, batch)

    @abstractmethod
    def per_example(self, output: Any, batch: Batch) -> Tensor:
        """The loss of each example, (n,)."""

    @abstractmethod
    def seeds(self, output: Any, batch: Batch, fisher: Fisher, random: Generator) -> Iterator[Seed]:
        """The backward passes that one batch takes.

        Raises:
            LossError: if the Fisher needs labels that the batch has not, or they do not fit.
            NonFiniteError: if the model's output or the loss holds a NaN or an infinity.
        """

    def numbers_drawn(self, output: Any, batch: Batch, fisher: Fisher) -> int:
        """How many random numbers `seeds` takes for a batch with this output."""
        return 0


class PredictiveHead(Head):
    """A loss that is (up to scale) the log-likelihood of a predictive distribution."""

    def starts(self, output: Any) -> list[Tensor]:
        return [logits_of(output)]

    def positions(self, output: Any, batch: Batch) -> int:
        return self.draws(logits_of(output), batch)

    def divergence(self, reference: Tensor, logits: Tensor, batch: Batch) -> Tensor:
        """The expected rise of each example's loss, (n,), if ``reference`` tells the truth.

        Cross-entropy: KL(reference ‖ logits), summed over positions.

        Raises:
            MismatchError: if the two are not of the same shape.
        """
        if reference.shape != logits.shape:
            raise MismatchError(
                f"the original (or reference) returns {tuple(reference.shape)} and the model "
                f"{tuple(logits.shape)} for the same batch; give the network that it was made of"
            )
        return self._rise(reference, logits, batch)

    @abstractmethod
    def _rise(self, reference: Tensor, logits: Tensor, batch: Batch) -> Tensor:
        """`divergence` of two that have the same shape."""

    def terms(self, logits: Tensor, batch: Batch) -> int:
        """How many terms the divergences of a batch's examples add up, one a position or example.

        At least 1.
        """
        return max(1, batch.size)

    @abstractmethod
    def quadratic(self, logits: Tensor, tangent: Tensor, batch: Batch) -> Tensor:
        """`divergence` to second order, (n,), if ``logits`` move by ``tangent``.

        ½ vᵀ H v in float64, v the example's tangent, H the Hessian of its loss in the logits, in
        expectation over the labels that the model predicts.
        """

    def seeds(self, output: Any, batch: Batch, fisher: Fisher, random: Generator) -> Iterator[Seed]:
        logits = logits_of(output)
        if logits.ndim == 0 or logits.shape[0] != batch.size:
            raise LossError(
                f"the model's output has shape {tuple(logits.shape)} for {batch.size} examples; "
                f"its first axis must be the batch"
            )
        if not bool(torch.isfinite(logits).all()):
            raise NonFiniteError(
                "the model's output holds NaN or infinite values although its input is finite; "
                "check the weights"
            )
        wide = logits.detach()
        wide = wide if wide.dtype == torch.float64 else wide.float()
        if fisher == "mc":
            cotangents: Iterator[Tensor] = iter([self.sampled(wide, batch, random)])
            total = 1
        elif fisher == "empirical":
            cotangents, total = iter([self.observed(wide, batch)]), 1
        else:
            total = self.passes(wide)
            if total > _MOST_PASSES:
                raise LossError(
                    f"fisher='exact' would take {total} backward passes a batch for outputs of "
                    f"shape {tuple(logits.shape)}; use fisher='mc'"
                )
            cotangents = self.expected(wide, batch)
        for index, v in enumerate(cotangents):
            yield Seed(logits, v.to(logits.dtype), more=index + 1 < total)

    def numbers_drawn(self, output: Any, batch: Batch, fisher: Fisher) -> int:
        return self.draws(logits_of(output), batch) if fisher == "mc" else 0

    @abstractmethod
    def sampled(self, logits: Tensor, batch: Batch, random: Generator) -> Tensor:
        """One cotangent, drawn from the model's own prediction."""

    @abstractmethod
    def draws(self, logits: Tensor, batch: Batch) -> int:
        """How many uniform numbers `sampled` takes, one after another: one a place that counts."""

    @abstractmethod
    def observed(self, logits: Tensor, batch: Batch) -> Tensor:
        """The gradient of the data's own loss."""

    @abstractmethod
    def passes(self, logits: Tensor) -> int:
        """How many cotangents `expected` yields."""

    @abstractmethod
    def expected(self, logits: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Cotangents whose outer products sum to the Hessian exactly."""


def widened(x: Tensor) -> Tensor:
    """At least in single precision: a loss in half of it has an error as large as what it rises."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def checked(target: Tensor | None) -> Tensor:
    """The labels of a batch.

    Raises:
        LossError: if it has none.
        NonFiniteError: if one is NaN or infinite.
    """
    if target is None:
        raise LossError(
            "this needs labels, but the data has none; give (input, label) batches, or use "
            "fisher='mc' (the default) or 'exact', which draw labels from the model itself"
        )
    if target.is_floating_point() and not bool(torch.isfinite(target).all()):
        raise NonFiniteError("the labels hold NaN or infinite values; clean the data first")
    return target


def uniform_where(wanted: Bool[Tensor, "*shape"], random: Generator) -> Float[Tensor, "*shape"]:
    """A uniform number in float64 for each place that is wanted, and 0 for the others.

    They are drawn in data order on the CPU: they depend neither on how the data is cut into
    batches or padded, nor on the device.
    """
    places = wanted.cpu()
    drawn = torch.zeros(wanted.shape, dtype=torch.float64)
    drawn[places] = torch.rand(int(places.sum()), generator=random, dtype=torch.float64)
    return drawn.to(wanted.device)
