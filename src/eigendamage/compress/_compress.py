"""compress: curvature, plan, surgery, repair, report, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from eigendamage.batches import Data, iterable_of, kept
from eigendamage.columns import fitted
from eigendamage.compress._call import call_in_words, with_command
from eigendamage.compress._once import check, once
from eigendamage.compress._result import Compressed, Options, noted
from eigendamage.compress._rounds import RoundTraining, in_rounds
from eigendamage.curvature import Curvature, EigenvalueKind, Fisher, Loss
from eigendamage.distributed import decided, one_fate
from eigendamage.errors import EigenDamageError
from eigendamage.files import alone_in
from eigendamage.layers import preserved_random_state
from eigendamage.plan import (
    ACTIONS,
    ActionKind,
    Budget,
    FormChoice,
    RankBy,
)
from eigendamage.training import FinetuneConfig, PolishConfig, length_of


@one_fate
@torch.inference_mode(False)
@preserved_random_state()
def compress(
    model: nn.Module,
    data: Data,
    *,
    budget: Budget,
    method: str = "auto",
    variant: str | None = None,
    eval_data: Data | None = None,
    curvature: Curvature | None = None,
    loss: Loss = "cross_entropy",
    fisher: Fisher = "mc",
    eigenvalues: EigenvalueKind = "ekfac",
    max_ratio: float = 0.95,
    form: FormChoice = "cheapest",
    damping: float = 1e-3,
    rank_by: RankBy | None = None,
    ignore: Iterable[str] = (),
    actions: Iterable[ActionKind] = ACTIONS,
    multiple: int | None = None,
    floors: Mapping[str, float] | None = None,
    refine: int = 30,
    calibrate: bool | None = None,
    repair: bool | None = None,
    polish: int | PolishConfig = 0,
    shots: int = 1,
    rounds: int = 1,
    epochs: int = 0,
    train_data: Iterable[Any] | None = None,
    finetuning: FinetuneConfig | None = None,
    directory: str | Path | None = None,
    latency_batch: int = 1,
    max_examples: int | None = None,
    max_memory: int | str | None = None,
    recalibrate: bool | None = None,
    calibration_examples: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    seed: int = 0,
    progress: bool = True,
) -> Compressed:
    """Make a trained model smaller by its curvature. The model given is not changed.

    With ``method="auto"`` about a tenth of ``data`` is held out from curvature and repair; on it
    prices are calibrated, repairs judged, and the divergence from the original measured.

    Args:
        model: the trained network.
        data: some of its inputs in batches, in the same order in every pass: a DataLoader, a torch
            Dataset, any iterable (a generator is kept in memory), or a ``datasets.Dataset``, of
            which `column_batches` makes batches of 64. Labels are not needed unless
            ``fisher="empirical"``.
        budget: how small the result has to be.
        method: see `make_plan`; likewise ``variant``, ``max_ratio``, ``form``, ``damping``,
            ``rank_by``, ``actions``, ``floors`` and ``refine``.
        variant: the form of the method.
        eval_data: held-out batches to measure on; ``data`` itself if there is none, which the
            report then says. Nothing is chosen by it.
        curvature: of this model, if it was estimated before; saves the passes over the data.
        loss: see `estimate_curvature`; likewise ``fisher``, ``eigenvalues``,
            ``max_examples``, ``reduction`` and ``seed``.
        fisher: which labels.
        eigenvalues: λ, or the paper's Λ_S Λ_A.
        max_ratio: the most of one side of a layer, or of a group of channels, that may go.
        form: how factored layers are laid out.
        damping: of S and A where they are inverted.
        rank_by: by price, or by price for what is saved.
        ignore: shell patterns over dotted paths of layers to leave alone.
        actions: for ``auto``: what may be done to a layer.
        multiple: for ``auto``: ranks and channels left are multiples of this. By default 1; for a
            budget of latency 8, beside which any number of channels is tried in narrow groups.
        floors: for ``auto``: by shell pattern the fraction of a layer's MACs that has to stay.
        refine: for ``auto``: the most L-BFGS steps on an input basis.
        calibrate: for ``auto``: whether prices are corrected by what layers are measured to cost
            alone. By default where the loss has a divergence.
        repair: whether changed layers are refitted, without labels, to return what the original's
            return. By default for ``auto`` alone.
        polish: passes of label-free distillation over ``data`` at the end of every round, before
            its training, the part held out choosing the best one (see `PolishConfig`); 0 for none.
        shots: for ``auto``: split the budget into so many steps, each with curvature and repair of
            its own.
        rounds: the same for every method, each with ``epochs`` of training at its end, and with its
            own calibration, held against the model that the round began with. Bases of factored
            layers are merged, so that no layer gets more than three stages (Wang et al. 2019,
            section 4.3). Without training a step of ``auto`` that makes the divergence on held-out
            inputs worse than doing without the one before it is taken back.
        epochs: of fine-tuning after each round, on labels where there are any and on what ``model``
            predicts (see `finetune`).
        train_data: batches to fine-tune on, of known length; ``data`` by default.
        finetuning: how; its epochs are ``epochs``.
        directory: a folder for the state of the rounds, made if it is not there. Called again with
            the same arguments, `compress` goes on from where it was stopped, and ends with the same
            weights.
        latency_batch: examples a call where latency is measured.
        max_examples: the most examples of ``data`` to use.
        max_memory: what the sums of the curvature's passes may take, in bytes or as ``"2GB"``; see
            `estimate_curvature`.
        recalibrate: measure batch norm's statistics again on ``data``, without labels. By default
            where nothing is repaired; after a repair it makes most models worse.
        calibration_examples: how many examples the table of Fisher traces is made of; 0 for none,
            which is the default for ``auto``, 64 otherwise.
        reduction: what a loss function that returns one number has done over the batch.
        seed: of the label draws, of positions, and of the method ``random``.
        progress: whether to show progress.

    Returns:
        The smaller model with its plan, curvature and report. A budget that asks for no change
        returns a copy of the model, and the report's notes say so.

    Raises:
        BudgetError: if the budget cannot be met; the message says what can.
        EigenDamageError: another of its subclasses, as `estimate_curvature` and `make_plan` say.
    """
    said = call_in_words(compress, locals())
    data, eval_data = fitted(data, model), fitted(eval_data, model)
    train_data = fitted(train_data, model)
    ignored = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    options = Options(
        budget=budget,
        method=method,
        variant=variant,
        loss=loss,
        fisher=fisher,
        eigenvalues=eigenvalues,
        max_ratio=max_ratio,
        form=form,
        damping=damping,
        rank_by=rank_by,
        ignore=ignored,
        actions=tuple(actions),
        multiple=multiple,
        floors=floors,
        refine=refine,
        calibrate=calibrate,
        repair=repair,
        polish=polish_config(polish),
        shots=shots,
        back=False,
        latency_batch=latency_batch,
        max_examples=max_examples,
        max_memory=max_memory,
        recalibrate=recalibrate,
        calibration_examples=calibration_examples,
        reduction=reduction,
        seed=seed,
        progress=progress,
    )
    check(options)
    if options.polish is not None:
        options.polish.training(seed)
    auto = options.auto
    check_steps(shots, rounds, epochs, auto=auto, budget=budget)
    if epochs == 0 and (train_data is not None or finetuning is not None):
        raise EigenDamageError("train_data and finetuning are for training; give epochs=")
    if epochs == 0 and (auto or rounds == 1):
        if directory is not None:
            raise EigenDamageError("a directory is for rounds with training; give epochs=")
        options = replace(options, shots=max(shots, rounds), back=rounds > 1)
        result = once(model, data, options, eval_data=eval_data, curvature=curvature)
        return noted(with_command(result, said))
    # One view of the data for all rounds: a generator is used up by the first.
    data = kept(data, None if epochs and train_data is None else max_examples)
    training = None
    if epochs:
        if finetuning is not None and finetuning.epochs not in (1, epochs):
            raise EigenDamageError(
                f"epochs is {epochs} and finetuning.epochs {finetuning.epochs}; give it once"
            )
        config = replace(finetuning or FinetuneConfig(seed=seed), epochs=epochs)
        config.check()
        source = iterable_of(data if train_data is None else train_data)
        length_of(source)
        training = RoundTraining(source, config)
    with ExitStack() as stack:
        if directory is not None:
            decided(partial(stack.enter_context, alone_in(Path(directory))))
        result = in_rounds(
            model,
            data,
            options,
            rounds=rounds,
            training=training,
            eval_data=kept(eval_data),
            curvature=curvature,
            directory=None if directory is None else Path(directory),
        )
    return noted(with_command(result, said))


def polish_config(wanted: int | PolishConfig) -> PolishConfig | None:
    """How to polish; None for not at all.

    Raises:
        EigenDamageError: if the number of passes is none.
    """
    if isinstance(wanted, PolishConfig):
        return wanted
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise EigenDamageError(
            f"polish is {wanted!r}; expected a number of passes, 0 for none, or a PolishConfig"
        )
    return PolishConfig(passes=wanted) if wanted else None


def check_steps(shots: int, rounds: int, epochs: int, *, auto: bool, budget: Budget) -> None:
    """Refuse steps that are no counts, or do not go with each other, the method or the budget.

    Raises:
        EigenDamageError: saying which.
    """
    for what, value, least in (("shots", shots, 1), ("rounds", rounds, 1), ("epochs", epochs, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise EigenDamageError(
                f"{what} is {value!r}; it must be a whole number, at least {least}"
            )
    if shots > 1 and rounds > 1:
        raise EigenDamageError("give shots or rounds, not both")
    if budget.loss is not None and max(shots, rounds) > 1:
        raise EigenDamageError(
            "a budget of loss is searched for in one shot; give shots or rounds with a size"
        )
    if not auto and shots > 1:
        raise EigenDamageError("shots are for method='auto'; for other methods give rounds")
    if shots > 1 and epochs:
        raise EigenDamageError("shots are not trained between; give rounds with epochs")
