"""Draw why the basis matters: what OBD and OBS make of two weights, and of the same two rotated.

python examples/two_weights.py --out two_weights.svg

Two weights θ, a loss that rises by ½ δᵀFδ when they change by δ, and so, read as a posterior, the
Gaussian N(θ, F⁻¹). OBD and OBS price the removal of a weight as if that Gaussian were a product of
independent ones, and each takes another product (Wang et al. 2019, section 3). Only in the
eigenbasis of F is there nothing to choose, and only there do prices add up. The script prints the
prices and draws them; docs/why_the_basis.md derives them.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

WEIGHTS = torch.tensor([2.0, 0.8], dtype=torch.float64)
CURVATURES = (1.0, 2.0)  # F_11 and F_22; unequal, so that the eigenbasis is not simply at 45°
CORRELATION = 0.8  # of the posterior, in the table and in the two panels on the left
STRONGEST = 0.95  # where the panel on the right ends, on both sides

GREY, ORANGE, BLUE, GREEN = "#333333", "#d55e00", "#0072b2", "#009e73"  # Okabe & Ito's
STYLE = {
    "font.size": 13,
    "axes.titlesize": 13.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 2.4,
    "svg.hashsalt": "eigendamage",  # the same file from every run
}


# The curvature, and what removing weights really costs.


def fisher(correlation: float) -> Tensor:
    """The Fisher F of two weights whose posterior N(θ, F⁻¹) has this correlation.

    Args:
        correlation: r, between -1 and 1, both excluded.

    Returns:
        F, (2, 2), with ``CURVATURES`` as its diagonal. F_12 = -r √(F_11 F_22): weights that may
        only move together have a posterior along the diagonal, and a negative cross term.
    """
    a, b = CURVATURES
    cross = -correlation * math.sqrt(a * b)
    return torch.tensor([[a, cross], [cross, b]], dtype=torch.float64)


def rise(change: Tensor, F: Tensor) -> Tensor:
    """Rise of the loss, ½ δᵀFδ, for a change δ (n) under the curvature F (n, n); a scalar."""
    return 0.5 * change @ F @ change


def remove(weights: Tensor, removed: Tensor) -> Tensor:
    """The change δ (n) that sets the weights in the mask ``removed`` to zero and no other."""
    return torch.where(removed, -weights, torch.zeros_like(weights))


def remove_and_repair(weights: Tensor, F: Tensor, removed: Tensor) -> Tensor:
    """The change δ (n) that sets the weights in ``removed`` to zero and moves the others to help.

    The others K go where ½ δᵀFδ is least: δ_K = -F_KK⁻¹ F_KR δ_R. For one removed weight this is
    OBS's update (Hassibi & Stork 1993).
    """
    change = remove(weights, removed)
    kept = ~removed
    change[kept] = -torch.linalg.solve(F[kept][:, kept], F[kept][:, removed] @ change[removed])
    return change


# What OBD and OBS say it costs: both replace the posterior by independent Gaussians.


def obd_variances(F: Tensor) -> Tensor:
    """1 / F_qq (n): weight q's variance while the others are held; the least reverse KL."""
    return 1 / F.diagonal()


def obs_variances(F: Tensor) -> Tensor:
    """[F⁻¹]_qq (n): weight q's variance while the others are free; the least forward KL."""
    return torch.linalg.inv(F).diagonal()


def prices(weights: Tensor, variances: Tensor) -> Tensor:
    """What each weight costs alone, ½ θ_q² / s_q (n), for variances s (n).

    That is by how many nats the density of N(θ_q, s_q) is lower at 0 than at its peak.
    """
    return 0.5 * weights**2 / variances


def reverse_kl(variances: Tensor, F: Tensor) -> Tensor:
    """KL(q ‖ p) of q = N(θ, diag s) from the posterior p = N(θ, F⁻¹), in nats; s is (n)."""
    return 0.5 * ((F.diagonal() * variances).sum() - len(F) - variances.log().sum() - F.logdet())


def forward_kl(variances: Tensor, F: Tensor) -> Tensor:
    """KL(p ‖ q) of the posterior p = N(θ, F⁻¹) from q = N(θ, diag s), in nats; s is (n)."""
    marginal = torch.linalg.inv(F).diagonal()
    return 0.5 * ((marginal / variances).sum() - len(F) + variances.log().sum() + F.logdet())


# The same weights in the eigenbasis.


def rotate(weights: Tensor, F: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (n) and curvature (n, n) in the eigenbasis: Qᵀθ and Λ, where F = Q Λ Qᵀ."""
    eigenvalues, Q = torch.linalg.eigh(F)
    # An eigenvector's sign is arbitrary: take the one that makes the rotated weight positive.
    return (Q.T @ weights).abs(), eigenvalues.diag()


# The table and the picture.


def rows(weights: Tensor, F: Tensor, name: str) -> list[str]:
    """Three rows of the table: the first weight, the second, and both."""
    obd, obs = prices(weights, obd_variances(F)), prices(weights, obs_variances(F))
    lines = []
    for removed, label in (
        ([True, False], f"{name}₁"),
        ([False, True], f"{name}₂"),
        ([True, True], "both"),
    ):
        mask = torch.tensor(removed)
        held = rise(remove(weights, mask), F)
        repaired = rise(remove_and_repair(weights, F, mask), F)
        numbers = (obd[mask].sum(), obs[mask].sum(), held, repaired)
        lines.append(f"| {label} | " + " | ".join(f"{number:.2f}" for number in numbers) + " |")
    return lines


def table() -> str:
    """What is predicted and what is true, in both bases, as Markdown."""
    F = fisher(CORRELATION)
    header = "| removed | OBD | OBS | truth, others held | truth, others repaired |"
    rule = "| :-- | --: | --: | --: | --: |"
    return "\n".join([header, rule, *rows(WEIGHTS, F, "θ"), *rows(*rotate(WEIGHTS, F), "w")])


def contour(mean: Tensor, covariance: Tensor) -> Tensor:
    """Points (2, 181) of the ellipse one standard deviation around the mean of a Gaussian."""
    angle = torch.linspace(0, 2 * math.pi, 181, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()])
    return mean[:, None] + torch.linalg.cholesky(covariance) @ circle


def draw_posterior(axes: Axes, weights: Tensor, F: Tensor, name: str) -> None:
    """The posterior, and the independent Gaussians that OBD and OBS put in its place."""
    posterior = contour(weights, torch.linalg.inv(F))
    axes.axhline(0, color="#aaaaaa", linewidth=1, zorder=0)
    axes.axvline(0, color="#aaaaaa", linewidth=1, zorder=0)
    axes.fill(*posterior, color="#d9d9d9")
    axes.plot(*posterior, color=GREY)
    axes.plot(*contour(weights, obs_variances(F).diag()), color=BLUE, dashes=(5, 2))
    axes.plot(*contour(weights, obd_variances(F).diag()), color=ORANGE, dashes=(1.2, 1.2))
    trained = (weights[0].item(), weights[1].item())
    axes.plot(*trained, "o", color=GREY)
    axes.annotate("trained", trained, (0, 8), textcoords="offset points", ha="center")
    axes.plot(0, 0, "X", color=GREY, markersize=10)
    axes.annotate("both removed", (0, 0), (-8, -38), textcoords="offset points")
    axes.set(xlabel=f"{name}₁", ylabel=f"{name}₂", xlim=(-0.5, 4.3), ylim=(-1.6, 3.2))
    axes.set(xticks=range(5), yticks=range(-1, 4))


def draw_sums(axes: Axes) -> None:
    """Rise of the loss when both weights go, against the correlation: predicted and true."""
    correlations = torch.linspace(-STRONGEST, STRONGEST, 77, dtype=torch.float64)
    curvatures = [fisher(r) for r in correlations.tolist()]
    truth = [rise(-WEIGHTS, F) for F in curvatures]
    obd = [prices(WEIGHTS, obd_variances(F)).sum() for F in curvatures]
    obs = [prices(WEIGHTS, obs_variances(F)).sum() for F in curvatures]
    rotated = [rotate(WEIGHTS, F) for F in curvatures]
    either = [prices(w, obd_variances(D)).sum() for w, D in rotated]  # OBS gives the same
    axes.axvline(CORRELATION, color="#aaaaaa", linewidth=1, zorder=0)
    axes.annotate(
        "left panels",
        (CORRELATION, 5.2),
        (-4, -4),
        textcoords="offset points",
        ha="right",
        va="top",
    )
    axes.plot(correlations, truth, color=GREY, label="truth")
    axes.plot(correlations, obd, color=ORANGE, dashes=(1.2, 1.2), label="OBD (reverse KL)")
    axes.plot(correlations, obs, color=BLUE, dashes=(5, 2), label="OBS (forward KL)")
    axes.plot(correlations[::6], either[::6], "o", color=GREEN, label="either, in the eigenbasis")
    axes.text(0.22, 2.8, "far too high", color=ORANGE)
    axes.text(-0.66, 0.25, "far too low", color=BLUE)
    axes.set(xlabel="correlation of θ₁ and θ₂", ylabel="rise of loss, nats", ylim=(0, 5.2))


def draw() -> Figure:
    """The three panels."""
    F = fisher(CORRELATION)
    figure = Figure(figsize=(10.6, 4.2), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    left, middle, right = figure.subplots(1, 3)
    draw_posterior(left, WEIGHTS, F, "θ")
    draw_posterior(middle, *rotate(WEIGHTS, F), "w")
    draw_sums(right)
    left.set_title("The weights as they are")
    middle.set_title("In the eigenbasis: all agree")
    right.set_title("Sum of both prices")
    for axes in (left, middle, right):
        axes.set_box_aspect(1)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--out", type=Path, default=Path("two_weights.svg"), help="the picture, .svg or .png"
    )
    out: Path = parser.parse_args().out
    print(table())
    with mpl.rc_context(STYLE):
        draw().savefig(out, dpi=140, metadata={"Date": None} if out.suffix == ".svg" else None)
    print(f"Picture in {out}")


if __name__ == "__main__":
    main()
