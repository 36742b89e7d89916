"""The networks of the coverage table: forty of timm and torchvision, small members of many kinds.

Weights are random. Scales, shifts and batch norm's statistics are drawn too: at initialisation many
of them are 0, 1 or a millionth, so that whole branches would have no part in the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import eigendamage as ed


@dataclass(frozen=True)
class Network:
    """A network of the table.

    Attributes:
        name: as `eigendamage.get_model` takes it.
        kind: what sort of network it is.
        size: height and width of its images.
        options: for ``timm.create_model``, where the network is not taken as it is.
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
        if self.options:
            import timm

            model = timm.create_model(self.name.removeprefix("timm:"), **self.options).eval()
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
    """Give every parameter of one axis, and every learned scale of channels, a drawn value."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.numel() > max(parameter.shape, default=1):
                continue
            if name.endswith("bias"):
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


_SMALL = {"img_size": 64}
_SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 48, "depths": (2, 2, 2, 1)}
_MIXER = {"img_size": 64, "embed_dim": 128, "num_blocks": 4}

NETWORKS = (
    Network("torchvision:resnet18", "CNN"),
    Network("timm:resnet10t", "CNN"),
    Network("torchvision:squeezenet1_1", "CNN"),
    Network("torchvision:googlenet", "CNN", 96),
    Network("timm:densenet121", "CNN"),
    Network("timm:dla46_c", "CNN"),
    Network("timm:repvgg_a0", "CNN"),
    Network("timm:test_nfnet", "CNN"),
    Network("timm:regnetx_002", "CNN, groups"),
    Network("timm:regnety_002", "CNN, groups"),
    Network("timm:mobilenetv2_035", "depthwise"),
    Network("timm:mobilenetv3_small_050", "depthwise"),
    Network("timm:mobilenetv4_conv_small_035", "depthwise"),
    Network("torchvision:mnasnet0_5", "depthwise"),
    Network("torchvision:shufflenet_v2_x0_5", "depthwise"),
    Network("torchvision:efficientnet_b0", "depthwise"),
    Network("timm:tinynet_e", "depthwise"),
    Network("timm:ghostnet_050", "depthwise"),
    Network("timm:starnet_s1", "depthwise"),
    Network("timm:convnext_atto", "ConvNeXt"),
    Network("timm:convnextv2_atto", "ConvNeXt"),
    Network("timm:inception_next_atto", "ConvNeXt"),
    Network("timm:poolformer_s12", "MetaFormer"),
    Network("timm:vit_tiny_patch16_224", "ViT", options=_SMALL),
    Network("timm:deit_tiny_distilled_patch16_224", "ViT", options=_SMALL),
    Network("timm:pit_ti_224", "ViT", options=_SMALL),
    Network("timm:xcit_nano_12_p16_224", "ViT", options=_SMALL),
    Network("timm:pvt_v2_b0", "ViT"),
    Network("timm:swin_tiny_patch4_window7_224", "Swin", options=_SWIN),
    Network("timm:swinv2_tiny_window8_256", "Swin", options=_SWIN),
    Network("timm:mobilevit_xxs", "CNN and attention"),
    Network("timm:edgenext_xx_small", "CNN and attention"),
    Network("timm:levit_128s", "CNN and attention", 224),
    Network("timm:efficientvit_b0", "CNN and attention"),
    Network("timm:mixer_s32_224", "MLP-Mixer", options=_MIXER),
    Network("timm:resmlp_12_224", "MLP-Mixer", options=_MIXER),
    Network("torchvision:lraspp_mobilenet_v3_large", "segmentation", part=PixelLogits),
    Network("torchvision:deeplabv3_mobilenet_v3_large", "segmentation", part=PixelLogits),
    Network("torchvision:ssdlite320_mobilenet_v3_large", "detection", part=BoxLogits),
    Network("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", "detection", part=Proposals),
)
"""All of them, in the order in which they run."""
