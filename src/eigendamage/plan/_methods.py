"""The methods by name: what each removes, what it needs to know, and how it prices and repairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from eigendamage.curvature import Extra
from eigendamage.errors import EigenDamageError
from eigendamage.plan._plan import Repair
from eigendamage.plan._views import GroupPrices, GroupView, LayerView, estimated
from eigendamage.plan.prices import (
    c_obd,
    c_obs,
    kron_obd,
    kron_obs,
    magnitude,
    obd,
    obs,
    random,
    slimming,
    taylor,
)

PriceGroup = Callable[[GroupView, torch.Generator], GroupPrices | None]
PriceWeights = Callable[[LayerView], Float[Tensor, "o i K"]]


@dataclass(frozen=True)
class BlockMethod:
    """A method that cuts rows and columns in the eigenbasis.

    Attributes:
        summary: what it does, in a line.
        depthwise: whether the middle stage of what is cut becomes depthwise.
    """

    summary: str
    depthwise: bool = False
    needs: tuple[Extra, ...] = ()


@dataclass(frozen=True)
class ChannelRule:
    """How channels are priced, and how what stays makes up for those that go.

    Attributes:
        prices: of a group's units, by layer; None if the group cannot be priced.
        repair: of the weights that stay.
        is_rise: whether a price is an expected rise of the loss.
        adds_up: whether prices of different layers are in one unit, so that a price can be held
            against what it saves.
    """

    prices: PriceGroup
    repair: Repair = "none"
    is_rise: bool = True
    adds_up: bool = True


@dataclass(frozen=True)
class ChannelMethod:
    """A method that removes whole channels.

    Attributes:
        summary: what it does, in a line.
        needs: what has to be estimated beside S, A and λ.
        variants: its forms by name, the default first.
    """

    summary: str
    needs: tuple[Extra, ...]
    variants: Mapping[str, ChannelRule]


@dataclass(frozen=True)
class WeightMethod:
    """A method that sets single weights to zero.

    Attributes:
        summary: what it does, in a line.
        needs: what has to be estimated beside S, A and λ.
        prices: of a layer's weights.
        repair: of the weights that stay.
    """

    summary: str
    needs: tuple[Extra, ...]
    prices: PriceWeights
    repair: Literal["none", "masked"] = "none"


@dataclass(frozen=True)
class AutoMethod:
    """The method that chooses among all actions, for each layer on its own.

    Attributes:
        summary: what it does, in a line.
        needs: what has to be estimated beside S, A and λ.
    """

    summary: str
    needs: tuple[Extra, ...] = ("patches", "channels")


Method = AutoMethod | BlockMethod | ChannelMethod | WeightMethod


def _by_rows(price: Callable[[LayerView], Float[Tensor, " o"]]) -> PriceGroup:
    """The prices of the rows that make a unit, added up over the layers that make it."""

    def prices(group: GroupView, _generator: torch.Generator) -> GroupPrices:
        return {end.layer.name: end.summed(price(end.layer)) for end in group.producers}

    return prices


def _by_elimination(group: GroupView, _generator: torch.Generator) -> GroupPrices:
    """Kron-OBS over the columns that read a unit, in backward elimination over all readers.

    A factored reader is not repaired, so there it is the price of the columns as they are.
    """
    repaired = [end for end in group.readers if not end.layer.factored]
    prices: dict[str, Tensor] = {}
    if repaired:
        prices[group.name] = kron_obs.elimination_prices(
            [
                kron_obs.Reader(y.W, y.S, y.A_inverse, [y.columns(unit) for unit in end.units])
                for end in repaired
                for y in (end.layer,)
            ]
        )
    for end in group.readers:
        y = end.layer
        if y.factored:
            columns = [y.columns(unit) for unit in end.units]
            prices[y.name] = kron_obs.plain_column_prices(y.W, y.S, y.A, columns)
    return prices


def _without_data(price: Callable[[GroupView], GroupPrices | None]) -> PriceGroup:
    def prices(group: GroupView, _generator: torch.Generator) -> GroupPrices | None:
        return price(group)

    return prices


def _obs_prices(layer: LayerView) -> Float[Tensor, "o i K"]:
    priced = obs.weight_prices(layer.W, layer.S_inverse, layer.A_inverse)
    weights = layer.weight.shape[1] * layer.weight.shape[2]
    return priced[:, :weights].reshape(layer.weight.shape)


def _single(rule: ChannelRule) -> Mapping[str, ChannelRule]:
    return {"paper": rule}


READERS_REPAIRED = ChannelRule(_by_elimination, "columns")

METHODS: Mapping[str, Method] = {
    "auto": AutoMethod("for each layer what costs least of low rank, blocks and channels"),
    "eigendamage": BlockMethod("rows and columns in the Kronecker-factored eigenbasis"),
    "eigendamage-dw": BlockMethod(
        "the same, with a depthwise convolution in the middle", depthwise=True
    ),
    "kron-obs": ChannelMethod(
        "channels under the Kronecker-factored Fisher, the others repaired",
        ("patches", "channels"),
        {
            "readers": READERS_REPAIRED,
            "joint": ChannelRule(
                _by_rows(lambda y: kron_obs.row_prices(y.W, y.S_inverse, y.A)), "both"
            ),
            "paper": ChannelRule(
                _by_rows(lambda y: kron_obs.row_prices(y.W, y.S_inverse, y.A)), "rows"
            ),
            "official": ChannelRule(
                _by_rows(lambda y: kron_obs.official_row_prices(y.W, y.S_inverse, y.A)),
                "rows one at a time",
                is_rise=False,  # Σ(w²A) is no quadratic form, and can be below zero
            ),
        },
    ),
    "kron-obd": ChannelMethod(
        "channels under the Kronecker-factored Fisher, nothing repaired",
        ("patches", "channels"),
        {
            "paper": ChannelRule(_by_rows(lambda y: kron_obd.row_prices(y.W, y.S, y.A))),
            "official": ChannelRule(
                _by_rows(lambda y: kron_obd.official_row_prices(y.W, y.S, y.A)), is_rise=False
            ),
        },
    ),
    "c-obs": ChannelMethod(
        "channels, each weight as if it went alone, under the Kronecker-factored Fisher",
        ("patches", "channels"),
        _single(
            ChannelRule(
                _by_rows(lambda y: c_obs.row_prices(y.W, y.S_inverse, y.A_inverse)),
                "c-obs",
                is_rise=False,  # each weight is priced as if it went alone
            )
        ),
    ),
    "c-obd": ChannelMethod(
        "channels under the Fisher's exact diagonal",
        ("gradients", "channels"),
        _single(
            ChannelRule(
                _by_rows(
                    lambda y: c_obd.row_prices(
                        y.weight.cpu(),
                        None if y.bias is None else y.bias.cpu(),
                        estimated(y, y.curvature.diagonal),
                        estimated(y, y.curvature.bias_diagonal),
                    )
                )
            )
        ),
    ),
    "obs": WeightMethod(
        "single weights under the Kronecker-factored Fisher, the others repaired",
        ("patches",),
        _obs_prices,
        "masked",
    ),
    "obd": WeightMethod(
        "single weights under the Fisher's exact diagonal",
        ("gradients",),
        lambda y: obd.weight_prices(y.weight.cpu(), estimated(y, y.curvature.diagonal)),
    ),
    "taylor": ChannelMethod(
        "channels by the first-order change of the loss",
        ("gradients", "channels"),
        _single(ChannelRule(_without_data(taylor.group_prices), is_rise=False)),
    ),
    "slimming": ChannelMethod(
        "channels by the scale of their batch norm",
        ("channels",),
        _single(ChannelRule(_without_data(slimming.group_prices), is_rise=False, adds_up=False)),
    ),
    "magnitude": ChannelMethod(
        "channels by the norm of their filters",
        ("channels",),
        _single(ChannelRule(_without_data(magnitude.group_prices), is_rise=False, adds_up=False)),
    ),
    "random": ChannelMethod(
        "channels by a draw",
        ("channels",),
        _single(ChannelRule(random.group_prices, is_rise=False, adds_up=False)),
    ),
}


def method_named(name: str) -> Method:
    """The method of that name.

    Raises:
        EigenDamageError: if there is none.
    """
    if name not in METHODS:
        raise EigenDamageError(f"method '{name}' is unknown; known are {', '.join(METHODS)}")
    return METHODS[name]


def needs(method: str) -> tuple[Extra, ...]:
    """What a method needs to be estimated beside S, A and λ: ``also`` of `estimate_curvature`.

    Raises:
        EigenDamageError: if there is no such method.
    """
    return method_named(method).needs


def variant_of(name: str, variant: str | None) -> str | None:
    """The variant that is meant; the method's default for None, None if it has no variants.

    Raises:
        EigenDamageError: if the method has no such variant.
    """
    method = method_named(name)
    known = list(method.variants) if isinstance(method, ChannelMethod) else []
    if variant is None:
        return known[0] if len(known) > 1 else None
    if variant not in known:
        has = f"its variants are {', '.join(known)}" if known else "it has no variants"
        raise EigenDamageError(f"method '{name}' has no variant '{variant}'; {has}")
    return variant
