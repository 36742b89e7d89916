"""Polish: distilling the original into a smaller network on a few inputs without labels."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from eigendamage.batch import Batch
from eigendamage.calls import device_of
from eigendamage.curvature import Loss, head_of
from eigendamage.errors import EigenDamageError
from eigendamage.layers import evaluating
from eigendamage.training._augment import Augment
from eigendamage.training._config import FinetuneConfig
from eigendamage.training._feed import PoolFeed
from eigendamage.training._finetune import mean_score, training_of
from eigendamage.training._layout import channels_last
from eigendamage.training._loop import Training, train
from eigendamage.training._objective import Objective
from eigendamage.training._pool import Pool, mapped, tensor_of

VIEWS = 2
"""How often each held-out input is augmented."""


@dataclass(frozen=True)
class PolishConfig:
    """How to polish.

    Attributes:
        passes: over the inputs.
        batch_size: inputs a step, where they can be mixed.
        learning_rate: of AdamW, the peak of the one-cycle schedule.
        average: how much of the past stays at each step in a moving average of the weights, which
            is what is judged and kept. It takes the noise of the few inputs out.
        clip: the most that the norm of all gradients together may be.
        temperature: that both networks' logits are divided by.
        feature_weight: of how unlike the layers' outputs are, beside the divergence.
        augment: changes inputs before both networks see them; None for nothing.
    """

    passes: int = 6
    batch_size: int = 32
    learning_rate: float = 2e-3
    average: float = 0.98
    clip: float | None = None
    temperature: float = 2.0
    feature_weight: float = 400.0
    augment: Augment | None = None

    def training(self, seed: int) -> FinetuneConfig:
        """The same as a config of the loop.

        Raises:
            EigenDamageError: naming a field that cannot be.
        """
        for field in ("passes", "batch_size"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise EigenDamageError(f"{field} is {value!r}; expected a whole number from 1 up")
        config = FinetuneConfig(
            epochs=self.passes,
            optimizer="adamw",
            learning_rate=self.learning_rate,
            weight_decay=0.0,
            clip=self.clip,
            average=self.average,
            temperature=self.temperature,
            feature_weight=self.feature_weight,
            seed=seed,
        )
        config.check()
        return config


def polish(
    model: nn.Module,
    original: nn.Module,
    data: Iterable[Batch],
    *,
    held_out: Iterable[Batch],
    features: Sequence[str] = (),
    config: PolishConfig | None = None,
    loss: Loss = "cross_entropy",
    seed: int = 0,
    progress: bool = True,
) -> Training:
    """Train a smaller network, in place, to predict what the original does, without labels.

    Knowledge distillation (Hinton et al. 2015) on the few inputs that the curvature saw, of the
    predictions and of what layers return (Romero et al. 2015): outputs of layers say far more of an
    input than its classes do. Both networks run as in evaluation, so batch norms keep their
    statistics. After each pass the divergence on held-out inputs is measured, and in the end the
    model has the weights of the best pass. Held-out inputs are augmented as the others are, `VIEWS`
    times, always alike: plan and repair were judged by the inputs as they are, which look better
    for it than others do. The scores have that of the start too: whether it was better is for the
    caller to say.

    Of several processes each does all of it.

    Args:
        model: the network to train. Only parameters that require gradients change; all do if none
            requires any, as in a model that was frozen to be used.
        original: the network that it was made of; not changed.
        data: what to train on; kept in memory.
        held_out: other inputs, to choose the best pass by.
        features: dotted paths of modules of both networks whose outputs are to be alike.
        config: how to train.
        loss: which divergence: ``cross_entropy``, ``causal_lm``, ``mse`` or ``bce``.
        seed: of the order of the inputs and of their augmentation.
        progress: whether to show progress.

    Raises:
        DataError: if there is nothing to train on.
        LossError: if the loss is a function, which has no divergence.
        NonFiniteError: if the divergence becomes NaN or infinite.
        EigenDamageError: if the model has no parameter, or the config cannot be.
    """
    config = config or PolishConfig()
    training = config.training(seed)
    objective = Objective(
        head_of(loss),
        original,
        temperature=config.temperature,
        label_share=0.0,
        features=features if config.feature_weight else (),
        feature_weight=config.feature_weight,
    )
    data, judged = list(data), list(held_out)
    pool = Pool(data, config.batch_size)
    shapes = {batch.shapes(): batch for batch in (*judged, *data)}
    if config.augment is not None:
        draws = torch.Generator().manual_seed(seed)
        judged = [_augmented(config.augment, b, draws) for _ in range(VIEWS) for b in judged]
    feed = PoolFeed(pool.shuffled, pool.steps, partial(_augmented, config.augment), seed)
    with (
        _some_trained(model),
        training_of(model, original),
        evaluating(model),
        channels_last((model, original), list(shapes.values())),
    ):
        return train(
            model,
            feed,
            objective,
            training,
            score=partial(
                mean_score, objective.divergence, [(b, objective.target(b)) for b in judged]
            ),
            checkpoint=None,
            device=device_of(model),
            what="polish",
            progress=progress,
        )


@contextmanager
def _some_trained(model: nn.Module) -> Generator[None]:
    """All parameters of a frozen model require gradients meanwhile."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    if any(p.requires_grad for p in parameters):
        yield
        return
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def _augmented(augment: Augment | None, batch: Batch, draws: torch.Generator) -> Batch:
    if augment is None:
        return batch
    if tensor_of(batch) is None:
        raise EigenDamageError(
            "augment= changes inputs that are one tensor; this data has others, so leave it out"
        )

    def change(x: Tensor) -> Tensor:
        return augment(x, draws)

    return mapped(batch, change, batch.size)
