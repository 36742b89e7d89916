"""Train the demo network on the bundled images and write its weights into the package.

python scripts/train_demo_network.py

The last 1,000 training images are held out to watch the progress; nothing is chosen by them, and
the test images are looked at once, at the end. Some ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy

from eigendamage.zoo import ImageSet, demo_network, fashion_mnist

WEIGHTS = Path(__file__).resolve().parents[1] / "src" / "eigendamage" / "zoo" / "weights"
HELD_OUT = 1_000
WEIGHT_DECAY = 5e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--peak-lr", type=float, default=0.15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder to write to")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = demo_network(pretrained=False).to(memory_format=torch.channels_last)
    everything = fashion_mnist("train")
    held_out = everything.take(slice(-HELD_OUT, None))
    batches = everything.take(slice(-HELD_OUT)).batches(
        args.batch_size, shuffle_seed=args.seed, augment=True
    )
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.peak_lr, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.peak_lr, total_steps=args.epochs * len(batches), cycle_momentum=False
    )

    start = time.perf_counter()
    for epoch in range(1, args.epochs + 1):
        model.train()
        total = 0.0
        for images, labels in batches:
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        accuracy, held_out_loss = evaluate(model, held_out)
        print(
            f"epoch {epoch:2d}  {time.perf_counter() - start:4.0f} s"
            f"  training loss {total / len(batches):.4f}"
            f"  held out: loss {held_out_loss:.4f}, accuracy {accuracy:.4f}",
            flush=True,
        )
    seconds = time.perf_counter() - start

    held_out_accuracy, held_out_loss = evaluate(model, held_out)
    test_accuracy, test_loss = evaluate(model, fashion_mnist("test"))
    record = {
        "command": " ".join(["python", "scripts/train_demo_network.py", *sys.argv[1:]]),
        "seed": args.seed,
        "epochs": args.epochs,
        "seconds": round(seconds),
        "torch": torch.__version__,
        "held_out_accuracy": held_out_accuracy,
        "held_out_loss": held_out_loss,
        "test_accuracy": test_accuracy,
        "test_loss": test_loss,
    }
    write(model, record, args.out)
    print(f"{args.epochs} epochs, {seconds:.0f} s; held out: {held_out_accuracy:.4f}")
    print(f"test: accuracy {test_accuracy:.4f}, loss {test_loss:.4f}")


@torch.no_grad()
def evaluate(model: nn.Module, images: ImageSet) -> tuple[float, float]:
    """Return accuracy and mean cross-entropy."""
    model.eval()
    correct, loss = 0, 0.0
    for inputs, labels in images.batches(500):
        logits = model(inputs)
        correct += int((logits.argmax(1) == labels).sum())
        loss += cross_entropy(logits, labels, reduction="sum").item()
    return correct / len(images), loss / len(images)


def write(model: nn.Module, record: dict[str, object], folder: Path) -> None:
    """Write weights and record beside their places, then rename both."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    weights = folder / "demo_network.safetensors.partial"
    save_file(tensors, weights)
    weights.chmod(0o644)
    (folder / "demo_network.json.partial").write_text(json.dumps(record, indent=2) + "\n")
    for name in ("demo_network.safetensors", "demo_network.json"):
        (folder / f"{name}.partial").replace(folder / name)


if __name__ == "__main__":
    main()
