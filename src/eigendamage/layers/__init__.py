"""What a compressible layer is: its (o, i, K) weight, geometry, cost and factored forms."""

from eigendamage.layers._channel_graph import Carrier, ChannelGraph, ChannelGroup, Counter, Member
from eigendamage.layers._channels import find_channels
from eigendamage.layers._copy import copy_model, require_copyable
from eigendamage.layers._cost import FORMS, Cost, DenseForm, Form, LayerShape
from eigendamage.layers._counters import COUNTERS, FOLLOWING
from eigendamage.layers._factored import FactoredConv2d, FactoredLinear, balance, balance_factors
from eigendamage.layers._find import ON_REQUEST, Layer, Layers, find_layers
from eigendamage.layers._fused import PACKING, SWITCHES, fused_calls, set_following
from eigendamage.layers._geometry import ConvGeometry
from eigendamage.layers._origin import (
    Origin,
    join,
    origin_of,
    own_tensors,
    recounted_origin,
    reshaped_origin,
    saved_tensors,
    set_origin,
)
from eigendamage.layers._sketch import (
    Sketch,
    require_known,
    require_near,
    sketch_of,
)
from eigendamage.layers._slicing import (
    Kept,
    Sides,
    channels_of,
    counts_left,
    kept_indices,
    remove_units,
    sides,
    slice_channels,
    zero_inputs,
)
from eigendamage.layers._sums import Port, Sum, find_sums
from eigendamage.layers._trace import LayerTrace, Trace, evaluating, preserved_random_state, trace

__all__ = [
    "COUNTERS",
    "FOLLOWING",
    "FORMS",
    "ON_REQUEST",
    "PACKING",
    "SWITCHES",
    "Carrier",
    "ChannelGraph",
    "ChannelGroup",
    "ConvGeometry",
    "Cost",
    "Counter",
    "DenseForm",
    "FactoredConv2d",
    "FactoredLinear",
    "Form",
    "Kept",
    "Layer",
    "LayerShape",
    "LayerTrace",
    "Layers",
    "Member",
    "Origin",
    "Port",
    "Sides",
    "Sketch",
    "Sum",
    "Trace",
    "balance",
    "balance_factors",
    "channels_of",
    "copy_model",
    "counts_left",
    "evaluating",
    "find_channels",
    "find_layers",
    "find_sums",
    "fused_calls",
    "join",
    "kept_indices",
    "origin_of",
    "own_tensors",
    "preserved_random_state",
    "recounted_origin",
    "remove_units",
    "require_copyable",
    "require_known",
    "require_near",
    "reshaped_origin",
    "saved_tensors",
    "set_following",
    "set_origin",
    "sides",
    "sketch_of",
    "slice_channels",
    "trace",
    "zero_inputs",
]
