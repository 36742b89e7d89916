"""What a layer costs, in closed form: multiply-accumulates of one example, parameters, bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eigendamage.errors import EigenDamageError

DenseForm = Literal["three", "merge_in", "merge_out"]
Form = Literal[DenseForm, "depthwise"]
"""How a factored layer is laid out.

``three``: 1×1 (i → r_i), K (r_i → r_o), 1×1 (r_o → o).
``merge_in``: the first two multiplied together, K (i → r_o), 1×1 (r_o → o).
``merge_out``: the last two multiplied together, 1×1 (i → r_i), K (r_i → o).
``depthwise``: 1×1 (i → R), K on each channel by itself (R → R, R groups), 1×1 (R → o). At R = 1 it
is the same as ``three``.
"""
FORMS: tuple[DenseForm, ...] = ("three", "merge_in", "merge_out")
"""The forms of one and the same product: which of them is only a question of cost."""


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one example, number of parameters, and the bytes that they take."""

    macs: float
    parameters: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.macs + other.macs,
            self.parameters + other.parameters,
            self.bytes + other.bytes,
        )

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.macs - other.macs,
            self.parameters - other.parameters,
            self.bytes - other.bytes,
        )


@dataclass(frozen=True)
class LayerShape:
    """Everything that the cost of a layer and of its factored forms depends on.

    Attributes:
        outputs: o, output features or channels.
        inputs: i, input features or channels (of one group).
        offsets: K, kernel taps; 1 for Linear.
        bias: whether the layer has one.
        positions_in: pixels or tokens of one example at the input (the resolution of a leading
            1×1 stage).
        positions_out: positions of one example at the output.
        itemsize: bytes of one parameter.
    """

    outputs: int
    inputs: int
    offsets: int
    bias: bool
    positions_in: float
    positions_out: float
    itemsize: int = 4

    def dense(self) -> Cost:
        """Cost of the layer as one matrix product or convolution."""
        weights = self.outputs * self.inputs * self.offsets
        return self._cost(weights * self.positions_out, weights + self._bias())

    def factored(self, rank_out: int, rank_in: int, form: Form) -> Cost:
        """Cost of the layer in stages, with ``rank_out`` rows and ``rank_in`` columns kept.

        Raises:
            EigenDamageError: if the form is ``depthwise`` and the ranks are not the same R.
        """
        o, i, k = self.outputs, self.inputs, self.offsets
        reduce = self._cost(i * rank_in * self.positions_in, i * rank_in)
        expand = self._cost(rank_out * o * self.positions_out, rank_out * o + self._bias())
        if form == "three":
            core = rank_in * k * rank_out
            return reduce + self._cost(core * self.positions_out, core) + expand
        if form == "depthwise":
            if rank_out != rank_in:
                raise EigenDamageError(
                    f"a depthwise stage has as many outputs as inputs, but ranks ({rank_out}, "
                    f"{rank_in}) were given; give the number of its channels twice"
                )
            core = rank_in * k
            return reduce + self._cost(core * self.positions_out, core) + expand
        if form == "merge_in":
            core = i * k * rank_out
            return self._cost(core * self.positions_out, core) + expand
        core = rank_in * k * o
        return reduce + self._cost(core * self.positions_out, core + self._bias())

    def _cost(self, macs: float, parameters: int) -> Cost:
        return Cost(macs, parameters, parameters * self.itemsize)

    def _bias(self) -> int:
        return self.outputs if self.bias else 0
