"""Fine-tuning: by labels, by distilling the original, or by both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from eigendamage.batch import Batch, tensors_in
from eigendamage.batches import Batches, Data, iterable_of
from eigendamage.calls import device_of, require_gradients_possible
from eigendamage.curvature import Loss, head_of, loss_name
from eigendamage.distributed import (
    failing_alone,
    mark_of,
    one_fate,
    rank,
    require_same,
    world,
)
from eigendamage.errors import DataError, EigenDamageError, warn
from eigendamage.layers import balance_factors, evaluating, preserved_random_state
from eigendamage.training._checkpoint import Checkpoint
from eigendamage.training._config import FinetuneConfig
from eigendamage.training._feed import LoaderFeed, hold_out, seed_everything
from eigendamage.training._loop import Training, train
from eigendamage.training._objective import Objective

Item = TypeVar("Item")


@one_fate
@torch.inference_mode(False)
def finetune(
    model: nn.Module,
    data: Iterable[Any],
    config: FinetuneConfig | None = None,
    *,
    original: nn.Module | None = None,
    held_out: Data | None = None,
    loss: Loss = "cross_entropy",
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Training:
    """Train a model in place: on labels, on what the original predicts, or half on each.

    Factored layers start from equal norms of their stages, without which they hardly train. The
    weights of the epoch that is best on held-out data are kept, where something is held out. Modes,
    hooks and random states are as before; if training fails, so are the weights.

    Args:
        model: the model to train, compressed or not, on any device.
        data: batches, (input, label) or inputs alone, gone through once an epoch; of known length.
            Shuffling and augmentation are the loader's own.
        config: how to train.
        original: the network that ``model`` was made of, to learn from: alone where there are no
            labels, beside them otherwise (Hinton et al. 2015). It is not changed. None needs
            labels.
        held_out: other data to choose the epoch by; by default a part of ``data``, as the config
            says.
        loss: ``cross_entropy``, ``causal_lm``, ``mse``, ``bce``, or a function of (output, target).
        checkpoint: a file for the state of the run, written beside and renamed after each epoch and
            every ``config.checkpoint_every`` seconds. If it is there already, the run goes on from
            it, and ends with the same weights as one that was never stopped.
        progress: whether to show progress, with the time left.

    In a group of several processes (``torch.distributed``) all make this call with the same model
    and the same data. Batches are dealt out in turn and gradients averaged
    (DistributedDataParallel), so a step is as large as so many batches; those left over are left
    out. The first process writes.

    Returns:
        The losses and scores by epoch.

    Warns:
        UserWarning: if what was held out is clearly worse off after the best epoch than before.

    Raises:
        DataError: if the data is empty, of unknown length, or cannot be divided; if it has no
            labels and there is no original; if no position of it, or of what is held out, counts.
        LossError: if the original cannot be distilled by this loss.
        MismatchError: if the checkpoint is of another run, or the original's output has another
            shape.
        NonFiniteError: if the loss becomes NaN or infinite.
        ProcessError: if training fails in one of several processes.
        EigenDamageError: if no parameter can be trained, or a field of the config is wrong.
    """
    config = config or FinetuneConfig()
    config.check()
    if original is model:
        raise EigenDamageError("original is the model itself, which has nothing to learn from it")
    data = iterable_of(data)
    as_it_is = held_out is not None or config.held_out == 0
    if checkpoint is not None and as_it_is and getattr(data, "persistent_workers", False):
        raise DataError(
            "a DataLoader with persistent_workers cannot be gone on with after a stop: its workers "
            "keep random states of their own. Leave them off, or give no checkpoint"
        )
    objective = Objective(
        head_of(loss),
        original,
        temperature=config.temperature,
        label_share=config.label_share,
        features=config.features,
        feature_weight=config.feature_weight,
    )
    device = device_of(model)
    if held_out is None and config.held_out > 0:
        data, held_out = hold_out(data, config.held_out, config.seed)
    feed = LoaderFeed(data, device, config.seed, rank(), world())
    judged = None if held_out is None else Batches(held_out, device)
    require_same("the weights to fine-tune", mark_of(model.state_dict().values()))
    require_same("the options of fine-tuning", (config, loss_name(loss), len(feed)))
    with failing_alone("fine-tuning"), training_of(model, original):
        keeper = None
        if checkpoint is not None:
            identity = _identity(config, loss, model, original, feed, judged)
            keeper = Checkpoint(
                checkpoint, identity, every=config.checkpoint_every, writing=rank() == 0
            )
        model.train()
        done = train(
            model,
            feed,
            objective,
            config,
            score=None
            if judged is None
            else partial(mean_score, objective.score, judged, seed=config.seed),
            checkpoint=keeper,
            device=device,
            what="fine-tuning",
            progress=progress,
            # Without labels nobody has seen the answers, and what came in is a fair rival.
            least=1 if judged is None or objective.by_labels(next(iter(judged))) else 0,
            processes=world(),
        )
    if rank() == 0 and (trouble := worsening(done, config)):
        warn(trouble)
    return done


def worsening(done: Training, config: FinetuneConfig) -> str | None:
    """What to say of a training that left the model clearly worse on what was held out.

    Worse by more than what the original's having seen those data may feign.
    """
    if not done.scores:
        return None
    before, after = done.scores[0], done.scores[done.best]
    if after - before <= max(0.1 * abs(before), 0.05):
        return None
    return (
        f"fine-tuning made the model worse on held-out data, which the original may have been "
        f"trained on: {before:.3g} before, {after:.3g} after epoch {done.best}, the best of "
        f"{config.epochs}; lower the learning rate (it is {config.peak}), or train for more epochs"
    )


def _identity(
    config: FinetuneConfig,
    loss: Loss,
    model: nn.Module,
    original: nn.Module | None,
    feed: LoaderFeed,
    judged: Iterable[Batch] | None,
) -> dict[str, Any]:
    """What a run's result depends on, by name."""
    found = asdict(config)
    del found["checkpoint_every"]
    found["learning_rate"] = config.peak
    return {
        **found,
        "loss": loss_name(loss),
        "the weights": digest(model),
        "the original's weights": "none" if original is None else digest(original),
        "the number of batches": len(feed),
        "the first batch": "none" if len(feed) == 0 else batch_digest(next(feed.batches(0))),
        "the first held-out batch": "none" if judged is None else batch_digest(next(iter(judged))),
    }


def mean_score(
    score: Callable[[nn.Module, Item], tuple[Tensor, int]],
    held_out: Iterable[Item],
    model: nn.Module,
    *,
    seed: int = 0,
) -> float:
    """The mean of an objective's score over what is held out, run as in evaluation.

    Whatever the data draws, it draws the same each time.

    Raises:
        DataError: if no position of it counts.
    """
    total, terms = 0.0, 0
    with torch.no_grad(), evaluating(model), preserved_random_state():
        seed_everything(seed)
        for item in held_out:
            value, count = score(model, item)
            total, terms = total + float(value), terms + count
    if not terms:
        raise DataError(
            "no position of the held-out data counts for the loss: its labels are all -100 "
            "(ignored), or its attention_mask excludes every token. Give data in which some count; "
            "if only what is held out has none, give other held_out= data, or a config with "
            "held_out=0"
        )
    return total / terms


@contextmanager
def training_of(model: nn.Module, original: nn.Module | None) -> Generator[None]:
    """What is put back after training, and what is put back only if it fails.

    Raises:
        EigenDamageError: if no parameter can be trained, or the model was made under
            ``torch.inference_mode()``.
    """
    require_gradients_possible(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise EigenDamageError("no parameter of the model is trainable; set requires_grad first")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [(m, m.training) for m in model.modules()]
    try:
        with (
            preserved_random_state(),
            torch.enable_grad(),
            evaluating(model if original is None else original),
        ):
            balance_factors(model)
            yield
    except BaseException:
        model.load_state_dict(before)
        raise
    finally:
        for module, mode in modes:
            module.training = mode


def digest(model: nn.Module) -> str:
    """A fingerprint of a model's names, shapes and weights."""
    return _digest(model.state_dict().items())


def batch_digest(batch: Batch) -> str:
    """A fingerprint of a batch's inputs and labels."""
    inputs = tensors_in([*batch.args, *batch.kwargs.values()])
    labels = [] if batch.target is None else [("labels", batch.target)]
    return _digest([*((str(index), x) for index, x in enumerate(inputs)), *labels])


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    found = hashlib.sha256()
    for name, value in tensors:
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        found.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
