import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eigendamage import zoo
from eigendamage.errors import EigenDamageError


def macs(model: torch.nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    return counter.get_total_flops() // 2


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_wide_resnet32_has_the_size_the_paper_prints():
    model = zoo.wide_resnet32()
    assert round(parameters(model) / 1e6, 2) == 7.43
    assert round(macs(model, torch.zeros(1, 3, 32, 32)) / 1e9, 2) == 1.10


@pytest.mark.parametrize(
    ("name", "count", "mega_macs"),
    [
        ("resnet20", 269_722, 40.55),
        ("resnet32", 464_154, 68.86),
        ("resnet44", 658_586, 97.17),
        ("resnet56", 853_018, 125.49),
    ],
)
def test_cifar_resnets_have_the_published_sizes(name, count, mega_macs):
    model = zoo.get(name)()
    assert parameters(model) == count
    assert round(macs(model, torch.zeros(1, 3, 32, 32)) / 1e6, 2) == mega_macs


def test_vgg19_has_twenty_million_parameters_in_sixteen_convolutions_and_a_linear_layer():
    model = zoo.vgg19()
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 16
    # 3 x 3 kernels between 3, 64, 64, ... 512 channels, two numbers a batch norm channel.
    assert parameters(model) == 20_018_880 + 2 * 5_504 + 512 * 10 + 10
    assert round(parameters(model) / 1e6, 1) == 20.0


def test_preresnet_has_nine_layers_for_each_block_of_a_stage_and_two_more():
    convolutions = [
        m
        for name, m in zoo.preresnet29().named_modules()
        if isinstance(m, torch.nn.Conv2d) and "downsample" not in name
    ]
    assert len(convolutions) + 1 == 29


def test_preresnet_block_is_its_input_where_the_last_convolution_is_zero():
    block = zoo.preresnet29().layer1[1].eval()
    torch.nn.init.zeros_(block.conv3.weight)
    x = torch.randn(2, 64, 8, 8)
    assert torch.equal(block(x), x)


def test_resnet_shortcut_thins_pixels_and_pads_channels_on_both_sides():
    shortcut = zoo.resnet20().layer2[0].shortcut
    x = torch.randn(2, 16, 8, 8)
    y = shortcut(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()
    assert list(shortcut.parameters()) == []


def test_width_multiplies_every_stage():
    model = zoo.resnet(20, width=8, num_classes=7)
    assert [model.layer1[0].conv1.out_channels, model.linear.in_features] == [8, 32]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", sorted(zoo.MODELS.keys() - {"demo_network"}))
def test_every_network_maps_images_to_finite_logits_that_tell_inputs_apart(name):
    torch.manual_seed(0)
    logits = zoo.get(name)(num_classes=5).eval()(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()
    assert not torch.allclose(logits[0], logits[1])


def test_initial_weights_keep_the_variance_of_the_input():
    torch.manual_seed(0)
    weight = zoo.vgg19().feature[49].weight
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize("depth", [2, 21, -4])
def test_impossible_depth_is_refused_with_the_rule(depth):
    with pytest.raises(EigenDamageError, match=rf"6n \+ 2 layers.*{depth}.*take 8"):
        zoo.resnet(depth)
    with pytest.raises(EigenDamageError, match=rf"9n \+ 2 layers.*{depth}.*take 11"):
        zoo.preresnet(depth)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(EigenDamageError, match=r"'resnet18'.*demo_network.*resnet20.*vgg19"):
        zoo.get("resnet18")


def test_registry_holds_the_public_constructors():
    assert all(getattr(zoo, name) is constructor for name, constructor in zoo.MODELS.items())
