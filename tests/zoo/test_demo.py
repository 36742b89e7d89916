import importlib.resources
import json

import pytest
import torch

from eigendamage import zoo

FILES = importlib.resources.files("eigendamage.zoo")


def outcome(model: torch.nn.Module, count: int = 2_000) -> tuple[float, float]:
    correct, loss = 0, 0.0
    test = zoo.fashion_mnist("test").take(slice(count))
    with torch.no_grad():
        for images, labels in test.batches(500):
            logits = model(images)
            correct += int((logits.argmax(1) == labels).sum())
            loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    return correct / count, loss / count


def test_demo_network_is_as_good_on_the_test_images_as_its_record_says():
    accuracy, loss = outcome(zoo.demo_network())
    record = json.loads((FILES / "weights" / "demo_network.json").read_text())
    assert accuracy > 0.89
    # Two images of 2,000 may fall the other way on another processor.
    assert accuracy == pytest.approx(record["test_accuracy"], abs=0.001)
    assert loss == pytest.approx(record["test_loss"], rel=1e-3)


def test_untrained_demo_network_guesses():
    torch.manual_seed(0)
    accuracy, _ = outcome(zoo.demo_network(pretrained=False).eval(), 500)
    assert accuracy < 0.3


def test_pretrained_network_is_in_evaluation_mode_and_float32():
    model = zoo.demo_network()
    assert not any(module.training for module in model.modules())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())


def test_building_the_pretrained_network_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    zoo.demo_network()
    assert torch.equal(torch.get_rng_state(), before)


def test_demo_network_has_the_announced_stages():
    model = zoo.demo_network(pretrained=False)
    shapes = []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape[1:])))
    model(torch.zeros(2, 1, 28, 28))
    assert shapes == [(32, 14, 14), (64, 7, 7), (128, 4, 4)]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 0.70


@pytest.mark.parametrize(
    ("name", "limit"),
    [("weights/demo_network.safetensors", 3_000_000), ("data/fashion_mnist.npz", 7_000_000)],
)
def test_bundled_file_is_small(name, limit):
    assert len(FILES.joinpath(*name.split("/")).read_bytes()) <= limit


def test_licence_of_the_images_lies_beside_them():
    text = (FILES / "data" / "LICENSE.fashion-mnist").read_text()
    assert "Zalando SE" in text
    assert "Permission is hereby granted" in text
