"""structure.json: what a saved model was, and what became of every module that was changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from eigendamage.documents import Document, Frozen
from eigendamage.layers import Form

STRUCTURE_VERSION = 1

_MOST = 2**31 - 1
Index = Annotated[int, Field(ge=0, le=_MOST)]
Count = Annotated[int, Field(ge=1, le=_MOST)]
Shape = tuple[Index, ...]


class _Strict(Frozen):
    model_config = ConfigDict(strict=True)


class LinearStage(_Strict):
    """A plain Linear layer."""

    kind: Literal["linear"] = "linear"
    inputs: Count
    outputs: Count
    bias: bool


class ConvStage(_Strict):
    """A plain Conv2d layer."""

    kind: Literal["conv2d"] = "conv2d"
    inputs: Count
    outputs: Count
    bias: bool
    kernel: tuple[Count, Count]
    stride: tuple[Count, Count]
    padding: tuple[Index, Index] | Literal["same", "valid"]
    dilation: tuple[Count, Count]
    groups: Count
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]

    @model_validator(mode="after")
    def _fits(self) -> ConvStage:
        if self.inputs % self.groups or self.outputs % self.groups:
            raise ValueError(
                f"{self.groups} groups do not divide {self.inputs} inputs and {self.outputs} "
                f"outputs"
            )
        return self


Stage = Annotated[LinearStage | ConvStage, Field(discriminator="kind")]


class Stages(_Strict):
    """The plain layers that took the place of a layer.

    Attributes:
        form: how they are laid out; None for a single one.
        ranks: r_o and r_i; a side that was merged is full. None for a single one.
        layers: first to last.
    """

    form: Form | None
    ranks: tuple[Count, Count] | None
    layers: tuple[Stage, ...] = Field(min_length=1, max_length=3)

    @model_validator(mode="after")
    def _fits(self) -> Stages:
        single = len(self.layers) == 1
        if single != (self.form is None) or single != (self.ranks is None):
            raise ValueError("two or three stages have a form and ranks, a single one has neither")
        if len({stage.kind for stage in self.layers}) > 1:
            raise ValueError("stages are either all linear or all conv2d")
        return self


class ModuleForm(_Strict):
    """What became of one module.

    Attributes:
        stages: the layers that took its place; None where it is still what it was.
        dropped_outputs: those of the original's outputs that are gone, ascending.
        dropped_inputs: those of the original's inputs that are gone, ascending.
        added_bias: whether it had no bias and now has one.
        masked: whether its weight has a mask of ``torch.nn.utils.prune``.
        counts: attributes that count heads or their channels, or allow a fused call, before and
            after.
    """

    stages: Stages | None = None
    dropped_outputs: tuple[Index, ...] = ()
    dropped_inputs: tuple[Index, ...] = ()
    added_bias: bool = False
    masked: bool = False
    counts: Mapping[str, tuple[Index, Index]] = Field(default_factory=dict)


class Structure(Document):
    """What turns the original model into the saved one, but for the weights.

    Attributes:
        version: of the file format.
        model: name of the original's class, for the reader.
        original: shape of every parameter and persistent buffer of the original, by name.
        modules: those that were changed, by dotted path.
        ties: names of tensors that are stored under another name, which is the same tensor.
        layouts: strides of tensors that are not laid out row by row in memory.
    """

    model_config = ConfigDict(strict=True)

    version: Literal[1] = STRUCTURE_VERSION
    model: str
    original: Mapping[str, Shape]
    modules: Mapping[str, ModuleForm] = Field(default_factory=dict)
    ties: Mapping[str, str] = Field(default_factory=dict)
    layouts: Mapping[str, tuple[Index, ...]] = Field(default_factory=dict)
