import pytest
import torch
from safetensors.torch import save_file

from eigendamage import zoo
from eigendamage.errors import FileError, FileFormatError, MismatchError, MissingFileError


@pytest.fixture
def small():
    return zoo.resnet(8, width=4)


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["safetensors", "pt", "pth", "nested"])
def test_weights_come_back_as_they_were_saved(small, tmp_path, kind):
    weights = weights_of(small)
    path = tmp_path / f"weights.{'pt' if kind == 'nested' else kind}"
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights, "epoch": 3} if kind == "nested" else weights, path)
    other = zoo.resnet(8, width=4)
    zoo.load_weights(other, path)
    assert all(torch.equal(other.state_dict()[name], weights[name]) for name in weights)


def test_not_a_number_is_loaded_like_any_other(small, tmp_path):
    weights = weights_of(small)
    weights["linear.bias"].fill_(float("nan"))
    save_file(weights, tmp_path / "nan.safetensors")
    zoo.load_weights(small, tmp_path / "nan.safetensors")
    assert small.linear.bias.isnan().all()


def test_missing_key_is_named_and_nothing_is_loaded(small, tmp_path):
    weights = {name: tensor + 1 for name, tensor in weights_of(small).items()}
    del weights["layer2.0.conv1.weight"]
    save_file(weights, tmp_path / "w.safetensors")
    before = weights_of(small)
    with pytest.raises(MismatchError, match=r"has no 'layer2\.0\.conv1\.weight' of shape \(8, 4"):
        zoo.load_weights(small, tmp_path / "w.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


def test_unexpected_key_is_named(small, tmp_path):
    save_file(weights_of(small) | {"head.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(MismatchError, match=r"has 'head\.weight', which the model has not"):
        zoo.load_weights(small, tmp_path / "w.safetensors")


def test_other_shape_is_named_with_both_shapes(small, tmp_path):
    save_file(weights_of(zoo.resnet(8, width=4, num_classes=3)), tmp_path / "w.safetensors")
    with pytest.raises(MismatchError, match=r"'linear\.weight' of shape \(3, 16\).*\(10, 16\)"):
        zoo.load_weights(small, tmp_path / "w.safetensors")


def test_pickled_model_is_refused(small, tmp_path):
    torch.save(small, tmp_path / "model.pt")
    with pytest.raises(FileFormatError, match=r"save model\.state_dict\(\)"):
        zoo.load_weights(small, tmp_path / "model.pt")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {0: torch.zeros(1)}])
def test_file_without_a_state_dict_is_refused(small, tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(FileFormatError, match="state dict"):
        zoo.load_weights(small, tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_file_cut_short_is_refused(small, tmp_path, name):
    path = tmp_path / name
    if name == "w.pt":
        torch.save(weights_of(small), path)
    else:
        save_file(weights_of(small), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(FileFormatError, match=r"w\."):
        zoo.load_weights(small, path)


def test_missing_file_and_other_suffix_are_refused(small, tmp_path):
    with pytest.raises(MissingFileError, match=r"there is no file of weights at '.*w\.pt'"):
        zoo.load_weights(small, tmp_path / "w.pt")
    with pytest.raises(FileError, match="cannot read the file of weights"):
        zoo.load_weights(small, tmp_path)
    (tmp_path / "w.onnx").write_bytes(b"")
    with pytest.raises(FileFormatError, match=r"ends in '\.onnx'"):
        zoo.load_weights(small, tmp_path / "w.onnx")


@pytest.fixture(scope="module")
def cifar(shared_file):
    return zoo.load_images(shared_file("data/cifar10-jpeg.zip"), "test", limit=1_500)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "published"), [("resnet20", 0.880), ("resnet56", 0.897)])
def test_pretrained_resnets_have_their_published_accuracy(shared_file, cifar, name, published):
    model = zoo.get(name)()
    zoo.load_weights(model, shared_file(f"models/{name}_cifar10jpeg.safetensors"))
    model.eval()
    with torch.no_grad():
        hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in cifar.batches(500))
    # 1,500 of the 10,000 test images: the standard error is 0.8 points.
    assert hits / len(cifar) == pytest.approx(published, abs=0.02)
