"""compress_in_rounds: curvature, plan, surgery and fine-tuning, several times over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

from torch import nn

from eigendamage.batches import Data
from eigendamage.compress import Compressed, compress
from eigendamage.curvature import Curvature, Fisher, Loss
from eigendamage.errors import DataError, EigenDamageError
from eigendamage.layers import copy_model
from eigendamage.measure import Evaluation, evaluate
from eigendamage.plan import Budget, FormChoice, RankBy
from eigendamage.training import FinetuneConfig, finetune


@dataclass(frozen=True, eq=False)
class Round:
    """One round.

    Attributes:
        compressed: the model right after surgery (before training), its plan, the curvature it was
            made by, and the report; all of them relative to the round before.
        tuned: the model after fine-tuning, measured; None if it was not.
    """

    compressed: Compressed
    tuned: Evaluation | None


@dataclass(frozen=True, eq=False)
class Rounds:
    """What `compress_in_rounds` returns.

    Attributes:
        model: the smaller model, a plain module.
        rounds: each round, in order.
    """

    model: nn.Module
    rounds: tuple[Round, ...]


def compress_in_rounds(
    model: nn.Module,
    data: Data,
    *,
    budget: Budget,
    rounds: int,
    train_data: Iterable[Any] | None = None,
    finetuning: FinetuneConfig | None = None,
    method: str = "eigendamage",
    variant: str | None = None,
    eval_data: Data | None = None,
    curvature: Curvature | None = None,
    loss: Loss = "cross_entropy",
    fisher: Fisher = "mc",
    max_ratio: float = 0.95,
    form: FormChoice = "cheapest",
    damping: float = 1e-3,
    rank_by: RankBy | None = None,
    ignore: Iterable[str] = (),
    max_examples: int | None = None,
    recalibrate: bool | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Rounds:
    """Make a model smaller in several steps, with fresh curvature before and training after each.

    EigenDamage's iterative form (Wang et al. 2019, section 4.3): the curvature of a factored layer
    is taken at its outer input and output, within what its outer stages span, so that the new
    eigenbasis merges with the old one and no layer ever has more than three stages. The model
    given is not changed.

    Args:
        model: the trained network.
        data: inputs for the curvature, as for `compress`.
        budget: of the whole, relative to ``model``. MACs and parameters shrink by the same factor
            in each round; a ratio is that of every round.
        rounds: how many.
        train_data: labelled batches of known length to fine-tune on after each round with
            cross-entropy. They are split among the rounds: in every pass each round trains on its
            own share. None trains nothing.
        finetuning: how; see `FinetuneConfig`. Its epochs are those of each share.
        method: see `make_plan`; likewise ``variant``, ``max_ratio``, ``form``, ``damping`` and
            ``rank_by``.
        variant: the form of the method.
        eval_data: held-out batches to measure on; nothing is chosen by it.
        curvature: of ``model``, for the first round, if it was estimated before.
        loss: see `compress`; likewise ``fisher``, ``max_examples`` and ``recalibrate``.
        fisher: which labels the curvature takes.
        max_ratio: the most of one side of a layer that may go in a round.
        form: how factored layers are laid out.
        damping: of S and A where they are inverted.
        rank_by: by price, or by price for what is saved.
        ignore: shell patterns over dotted paths of layers to leave alone.
        max_examples: the most examples of ``data`` to use.
        recalibrate: measure batch norm's statistics again after each surgery.
        seed: of the label draws.
        progress: whether to show progress.

    Raises:
        EigenDamageError: if there is no round; otherwise as `compress` and `finetune`.
    """
    if rounds < 1:
        raise EigenDamageError(f"rounds is {rounds}; it must be at least 1")
    # A generator is used up by the first round.
    data = list(data) if isinstance(data, Iterator) else data
    if isinstance(eval_data, Iterator):
        eval_data = list(eval_data)
    ignored = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    shares = None if train_data is None else split_batches(train_data, rounds)
    done: list[Round] = []
    current = model
    left: dict[str, float] = {str(unit): 1.0 for unit in budget.limits}
    for index in range(rounds):
        result = compress(
            current,
            data,
            budget=budget.step((index + 1) / rounds, left),
            method=method,
            variant=variant,
            eval_data=eval_data,
            curvature=curvature,
            loss=loss,
            fisher=fisher,
            max_ratio=max_ratio,
            form=form,
            damping=damping,
            rank_by=rank_by,
            ignore=ignored,
            max_examples=max_examples,
            recalibrate=recalibrate,
            calibration_examples=0,
            seed=seed + index,
            progress=progress,
        )
        curvature = None
        for unit in budget.limits:
            left[unit] *= result.plan.left(unit)
        tuned = None
        current = result.model
        if shares is not None:
            current = copy_model(current)
            finetune(current, shares[index], finetuning, progress=progress)
            measured_on = data if eval_data is None else eval_data
            tuned = evaluate(current, measured_on, loss=loss, reference=model, progress=progress)
        done.append(Round(result, tuned))
    return Rounds(current, tuple(done))


def split_batches(data: Iterable[Any], parts: int) -> list[Share]:
    """The batches of a pass over the data, dealt out in turn; every part gets one at least.

    Raises:
        DataError: if the data has no length, or fewer batches than parts.
    """
    kept = list(data) if isinstance(data, Iterator) else data
    if not isinstance(kept, Sized):
        raise DataError("training needs data of known length, such as a DataLoader")
    if len(kept) < parts:
        raise DataError(
            f"{len(kept)} batches of training data cannot be split among {parts} rounds"
        )
    return [Share(kept, index, parts) for index in range(parts)]


class Share:
    """Every so many batches of a pass over the data; each pass is one of its own over the whole.

    Args:
        data: batches, of known length.
        index: of the first batch that it takes.
        parts: of how many shares it is one.
    """

    def __init__(self, data: Iterable[Any], index: int, parts: int) -> None:
        self._data = data
        self._index = index
        self._parts = parts

    def __len__(self) -> int:
        return len(range(self._index, len(cast(Sized, self._data)), self._parts))

    def __iter__(self) -> Iterator[Any]:
        return islice(self._data, self._index, None, self._parts)
