"""The settings of a task, section by section: the whole vocabulary in which a cell can be described. A key that is
not here is refused.

Fields default to null (not said) or to "off"; what a protocol cannot do without stands in its row of
kinds.py and is checked on every resolved cell, because arms and grid points may supply it. No torch.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from suite.spec.learning_rate import SCHEDULES
from suite.spec.perturbations import PERTURBATIONS
from suite.spec.precision import CACHE_FORMATS, DTYPES, FORMATS, ROUNDED_WHERE

Dtype = Literal[*DTYPES]
RolloutFormat = Literal[*FORMATS]
CacheFormat = Literal[*DTYPES, *CACHE_FORMATS]
# What becomes part of a path. Every name of a task file that does has one of these three types.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=80)]  # tasks, blocks, claims, arms, controls
SettingPath = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*$", max_length=80)]  # axes of a grid
Family = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$", max_length=60)]  # model_type of config.json
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=120)]
Sha256 = Annotated[str, Field(pattern=r"^([0-9a-f]{64}|unknown)$")]
Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]

SECTIONS = ("model", "data", "rollout", "train", "precision", "algorithm", "schedule")


class Strict(BaseModel):
    """Frozen; unknown keys, wrong types and non-finite numbers are errors."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Model(Strict):
    """Weights: a hub id or a local path; `sha256` is that of the weight file, or, of several, of what
    `sha256sum *.safetensors` prints; `unknown` until somebody looked it up (every record holds it as `weights`).
    family: the model_type of its config.json.
    files_sha256: of the other files that engines read (models.READ): of what `sha256sum` prints of them, by name.
    """

    path: str | None = None
    id: str | None = None
    revision: str | None = None
    sha256: Sha256 | None = None
    files_sha256: Sha256 | None = None
    family: Family | None = None
    dtype_on_disk: Literal["fp32", "bf16", "fp16", "unknown"] | None = None


class DataFile(Strict):
    name: FileName
    sha256: Sha256
    rows: Positive | None = None


class ProblemFile(Strict):
    """A set of problems in one file: a kept set that the filter wrote (JSON), or published Parquet. Found at `path`
    (from the top of the checkout if relative), in SUITE_DATA_DIR under `name`, or on the hub in the data set `id`.
    """

    path: str | None = None
    name: FileName | None = None
    id: str | None = None
    sha256: Sha256


class HeldOut(Strict):
    """Desk problems on which the trainer's policy is evaluated: how many, and the seed that draws them."""

    num_prompts: Positive
    seed: Natural


class Data(Strict):
    """Problems: a hub id, a local path, or a generated family.

    num_terms: digits in a desk problem, ends included. seed: draws desk problems in place of the launch seed, so that
    every launch of an RL task has the same problems. kept: these problems of an earlier filter instead of all.
    keep_accuracy: of the filter protocol, the band of initial accuracy that is kept, ends included; reference: the set
    that its own is compared with. zero_truncated: a response cut at the length limit gets reward 0 whatever it holds.
    max_prompt_tokens: problems whose prompt is longer are left out.
    grader: who compares an answer with the gold answer: the suite (null too), or one of the two that made the paper's
    numbers, of VeRL and of OAT (paper_graders.py).
    """

    id: str | None = None
    path: str | None = None
    revision: str | None = None
    sha256: Sha256 | None = None
    rows: Positive | None = None
    unique_rows: Positive | None = None
    template: Literal["desk", "qwen_math", "r1", "verl_r1", "octothinker", "none", "tokens"] | None = None
    num_prompts: Positive | None = None
    num_terms: tuple[Positive, Positive] | None = None
    files: tuple[DataFile, ...] | None = None
    seed: Natural | None = None
    kept: ProblemFile | None = None
    keep_accuracy: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] | None = None
    reference: ProblemFile | None = None
    held_out: HeldOut | None = None
    zero_truncated: bool | None = None
    max_prompt_tokens: Positive | None = None
    reward_timeout_s: Annotated[float, Field(gt=0)] | None = None
    grader: Literal["suite", "mathd_sympy", "oat"] | None = None


class Rollout(Strict):
    """How rollouts are sampled. `top_k` 0 and `top_p` 1.0 are off; limits are in tokens, cache memory in GiB. A response
    ends with the token that completes one of the strings in `stop`, or with the model's own end.
    """

    engine: Literal["vllm", "hf", "auto"] | None = None
    samples_per_prompt: Positive | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Share | None = None
    top_k: Natural = 0
    max_tokens: Positive | None = None
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None = None
    max_model_len: Positive | None = None
    max_num_seqs: Positive | None = None
    prompts_per_batch: Positive | None = None
    enforce_eager: bool = True
    prefix_caching: bool = False
    chunked_prefill: bool = False
    max_num_batched_tokens: Positive | None = None
    cascade_attention: bool = False
    kv_cache_gib: Annotated[float, Field(gt=0)] | None = None
    gpu_memory_utilization: Share | None = None
    attention_backend: str | None = None
    seed: Natural | None = None


class Perturb(Strict):
    """A trainer weight scaled on purpose: the control that must be caught."""

    parameter: str
    scale: float


class LrSchedule(Strict):
    """How the learning rate falls, in optimizer steps after warm-up (learning_rate.py): `linear` to `final` times
    the rate over `steps`, `step` by `factor` every `every`. A kind takes its own keys and needs all of them.
    """

    kind: Literal[*SCHEDULES]
    steps: Positive | None = None
    final: Annotated[float, Field(ge=0, lt=1)] | None = None
    every: Positive | None = None
    factor: Annotated[float, Field(gt=0, lt=1)] | None = None


class Optimizer(Strict):
    name: Literal["adamw"]
    lr: Annotated[float, Field(ge=0)]
    betas: tuple[float, float]
    eps: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    warmup_steps: Natural = 0
    lr_schedule: LrSchedule | None = None


class Lora(Strict):
    """Low-rank adapters: update (alpha / rank) B A; `targets` are the last names of the linear layers that get one."""

    rank: Positive
    alpha: Positive
    targets: Annotated[tuple[str, ...], Field(min_length=1)]


class Parallel(Strict):
    """Number of ranks along each way of splitting the trainer."""

    data: Positive = 1
    tensor: Positive = 1
    pipeline: Positive = 1
    expert: Positive = 1


class Train(Strict):
    """The trainer. `score_batch_size` and `micro_batch_size` count sequences per forward, of a scoring pass and of an
    update: batch shape alone moves bf16 log-probs, so both are fixed. routing_replay: whose experts a mixture's trainer
    takes in scoring and in updates: its own router's (null), or those that the sampler chose for the same tokens.
    """

    engine: Literal["dense", "moe"] | None = None
    score_batch_size: Positive | None = None
    micro_batch_size: Positive | None = None
    head_chunk_tokens: Positive | None = None
    attention: Literal["sdpa", "eager"] | None = None
    routing_replay: Literal["rollout"] | None = None
    perturb: Perturb | None = None
    gradient_checkpointing: bool = False
    grad_clip: Annotated[float, Field(gt=0)] | None = None
    optimizer: Optimizer | None = None
    lora: Lora | None = None
    parallel: Parallel | None = None


class LossScaling(Strict):
    enabled: bool
    init_scale: Annotated[float, Field(gt=0)] = 65536.0
    growth_factor: Annotated[float, Field(gt=1)] = 2.0
    backoff_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    growth_interval: Positive = 400


class PrecisionSettings(Strict):
    """The format asked for at each point; null follows `rollout` or `train`. What was executed is in the record.

    rollout: also a coarse format, m0 to m22; rollout_rounded: where it acts, on the weights.
    kv_cache: in which the sampler keeps keys and values; null is its own dtype, otherwise one of two 8-bit formats.
    gradient_reduction: in which micro-batches and ranks add up their gradients; null is fp32, otherwise fp32 or the
    trainer's own dtype.
    """

    rollout: RolloutFormat | None = None
    rollout_rounded: Literal[*ROUNDED_WHERE] | None = None
    train: Dtype | None = None
    wire: Dtype | None = None
    trainer_head: Dtype | None = None
    rollout_logits: Dtype | None = None
    kv_cache: CacheFormat | None = None
    gradient_reduction: Dtype | None = None
    loss_scaling: LossScaling | None = None


class PerturbLoss(Strict):
    """A row of perturbations.py by its name; `format`: that to which the trainer's weights are rounded for it."""

    name: Literal[*PERTURBATIONS]
    format: RolloutFormat | None = None


class Algorithm(Strict):
    """The row of algorithms.py by its name in the paper, and what a task may set on it (algorithms.OVERRIDES; null
    keeps the row's own). shuffle_rewards: the control in which a step's rewards are handed to other rollouts. perturb: what
    the loss is told of the log-probs is changed on purpose.
    """

    name: Name | None = None
    clip_low: Annotated[float, Field(ge=0)] | None = None
    clip_high: Annotated[float, Field(ge=0)] | None = None
    dual_clip: Annotated[float, Field(gt=0)] | None = None
    cap: Annotated[float, Field(gt=0)] | None = None
    floor: Annotated[float, Field(gt=0)] | None = None
    anchor: str | None = None
    divergence_low: Annotated[float, Field(gt=0)] | None = None
    divergence_high: Annotated[float, Field(gt=0)] | None = None
    log_ratio_limit: Annotated[float, Field(gt=0)] | None = None
    advantage: str | None = None
    aggregation: str | None = None
    aggregation_length: Positive | None = None
    shuffle_rewards: bool = False
    perturb: PerturbLoss | None = None


class DynamicSampling(Strict):
    """DAPO's: problems are drawn, in at most `max_rounds` rounds of prompts_per_step, until so many have responses that do
    not all get the same reward (drawing.py)."""

    max_rounds: Positive


class Schedule(Strict):
    """Counts per run: `steps` are rollout iterations, `minibatches` the gradient steps in each; every `eval_every` of them
    the trainer's policy is evaluated on data.held_out. minibatch_of: what a mini-batch is drawn from: prompts with all
    their responses (null means this), or responses, so that those of one prompt come into different gradient steps.
    whole_rows_per_step: of how many rollouts of a step, drawn at random, the evidence keeps tokens and log-probs; of the
    others it keeps their sums. Null keeps all.
    """

    steps: Positive | None = None
    prompts_per_step: Positive | None = None
    minibatches: Positive | None = None
    minibatch_of: Literal["prompts", "responses"] | None = None
    eval_every: Positive | None = None
    checkpoint_every: Positive | None = None
    whole_rows_per_step: Positive | None = None
    dynamic_sampling: DynamicSampling | None = None


class Settings(Strict):
    """Everything that decides the numbers of a cell; the run key is made from it."""

    model: Model | None = None
    data: Data | None = None
    rollout: Rollout | None = None
    train: Train | None = None
    precision: PrecisionSettings | None = None
    algorithm: Algorithm | None = None
    schedule: Schedule | None = None
