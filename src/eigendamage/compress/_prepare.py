"""What comes before a plan and serves any budget: data in parts, curvature, menus, latencies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

from torch import nn

from eigendamage.batches import Data, kept
from eigendamage.calls import device_of, require_gradients_possible
from eigendamage.compress._result import Options
from eigendamage.compress._split import Parts, split
from eigendamage.compress._steps import Clock, Planning, Settings, Source
from eigendamage.compress._timed import Timing
from eigendamage.curvature import (
    Curvature,
    Extra,
    Loss,
    PredictiveHead,
    estimate_curvature,
    head_of,
    loss_name,
)
from eigendamage.distributed import decided
from eigendamage.errors import ChannelError, EigenDamageError, LossError, MismatchError
from eigendamage.layers import ON_REQUEST, find_layers, require_copyable
from eigendamage.measure import evaluate, measure_latency_table
from eigendamage.plan import (
    ACTIONS,
    Budget,
    LatencyTable,
    Menus,
    check_refine,
    make_menus,
    needs,
    refuse_options_of_auto,
    wanted_actions,
)

_NOT_PREDICTIVE = (
    "the loss is a function, which tells nothing without labels: prices are not calibrated, and "
    "predictions are not held against a measured divergence"
)
_UNSTEADY = (
    "two passes over the data did not begin with the same batch: examples that are held out of one "
    "may be fitted on in another, and what is judged by them looks better than it is. Give the "
    "data in the same order in every pass"
)
_LATENCY_MULTIPLE = 8  # many processors take no less time for ranks in between
_FIRST = 8  # examples
_FEW = 8  # steps: a group of fewer may do better with numbers in between


def require_measurable(model: nn.Module, eval_data: Data, options: Options) -> None:
    """Measure the original on the first examples of what the result is measured on in the end.

    Raises:
        EigenDamageError: if that fails, so that it does so before all the work and not after it.
    """
    try:
        evaluate(
            model,
            eval_data,
            loss=options.loss,
            max_examples=_FIRST,
            reduction=options.reduction,
            progress=False,
        )
    except EigenDamageError as error:
        error.args = (f"eval_data: {error}",)
        raise


@dataclass(frozen=True, eq=False)
class Preparation:
    """How to get from a model to all that a plan of it is made of.

    Attributes:
        data: all of it; can be gone through several times.
        options: what was asked for.
        settings: what the steps after this share.
        multiple: ranks and channels left are multiples of this.
        timing: how latency is measured.
        timed: whether a budget asks for it.
        notes: what a user should know of it; grows along the way.
    """

    data: Data
    options: Options
    settings: Settings
    multiple: int
    timing: Timing
    timed: bool
    notes: list[str] = field(default_factory=list[str])

    def curvature(self, model: nn.Module, ignore: Iterable[str]) -> Curvature:
        """The curvature of a model with what the method needs.

        Method ``auto`` does without channels, with a note, where they cannot be traced.

        Raises:
            ChannelError: if another method needs them.
        """
        also = needs(self.options.method)
        if self.options.auto and "channels" not in self.settings.planning.actions:
            also = ("patches",)
        with self.settings.clock.stage("curvature"):
            try:
                return self._estimated(model, ignore, also)
            except ChannelError as error:
                if not self.options.auto:
                    raise
                self.notes.append(f"channels are not on the menu: {error}")
                return self._estimated(model, ignore, ("patches",))

    def _estimated(
        self, model: nn.Module, ignore: Iterable[str], also: tuple[Extra, ...]
    ) -> Curvature:
        settings, parts = self.settings, self.settings.parts
        return estimate_curvature(
            model,
            self.data if parts is None else parts.fit,
            loss=settings.loss,
            fisher=self.options.fisher,
            eigenvalues=self.options.eigenvalues,
            ignore=ignore,
            max_examples=self.options.max_examples if parts is None else None,
            max_memory=self.options.max_memory,
            also=also,
            reduction=settings.reduction,
            seed=settings.seed,
            progress=settings.progress,
        )

    def source(self, model: nn.Module, curvature: Curvature, ignore: Iterable[str]) -> Source:
        """A model with its curvature, its menus and, where budgets ask for them, its latencies.

        Args:
            model: the model.
            curvature: of it.
            ignore: shell patterns over dotted paths of layers to leave alone although the
                curvature has them.
        """
        table = self._table(model, curvature) if self.timed else None
        planning = self.settings.planning
        menus_of = partial(
            make_menus,
            model,
            curvature,
            damping=planning.damping,
            max_ratio=self.options.max_ratio,
            ignore=tuple(ignore),
            progress=self.settings.progress,
        )
        with self.settings.clock.stage("menus"):
            menus = menus_of(actions=planning.actions, multiple=self.multiple)
        wanted = self.timed and self.options.multiple is None and _coarse(menus)
        finer = cache(partial(menus_of, actions=("channels",))) if wanted else None
        return Source(model, curvature, menus, finer, latency=table)

    def source_like(self, curvature: Curvature, ignore: Iterable[str], model: nn.Module) -> Source:
        """A model that was made of another, which leaves alone what was left alone of the other.

        Args:
            curvature: of the other.
            ignore: what was left alone of it although its curvature has it.
            model: the model.
        """
        asked = (*on_request(curvature), *ignore)
        return self.source(model, self.curvature(model, asked), ())

    def _table(self, model: nn.Module, curvature: Curvature) -> LatencyTable:
        layers = find_layers(model).compressible
        with self.settings.clock.stage("latency"):
            return decided(
                lambda: measure_latency_table(
                    model,
                    self.data,
                    layers={name: layer for name, layer in layers.items() if name in curvature},
                    batch=self.timing.batch,
                    multiple=self.multiple,
                    progress=self.settings.progress,
                )
            )


def prepared(
    model: nn.Module, data: Data, options: Options, budgets: Sequence[Budget] | None = None
) -> Preparation:
    """Settle what `compress` leaves open, and hold out data where something is judged by it.

    Args:
        model: the model.
        data: some of its inputs.
        options: of `compress`.
        budgets: all that are to be met; that of the options by default.

    Raises:
        DataError: if nothing can be held out.
        EigenDamageError: if an action or the loss is unknown, ``latency_batch`` below 1, or the
            model was made under ``torch.inference_mode()`` or cannot be copied.
    """
    require_gradients_possible(model)
    require_copyable(model)
    if options.latency_batch < 1:
        raise EigenDamageError(f"latency_batch is {options.latency_batch}; it must be at least 1")
    check_refine(options.refine)
    allowed = wanted_actions(options.actions)
    auto, calibrate = options.auto, options.calibrate
    refuse_options_of_auto(
        options.method,
        {
            "floors": options.floors,
            "multiple": options.multiple is not None,
            "actions": allowed != ACTIONS,
            "calibrate": calibrate,
        },
    )
    predictive = isinstance(head_of(options.loss, options.reduction), PredictiveHead)
    polish = options.polish is not None
    if polish and not predictive:
        raise LossError(
            "a polish needs a loss with a divergence, one of those that go by name, not a function"
        )
    repair = auto if options.repair is None else options.repair
    calibrate = (auto and predictive) if calibrate is None else calibrate
    # One view of the data for all stages: a generator is used up by the first.
    data = kept(data, options.max_examples)
    budgets = [options.budget] if budgets is None else budgets
    parts: Parts | None = None
    if repair or calibrate or polish or any(budget.loss is not None for budget in budgets):
        parts = split(data, device_of(model), options.max_examples)
    notes = [] if predictive or not auto else [_NOT_PREDICTIVE]
    if parts is not None and not parts.steady:
        notes.append(_UNSTEADY)
    timed = any(budget.latency is not None for budget in budgets)
    return Preparation(
        data=data,
        options=options,
        settings=Settings(
            parts=parts,
            loss=options.loss,
            reduction=options.reduction,
            repair=repair,
            calibrated=calibrate,
            planning=Planning(options.damping, options.refine, options.floors, allowed),
            clock=Clock(),
            seed=options.seed,
            progress=options.progress,
        ),
        multiple=options.multiple or (_LATENCY_MULTIPLE if timed else 1),
        timing=Timing(data, options.latency_batch),
        timed=timed,
        notes=notes,
    )


def _coarse(menus: Menus) -> bool:
    """Whether multiples leave some group on the menu a few numbers of channels alone."""
    return any(
        group.step > 1 and len(group.order) < _FEW * group.step for group in menus.groups.values()
    )


def on_request(curvature: Curvature) -> tuple[str, ...]:
    """The layers that a curvature leaves alone because it was asked to."""
    reasons = curvature.left_alone.items()
    return tuple(name for name, why in reasons if why.startswith(ON_REQUEST))


def require_loss(curvature: Curvature, loss: Loss) -> None:
    """Refuse a curvature of another loss.

    Raises:
        MismatchError: if it is of one.
    """
    if curvature.loss != loss_name(loss):
        raise MismatchError(
            f"the curvature given is of the loss '{curvature.loss}', not of '{loss_name(loss)}'"
        )
