"""What is refused although every setting alone is fine: it would fail, or mean nothing, only after the fit."""

from __future__ import annotations

from laplace.enums import LinkApprox
from laplace.likelihoods import BaseLikelihood
from laplace_dist.config.likelihood import likelihood_of
from laplace_dist.config.settings import HF, Config
from laplace_dist.errors import SettingsError


def ood(config: Config) -> list[str]:
    """Return the out-of-distribution splits that an evaluation uses: none where predictions have no confidence."""
    return config.ood if likelihood_of(config.likelihood).has_confidence else []


def evaluated(config: Config) -> list[str]:
    """Return the splits that an evaluation scores: `test`, those out of distribution, and the one without labels."""
    unlabelled = [] if config.unlabelled is None else [config.unlabelled]
    return ["test", *(name for name in ood(config) if name != config.unlabelled), *unlabelled]


def check_predictive(config: Config) -> None:
    """Refuse combinations of settings that would fail, or mean nothing, only after the fit.

    Raises:
        SettingsError: Naming the fields.
    """
    _check_machine(config)
    _check_curvature(config)
    if (config.task is None) == config.model.startswith(HF):
        raise SettingsError(
            f"--task: got {config.task!r} with --model {config.model!r}; a task belongs to {HF}PATH, and that needs one: "
            "sequence-classification or causal-lm"
        )
    _check_predictions(config)
    _check_prior_structure(config)


def _check_machine(config: Config) -> None:
    if config.device == "cpu" and config.gpus_per_worker:
        raise SettingsError(
            f"--gpus-per-worker: got {config.gpus_per_worker:g} with --device cpu; leave one of them out"
        )
    if config.device == "cuda" and config.gpus_per_worker == 0:
        raise SettingsError("--gpus-per-worker: got 0 with --device cuda; leave one of them out")
    if config.precision == "bf16" and config.backend != "native":
        raise SettingsError(
            f"--precision: got 'bf16' with --backend {config.backend}, whose package would round its sums of products to "
            "two digits too; expected --backend native, float32 or tf32"
        )


def _check_curvature(config: Config) -> None:
    check_example_weights(config)
    if config.hessian_structure == "lowrank":
        _check_lowrank(config)
    if (config.module_groups or 1) > 1 and (why := no_groups(config)):
        raise SettingsError(f"--module-groups: got {config.module_groups} {why}; leave it out")
    if config.kfac_approx != "expand" and config.hessian_structure not in ("kron", "ekfac"):
        raise SettingsError(
            f"--kfac-approx: got {config.kfac_approx!r} with --hessian-structure {config.hessian_structure}, which has no "
            "Kronecker factors; leave it out, or expected --hessian-structure kron or ekfac"
        )
    if config.kfac_approx != "expand" and config.backend != "native":
        raise SettingsError(
            f"--kfac-approx: got {config.kfac_approx!r} with --backend {config.backend}; expected --backend native, or expand"
        )


def _check_predictions(config: Config) -> None:
    likelihood = likelihood_of(config.likelihood)
    if config.pred_type == "nn" and not likelihood.predicts_outputs and config.link_approx != "mc":
        raise SettingsError(
            f"--link-approx: got {config.link_approx!r} with --pred-type nn, which samples networks; expected mc"
        )
    predicting = likelihood.predicting(False)
    if config.pred_type == "glm" and type(predicting).integrate is BaseLikelihood.integrate:
        try:
            predicting.refuse_bridge(LinkApprox(config.link_approx))
        except ValueError as error:
            raise SettingsError(f"--link-approx: got {config.link_approx!r}; {error}") from error
    if config.recalibrate != "prior" and not likelihood.scales_logits:
        raise SettingsError(
            f"--recalibrate: got {config.recalibrate!r} for {likelihood.identity}, whose outputs are no logits that a "
            "temperature could divide; expected prior"
        )


def _check_prior_structure(config: Config) -> None:
    if config.prior_structure == "diag" and config.hessian_structure in ("kron", "ekfac"):
        which = "a kron" if config.hessian_structure == "kron" else "an ekfac"
        raise SettingsError(
            f"--prior-structure: got 'diag' for {which} posterior, whose factors do not commute with a diagonal; expected "
            "scalar or layerwise, or a diag or full fit"
        )
    if config.searches_prior and config.prior_structure != "scalar":
        raise SettingsError(
            f"--prior-structure: got {config.prior_structure!r} with --tune-method gridsearch; expected scalar"
        )


def check_example_weights(config: Config) -> None:
    """Refuse weights of examples where the backend's package sums over a batch by itself.

    Raises:
        SettingsError: Naming the fields.
    """
    if config.example_weights is not None and config.backend != "native":
        raise SettingsError(
            f"--example-weights: got {config.example_weights!r} with --backend {config.backend}, whose package sums over a "
            "batch by itself; expected --backend native, or leave it out"
        )


def no_groups(config: Config) -> str | None:
    """Say why curvature cannot be added up in several groups of factors; None where it can."""
    if config.hessian_structure == "lowrank":
        return (
            "with --hessian-structure lowrank, whose basis is found from the whole sketch in one worker, which takes more than "
            "the pass does: a lower --rank or --oversampling takes less"
        )
    if config.hessian_structure == "full" and config.backend != "native":
        return (
            f"with --hessian-structure full and --backend {config.backend}, whose package makes the whole matrix for every "
            "batch"
        )
    return None


def _check_lowrank(config: Config) -> None:
    if config.subset_of_weights != "all":
        raise SettingsError(
            f"--subset-of-weights: got {config.subset_of_weights!r} with --hessian-structure lowrank, which is over all "
            "weights; expected all, or --hessian-structure full or kron"
        )
    if config.backend != "native":
        raise SettingsError(
            f"--backend: got {config.backend!r} with --hessian-structure lowrank, whose sketches are sums over rows that this "
            "package does not give; expected native"
        )


def check_training(config: Config) -> None:
    """Refuse settings that a training by empirical Bayes has no use for.

    Raises:
        SettingsError: Naming the fields.
    """
    if config.subset_of_weights != "all":
        raise SettingsError(
            f"--subset-of-weights: got {config.subset_of_weights!r}; a training by empirical Bayes is of all weights"
        )
    if config.hessian_structure not in ("kron", "diag", "full"):
        raise SettingsError(
            f"--hessian-structure: got {config.hessian_structure!r}; a training by empirical Bayes expects kron, diag or full"
        )
    if config.example_weights is not None:
        raise SettingsError(
            f"--example-weights: got {config.example_weights!r}; a training by empirical Bayes counts every example once; "
            "leave it out"
        )
    if config.window is not None:
        raise SettingsError(f"--window: got {config.window!r}; a training by empirical Bayes is of all its data")
    if config.module_groups is not None:
        raise SettingsError(
            f"--module-groups: got {config.module_groups}; a training by empirical Bayes needs all its sums in the driver, "
            "since the evidence is of all weights at once; leave it out"
        )
    check_predictive(config)


def link_approx(config: Config) -> str:
    """Return the link that predictions use: of sampled networks there is but one."""
    return "mc" if config.pred_type == "nn" else config.link_approx


def check_storage_options(config: Config) -> None:
    """Refuse options that no URL would be opened with; their values are never repeated.

    Raises:
        SettingsError: Naming the flag.
    """
    for name, place in (("data", config.data), ("weights", config.weights)):
        if getattr(config, f"{name}_storage_options") and not is_url(place):
            raise SettingsError(
                f"--{name}-storage-options: given, but --{name} is {place!r}, which is no URL; leave them out, or give a URL"
            )


def is_url(place: str | None) -> bool:
    """Say whether a place is reached over a file system of fsspec's that may want options."""
    return place is not None and "://" in place and not place.startswith("file:")
