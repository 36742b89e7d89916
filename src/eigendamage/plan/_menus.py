"""The menus of a whole model: made once from its curvature, used for any budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from eigendamage.curvature import Curvature
from eigendamage.distributed import exchanged, one_fate, rank, shared_out
from eigendamage.errors import EigenDamageError, NothingToCompressError
from eigendamage.layers import ChannelGraph, Layer
from eigendamage.plan._group_menu import GroupMenu, group_menus
from eigendamage.plan._matching import ignored_layers, matching_layers, matching_sketches
from eigendamage.plan._menu import LayerMenu, layer_menu, metric_of
from eigendamage.plan._views import GroupPrices
from eigendamage.plan.prices.low_rank import refined_basis
from eigendamage.progress import track

ActionKind = Literal["low-rank", "blocks", "channels"]
"""What a menu may hold: low-rank forms in the metric S ⊗ A, blocks of the eigenbasis, channels."""
ACTIONS: tuple[ActionKind, ...] = get_args(ActionKind)
# Refining an input basis is worth it up to this many multiplications an evaluation of its price.
_REFINABLE = 1e8
_UNSEEN = 1e-30  # of S where it is zero; prices made of it vanish beside all others


@dataclass(frozen=True, eq=False)
class Menus:
    """Every way to shrink every layer of a model; see `make_menus`.

    Attributes:
        curvature: that they were made from.
        seen: the same, with a tiny S for layers that it says nothing of; see `sighted`.
        layers: by dotted path.
        groups: of channels, by name; no two of them share a layer.
        graph: all groups that are usable; None where channels are not on the menu.
        kept: the layers that have no menu, with the reason.
        left_alone: why channels of other groups stay.
        damping: of S and A, relative to their mean diagonal.
        max_ratio: the most of a side of the eigenbasis that may go.
        multiple: of which ranks and channels are multiples.
        notes: what a user should know.
    """

    curvature: Curvature
    seen: Curvature
    layers: Mapping[str, LayerMenu]
    groups: Mapping[str, GroupMenu]
    graph: ChannelGraph | None
    kept: Mapping[str, str]
    left_alone: Mapping[str, str]
    damping: float
    max_ratio: float
    multiple: int
    notes: tuple[str, ...] = ()
    _refined: dict[tuple[str, int, int, int], Tensor] = field(default_factory=dict, repr=False)
    _of_groups: dict[str, GroupPrices | None] = field(default_factory=dict, repr=False)

    def group_prices(
        self, name: str, price: Callable[[], GroupPrices | None]
    ) -> GroupPrices | None:
        """What the channels of a group cost, priced once and kept for the next plan."""
        if name not in self._of_groups:
            self._of_groups[name] = price()
        return self._of_groups[name]

    def refined(self, layer: Layer, rank_out: int, rank_in: int, steps: int) -> Tensor | None:
        """A layer's input basis, refined for these ranks; None where that costs too much.

        It is the same whatever was refined before, and kept for the next plan.
        """
        menu = self.layers[layer.name]
        if _work(menu, rank_in) > _REFINABLE:
            return None
        key = (layer.name, rank_out, rank_in, steps)
        if key not in self._refined:
            self._refined[key] = self._basis(layer, rank_out, rank_in, steps)
        return self._refined[key]

    def refine(
        self, layers: Mapping[str, Layer], ranks: Iterable[tuple[str, int, int]], steps: int
    ) -> None:
        """Refine the input bases of several (layer, r_o, r_i), each in one of the processes."""
        wanted = [
            (name, rank_out, rank_in, steps)
            for name, rank_out, rank_in in ranks
            if _work(self.layers[name], rank_in) <= _REFINABLE
        ]
        keys = [key for key in wanted if key not in self._refined]
        owners = shared_out([_work(self.layers[name], rank_in) for name, _, rank_in, _ in keys])
        mine: dict[tuple[str, int, int, int], Tensor] = {
            key: self._basis(layers[key[0]], *key[1:])
            for key, owner in zip(keys, owners, strict=True)
            if owner == rank()
        }
        self._refined.update(exchanged(mine))

    def _basis(self, layer: Layer, rank_out: int, rank_in: int, steps: int) -> Tensor:
        start = self.layers[layer.name].bases[0][:, :rank_in]
        metric = metric_of(layer, self.seen[layer.name], self.damping)
        return refined_basis(metric, start, rank_out, steps)


def _work(menu: LayerMenu, rank_in: int) -> float:
    """Multiplications in one evaluation of the price of an input basis."""
    o, i, K = menu.shape.outputs, menu.shape.inputs, menu.shape.offsets
    m, n = i * K, rank_in * K
    return m * K * i * rank_in + n * K * i * rank_in + n**3 / 3 + n * n * o + o**2 * n + o**3


def _pricing(layer: Layer) -> float:
    """Multiplications in the decompositions that a layer's menu takes, in proportion."""
    return float(layer.outputs**3 + (layer.inputs * layer.offsets) ** 3)


@one_fate
@torch.inference_mode(False)
def make_menus(
    model: nn.Module,
    curvature: Curvature,
    *,
    actions: Iterable[ActionKind] = ACTIONS,
    damping: float = 1e-3,
    max_ratio: float = 0.95,
    multiple: int = 1,
    ignore: Iterable[str] = (),
    progress: bool = True,
) -> Menus:
    """Price every way to shrink every layer. Neither the model nor any data is run.

    Several processes of a group share the layers out; all get all menus.

    Each layer but the classifier gets: to be kept; low-rank forms of every rank in the metric
    S ⊗ A (for convolutions also of every basis of leading input directions); blocks of the
    eigenbasis; and, for groups of channels that share no layer, how many channels go. All prices
    are the expected rise of the mean loss, those of low-rank forms and channels after the best
    refit of what stays.

    Args:
        model: the network that the curvature is of; only its weights are read.
        curvature: from `estimate_curvature` with ``also=("patches", "channels")``. Without the
            channels there are none on the menu, and a note says so.
        actions: what may be on it: ``low-rank``, ``blocks``, ``channels``.
        damping: added to S and A, relative to their mean diagonal.
        max_ratio: the most of one side of the eigenbasis that a block may leave out.
        multiple: ranks and channels left are multiples of this (8 or 16 suit many processors); a
            layer narrower than it takes any.
        ignore: shell patterns over dotted paths of layers to leave alone.
        progress: whether to show progress.

    Raises:
        MismatchError: if the curvature is of another model.
        NothingToCompressError: if no layer may be changed.
        NonFiniteError: if a weight or a factor holds NaN or infinity.
        EigenDamageError: if the curvature lacks patches, or an option is unknown.
    """
    wanted = wanted_actions(actions)
    check_multiple(multiple)
    layers = matching_layers(model, curvature)
    matching_sketches(layers, curvature)
    ignored = ignored_layers(curvature, ignore)
    kept = dict.fromkeys(curvature.classifier, "it is the classifier") | dict(ignored)
    open_layers = {name: layer for name, layer in layers.items() if name not in kept}
    if not open_layers:
        others = {n: why for n, why in curvature.left_alone.items() if n not in kept}
        shown, left = (
            "; ".join(f"'{n}': {why}" for n, why in list(each.items())[:6])
            for each in (kept, others)
        )
        raise NothingToCompressError(
            f"every compressible layer is kept: {shown}"
            f"{f'. Not compressible are: {left}' if left else ''}"
        )
    seen, blind = sighted(curvature)
    owners = shared_out([_pricing(layer) for layer in open_layers.values()])
    mine = [n for n, owner in zip(open_layers, owners, strict=True) if owner == rank()]
    priced = exchanged(
        {
            name: layer_menu(open_layers[name], seen[name], wanted, damping, max_ratio, multiple)
            for name in track(mine, "pricing", total=len(mine), enabled=progress)
        }
    )
    menus = {name: priced[name] for name in open_layers}
    groups: dict[str, GroupMenu] = {}
    graph, left_alone, notes = None, {}, blind
    if "channels" in wanted and curvature.channels is None:
        notes += (
            "channels are not on the menu: which of them go together was not traced (give "
            "also=('patches', 'channels') to estimate_curvature)",
        )
    elif "channels" in wanted:
        try:
            groups, graph, left_alone = group_menus(seen, layers, ignored, damping, multiple)
        except NothingToCompressError as error:
            notes += (f"channels are not on the menu: {error}",)
    return Menus(
        curvature=curvature,
        seen=seen,
        layers=menus,
        groups=groups,
        graph=graph,
        kept=kept,
        left_alone=left_alone,
        damping=damping,
        max_ratio=max_ratio,
        multiple=multiple,
        notes=notes,
    )


def sighted(curvature: Curvature) -> tuple[Curvature, tuple[str, ...]]:
    """The curvature with a tiny S = ε I where S is zero, and a note of where that is.

    A network that is sure of all its predictions has no Fisher, and any change of it a price of
    zero. Then the change that alters the layers' outputs least is the best guess.
    """
    blind = [name for name, layer in curvature.items() if not bool(layer.S.any())]
    if not blind:
        return curvature, ()
    layers = dict(curvature.layers)
    for name in blind:
        known = layers[name]
        values = known.A_eigenvalues.double() * _UNSEEN
        layers[name] = replace(
            known,
            S=_UNSEEN * torch.eye(len(known.S), dtype=torch.float64, device=known.S.device),
            S_eigenvalues=torch.full_like(known.S_eigenvalues, _UNSEEN, dtype=torch.float64),
            eigenvalues=values[None, :, None].expand(known.eigenvalues.shape).contiguous(),
        )
    shown = ", ".join(f"'{name}'" for name in blind[:3]) + (", …" if len(blind) > 3 else "")
    note = (
        f"the predictions on the data do not depend on {len(blind)} of {len(curvature)} layers "
        f"({shown}) as far as numbers show, so prices there are nothing but the change of outputs; "
        f"is the model trained, and the data what it was trained for?"
    )
    return replace(curvature, layers=layers), (note,)


def check_multiple(multiple: int) -> None:
    """Refuse what ranks and channels cannot be multiples of.

    Raises:
        EigenDamageError: if it is no whole number of at least 1.
    """
    if not isinstance(multiple, int) or multiple < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise EigenDamageError(f"multiple is {multiple!r}; it must be a whole number from 1 on")


def wanted_actions(actions: Iterable[ActionKind]) -> tuple[ActionKind, ...]:
    """The known actions among those asked for, in their order.

    Raises:
        EigenDamageError: if there is none, or one is unknown.
    """
    asked = {actions} if isinstance(actions, str) else set(actions)
    unknown = sorted(asked - set(ACTIONS))
    if unknown or not asked:
        what = f"action '{unknown[0]}' is unknown" if unknown else "no action is given"
        raise EigenDamageError(f"{what}; known are {', '.join(ACTIONS)}")
    return tuple(action for action in ACTIONS if action in asked)
