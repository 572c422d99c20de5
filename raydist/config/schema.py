"""The recipe: every key that a run may have.

Required values have no default. Sizes of the model come from ``model.preset`` and single overrides; what follows from other
keys is computed once (:mod:`raydist.config.load`) and printed, never written twice.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from raydist.config.base import StrictModel, choice
from raydist.config.registries import OBJECTIVES, SAMPLERS


class ModelConfig(StrictModel):
    """Which decoder, and where its weights come from."""

    preset: str = "debug"
    """A name of `raydist list models`: debug, ..., llama3.1-8b, qwen3-8b."""
    overrides: dict[str, int | float | bool | str] = Field(default_factory=dict)
    """Single fields of the preset to change, e.g. {num_layers: 4}."""
    init_from: str | None = None
    """A Hugging Face directory (safetensors) to start from; the preset is then read from its config.json."""
    attention: Literal["auto", "sdpa", "flex"] = "auto"
    """Attention kernel; auto is flex on CUDA and sdpa with a dense mask elsewhere."""
    recompute: Literal["none", "block"] = "none"
    """block: activations of each decoder block are recomputed in the backward pass."""
    compile: bool = False
    """torch.compile each decoder block."""


class DatasetConfig(StrictModel):
    """One prepared dataset of a mixture."""

    path: str
    """Directory with a manifest.json, local or s3://."""
    weight: PositiveFloat = 1.0
    """Share of rows, relative to the other datasets."""


class DataConfig(StrictModel):
    """What is read, and how it is cached on the node."""

    train: list[DatasetConfig] = Field(min_length=1)
    """Datasets mixed by weight. A single path may be given as a string."""
    validation: list[DatasetConfig] = Field(default_factory=list)
    """Datasets of the in-loop validation; empty for none."""
    seq_len: PositiveInt
    """Clean tokens per row that the model sees."""
    cache_dir: str | None = None
    """Node-local folder of decompressed shards; default: a folder under the user's cache directory."""
    cache_limit: str = "20GiB"
    """Most bytes of decompressed shards on the node; at least one shuffle window of each dataset."""
    shuffle_window_shards: PositiveInt = 8
    """Rows are permuted inside windows of this many shards; a worker opens no more of a dataset."""
    prefetch_steps: int = Field(default=2, ge=0)
    """Batches that the background thread hands over at a time; up to three such groups exist. 0 prepares each batch when it
    is asked for."""

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _paths_are_datasets(cls, value: Any) -> Any:
        items = [value] if isinstance(value, str | dict) else value
        if not isinstance(items, list | tuple):
            return items
        return [{"path": item} if isinstance(item, str) else item for item in items]


class OptimizerConfig(StrictModel):
    """AdamW. Matrices and embeddings decay; norms (vectors) do not."""

    learning_rate: PositiveFloat
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: PositiveFloat | None = 1.0
    """Global gradient norm above which gradients are scaled down; null for no clipping."""


class LearningRateConfig(StrictModel):
    """The learning rate over the run, as a factor of optimizer.learning_rate."""

    name: Literal["cosine", "stable_decay", "constant"] = "cosine"
    """cosine: warm-up, then half a cosine; stable_decay: warm-up, flat, then linear; constant: warm-up, then flat."""
    warmup_steps: int = Field(default=0, ge=0)
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """stable_decay only: the last share of the run in which the rate falls."""
    final_factor: float = Field(default=0.1, ge=0, le=1)


class TrainingConfig(StrictModel):
    """The loop."""

    num_steps: PositiveInt
    """Optimizer steps of the whole run."""
    batch_rows: PositiveInt
    """Rows per optimizer step over all workers and microbatches; must divide by workers x microbatch_rows."""
    microbatch_rows: PositiveInt
    """Rows per forward on one worker."""
    optimizer: OptimizerConfig
    learning_rate_schedule: LearningRateConfig = LearningRateConfig()
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: parameters are gathered and used in bfloat16; master weights, reductions and the loss stay in float32."""
    log_every_steps: PositiveInt = 10
    validate_every_steps: PositiveInt | None = None
    """Steps between validations; null for none."""
    validation_batches: PositiveInt = 2
    """Batches of batch_rows rows in one validation, always the same rows with the same noise."""
    validation_objective: choice(OBJECTIVES) | None = None  # type: ignore[valid-type]
    """What validation measures; null: the objective itself. Runs that train with different settings are comparable by it."""
    num_threads: PositiveInt | None = None
    """torch threads of one worker on CPU; null leaves torch's choice."""
    peak_tflops: PositiveFloat | None = None
    """Peak TFLOP/s of one worker's device, for the metric mfu; null: known GPUs by their name, and no mfu on others."""


class KeepBestConfig(StrictModel):
    """Which checkpoint is the best one: of those saved at a step that was validated."""

    metric: str
    """As it is logged, e.g. validation/bound_nats_per_token."""
    mode: Literal["min", "max"] = "min"


class CheckpointConfig(StrictModel):
    """Training state to go on from."""

    every_steps: PositiveInt | None = 100
    """null: by time only. The last step is always saved."""
    every_minutes: PositiveFloat | None = 15.0
    """A step is also saved when so much time has passed since the last save began: what a sudden end can cost. null: by
    steps only."""
    keep: PositiveInt = 2
    """Newest complete checkpoints kept; older ones are deleted."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints of multiples of this step are made besides, and kept for good."""
    keep_best: KeepBestConfig | None = None
    """The best one is kept besides, until a better one is complete. Sweeps set it for their trials."""
    spool_dir: str | None = None
    """Node-local folder that shards pass through on their way to a bucket; it needs room for the shards of all workers of
    the node once. default: a folder under the system's temporary one."""


class TrackingConfig(StrictModel):
    """Where metrics and artifacts go. `metrics.jsonl` in the run directory is always written."""

    mlflow_uri: str | None = None
    """MLflow server or database. null: MLFLOW_TRACKING_URI, else sqlite in <output_dir>/mlflow.db with the artifacts beside
    it; `none` turns MLflow off."""
    experiment: str = "raydist"
    system_metrics: bool = True
    max_artifact: str = "2GiB"
    """Larger files stay in storage; MLflow then holds pointer, size and hash."""
    tags: dict[str, str] = Field(default_factory=dict)


class ScalingConfig(StrictModel):
    """The Ray Train workers."""

    num_workers: PositiveInt = 1
    min_workers: PositiveInt | None = None
    """Elastic: the run goes on with fewer workers, down to this many, while nodes are missing, and takes on new ones as they
    come. Batches and their order stay the same. null: always num_workers."""
    use_gpu: bool = False
    cpus_per_worker: PositiveFloat = 1.0
    reshard_after_forward: bool = True
    """True frees a block's gathered weights between forward and backward; False keeps them: more memory, fewer collectives."""
    max_failures: int = Field(default=3, ge=-1)
    """Worker failures survived before the run is given up; -1 for any number."""
    collective_timeout_s: PositiveFloat = Field(default=600.0, ge=1)
    """A worker that does not answer for so long, or a collective that takes longer, counts as a failure. It must exceed the
    longest that one worker may keep the others waiting, e.g. while it fetches its first shards."""
    stop_grace_s: PositiveFloat = 120.0
    """After SIGTERM or Ctrl-C: the longest wait for the running step and its checkpoint."""

    @model_validator(mode="after")
    def _limits_are_ordered(self) -> ScalingConfig:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers={self.min_workers} must not exceed num_workers={self.num_workers}")
        return self


class SamplingConfig(StrictModel):
    """How `raydist sample` rolls the trained model out unless told otherwise."""

    sampler: choice(SAMPLERS) = Field(default_factory=lambda: {"name": "autoregressive"})  # type: ignore[valid-type]
    max_new_tokens: PositiveInt = 128
    prompts: list[str] = Field(default_factory=list)


class RunConfig(StrictModel):
    """One training run."""

    name: str | None = None
    """Names the run directory and the MLflow run; default: <recipe>-<hash of the configuration>."""
    seed: int = 0
    """Of the weights, the data order and the noise."""
    output_dir: str = "runs"
    """Folder or bucket prefix of the run directories."""
    model: ModelConfig
    data: DataConfig
    objective: choice(OBJECTIVES)  # type: ignore[valid-type]
    training: TrainingConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    scaling: ScalingConfig = ScalingConfig()
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, name: str | None) -> str | None:
        if name is not None and (not name or any(not (c.isalnum() or c in "-_.") for c in name) or name[0] in ".-"):
            raise ValueError("letters, digits, '-', '_' and '.', not starting with '.' or '-'")
        return name

    @model_validator(mode="after")
    def _batch_divides(self) -> RunConfig:
        sizes = self.world_sizes()
        for key in ("num_workers", "min_workers"):
            num_workers = getattr(self.scaling, key)
            if num_workers is not None and num_workers not in sizes:
                raise ValueError(
                    f"training.batch_rows={self.training.batch_rows} must be a multiple of scaling.{key} x "
                    f"training.microbatch_rows = {num_workers * self.training.microbatch_rows}"
                )
        return self

    def world_sizes(self) -> list[int]:
        """The numbers of workers that the run may have, ascending: those between the limits that divide the batch."""
        scaling, training = self.scaling, self.training
        fewest = scaling.num_workers if scaling.min_workers is None else scaling.min_workers
        between = range(fewest, scaling.num_workers + 1)
        return [size for size in between if training.batch_rows % (size * training.microbatch_rows) == 0]
