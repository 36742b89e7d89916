"""Which channels go together, as data: groups of units and their places in the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

from eigendamage.documents import Frozen


class Member(Frozen):
    """One side of a module that holds the channels of a group.

    Attributes:
        module: its dotted path; that of the factored layer, if it is a part of one.
        indices: for each unit of the group, the channels of that side that go with it: one, or
            a block of them where feature maps are flattened or a tensor is read several times.
            Every unit has equally many.
    """

    module: str
    indices: tuple[tuple[int, ...], ...]


class Counter(Frozen):
    """An attribute of a module that says how many units or channels there are.

    Attributes:
        module: its dotted path.
        attribute: its name.
        whole: its value with all units.
        per_unit: by how much it falls with each that goes.
    """

    module: str
    attribute: str
    whole: int
    per_unit: int


class ChannelGroup(Frozen):
    """Channels of several modules that can only be removed together, unit by unit.

    Attributes:
        size: number of units.
        producers: Linear, Conv2d and factored layers whose output rows (and bias) make them.
        carriers: what passes them on one by one and has a state for each: batch and instance
            norms, PReLU with a parameter a channel, depthwise convolutions.
        readers: Linear, Conv2d and factored layers whose input columns read them.
        macs: multiply-accumulates of one unit and example that are in none of these modules, as
            those of attention for a head.
        counters: attributes that have to follow the number of units.
    """

    size: int
    producers: tuple[Member, ...]
    carriers: tuple[Member, ...]
    readers: tuple[Member, ...]
    macs: float = 0.0
    counters: tuple[Counter, ...] = ()

    @property
    def makers(self) -> tuple[str, ...]:
        """The dotted paths of the producers."""
        return tuple(member.module for member in self.producers)

    @property
    def holder(self) -> str:
        """The dotted path of the innermost module that all producers and readers are in."""
        return innermost([member.module for member in (*self.producers, *self.readers)])

    @property
    def has_blocks(self) -> bool:
        """Whether its units are blocks of outputs, as heads are."""
        return any(len(member.indices[0]) > 1 for member in self.producers)


class Carrier(Frozen):
    """What a carrier costs.

    Attributes:
        channels: how many it has.
        parameters: of one channel.
        macs: multiply-accumulates of one channel and example; 0 unless it is a convolution.
    """

    channels: int
    parameters: int
    macs: float


class ChannelGraph(Frozen):
    """All groups of channels of a model that can be removed, and why the others cannot.

    Attributes:
        groups: by the dotted path of the group's first producer in order of execution (of the
            first that names no other group, where a layer's rows are spread over several).
        carriers: the cost of every carrier in ``groups``, by dotted path.
        left_alone: by first producer, the reason why its channels stay.
    """

    groups: Mapping[str, ChannelGroup]
    carriers: Mapping[str, Carrier]
    left_alone: Mapping[str, str]


def innermost(paths: Sequence[str]) -> str:
    """The dotted path of the innermost module that modules with these paths are in."""
    parents = [path.split(".")[:-1] for path in paths]
    shared = takewhile(lambda names: len(set(names)) == 1, zip(*parents, strict=False))
    return ".".join(names[0] for names in shared)
