"""The curvature of a model: a mapping from layers to theirs, and how two of them merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from eigendamage.curvature._head import Fisher
from eigendamage.curvature._layer import EigenvalueKind, LayerCurvature
from eigendamage.curvature._merge import merge_layers
from eigendamage.errors import MismatchError
from eigendamage.layers import ChannelGraph, Sketch, require_near

Extra = Literal["patches", "gradients", "channels"]
"""What a curvature can hold beside S, A and λ; see `estimate_curvature`."""


@dataclass(frozen=True, eq=False, repr=False)
class Curvature(Mapping[str, LayerCurvature]):
    """The curvature of a model's layers: a mapping from dotted path to `LayerCurvature`.

    Attributes:
        layers: the layers, in the order in which they run.
        left_alone: why every other module with parameters is not among them.
        classifier: the layers whose output is the model's; the last that runs, if no module with
            parameters returns it.
        macs: multiply-accumulates of one example in the whole model.
        parameters: number of parameters of the whole model.
        examples: N.
        loss: name of the loss.
        fisher: ``mc``, ``exact`` or ``empirical``.
        kind: ``ekfac`` if the eigenvalues are λ, ``kfac`` if they are Λ_S Λ_A.
        extras: what else was estimated; see `estimate_curvature`.
        channels: which channels can go together, if that was wished for.
        sketches: a few numbers of each layer's weight, by which those of another model are told.
    """

    layers: Mapping[str, LayerCurvature]
    left_alone: Mapping[str, str] = field(default_factory=dict[str, str])
    classifier: tuple[str, ...] = ()
    macs: float = 0.0
    parameters: int = 0
    examples: int = 0
    loss: str = "cross_entropy"
    fisher: Fisher = "mc"
    kind: EigenvalueKind = "ekfac"
    extras: tuple[Extra, ...] = ()
    channels: ChannelGraph | None = None
    sketches: Mapping[str, Sketch | None] = field(default_factory=dict[str, Sketch | None])

    def __repr__(self) -> str:
        extras = f", with {', '.join(self.extras)}" if self.extras else ""
        return (
            f"Curvature of {len(self.layers)} layers on {self.examples} examples ({self.loss}, "
            f"fisher={self.fisher!r}, {self.kind}{extras}; {len(self.left_alone)} left alone)"
        )

    def __getitem__(self, name: str) -> LayerCurvature:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def merge(self, other: Curvature) -> Curvature:
        """The curvature of both sets of data together, each weighted by its examples.

        S, A and the mean are exact. So is λ if both were estimated in one basis (``basis=`` of
        `estimate_curvature`), which is then kept. If not, the eigenbasis is that of the
        merged factors, and each λ is carried into it as the diagonal of Q diag(λ) Qᵀ there: its
        sum, the trace, stays exact, its distribution is an approximation. Patches and gradients
        are exact.

        Raises:
            MismatchError: if the two are not of the same model and weights, loss, Fisher and kind.
        """
        if list(self) != list(other):
            mine, theirs = set(self), set(other)
            odd = sorted(mine ^ theirs) or ["the order of layers"]
            raise MismatchError(f"the curvatures are of different models: {odd[0]} differs")
        for what in ("loss", "fisher", "kind", "extras", "channels"):
            ours, its = getattr(self, what), getattr(other, what)
            if ours != its:
                said = "" if what == "channels" else f": '{ours}' and '{its}'"
                raise MismatchError(f"the curvatures differ in {what}{said}")
        for name in self:
            one, two = self.sketches.get(name), other.sketches.get(name)
            require_near(name, two, one, "other curvature")
        sketches = {**other.sketches, **{n: s for n, s in self.sketches.items() if s is not None}}
        merged = {name: merge_layers(name, self[name], other[name], self.kind) for name in self}
        examples = self.examples + other.examples
        return replace(self, layers=merged, examples=examples, sketches=sketches)
