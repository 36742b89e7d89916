"""The networks of the coverage table: forty of timm and torchvision, small members of many kinds.

Weights are random. Scales, shifts and batch norm's statistics are drawn too: at initialisation many
of them are 0, 1 or a millionth, so that whole branches would have no part in the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

import eigendamage as ed


@dataclass(frozen=True)
class Network:
    """A network of the table.

    Attributes:
        name: as `eigendamage.get_model` takes it; with options also a class, ``module:class``.
        kind: what sort of network it is.
        size: height and width of its images.
        options: for ``timm.create_model`` or the class, where the network is not taken as it is.
        part: the module around it that returns logits, where it returns something else.
    """

    name: str
    kind: str
    size: int = 64
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    part: type[nn.Module] | None = None

    def make(self, seed: int) -> nn.Module:
        """The network in eval mode, with weights that only the seed decides."""
        torch.manual_seed(seed)
        library, _, made = self.name.partition(":")
        if library == "timm" and self.options:
            model = import_module("timm").create_model(made, **self.options).eval()
        elif self.options:
            model = getattr(import_module(library), made)(**self.options).eval()
        else:
            model = ed.get_model(self.name)
        model = model if self.part is None else self.part(model).eval()
        draw_scales(model)
        ed.recalibrate_batchnorm(model, self.images(16, seed), progress=False)
        return model

    def images(self, number: int, seed: int) -> list[Tensor]:
        """Random images in batches of eight."""
        random = torch.Generator().manual_seed(seed)
        return list(torch.randn(number, 3, self.size, self.size, generator=random).split(8))


def draw_scales(model: nn.Module) -> None:
    """Give every parameter of one axis, every scale of channels and every 0 a drawn value."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.numel() > max(parameter.shape, default=1):
                if not parameter.any():
                    parameter.normal_(0, 0.1)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:
                parameter.uniform_(0.5, 1.5)


class PixelLogits(nn.Module):
    """A segmentation network of torchvision, which returns a dict, as one that returns ``out``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every pixel."""
        return self.network(x)["out"]


class BoxLogits(nn.Module):
    """Backbone and head of a one-stage detector, without anchors and suppression of boxes."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of classes and boxes, for every anchor."""
        found = self.head(list(self.backbone(x).values()))
        return found["cls_logits"], found["bbox_regression"]


class Proposals(nn.Module):
    """Backbone and proposal head of a two-stage detector: what may be an object, and its box."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.rpn.head

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits of all anchors, and the boxes of each level."""
        objectness, boxes = self.head(list(self.backbone(x).values()))
        return (torch.cat([o.flatten(1) for o in objectness], 1), *boxes)


_RESNET = {"channels": (32, 64, 128, 256)}
_DENSE = {"block_config": (2, 3, 3, 2), "growth_rate": 16}
_NEXT = {"depths": (1, 1, 2, 1), "dims": (24, 48, 96, 128)}
_VIT = {"img_size": 64, "depth": 2}
_PIT = {"img_size": 64, "depth": (1, 1, 1)}
_PVT = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 80, 96)}
_LEVIT = {
    "img_size": 64,
    "embed_dim": (32, 64, 96),
    "key_dim": 16,
    "depth": (2, 2, 2),
    "num_heads": (2, 3, 4),
}
_SWIN = {
    "img_size": 64,
    "window_size": 4,
    "embed_dim": 32,
    "depths": (1, 2, 1, 1),
    "num_heads": (2, 4, 8, 16),
}
_MIXER = {"img_size": 64, "patch_size": 8, "embed_dim": 128, "num_blocks": 3}

NETWORKS = (
    Network("timm:resnet18", "CNN", options=_RESNET),
    Network("timm:resnet10t", "CNN", options=_RESNET),
    Network("torchvision:squeezenet1_1", "CNN"),
    Network("timm:densenet121", "CNN", options=_DENSE),
    Network("timm:dla46_c", "CNN"),
    Network("timm:test_byobnet", "CNN"),
    Network("timm:test_nfnet", "CNN"),
    Network("timm:regnetx_002", "CNN, groups"),
    Network("timm:regnety_002", "CNN, groups"),
    Network("timm:mobilenetv2_035", "depthwise"),
    Network("timm:mobilenetv3_small_050", "depthwise"),
    Network("timm:mobilenetv4_conv_small_035", "depthwise"),
    Network("torchvision:mnasnet0_5", "depthwise"),
    Network("torchvision:shufflenet_v2_x0_5", "depthwise"),
    Network("timm:test_efficientnet", "depthwise"),
    Network("timm:lcnet_035", "depthwise"),
    Network("timm:ghostnet_050", "depthwise"),
    Network("timm:convnext_atto", "ConvNeXt", options=_NEXT),
    Network("timm:convnextv2_atto", "ConvNeXt", options=_NEXT),
    Network("timm:inception_next_atto", "ConvNeXt", options=_NEXT),
    Network("timm:test_mambaout", "ConvNeXt"),
    Network("timm.models.metaformer:MetaFormer", "MetaFormer", options=_NEXT),
    Network("timm:vit_tiny_patch16_224", "ViT", options=_VIT),
    Network("timm:deit_tiny_distilled_patch16_224", "ViT", options=_VIT),
    Network("timm:pit_ti_224", "ViT", options=_PIT),
    Network("timm:xcit_nano_12_p16_224", "ViT", options=_VIT),
    Network("timm:pvt_v2_b0", "ViT", options=_PVT),
    Network("timm:swin_tiny_patch4_window7_224", "Swin", options=_SWIN),
    Network("timm:swinv2_tiny_window8_256", "Swin", options=_SWIN),
    Network("timm:test_coatnet", "CNN and attention", options={"img_size": 64}),
    Network("timm:test_maxvit", "CNN and attention", options={"img_size": 64}),
    Network("timm:mobilevit_xxs", "CNN and attention"),
    Network("timm:edgenext_xx_small", "CNN and attention"),
    Network("timm.models.levit:Levit", "CNN and attention", options=_LEVIT),
    Network("timm:efficientvit_b0", "CNN and attention"),
    Network("timm.models.mlp_mixer:MlpMixer", "MLP-Mixer", options=_MIXER),
    Network("torchvision:lraspp_mobilenet_v3_large", "segmentation", part=PixelLogits),
    Network("torchvision:deeplabv3_mobilenet_v3_large", "segmentation", part=PixelLogits),
    Network("torchvision:ssdlite320_mobilenet_v3_large", "detection", part=BoxLogits),
    Network("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", "detection", part=Proposals),
)
"""All of them, in the order in which they run."""
