"""Typed settings of a job, validated, and which of them change bits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from laplace.likelihoods import BaseLikelihood
from laplace_dist.config.import_path import IMPORT_PATH
from laplace_dist.config.kinds import (
    Arguments,
    Checked,
    Count,
    Gates,
    Location,
    Name,
    NewSplit,
    NewSplits,
    Outputs,
    PriorRange,
    RunLocation,
    WindowName,
    Windows,
)
from laplace_dist.config.likelihood import likelihood_of
from laplace_dist.config.plain_yaml import dump_yaml

HF = "hf:"  # before the path of a folder of save_pretrained, as --model


class Config(Checked):
    """Every setting of a run, checked and immutable.

    Raises:
        SettingsError: Naming each field that is refused, its value, and what is accepted.
    """

    model: Location = Field(
        description="import path module:callable that returns an nn.Module, or hf: and a folder of save_pretrained"
    )
    task: Literal["sequence-classification", "causal-lm"] | None = Field(None, description="of --model hf:PATH")
    model_args: Arguments = Field(
        {}, description="keyword arguments of --model, as JSON or YAML; of hf:PATH fields of its configuration"
    )
    weights: Location | None = Field(
        None,
        description="URL or path of a state dict: .safetensors, torch.save's format, or a folder or index of safetensors",
    )
    data: Location = Field(
        description="import path module:callable that takes split=, or the path or URL of data in files"
    )
    data_args: Arguments = Field(
        {}, description="keyword arguments of --data, as JSON or YAML; of data in files: columns, group, index"
    )
    example_weights: Name | None = Field(
        None,
        description="name of the column, Zarr array or attribute of --data's train split with a weight for each example; "
        "1 each if not given",
    )
    ood: NewSplits = Field([], description="names of out-of-distribution splits for the evaluation")
    checkpoint: RunLocation = Field(description="directory or fsspec URL of the run")
    storage_options: dict[str, Any] = Field(
        {},
        repr=False,
        exclude=True,
        description="of --checkpoint alone: endpoint and the like, as JSON or YAML; never stored",
    )
    data_storage_options: dict[str, Any] = Field(
        {}, repr=False, exclude=True, description="the same for --data, where it is a URL"
    )
    weights_storage_options: dict[str, Any] = Field(
        {}, repr=False, exclude=True, description="the same for --weights, where it is a URL"
    )
    collate: str | None = Field(None, description="import path module:callable, as DataLoader's collate_fn")
    loader_workers: Annotated[int, Field(ge=0, le=128)] = Field(
        0, description="processes that read ahead for one worker, at most 128; 0 reads in the worker itself"
    )
    dict_key_x: Name = Field("input_ids", description="inputs of a dict-like batch")
    dict_key_y: Name = Field("labels", description="targets of a dict-like batch")
    likelihood: Literal["classification", "regression"] | Annotated[str, Field(pattern=IMPORT_PATH.pattern + "$")] = (
        Field("classification", description="of the model, or an import path module:callable that returns one")
    )
    subset_of_weights: Literal["all", "last_layer"] = Field("all", description="the weights to be uncertain about")
    hessian_structure: Literal["kron", "ekfac", "diag", "blockdiag", "full", "lowrank"] = Field(
        "kron", description="structure of the curvature"
    )
    rank: Count = Field(20, description="eigenpairs of a lowrank posterior, at most")
    oversampling: Annotated[int, Field(ge=2, lt=2**31)] = Field(
        10, description="columns of a lowrank posterior's sketch beyond the rank"
    )
    backend: Literal["native", "curvlinops", "asdl", "backpack"] = Field(
        "native", description="what computes the curvature"
    )
    estimator: Literal["ggn", "mc", "ef"] | None = Field(
        None,
        description="exact GGN, sampled Fisher or empirical Fisher; if not given ggn, but mc where over 64 outputs take a "
        "backward pass each",
    )
    mc_samples: Annotated[int, Field(ge=1, le=10_000)] | None = Field(
        None, description="labels drawn for each example by --estimator mc, a backward pass each; 1 if not given"
    )
    outputs: Outputs | None = Field(
        None, description="indices of some outputs, whose exact GGN is taken, the others held constant"
    )
    kfac_approx: Literal["expand", "reduce"] = Field(
        "expand", description="how Kronecker factors treat weights that positions share: each by itself, or their mean"
    )
    batch_size: Count = Field(256, description="examples per batch")
    segment_size: Count | None = Field(None, description="examples per segment, the unit of work and of loss")
    module_groups: Count | None = Field(
        None,
        description="passes over the data, each of which adds up a group of the factors, so that sums fit that no worker has "
        "the memory for at once; as few as the workers' memory asks for if not given",
    )
    num_workers: Count | None = Field(None, description="workers; as many as the cluster holds if not given")
    cpus_per_worker: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="CPUs, and threads, of one worker")
    gpus_per_worker: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="1 where there are GPUs, else 0"
    )
    ray_address: Name = Field("auto", description="auto, local, inline (this process, without Ray), or an address")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where workers compute; auto is cuda where the cluster has GPUs when the run begins"
    )
    precision: Literal["float32", "tf32", "bf16"] = Field(
        "float32",
        description="of forward and backward passes: tf32 has three digits on GPUs, bf16 (autocast) two; sums are float64",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of everything that is sampled")
    tune_method: Literal["marglik", "gridsearch"] | None = Field(
        None, description="gridsearch for classification with a scalar prior, else marglik"
    )
    recalibrate: Literal["prior", "temperature", "both"] = Field(
        "prior", description="what is tuned; a temperature of the logits needs a val split"
    )
    prior_structure: Literal["scalar", "layerwise", "diag"] = Field("scalar", description="of the prior precision")
    prior_range: PriorRange | None = Field(
        None, description="the grid search stays between these prior precisions; begins with 1e-4 to 1e4 if not given"
    )
    grid_size: Annotated[int, Field(ge=2, le=10_000)] = Field(41, description="values in the range of the grid search")
    link_approx: Literal["probit", "mc", "bridge"] = Field("probit", description="approximation of the predictive")
    pred_type: Literal["glm", "nn"] = Field("glm", description="linearised, or by sampling networks")
    segment_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="seconds before a segment, or any other task, is given to another worker"
    )
    window: WindowName | None = Field(
        None, description="name of the window of training data; of a new one today's date if not given"
    )
    windows: Windows = Field(
        "all", description="which windows the posterior is made of: all, last:K, or names with commas between them"
    )
    decay: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Field(
        1.0, description="weight of a window relative to that of the next one that counts"
    )
    keep_partials: bool = Field(
        False, description="keep the partials of windows, the fit's among them, once their sums are committed"
    )
    shared_examples: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        0.01,
        description="share of a window's examples that another window may have too, beyond what repeats within them",
    )
    margin_nll: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.01, description="nats by which a candidate's NLL may be higher and still count as no worse"
    )
    margin_ece: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.01, description="by which a candidate's calibration error may be higher and still count as no worse"
    )
    level: Annotated[float, Field(gt=0.5, lt=1)] = Field(0.95, description="one-sided level of the comparison")
    draws: Annotated[int, Field(ge=100, le=1_000_000)] = Field(2000, description="of the bootstrap of the comparison")
    gate: Gates = Field(
        [], description="a threshold that a candidate has to meet too, such as nll<=0.005; may be given several times"
    )
    keep_versions: Count | None = Field(
        None,
        description="keep the versions that were current last, so many with this one, and delete what only older ones need",
    )
    unlabelled: NewSplit | None = Field(
        None, description="name of a split of fresh examples without labels, which are watched for drift"
    )
    alert_cmd: Name | None = Field(
        None, repr=False, exclude=True, description="command that is given the record of a recalibration with drift"
    )
    skip_tune: bool = Field(False, description="do not tune the prior precision")
    skip_evaluate: bool = Field(False, description="do not evaluate the predictive")
    skip_report: bool = Field(False, description="do not write the report")
    fresh: bool = Field(False, description="delete the run at --checkpoint first")

    @property
    def threads_per_worker(self) -> int:
        """Threads that a worker computes with: the CPUs that it is given, since their number changes bits."""
        return self.cpus_per_worker

    @property
    def tuning(self) -> str:
        """How the prior precision is chosen.

        The evidence of a Kron or diagonal posterior over all weights often favours priors that blur a classifier, so
        classification is tuned by the validation loss; the mean of a regression does not depend on the prior, so there it
        is the evidence, and it alone can tell the values of a layerwise or diagonal prior apart.
        """
        if self.tune_method is not None:
            return self.tune_method
        scalar = self.prior_structure == "scalar"
        return likelihood_of(self.likelihood).tuning if scalar else "marglik"

    @property
    def searches_prior(self) -> bool:
        """Whether the prior precision is searched on validation data."""
        return self.recalibrate != "temperature" and self.tuning == "gridsearch"

    @property
    def searches(self) -> bool:
        """Whether anything is tuned on validation data."""
        return self.searches_prior or self.recalibrate != "prior"

    @property
    def tuned_pred_type(self) -> str:
        """Predictive that a search scores: of a likelihood with noise the linearised one, where the best noise is a formula."""
        return "glm" if likelihood_of(self.likelihood).has_noise else self.pred_type

    @property
    def batching(self) -> dict[str, Any]:
        """What was chosen of how examples become batches, by field name.

        Defaults are left out, so that a run from before these settings existed has the digest of one that leaves them alone.
        """
        names = ("collate", "dict_key_x", "dict_key_y")
        return {
            name: value for name in names if (value := getattr(self, name)) != type(self).model_fields[name].default
        }

    def bits(self, *, device_type: str = "cpu") -> dict[str, Any]:
        """Return the settings that change the bits of the result; two runs that agree on them may share partials.

        Args:
            device_type: Where the workers compute: `cpu` or `cuda`.
        """
        names = ("likelihood", "subset_of_weights", "hessian_structure", "backend", "estimator")
        sizes = ("batch_size", "segment_size", "seed")
        chosen = {name: getattr(self, name) for name in names + sizes}
        if self.kfac_approx != "expand":  # what runs from before there was another have
            chosen["kfac_approx"] = self.kfac_approx
        sketch = {"rank": self.rank, "oversampling": self.oversampling} if self.hessian_structure == "lowrank" else {}
        few = {name: value for name in ("mc_samples", "outputs") if (value := getattr(self, name)) is not None}
        drawn = {"sampling": BaseLikelihood.sampling} if self.estimator == "mc" else {}
        return {**chosen, **sketch, **few, **drawn, **self.batching, **self.machine(device_type)}

    def machine(self, device_type: str) -> dict[str, Any]:
        """Return what changes bits of how a worker computes, for `bits` and the keys of follow-on results."""
        return {
            "cpus_per_worker": self.threads_per_worker,
            "device_type": device_type,
            "precision": self.precision,
        }

    def to_yaml(self) -> str:
        """Return the settings as a file for `--config`, without the storage options and without `fresh`."""
        values = {name.replace("_", "-"): value for name, value in self.model_dump(exclude={"fresh"}).items()}
        return "# storage-options are left out: give them again\n" + dump_yaml(values)
