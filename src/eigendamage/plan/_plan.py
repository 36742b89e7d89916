"""The plan: for each layer an action, its price, its cost before and after."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from eigendamage.documents import Document, Frozen
from eigendamage.errors import MismatchError
from eigendamage.layers import DenseForm, Sketch
from eigendamage.plan._budget import Budget, Unit

PLAN_VERSION = 1


Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Repair = Literal["none", "rows", "columns", "both", "rows one at a time", "c-obs"]
"""How the weights that stay make up for rows and columns that go.

``rows``, ``columns``, ``both``: the exact optimum of the Kronecker-factored quadratic, over what is
named. ``rows one at a time``: the sum of the optimal repairs of each row alone, as the paper's code
does for Kron-OBS. ``c-obs``: the sum of those of each weight of the rows, as it does for C-OBS.
"""


def packed(basis: Float[Tensor, "i r"]) -> str:
    """A matrix as text: float32, row by row, deflated, in base 64."""
    values = basis.detach().cpu().float().contiguous().numpy().astype("<f4")
    return base64.b64encode(zlib.compress(values.tobytes())).decode("ascii")


def unpacked(text: str, rows: int) -> Float[Tensor, "i r"]:
    """The matrix of `packed`.

    Raises:
        MismatchError: if it is none, or its numbers do not make whole columns of so many rows.
    """
    most = 4 * rows * rows
    try:
        values = zlib.decompressobj().decompress(base64.b64decode(text), most + 1)
    except (ValueError, zlib.error) as error:
        raise MismatchError(f"an input basis of a plan cannot be read: {error}") from error
    if not values or len(values) > most or len(values) % (4 * rows):
        raise MismatchError(f"an input basis of a plan is not one of {rows} inputs")
    matrix = torch.from_numpy(np.frombuffer(values, "<f4").astype(np.float32)).reshape(rows, -1)
    if not bool(torch.isfinite(matrix).all()):
        raise MismatchError("an input basis of a plan holds NaN or infinity")
    gram = matrix.double().T @ matrix.double()
    if not torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype), atol=1e-4):
        raise MismatchError("an input basis of a plan is not orthonormal")
    return matrix


class Keep(Frozen):
    """The layer stays as it is, for the reason given."""

    kind: Literal["keep"] = "keep"
    reason: str


class EigenBlock(Frozen):
    """Rows and columns of the weight that are kept in the Kronecker-factored eigenbasis.

    Attributes:
        rows: kept rows of W', indices of the columns of Q_S, ascending.
        columns: kept columns of W', indices of the columns of Q_A, ascending.
        form: how the factored layer is laid out.
    """

    kind: Literal["eigenblock"] = "eigenblock"
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    form: DenseForm


class DepthwiseBlock(Frozen):
    """Rows and columns that are kept in the eigenbasis, joined by a depthwise convolution.

    Attributes:
        rows: kept rows of W', as in `EigenBlock`.
        columns: kept columns of W'.
        rank: R, of the CP decomposition of the kept block; channels of the depthwise stage.
    """

    kind: Literal["depthwise"] = "depthwise"
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    rank: int = Field(ge=1)


class LowRank(Frozen):
    """A product of low rank, the best of its shape under S ⊗ A; it always has a bias.

    Attributes:
        rank: r_o, the inner rank of the last two stages; the number of outputs for ``merge_out``.
        basis: of the inputs, (i, r_i), as packed by `packed`; None for all inputs (``merge_in``).
        form: how the factored layer is laid out.
        damping: of S and A, relative to their mean diagonal.
    """

    kind: Literal["lowrank"] = "lowrank"
    rank: int = Field(ge=1)
    basis: str | None
    form: DenseForm
    damping: Amount

    @model_validator(mode="after")
    def _fits(self) -> LowRank:
        if (self.basis is None) != (self.form == "merge_in"):
            raise ValueError("merge_in has no input basis, three and merge_out have one")
        return self

    def directions(self, inputs: int) -> Float[Tensor, "i r"] | None:
        """The basis, None for all inputs.

        Raises:
            MismatchError: if it is of another number of inputs.
        """
        return None if self.basis is None else unpacked(self.basis, inputs)


class Channels(Frozen):
    """Output and input channels of a layer that are kept; the others go with their groups.

    Attributes:
        outputs: kept rows of W, ascending.
        inputs: kept columns of W, ascending.
        repair: how the weights that stay are changed to make up for those that go.
        damping: of S and A in the repair, relative to their mean diagonal.
        bias: whether a repaired layer without a bias gets one, which takes up the mean of what
            goes.
    """

    kind: Literal["channels"] = "channels"
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    repair: Repair
    damping: Amount
    bias: bool = False


class Mask(Frozen):
    """Single weights that are kept; the others become zero and stay where they are.

    Attributes:
        kept: one bit a weight in the order of (o, i, K), packed, deflated, in base 64.
        repair: ``masked`` changes the weights that stay to make up for those that go.
        damping: of S and A in the repair, relative to their mean diagonal.
    """

    kind: Literal["mask"] = "mask"
    kept: str
    repair: Literal["none", "masked"]
    damping: Amount

    @classmethod
    def of(
        cls, keep: Bool[Tensor, "o i K"], repair: Literal["none", "masked"], damping: float
    ) -> Mask:
        """The mask of a weight."""
        bits = np.packbits(keep.cpu().numpy().ravel())
        packed = base64.b64encode(zlib.compress(bits.tobytes())).decode("ascii")
        return cls(kept=packed, repair=repair, damping=damping)

    def keep(self, shape: tuple[int, int, int]) -> Bool[Tensor, "o i K"]:
        """Which weights are kept.

        Raises:
            MismatchError: if the mask is of a weight of another size.
        """
        count = math.prod(shape)
        size = (count + 7) // 8
        try:
            unpacked = zlib.decompressobj().decompress(base64.b64decode(self.kept), size + 1)
        except (ValueError, zlib.error) as error:
            raise MismatchError(f"the mask of a plan cannot be read: {error}") from error
        if len(unpacked) != size:
            raise MismatchError(f"the mask of a plan is not of {count} weights, as the layer has")
        bits = np.unpackbits(np.frombuffer(unpacked, np.uint8), count=count)
        return torch.from_numpy(bits.astype(bool)).reshape(shape)


Action = Annotated[
    Keep | EigenBlock | DepthwiseBlock | LowRank | Channels | Mask, Field(discriminator="kind")
]


class LayerPlan(Frozen):
    """What happens to one layer.

    Attributes:
        action: what is done.
        price: expected rise of the mean loss per example (nats for cross-entropy); None where the
            method's measure is not a rise of the loss.
        shape: (o, i, K) of the weight, to recognise the layer.
        sketch: a few numbers of the weight, to tell it from that of another model.
        macs: multiply-accumulates of one example before and after.
        parameters: parameters before and after.
        calibrated: the price, corrected by what the layer was measured to cost alone.
    """

    action: Action
    price: Amount | None
    shape: tuple[int, int, int]
    macs: tuple[Amount, Amount]
    parameters: tuple[int, int]
    calibrated: Amount | None = None
    sketch: Sketch | None = None

    @property
    def changes(self) -> bool:
        """Whether the layer is changed at all."""
        return not isinstance(self.action, Keep)


class CarrierPlan(Frozen):
    """Which channels stay of a module that passes them on one by one: batch norm, say.

    Attributes:
        kept: indices, ascending.
        channels: how many there are.
    """

    kept: tuple[int, ...]
    channels: int


class CounterPlan(Frozen):
    """An attribute of a module that counts heads or their channels, of which some go.

    Attributes:
        module: its dotted path.
        attribute: its name.
        before: its value now.
        after: what it is to be.
    """

    module: str
    attribute: str
    before: int
    after: int


class Plan(Document):
    """What is done to each layer, and what that is expected to cost and save.

    Attributes:
        version: of the file format.
        method: name of the method.
        variant: which form of the method.
        budget: what was asked for.
        ratio: the fraction of units whose price the threshold reaches, where the method has one.
            Fewer go where a layer would not shrink, or one side would lose too many.
        layers: by dotted path, in the order in which they run.
        carriers: modules between the layers that lose channels, by dotted path.
        counters: attributes of modules that have to follow what goes.
        left_alone: why other modules with parameters are not in the plan.
        macs: multiply-accumulates of one example in the whole model, before and after.
        parameters: parameters of the whole model, before and after.
        bytes: of the parameters of the whole model, before and after.
        gap: the most that a better allocation of the same menus could save of the (calibrated)
            price, where the method allocates; 0 if none can.
        notes: what a user should know.
    """

    version: Literal[1] = PLAN_VERSION
    method: str
    variant: str | None = None
    budget: Budget
    ratio: float | None = None
    layers: Mapping[str, LayerPlan]
    carriers: Mapping[str, CarrierPlan] = {}
    counters: tuple[CounterPlan, ...] = ()
    left_alone: Mapping[str, str]
    macs: tuple[Amount, Amount]
    parameters: tuple[int, int]
    bytes: tuple[int, int] | None = None
    gap: Amount | None = None
    notes: tuple[str, ...] = ()

    @property
    def price(self) -> float | None:
        """Expected rise of the mean loss per example, all layers together.

        None where the method's measure is not a rise of the loss.
        """
        prices = [layer.price for layer in self.layers.values()]
        known = [price for price in prices if price is not None]
        return sum(known) if len(known) == len(prices) else None

    @property
    def calibrated(self) -> float | None:
        """Expected rise of the loss by calibrated prices; None if they were not calibrated."""
        changed = [layer for layer in self.layers.values() if layer.price]
        known = [layer.calibrated for layer in changed if layer.calibrated is not None]
        return sum(known) if known and len(known) == len(changed) else None

    @property
    def expected(self) -> float | None:
        """The best that is known of the rise of the loss: `calibrated`, else `price`."""
        return self.price if self.calibrated is None else self.calibrated

    def left(self, unit: Unit) -> float:
        """The fraction of the whole model's size that is left."""
        sizes = {"macs": self.macs, "params": self.parameters, "bytes": self.bytes}[unit]
        return sizes[1] / sizes[0] if sizes else 1.0

    @property
    def title(self) -> str:
        """The method, and its variant where it has several."""
        return self.method if self.variant is None else f"{self.method} ({self.variant})"

    @property
    def changed(self) -> tuple[str, ...]:
        """The layers that are changed."""
        return tuple(name for name, layer in self.layers.items() if layer.changes)
