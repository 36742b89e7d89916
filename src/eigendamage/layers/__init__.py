"""What a compressible layer is: its (o, i, K) weight, geometry, cost and factored forms."""

from eigendamage.layers._cost import FORMS, Cost, Form, LayerShape
from eigendamage.layers._factored import FactoredConv2d, FactoredLinear, balance
from eigendamage.layers._find import Layer, Layers, find_layers
from eigendamage.layers._geometry import ConvGeometry
from eigendamage.layers._trace import LayerTrace, Trace, evaluating, trace

__all__ = [
    "FORMS",
    "ConvGeometry",
    "Cost",
    "FactoredConv2d",
    "FactoredLinear",
    "Form",
    "Layer",
    "LayerShape",
    "LayerTrace",
    "Layers",
    "Trace",
    "balance",
    "evaluating",
    "find_layers",
    "trace",
]
