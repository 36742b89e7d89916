"""The callback of Lightning: a small network that is compressed while it is trained."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import eigendamage as ed

pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from eigendamage.integrations.lightning import CompressionCallback

_FEW = partial(ed.compress, method="eigendamage", progress=False)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*srun.*"),
    pytest.mark.filterwarnings("ignore:.*tensorboardX.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:DeprecationWarning"),
]


class _Inner(LightningModule):
    """A network within a LightningModule, SGD with momentum, and a schedule."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 3)),
        )
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def _loader() -> DataLoader[Any]:
    x = torch.randn(64, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x.mean((1, 2, 3)) > 0).long()), 16, shuffle=True)


def _trainer(folder: Path, callback: CompressionCallback, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[callback, ModelCheckpoint(folder, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.mark.parametrize("network", ["", "net"])
def test_rounds_at_steps_make_a_network_smaller_that_goes_on_training(
    network: str, tmp_path: Path
) -> None:
    callback = CompressionCallback(
        ed.Budget(macs=0.5), at_steps=(3, 6), network=network, batches=3, compressor=_FEW
    )
    module = _Inner()
    net, before = module.net, sum(p.numel() for p in module.parameters())
    trainer = _trainer(tmp_path, callback, max_epochs=3)
    trainer.fit(module, _loader())
    assert module.net is net
    assert len(callback.reports) == 2
    assert callback.reports[0].examples == 48
    first, last = callback.reports[0].macs[0], callback.reports[1].macs[1]
    assert last <= 0.5 * first
    assert sum(p.numel() for p in module.parameters()) < before
    assert len(module.losses) == 12
    assert all(0 < loss < 5 for loss in module.losses)
    (optimizer,) = trainer.optimizers
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in module.parameters()}
    assert all("momentum_buffer" in optimizer.state[p] for p in held)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.5**3)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    module.load_state_dict(saved["state_dict"])
    assert len(saved["optimizer_states"][0]["state"]) == len(held)


def test_a_round_after_an_epoch(tmp_path: Path) -> None:
    callback = CompressionCallback(ed.Budget(macs=0.7), at_epochs=[1], compressor=_FEW)
    module = _Inner()
    trainer = _trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(module, _loader())
    assert len(callback.reports) == 1
    assert len(module.losses) == 4


def test_a_training_that_is_shared_out_is_refused(tmp_path: Path) -> None:
    callback = CompressionCallback(ed.Budget(macs=0.7), at_epochs=[1], compressor=_FEW)
    trainer = _trainer(tmp_path, callback, strategy=DDPStrategy(), devices=2)
    with pytest.raises(ed.EigenDamageError, match="DDPStrategy of this Trainer shares"):
        callback.on_fit_start(trainer, _Inner())


@pytest.mark.parametrize("network", ["nope", "net.9", "losses"])
def test_a_network_that_is_not_there_is_refused_before_the_training(
    network: str, tmp_path: Path
) -> None:
    callback = CompressionCallback(
        ed.Budget(macs=0.7), at_epochs=[1], network=network, compressor=_FEW
    )
    module = _Inner()
    with pytest.raises(ed.MismatchError, match=rf"'{network}': the _Inner has no .* are net, net"):
        _trainer(tmp_path, callback, max_epochs=1).fit(module, _loader())
    assert not module.losses


class _WithoutForward(LightningModule):
    """Calls its network in the training step; the list is nothing that can be called."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(3, 3)])
        self.net = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("network", "what"),
    [("", "the _WithoutForward"), ("parts", "network='parts': that ModuleList")],
)
def test_a_network_without_a_forward_is_refused_before_the_training(
    network: str, what: str, tmp_path: Path
) -> None:
    callback = CompressionCallback(ed.Budget(macs=0.7), at_epochs=[1], network=network)
    trainer = _trainer(tmp_path, callback)
    with pytest.raises(ed.MismatchError, match=rf"^{what} has no forward.*are parts\.0, net$"):
        callback.on_fit_start(trainer, _WithoutForward())


class _TwoOptimizers(_Inner):
    """Steps by hand, with two optimizers: two steps of the Trainer a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, _: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        halves = [*self.net[:5].parameters()], [*self.net[5:].parameters()]
        return [torch.optim.SGD(half, lr=0.05) for half in halves]


def test_a_step_that_is_passed_over_has_its_round_once(tmp_path: Path) -> None:
    callback = CompressionCallback(
        ed.Budget(macs=0.5), at_steps=(1, 5, 6), batches=2, compressor=_FEW
    )
    trainer = _trainer(tmp_path, callback, max_steps=6)
    trainer.fit(_TwoOptimizers(), _loader())
    assert len(callback.reports) == 3
    assert callback.reports[2].macs[1] <= 0.5 * callback.reports[0].macs[0]


def test_rounds_go_by_steps_of_the_optimizer_where_gradients_are_accumulated(
    tmp_path: Path,
) -> None:
    callback = CompressionCallback(ed.Budget(macs=0.7), at_steps=[2], batches=2, compressor=_FEW)
    trainer = _trainer(tmp_path, callback, max_steps=3, accumulate_grad_batches=3)
    module = _Inner()
    trainer.fit(module, _loader())
    assert len(callback.reports) == 1


def test_a_second_training_with_no_round_left_or_of_another_network_is_refused(
    tmp_path: Path,
) -> None:
    callback = CompressionCallback(ed.Budget(macs=0.6), at_epochs=(1, 2), compressor=_FEW)
    module = _Inner()
    with pytest.warns(UserWarning, match="ended before 1 of 2 rounds"):
        _trainer(tmp_path / "one", callback, max_epochs=1).fit(module, _loader())
    with pytest.raises(ed.EigenDamageError, match=r"1 of 2 rounds .* another model.* new callback"):
        _trainer(tmp_path / "two", callback, max_epochs=2).fit(_Inner(), _loader())
    _trainer(tmp_path / "three", callback, max_epochs=2).fit(module, _loader())
    first, last = callback.reports
    assert last.macs[1] <= 0.6 * first.macs[0]
    with pytest.raises(ed.EigenDamageError, match=r"all 2 rounds .* make a new callback"):
        _trainer(tmp_path / "four", callback, max_epochs=2).fit(module, _loader())


@pytest.mark.parametrize("kind", ["dict", "list"])
def test_several_loaders_need_data_of_their_own(kind: str, tmp_path: Path) -> None:
    class Several(_Inner):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return super().training_step(batch["a"] if kind == "dict" else batch[0], index)

    loaders = {"a": _loader(), "b": _loader()} if kind == "dict" else [_loader(), _loader()]
    callback = CompressionCallback(ed.Budget(macs=0.7), at_steps=[1], compressor=_FEW)
    named = "'a', 'b'" if kind == "dict" else "number 0, number 1"
    with pytest.raises(ed.DataError, match=rf"{kind} of loaders \({named}\).*give .* data="):
        _trainer(tmp_path, callback, max_steps=2).fit(Several(), loaders)
    callback = CompressionCallback(
        ed.Budget(macs=0.7), at_steps=[1], data=_loader(), compressor=_FEW
    )
    _trainer(tmp_path, callback, max_steps=2).fit(Several(), loaders)
    assert len(callback.reports) == 1
