"""How to train."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

from eigendamage.errors import EigenDamageError
from eigendamage.seeds import check_seed

Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["one-cycle", "cosine", "constant"]
Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune.

    Attributes:
        epochs: passes over the data.
        learning_rate: the peak of the schedule; by default 0.02 for SGD and 0.001 for AdamW.
        optimizer: ``sgd`` (with Nesterov's momentum) or ``adamw``.
        schedule: of the learning rate, step by step: ``one-cycle`` (up for three tenths, then down
            to nothing; Smith & Topin 2019), ``cosine`` (from the peak to zero) or ``constant``.
        momentum: of SGD.
        weight_decay: of either.
        clip: the most that the norm of all gradients together may be; None for no limit.
        average: how much of the past stays at each step in a moving average of the weights, which
            is what is judged and kept; 0 for none.
        accumulate: batches whose gradients are averaged for one step.
        precision: of activations: ``no`` keeps the model's own, ``bf16`` and ``fp16`` are mixed.
        held_out: the fraction of the training data that is not trained on but decides which
            epoch's weights are kept; 0 keeps the last.
        temperature: that logits are divided by where the original is distilled.
        label_share: how much of the loss is that of the labels where there are labels and an
            original to distil; the rest is the distillation.
        features: dotted paths of modules whose outputs are to be like the original's too.
        feature_weight: of that in the loss.
        checkpoint_every: seconds between checkpoints within an epoch.
        seed: of everything that is drawn.
    """

    epochs: int = 1
    learning_rate: float | None = None
    optimizer: Optimizer = "sgd"
    schedule: Schedule = "one-cycle"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float | None = None
    average: float = 0.0
    accumulate: int = 1
    precision: Precision = "no"
    held_out: float = 0.1
    temperature: float = 4.0
    label_share: float = 0.5
    features: tuple[str, ...] = ()
    feature_weight: float = 1.0
    checkpoint_every: float = 120.0
    seed: int = 0

    @property
    def peak(self) -> float:
        """The learning rate at the schedule's peak."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 0.02 if self.optimizer == "sgd" else 0.001

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            EigenDamageError: naming the field, what it is, and what it may be.
        """
        hints = get_type_hints(FinetuneConfig)
        for field in fields(self):
            allowed = get_args(hints[field.name])
            value = getattr(self, field.name)
            if hints[field.name] is int and (isinstance(value, bool) or not isinstance(value, int)):
                raise EigenDamageError(f"{field.name} is {value!r}; expected a whole number")
            if allowed and isinstance(allowed[0], str) and value not in allowed:
                raise EigenDamageError(
                    f"{field.name} is '{value}'; expected {', '.join(map(str, allowed))}"
                )
        check_seed(self.seed)
        self._check_numbers()

    def _check_numbers(self) -> None:
        for name in ("epochs", "accumulate"):
            if getattr(self, name) < 1:
                raise EigenDamageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name, value in (("learning_rate", self.peak), ("temperature", self.temperature)):
            if not 0 < value < math.inf:
                raise EigenDamageError(f"{name} is {value}; it must be positive")
        for name in ("weight_decay", "feature_weight", "checkpoint_every"):
            if not getattr(self, name) >= 0:
                raise EigenDamageError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.clip is not None and not self.clip > 0:
            raise EigenDamageError(f"clip is {self.clip}; it must be positive, or None")
        for name in ("momentum", "average", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise EigenDamageError(
                    f"{name} is {getattr(self, name)}; it must be at least 0 and below 1"
                )
        if not 0 <= self.label_share <= 1:
            raise EigenDamageError(f"label_share is {self.label_share}; it must be in 0..1")
