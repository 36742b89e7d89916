"""What ``curvature_cost.py`` measures: one pass over the same images, by us and by others.

A variant takes a model, the images to go through and a few more to get ready with (an eigenbasis
for λ, say), and returns the pass itself. Packages are imported when asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from eigendamage.curvature import estimate_curvature

Images = list[tuple[Tensor, Tensor]]
Pass = Callable[[], Any]
"""Goes over the images once and returns what holds the tensors that were found."""


def plain(model: nn.Module, images: Images, few: Images) -> Pass:
    def run() -> None:
        model.train()
        for x, y in images:
            model.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y).backward()

    return run


def ours_factors(model: nn.Module, images: Images, few: Images) -> Pass:
    return lambda: estimate_curvature(model, images, eigenvalues="kfac", progress=False)


def ours_fixed_part(model: nn.Module, images: Images, few: Images) -> Pass:
    return ours_factors(model, [(x[:2], y[:2]) for x, y in few], few)


def ours_eigenvalues(model: nn.Module, images: Images, few: Images) -> Pass:
    basis = estimate_curvature(model, few, eigenvalues="kfac", progress=False)

    def run() -> list[Tensor]:
        found = estimate_curvature(model, images, basis=basis, progress=False)
        return [layer.eigenvalues for layer in found.values()]  # the rest is the basis given

    return run


def curvlinops_factors(model: nn.Module, images: Images, few: Images) -> Pass:
    from curvlinops import KFACLinearOperator

    def run() -> list[Any]:
        operator = KFACLinearOperator(**_curvlinops(model, images))
        operator.compute_kronecker_factors()
        state = operator.state_dict()
        return [state["input_covariances"], state["gradient_covariances"]]

    return run


def curvlinops_eigenvalues(model: nn.Module, images: Images, few: Images) -> Pass:
    from curvlinops import EKFACLinearOperator

    data = list(few)
    operator = EKFACLinearOperator(**_curvlinops(model, data))
    operator.compute_eigenvalue_correction()
    data[:] = images  # the eigenbasis is there: from now on only λ is summed

    def run() -> Any:
        operator.compute_eigenvalue_correction()
        return operator.state_dict()["corrected_eigenvalues"]

    return run


def _curvlinops(model: nn.Module, images: Images) -> dict[str, Any]:
    """Arguments that spare it every pass over the data but the one that is measured."""
    layers = [m for m in model.eval().modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return {
        "model_func": model,
        "loss_func": nn.CrossEntropyLoss(),
        "params": [layer.weight for layer in layers],
        "data": images,
        "fisher_type": "mc",
        "kfac_approx": "expand",
        "check_deterministic": False,
        "num_per_example_loss_terms": 1,
        "num_data": sum(len(x) for x, _ in images),
    }


def kronfluence_factors(model: nn.Module, images: Images, few: Images) -> Pass:
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader

    arguments = _kronfluence(model)
    return lambda: fit_covariance_matrices_with_loader(loader=images, **arguments)


def kronfluence_eigenvalues(model: nn.Module, images: Images, few: Images) -> Pass:
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.factor.eigen import fit_lambda_matrices_with_loader, perform_eigendecomposition

    arguments = _kronfluence(model)
    _, factors = fit_covariance_matrices_with_loader(loader=few, **arguments)
    without_task = {k: v for k, v in arguments.items() if k != "task"}
    basis = perform_eigendecomposition(factors, **without_task)
    return lambda: fit_lambda_matrices_with_loader(loader=images, eigen_factors=basis, **arguments)


def _kronfluence(model: nn.Module) -> dict[str, Any]:
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task
    from kronfluence.utils.state import State

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            x, y = batch
            logits = model(x)
            if sample:
                y = logits.detach().softmax(1).multinomial(1).flatten()
            return F.cross_entropy(logits, y, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    task = Classification()
    return {
        "model": prepare_model(model, task),
        "state": State(cpu=True),
        "task": task,
        "factor_args": FactorArguments(strategy="ekfac"),
        "disable_tqdm": True,
    }


VARIANTS: dict[str, Callable[[nn.Module, Images, Images], Pass]] = {
    "plain": plain,
    "ours: S and A": ours_factors,
    "ours: S and A, fixed part": ours_fixed_part,
    "ours: λ": ours_eigenvalues,
    "curvlinops: S and A": curvlinops_factors,
    "curvlinops: λ": curvlinops_eigenvalues,
    "kronfluence: S and A": kronfluence_factors,
    "kronfluence: λ": kronfluence_eigenvalues,
}
NOTES = {
    "plain": "forward and backward pass in train mode, cross-entropy, all gradients",
    "ours: S and A": "estimate_curvature(eigenvalues='kfac'): probes, pass, eigenbases; A is i x i",
    "ours: S and A, fixed part": "the same on one batch of 2 images: what does not grow with data",
    "ours: λ": "estimate_curvature(basis=...): probes and the second pass",
    "curvlinops: S and A": "KFACLinearOperator.compute_kronecker_factors, mc; A is iK x iK",
    "curvlinops: λ": "EKFACLinearOperator.compute_eigenvalue_correction in a given eigenbasis",
    "kronfluence: S and A": "fit_covariance_matrices_with_loader, mc; A is iK x iK",
    "kronfluence: λ": "fit_lambda_matrices_with_loader in a given eigenbasis",
}
