"""What comes before a plan and serves any budget: data in parts, curvature, menus, latencies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from eigendamage.batches import Data, kept
from eigendamage.calls import device_of, require_gradients_possible
from eigendamage.compress._search import Timing
from eigendamage.compress._split import Parts, split
from eigendamage.compress._steps import Clock, Planning, Settings, Source
from eigendamage.curvature import (
    Curvature,
    EigenvalueKind,
    Extra,
    Fisher,
    Loss,
    PredictiveHead,
    estimate_curvature,
    head_of,
    loss_name,
)
from eigendamage.distributed import decided
from eigendamage.errors import ChannelError, EigenDamageError, LossError, MismatchError
from eigendamage.layers import ON_REQUEST, find_layers, require_copyable
from eigendamage.measure import measure_latency_table
from eigendamage.plan import (
    ACTIONS,
    ActionKind,
    AutoMethod,
    Budget,
    LatencyTable,
    make_menus,
    method_named,
    needs,
    wanted_actions,
)

_NOT_PREDICTIVE = (
    "the loss is a function, which tells nothing without labels: prices are not calibrated, and "
    "predictions are not held against a measured divergence"
)
_LATENCY_MULTIPLE = 8  # processors take no less time for ranks in between


@dataclass(frozen=True, eq=False)
class Preparation:
    """How to get from a model to all that a plan of it is made of.

    Attributes:
        data: all of it; can be gone through several times.
        settings: what the steps after this share.
        method: see `make_plan`.
        fisher: which labels the curvature takes.
        eigenvalues: λ, or the paper's Λ_S Λ_A.
        max_ratio: the most of one side of a layer that may go.
        multiple: ranks and channels left are multiples of this.
        timing: how latency is measured.
        timed: whether a budget asks for it.
        max_examples: the most examples of ``data`` to use.
        max_memory: what the sums of the curvature's passes may take.
        notes: what a user should know of it; grows along the way.
    """

    data: Data
    settings: Settings
    method: str
    fisher: Fisher
    eigenvalues: EigenvalueKind
    max_ratio: float
    multiple: int
    timing: Timing
    timed: bool
    max_examples: int | None
    max_memory: int | str | None
    notes: list[str] = field(default_factory=list[str])

    @property
    def auto(self) -> bool:
        """Whether plans are made from menus."""
        return isinstance(method_named(self.method), AutoMethod)

    def curvature(self, model: nn.Module, ignore: Iterable[str]) -> Curvature:
        """The curvature of a model with what the method needs.

        Method ``auto`` does without channels, with a note, where they cannot be traced.

        Raises:
            ChannelError: if another method needs them.
        """
        also = needs(self.method)
        if self.auto and "channels" not in self.settings.planning.actions:
            also = ("patches",)
        with self.settings.clock.stage("curvature"):
            try:
                return self._estimated(model, ignore, also)
            except ChannelError as error:
                if not self.auto:
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
            fisher=self.fisher,
            eigenvalues=self.eigenvalues,
            ignore=ignore,
            max_examples=self.max_examples if parts is None else None,
            max_memory=self.max_memory,
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
        with self.settings.clock.stage("menus"):
            menus = make_menus(
                model,
                curvature,
                actions=self.settings.planning.actions,
                damping=self.settings.planning.damping,
                max_ratio=self.max_ratio,
                multiple=self.multiple,
                ignore=ignore,
                progress=self.settings.progress,
            )
        return Source(model, curvature, menus, latency=table)

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
    model: nn.Module,
    data: Data,
    budgets: Sequence[Budget],
    *,
    method: str,
    loss: Loss,
    fisher: Fisher,
    eigenvalues: EigenvalueKind,
    max_ratio: float,
    damping: float,
    actions: Iterable[ActionKind],
    multiple: int | None,
    floors: Mapping[str, float] | None,
    refine: int,
    calibrate: bool | None,
    repair: bool | None,
    polish: bool,
    latency_batch: int,
    max_examples: int | None,
    max_memory: int | str | None,
    reduction: Literal["mean", "sum"],
    seed: int,
    progress: bool,
) -> Preparation:
    """Settle what `compress` leaves open, and hold out data where something is judged by it.

    Args are those of `compress`; ``budgets`` are all that are to be met, ``polish`` is whether
    there will be one.

    Raises:
        DataError: if nothing can be held out.
        EigenDamageError: if an action or the loss is unknown, ``latency_batch`` below 1, or the
            model was made under ``torch.inference_mode()`` or cannot be copied.
    """
    require_gradients_possible(model)
    require_copyable(model)
    if latency_batch < 1:
        raise EigenDamageError(f"latency_batch is {latency_batch}; it must be at least 1")
    if refine < 0:
        raise EigenDamageError(f"refine is {refine}; it must be at least 0")
    allowed = wanted_actions(actions)
    auto = isinstance(method_named(method), AutoMethod)
    if not auto and (floors or multiple is not None or allowed != ACTIONS):
        raise EigenDamageError(
            f"floors, multiple and actions are for method='auto', not for '{method}'"
        )
    if not auto and calibrate:
        raise EigenDamageError(
            f"prices are calibrated for method='auto' alone; leave calibrate out for '{method}'"
        )
    predictive = isinstance(head_of(loss, reduction), PredictiveHead)
    if polish and not predictive:
        raise LossError(
            "a polish needs a loss with a divergence, one of those that go by name, not a function"
        )
    repair = auto if repair is None else repair
    calibrate = (auto and predictive) if calibrate is None else calibrate
    # One view of the data for all stages: a generator is used up by the first.
    data = kept(data)
    parts: Parts | None = None
    if repair or calibrate or polish or any(budget.loss is not None for budget in budgets):
        parts = split(data, device_of(model), max_examples)
    timed = any(budget.latency is not None for budget in budgets)
    if multiple is None:
        multiple = _LATENCY_MULTIPLE if timed else 1
    return Preparation(
        data=data,
        settings=Settings(
            parts=parts,
            loss=loss,
            reduction=reduction,
            repair=repair,
            calibrated=calibrate,
            planning=Planning(damping, refine, floors, allowed),
            clock=Clock(),
            seed=seed,
            progress=progress,
        ),
        method=method,
        fisher=fisher,
        eigenvalues=eigenvalues,
        max_ratio=max_ratio,
        multiple=multiple,
        timing=Timing(data, latency_batch),
        timed=timed,
        max_examples=max_examples,
        max_memory=max_memory,
        notes=[] if predictive or not auto else [_NOT_PREDICTIVE],
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
