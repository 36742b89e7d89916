"""Draw what prices say of many removals at once, and what the network says, on one trained layer.

python examples/predicted_and_measured.py --out predicted_and_measured.svg

Each method prices the units of one convolution (weights, filters, or rows and columns in the
eigenbasis), removes the cheapest 5 to 90 % of them, and repairs the rest as it prescribes. The
predicted rise of the loss is the sum of the prices. The measured one is KL(original ‖ changed) over
other images: what prices under the Fisher stand for. Two numbers between them say where they part:
the quadratic form of S ⊗ A for the whole change, which sums nothing, and the rise for a tenth of
the change times 100, which needs no S ⊗ A. docs/why_the_basis.md says what is seen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call

import eigendamage as ed
from eigendamage.plan._plan import Repair
from eigendamage.plan._repair import repaired
from eigendamage.plan._views import LayerView
from eigendamage.plan.prices import c_obd, c_obs, eigendamage, kron_obd, kron_obs, obd, obs
from eigendamage.plan.prices._quadratic import quadratic
from eigendamage.progress import track

LAYER = "layer2.1.conv1"  # inside a block, in the middle of the network, as many inputs as outputs
FRACTIONS = (0.05, 0.1, 0.2, 0.4, 0.65, 0.9)
IMAGES, OTHER_IMAGES, BATCH = 2000, 1000, 250
DAMPING = 1e-3  # the default of make_plan
SEED = 0  # of the labels drawn for the Fisher
STEP = 0.1  # of the change that stands for an infinitely small one

JOINTLY = "Kron-OBS, jointly"  # the same removals, priced together
PANELS = {  # what a panel shows, and both its axes' limits
    "Single weights": (("OBD", "OBS"), (2e-8, 2.0)),
    "Filters": (("C-OBD", "C-OBS", "Kron-OBD", JOINTLY, "Kron-OBS"), (6e-6, 2.0)),
    "In the eigenbasis": (("EigenDamage, K-FAC", "EigenDamage, λ"), (6e-6, 2.0)),
}
LOOKS = {  # Okabe & Ito's colours, and a marker of its own each
    "OBD": ("#d55e00", "o"),
    "OBS": ("#0072b2", "s"),
    "C-OBD": ("#d55e00", "o"),
    "C-OBS": ("#0072b2", "s"),
    "Kron-OBD": ("#e69f00", "^"),
    "Kron-OBS": ("#56b4e9", "D"),
    JOINTLY: ("#333333", "D"),
    "EigenDamage, K-FAC": ("#cc79a7", "v"),
    "EigenDamage, λ": ("#009e73", "P"),
}
LABELS = {  # the point that each line's name belongs to, and where in the panel it stands
    "OBD": (-1, (0.52, 0.94)),
    "OBS": (-1, (0.36, 0.76)),
    "C-OBD": (3, (0.8, 0.29)),
    "C-OBS": (-2, (0.14, 0.87)),
    "Kron-OBD": (-2, (0.83, 0.43)),
    "Kron-OBS": (2, (0.76, 0.15)),
    JOINTLY: (-1, (0.6, 0.96)),
    "EigenDamage, K-FAC": (3, (0.25, 0.83)),
    "EigenDamage, λ": (3, (0.76, 0.27)),
}
STYLE = {
    "font.size": 13,
    "axes.titlesize": 13.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 2,
    "lines.markersize": 6.5,
    "svg.hashsalt": "eigendamage",  # the same file from every run
}


# What each method makes of the layer.


@dataclass(frozen=True, eq=False)
class Change:
    """A weight in place of the layer's own, and what the method says that this costs.

    Attributes:
        X: the new weight, (o, iK), zero where something was removed.
        predicted: the sum of the prices of all removed units, each as if it went alone; nats.
    """

    X: Tensor
    predicted: float


def cheapest(prices: Tensor, fraction: float) -> Tensor:
    """The mask, shaped as the prices, of the cheapest ``fraction`` of them, rounded to units."""
    order = prices.flatten().argsort(stable=True)
    mask = torch.zeros(prices.numel(), dtype=torch.bool)
    mask[order[: round(fraction * prices.numel())]] = True
    return mask.reshape(prices.shape)


def remove_by_obd(layer: LayerView, fraction: float) -> Change:
    """Single weights by the Fisher's exact diagonal; nothing is repaired."""
    diagonal = layer.curvature.diagonal
    assert diagonal is not None
    prices = obd.weight_prices(layer.weight, diagonal).flatten(1)
    gone = cheapest(prices, fraction)
    return Change(layer.W * ~gone, float(prices[gone].sum()))


def remove_by_obs(layer: LayerView, fraction: float) -> Change:
    """Single weights under S ⊗ A; those that stay go where S ⊗ A is least."""
    prices = obs.weight_prices(layer.W, layer.S_inverse, layer.A_inverse)
    gone = cheapest(prices, fraction)
    X = obs.masked_update(layer.W, layer.S, layer.A, ~gone, 0.0)
    return Change(X, float(prices[gone].sum()))


def without_filters(layer: LayerView, prices: Tensor, fraction: float, repair: Repair) -> Change:
    """The cheapest rows of W set to zero, the others repaired as the method says."""
    gone = cheapest(prices, fraction)
    kept = (~gone).nonzero().flatten().tolist()
    X = torch.zeros_like(layer.W)
    X[kept] = repaired(layer, kept, range(layer.W.shape[1]), repair)
    return Change(X, float(prices[gone].sum()))


def remove_by_c_obd(layer: LayerView, fraction: float) -> Change:
    """Filters by the sum of their weights' OBD prices; nothing is repaired."""
    diagonal = layer.curvature.diagonal
    assert diagonal is not None
    prices = c_obd.row_prices(layer.weight, None, diagonal, None)
    return without_filters(layer, prices, fraction, "none")


def remove_by_c_obs(layer: LayerView, fraction: float) -> Change:
    """Filters by the sum of their weights' OBS prices; the sum of OBS's repairs."""
    prices = c_obs.row_prices(layer.W, layer.S_inverse, layer.A_inverse)
    return without_filters(layer, prices, fraction, "c-obs")


def remove_by_kron_obd(layer: LayerView, fraction: float) -> Change:
    """Filters under S ⊗ A; nothing is repaired."""
    prices = kron_obd.row_prices(layer.W, layer.S, layer.A)
    return without_filters(layer, prices, fraction, "none")


def remove_by_kron_obs(layer: LayerView, fraction: float) -> Change:
    """Filters under S ⊗ A; those that stay go where S ⊗ A is least, all together."""
    prices = kron_obs.row_prices(layer.W, layer.S_inverse, layer.A)
    return without_filters(layer, prices, fraction, "rows")


def remove_in_eigenbasis(layer: LayerView, eigenvalues: Tensor, fraction: float) -> Change:
    """Rows and columns of W' by ½ Σ w'² λ; there is nothing to repair.

    Entries at which a removed row crosses a removed column are in both prices.

    Args:
        layer: the layer.
        eigenvalues: λ, (o, i, K).
        fraction: of the o + i rows and columns.
    """
    Q_S, Q_A = layer.curvature.Q_S.double(), layer.curvature.Q_A.double()
    prices = eigendamage.unit_prices(layer.weight, Q_S, Q_A, eigenvalues).units
    gone = cheapest(prices, fraction)
    rows, columns = gone.split([len(Q_S), len(Q_A)])
    rotated = eigendamage.rotated_weight(layer.weight, Q_S, Q_A)
    left = rotated * ~rows[:, None, None] * ~columns[:, None]
    X = eigendamage.rotated_weight(left, Q_S.T, Q_A.T)
    return Change(X.flatten(1), float(prices[gone].sum()))


METHODS: Mapping[str, Callable[[LayerView, float], Change]] = {
    "OBD": remove_by_obd,
    "OBS": remove_by_obs,
    "C-OBD": remove_by_c_obd,
    "C-OBS": remove_by_c_obs,
    "Kron-OBD": remove_by_kron_obd,
    "Kron-OBS": remove_by_kron_obs,
    "EigenDamage, K-FAC": lambda layer, fraction: remove_in_eigenbasis(
        layer, layer.curvature.kfac_eigenvalues(), fraction
    ),
    "EigenDamage, λ": lambda layer, fraction: remove_in_eigenbasis(
        layer, layer.curvature.eigenvalues, fraction
    ),
}


# What the network makes of it.


@dataclass(frozen=True)
class Point:
    """One removal; rises of the mean loss are in nats.

    Attributes:
        method: one of ``METHODS``.
        fraction: of the layer's units that went.
        predicted: sum of their prices.
        jointly: ½ tr S (W−X) A (W−X)ᵀ of the whole change.
        small: what was measured for ``STEP`` of the change, over ``STEP``².
        measured: KL(original ‖ changed), mean over the images.
        error: standard error of that mean.
    """

    method: str
    fraction: float
    predicted: float
    jointly: float
    small: float
    measured: float
    error: float


def log_probabilities(model: nn.Module, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """The log p(y|x), (n, classes) in float64, of the model with these weights for its own."""
    with torch.no_grad():
        parts = [functional_call(model, dict(weights), (batch,)) for batch in images.split(BATCH)]
    return torch.cat(parts).double().log_softmax(1)


def divergences(reference: Tensor, changed: Tensor) -> Tensor:
    """KL(reference ‖ changed) of each example, (n), from log-probabilities (n, classes)."""
    return (reference.exp() * (reference - changed)).sum(1)


def measure(
    model: nn.Module, layer: LayerView, images: Tensor, fractions: Sequence[float]
) -> Iterator[Point]:
    """Every method at every fraction, with only this layer changed.

    Args:
        model: the network, in eval mode. It is left as it is.
        layer: a layer without bias.
        images: (n, ...), what to measure on.
        fractions: of the units to remove.
    """
    own = model.get_submodule(layer.name).weight
    reference = log_probabilities(model, {}, images)

    def rises(X: Tensor) -> Tensor:
        weight = X.reshape(own.shape).to(own)
        changed = log_probabilities(model, {f"{layer.name}.weight": weight}, images)
        return divergences(reference, changed)

    for method, fraction in product(METHODS, fractions):
        change = METHODS[method](layer, fraction)
        rise = rises(change.X)
        small = rises(layer.W + STEP * (change.X - layer.W)).mean() / STEP**2
        yield Point(
            method=method,
            fraction=fraction,
            predicted=change.predicted,
            jointly=quadratic(layer.W, change.X, layer.S, layer.A),
            small=small.item(),
            measured=rise.mean().item(),
            error=(rise.std() / len(rise) ** 0.5).item(),
        )


def view(model: nn.Module, name: str, images: Tensor) -> LayerView:
    """A layer with its curvature over images, whose labels are drawn from the model."""
    layers = ed.find_layers(model).compressible
    curvature = ed.estimate_curvature(
        model,
        list(images.split(BATCH)),
        also=("patches", "gradients"),
        ignore=[other for other in layers if other != name],
        seed=SEED,
    )
    return LayerView(name, layers[name].weight(), None, curvature[name], DAMPING)


# The tables and the picture.


def drawn(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points by line: the methods, and Kron-OBS once more with its joint prediction."""
    lines = {name: [p for p in points if p.method == name] for name in METHODS}
    lines[JOINTLY] = [replace(p, predicted=p.jointly) for p in lines["Kron-OBS"]]
    return {name: lines[name] for name in LOOKS}


def percent(fraction: float) -> str:
    """As it is read: 5 %."""
    return f"{fraction:.0%}".replace("%", " %")


def short(number: float) -> str:
    """Two digits that count, with an exponent only below 0.0001."""
    return f"{float(f'{number:.2g}'):g}"


def factors(points: Sequence[Point]) -> str:
    """How many times the measured rise is the predicted one, as Markdown: a method a row."""
    lines = drawn(points)
    columns = [percent(p.fraction) for p in lines["OBD"]]
    header = ["| removed | " + " | ".join(columns) + " |", "| :-- |" + " --: |" * len(columns)]
    rows = [
        f"| {name} | " + " | ".join(short(p.measured / p.predicted) for p in line) + " |"
        for name, line in lines.items()
    ]
    return "\n".join(header + rows)


def stages(points: Sequence[Point], fraction: float) -> str:
    """From the sum of prices to what was measured at one fraction, as Markdown, in nats."""
    header = [
        "| method | sum of prices | S ⊗ A, jointly | a tenth of the change, × 100 | measured |",
        "| :-- | --: | --: | --: | --: |",
    ]
    rows = [
        f"| {p.method} | "
        + " | ".join(short(x) for x in (p.predicted, p.jointly, p.small, p.measured))
        + " |"
        for p in points
        if p.fraction == fraction
    ]
    return "\n".join(header + rows)


def draw_line(axes: Axes, name: str, line: Sequence[Point]) -> None:
    """Measured against predicted rise, from few removals to many, and the line's name."""
    colour, marker = LOOKS[name]
    predicted, measured = [p.predicted for p in line], [p.measured for p in line]
    axes.plot(
        predicted,
        measured,
        color=colour,
        marker=marker,
        dashes=(2, 1.2) if name == JOINTLY else (None, None),
        markerfacecolor="white" if name == JOINTLY else colour,
    )
    at, place = LABELS[name]
    axes.annotate(
        name.replace("EigenDamage, ", "EigenDamage,\n"),
        (predicted[at], measured[at]),
        place,
        textcoords="axes fraction",
        color=colour,
        ha="center",
        va="center",
        arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.9, "shrinkB": 4},
    )


def draw_guide(axes: Axes, line: Sequence[Point]) -> None:
    """What the diagonal is, and how much went at both ends of a line."""
    axes.text(
        *(0.74, 0.66),
        "as predicted",
        transform=axes.transAxes,
        rotation=45,
        ha="center",
        va="center",
    )
    for p, offset in ((line[0], (8, -6)), (line[-1], (8, -2))):
        at = (p.predicted, p.measured)
        axes.annotate(percent(p.fraction), at, offset, textcoords="offset points")


def draw(points: Sequence[Point]) -> Figure:
    """A panel for each kind of unit; on the diagonal the prediction is honest."""
    figure = Figure(figsize=(10.6, 3.8), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    lines = drawn(points)
    panels = figure.subplots(1, len(PANELS))
    for axes, (title, (names, limits)) in zip(panels, PANELS.items(), strict=True):
        axes.set(xscale="log", yscale="log", xlim=limits, ylim=limits, title=title)
        axes.set(xlabel="predicted rise of loss, nats")
        axes.set_box_aspect(1)
        axes.plot(limits, limits, color="#888888", linewidth=1.2, zorder=0)
        for name in names:
            draw_line(axes, name, lines[name])
        axes.minorticks_off()
    draw_guide(panels[0], lines["OBD"])
    panels[0].set_ylabel("measured rise of loss, nats")
    return figure


# Reading and writing.


def fingerprint(points: Sequence[Point]) -> str:
    """What ties a picture to its numbers."""
    return hashlib.sha256(json.dumps([asdict(p) for p in points]).encode()).hexdigest()


def rounded(point: Point) -> Point:
    """With four digits: more would differ from one processor to the next."""
    numbers = {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in asdict(point).items()
    }
    return Point(**numbers)


def load(path: Path) -> list[Point]:
    """The points of a file that this script wrote."""
    return [Point(**point) for point in json.loads(path.read_text(encoding="utf-8"))["points"]]


def save(points: Sequence[Point], layer: str, out: Path) -> None:
    """Write the picture and, beside it, the numbers."""
    with mpl.rc_context(STYLE):
        metadata = {"Date": None, "Description": fingerprint(points)}
        draw(points).savefig(out, dpi=140, metadata=metadata if out.suffix == ".svg" else None)
    numbers = {
        "command": f"python examples/predicted_and_measured.py --layer {layer}",
        "seed": SEED,
        "layer": layer,
        "images": {"curvature": IMAGES, "measured": OTHER_IMAGES},
        "damping": DAMPING,
        "versions": {"eigendamage": ed.__version__, "torch": torch.__version__},
        "points": [asdict(point) for point in points],
    }
    text = json.dumps(numbers, indent=1, ensure_ascii=False) + "\n"
    out.with_suffix(".json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layer", default=LAYER, help="dotted path of a convolution")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("predicted_and_measured.svg"),
        help="the picture, .svg or .png; the numbers go beside it, .json",
    )
    arguments = parser.parse_args()
    model = ed.zoo.demo_network()
    images = ed.zoo.fashion_mnist("train").images
    layer = view(model, arguments.layer, images[:IMAGES])
    others = images[IMAGES : IMAGES + OTHER_IMAGES]
    total = len(METHODS) * len(FRACTIONS)
    measured = track(
        measure(model, layer, others, FRACTIONS), "measuring", total=total, enabled=True
    )
    points = [rounded(point) for point in measured]
    print(
        f"Measured rise over the predicted one, by part of the units removed:\n\n{factors(points)}"
    )
    for fraction in FRACTIONS:
        print(f"\n{percent(fraction)} removed, nats:\n\n{stages(points, fraction)}")
    save(points, arguments.layer, arguments.out)
    print(f"\nPicture in {arguments.out}, numbers in {arguments.out.with_suffix('.json')}")


if __name__ == "__main__":
    main()
