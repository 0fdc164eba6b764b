"""Settings of a training by empirical Bayes, beside those of every job."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from laplace_dist.config.kinds import Arguments, Checked, Count

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Scheduler = Literal[
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "LinearLR",
    "MultiStepLR",
    "OneCycleLR",
    "PolynomialLR",
    "StepLR",
]


class Training(Checked):
    """How weights and hyperparameters are trained together; every name is that of `laplace.marglik_training`, where it has one.

    Raises:
        SettingsError: Naming each field that is refused, its value, and what is accepted.
    """

    n_epochs: Count = Field(100, description="epochs of training; a finished run goes on if given more")
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="of the weights: adam, adamw or sgd")
    optimizer_args: Arguments = Field(
        {"lr": 1e-3}, description="its arguments, as JSON or YAML, such as '{lr: 0.01, momentum: 0.9}'"
    )
    scheduler: Scheduler | None = Field(
        None, description="of the weights' step size, by its name in torch.optim.lr_scheduler; a step after every batch"
    )
    scheduler_args: Arguments = Field({}, description="its arguments, as JSON or YAML, such as '{T_max: 2000}'")
    parts: Count = Field(4, description="parts of a batch, whose gradients workers find and the driver adds in order")
    shuffle: bool = Field(False, description="draw the order of the batches anew in every epoch")
    lr_hyp: Positive = Field(0.1, description="step size of Adam on the hyperparameters")
    n_epochs_burnin: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="epochs before the first estimate")
    n_hypersteps: Count = Field(10, description="steps on the hyperparameters for each estimate of the evidence")
    marglik_frequency: Count = Field(1, description="estimate the evidence after every so many epochs")
    prior_prec_init: Positive = Field(1.0, description="initial prior precision")
    sigma_noise_init: Positive = Field(1.0, description="initial observation noise of a regression")
    temperature: Positive = Field(1.0, description="of the likelihood")
    fix_sigma_noise: bool = Field(False, description="keep the initial observation noise")

    @field_validator("scheduler_args")
    @classmethod
    def _heeded(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if value and info.data.get("scheduler", "") is None:
            raise ValueError("a --scheduler with them, which would heed them")
        return value

    def bits(self, prior_structure: str = "scalar") -> dict[str, Any]:
        """Return the settings that belong to the plan: all but the number of epochs, since a run may go on.

        Args:
            prior_structure: The job's own setting, which changes no bit of a fit, and every one of a training.
        """
        unused = {"scheduler", "scheduler_args"} if self.scheduler is None else set()  # plans of before there were any
        structure = {"prior_structure": prior_structure} if prior_structure != "scalar" else {}  # as with these
        return {**self.model_dump(exclude={"n_epochs", *unused}), **structure}
