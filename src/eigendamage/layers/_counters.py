"""Attributes that say how many heads there are, where a reshape or a split reads them."""

from __future__ import annotations

from torch import nn

from eigendamage.layers._channel_graph import ChannelGroup, Counter, innermost
from eigendamage.layers._fused import SWITCHES

COUNTERS = (
    # Heads: timm, GPT-2, OPT and CLIP; GPT-NeoX and BERT; ViTs by hand; DistilBERT and T5.
    *("num_heads", "num_attention_heads", "heads", "n_heads"),
    # Their channels: GPT-2 and CodeGen; timm; BERT before transformers 5; T5 and diffusers.
    *("split_size", "attn_dim", "all_head_size", "inner_dim"),
)
FOLLOWING = (*COUNTERS, *SWITCHES)
"""Names of the attributes that are ever set; a file that names others is refused."""


def with_counters(base: nn.Module, group: ChannelGroup) -> ChannelGroup:
    """The group with the attributes that say how many of its units there are, if there are any.

    They are looked for by name, in the module that holds all layers of the group and in the one
    that holds those that make its channels.
    """
    counters = [
        Counter(module=holder, attribute=name, whole=value, per_unit=value // group.size)
        for holder in dict.fromkeys([group.holder, innermost(group.makers)])
        for name, value in vars(base.get_submodule(holder)).items()
        if name in COUNTERS and type(value) is int and value > 0 and value % group.size == 0
    ]
    return group.model_copy(update={"counters": tuple(counters)})
