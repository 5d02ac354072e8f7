"""One tree of typed settings. Defaults live here only; YAML files and `key=value` overrides come on top."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from roro_ray.cluster_config import FaultsConfig as FaultsConfig
from roro_ray.cluster_config import RayConfig as RayConfig
from roro_ray.cluster_config import StorageConfig as StorageConfig
from roro_ray.ppo_config import PpoConfig as PpoConfig

STEP_DELIMITER = "\n\n"


@dataclass
class ModelConfig:
    """One model of the pool."""

    name: str = "small"  # shown in reports
    path: str = "world:small"  # a directory in Hugging Face format, a model of the hub, or world:NAME for a shipped one
    engine: str = "hf"  # hf (transformers) | vllm | openai (a remote endpoint)
    device: str = "cpu"  # cpu | cuda | cuda:N
    dtype: str = "float32"  # torch dtype of the weights; float64: the same bits in any batch, 1.5 times the time
    revision: str = ""  # of a model of the hub; empty: the newest
    format: str = "plain"  # plain: query, blank line, steps (the embedded world's) | chat: the model's chat template
    thinking: str = "auto"  # auto | on | off: whether its answer begins with a thinking block (format=chat)
    max_context: int = 0  # tokens of prompt and answer together; 0: as many as the model has positions for
    gpus: float = 0.0  # GPUs of its own actor (pool.placement=actors); 0: ray.engine_gpus
    tensor_parallel: int = 1  # GPUs that share one copy of the weights (vllm)
    memory_fraction: float = 0.0  # of each GPU's memory (vllm); 0: vLLM's own default, the GPU to itself
    adapters: int = 0  # most LoRA adapters at once (vllm, hf); 0: none
    adapter_rank: int = 64  # largest rank of an adapter (vllm)
    price_in: float = 0.0  # US dollars per million prompt tokens
    price_cached: float = 0.0  # the same for tokens that it read before (an API bills them anew with every step)
    price_out: float = 0.0  # US dollars per million tokens written
    url: str = ""  # of an OpenAI-compatible endpoint, such as https://host/v1 (openai)
    api_model: str = ""  # the model's name there; empty: path
    api_key_env: str = "OPENAI_API_KEY"  # environment variable with the key; the key itself goes into no file
    api_mode: str = "auto"  # auto | completions | chat: how a step is continued there
    engine_args: dict[str, Any] = field(default_factory=dict)  # further arguments, handed to the engine as they are


@dataclass
class PoolConfig:
    """The models, cheap to dear, and how they decode."""

    models: list[ModelConfig] = field(
        default_factory=lambda: [ModelConfig("small", "world:small"), ModelConfig("large", "world:large")]
    )
    batch_size: int = 256  # most requests in one forward pass
    memo_entries: int = 400_000  # greedy steps remembered per model; 0 turns the memo off
    cache_mb: int = 256  # MiB of key/value states kept between steps, per model; 0 computes every prefix anew
    placement: str = "colocated"  # colocated: engines inside each rollout worker; actors: one actor per model


@dataclass
class DataConfig:
    """Which queries each stage uses."""

    suites: list[str] = field(default_factory=lambda: ["chain", "word", "long", "list", "clock"])
    train_suites: list[str] = field(default_factory=list)  # of the training stages; empty: the same as suites
    sources: dict[str, str] = field(default_factory=dict)  # suite: a JSONL or Parquet file or folder, or a hub dataset
    split_shares: list[float] = field(default_factory=lambda: [0.6, 0.2, 0.2])  # train, validation, test of one file
    train_queries: int = 80  # per suite, for collection and reward learning
    router_queries: int = 400  # per suite, router training draws from these
    validation_queries: int = 50  # per suite
    test_queries: int = 100  # per suite
    seed: int = 0  # seed of the query streams
    graders: int = 2  # processes that check mathematical answers, per rollout worker
    grade_timeout_s: float = 10.0  # of one answer, from when its check begins


@dataclass
class EpisodeConfig:
    """Limits of one episode."""

    max_steps: int = 16  # steps, the answer included
    max_step_tokens: int = 48  # tokens of one step
    min_step_tokens: int = 0  # a blank line after fewer tokens does not end a step: tiny paragraphs are merged
    max_tokens: int = 1024  # tokens of a whole trajectory
    max_repeats: int = 3  # the same step text this often in a row ends the episode
    instruction: str = ""  # follows the query in the prompt of a chat model
    answer_by: str = "large"  # large | small | last: who writes the final answer behind a thinking block
    max_answer_tokens: int = 1024  # tokens of that final answer
    temperature: float = 0.0  # 0 is greedy
    timeout_s: float = 600.0  # deadline of one batch of episodes


@dataclass
class CollectConfig:
    """Which strategies stage 1 rolls out for each query, and how many rollouts of each."""

    strategies: list[str] = field(
        default_factory=lambda: [
            "fixed:0",
            "fixed:1",
            "random:0.2",
            "random:0.4",
            "random:0.6",
            "threshold:0.9",
            "blocks:2",
            "periodic:3",
        ]
    )
    rollouts: int = 1  # per strategy and query
    shard_queries: int = 40  # queries per Parquet file


@dataclass
class PairsConfig:
    """How preference pairs are built."""

    folds: int = 4  # disjoint by query; the last one is held out
    cost_margin: float = 0.15  # least difference in large share of a cost pair
    process_margin: float = 0.1  # least difference in process quality of a process pair
    process_cost_slack: float = 0.15  # largest difference in large share of a process pair
    process_source: str = "interventions"  # interventions | agreement | confidence (an estimate without rollouts)
    continuations: int = 1  # continuations per intervention where decoding samples
    max_per_query: int = 16  # pairs kept per query and kind


@dataclass
class RewardConfig:
    """Rubricor and Judge: shapes, warm start and alternating optimisation."""

    backend: str = "local"  # local (two small models in memory) | engine (two LoRA adapters on the base below)
    engine: ModelConfig = field(default_factory=lambda: ModelConfig("reward", "", adapters=2))  # path empty: lora.base
    publish_every: int = 1  # updates between the versions of an adapter that the engine is given
    rubric_tokens: int = 512  # most tokens of a rubric (engine)
    judge_tokens: int = 0  # most tokens that the Judge reads at once (engine); 0: as many as the base has positions
    judge_rows: int = 256  # most questions about trajectories in one update of the Judge (engine)
    concurrency: int = 64  # trajectories or rubrics in flight at the engine
    rubricor: str = "world:rubricor"  # warm-started weights
    judge: str = "world:judge"
    rounds: int = 2  # alternations
    judge_updates: int = 10  # per round
    rubricor_updates: int = 80  # per round
    queries_per_update: int = 16
    rubrics_per_query: int = 8  # group size of the Rubricor phase
    verdicts_per_pair: int = 8  # group size of the Judge phase
    learning_rate: float = 1.5e-3  # of the Rubricor; Muon for matrices, AdamW for the rest
    judge_lr: float = 5e-4  # of the Judge
    entropy: float = 0.03  # entropy bonus of the Rubricor
    kind_weights: dict[str, float] = field(default_factory=lambda: {"outcome": 4.0, "cost": 1.0, "process": 1.0})
    score_scale: float = 0.1  # temperature of sigmoid(score difference / scale)
    min_criteria: int = 3
    max_criteria: int = 7
    rubric_source: str = "learned"  # learned | warm | random | fixed
    judge_dtype: str = "float64"  # of the Judge in the reward service; float64: the same bits in any batch
    queue_size: int = 4096  # trajectories waiting in the reward service
    timeout_s: float = 120.0  # deadline of one scoring call


@dataclass
class LoraConfig:
    """Rubricor and Judge as two LoRA adapters on one base model, and how their learner is spread over devices."""

    base: str = ""  # the base model: a directory in Hugging Face format or a model of the hub; empty: off
    revision: str = ""  # of a model of the hub; empty: the newest
    dtype: str = "bfloat16"  # bfloat16 | float32: of the base's weights; adapters and optimiser are always float32
    rank: int = 16  # of every adapter
    alpha: float = 32.0  # adapters are scaled by alpha / rank
    target_modules: list[str] = field(default_factory=list)  # names of modules to adapt; empty: every linear layer
    attention: str = "auto"  # auto (flash_attention_2 or segments) | segments | sdpa | flash_attention_2
    gradient_checkpointing: bool = True  # keep no activations inside a layer: less memory, a third more computation
    token_budget: int = 16384  # tokens of one packed row, which is one forward pass; no sequence may be longer
    logits_chunk: int = 512  # tokens whose logits (chunk x vocabulary, float32) are held at once
    rubricor_lr: float = 2e-5  # of the Rubricor's adapter under GRPO
    judge_lr: float = 1e-5  # of the Judge's adapter under GRPO
    sft_lr: float = 1e-4  # of either under SFT, after linear warm-up
    sft_updates: int = 200  # of either in the warm start
    sft_warmup: int = 10  # updates of linear warm-up in SFT
    weight_decay: float = 0.0  # of AdamW
    grad_clip: float = 1.0  # largest norm of an adapter's gradient
    strategy: str = "single"  # single | ddp | fsdp2: one process | a copy of the base per worker | base in shards
    workers: int = 1  # Ray Train workers
    cpus: float = 0.5  # of each worker
    gpus: float = 0.0  # of each worker
    checkpoint_every: int = 10  # updates; what came after the last checkpoint is done again after a crash
    max_failures: int = 2  # restarts of the worker group
    transport: str = "storage"  # storage (a directory that all nodes see) | objects (Ray's object store) to the engines
    timeout_s: float = 1800.0  # deadline of one update, and of loading the base


@dataclass
class WarmStartConfig:
    """Rubrics by a strong LLM, from which Rubricor and Judge learn before the alternation (jobs.warm_start)."""

    writer: str = "large"  # the strong LLM: a model of the pool by name; empty: the engine below
    engine: ModelConfig = field(default_factory=lambda: ModelConfig("writer", "world:large"))  # a model of its own
    pairs_per_query: int = 2  # pairs written about, drawn over kinds
    max_pairs: int = 2000  # in all
    attempts: int = 2  # rubrics sampled for a pair until one is kept
    temperature: float = 0.7  # of the writing
    max_tokens: int = 768  # of one written rubric
    verdicts: str = "scores"  # scores (probabilities of yes and no) | text (one written word, for endpoints without)
    margin: float = 0.1  # least difference in score between the preferred and the rejected trajectory
    swap: bool = True  # also ask which of the two is better, with the sides both ways
    concurrency: int = 16  # pairs in flight
    batch: int = 16  # examples of one SFT update
    epochs: float = 2.0  # passes over the examples, at most lora.sft_updates updates of each adapter


@dataclass
class RouterConfig:
    """The router network and its training by GRPO."""

    encoder: str = "world:encoder"  # causal LM that reads the text so far; empty: scalar signals only
    encoder_revision: str = ""  # of an encoder of the hub; empty: the newest
    encoder_dtype: str = "float32"  # float32 | bfloat16 (with encoder_rank > 0): of the encoder's weights
    encoder_rank: int = 0  # train the encoder as a LoRA adapter of this rank; 0: all of its weights
    device: str = ""  # of the router in rollout workers; empty: the first model's device
    hidden: int = 64  # width of the decision head
    prior: float = 0.25  # probability of a dearer model before training
    peek: str = "none"  # none | first_token | step
    iterations: int = 30
    queries: int = 16  # per iteration
    group_size: int = 8  # rollouts per query
    epochs: int = 4  # optimizer steps on each iteration's rollouts; the ratio clip bounds how far they go
    cost_weight_low: float = 0.1  # drawn per group, log-uniform
    cost_weight_high: float = 0.6
    beta: float = 1.0  # weight of the process reward; 0 is the outcome-only control
    credit: str = "trajectory"  # trajectory | step
    normalisation: str = "dr_grpo"  # dr_grpo | group | dapo
    head_lr: float = 2e-3
    encoder_lr: float = 5e-4
    final_lr: float = 0.1  # linear decay of both to this share of them
    clip: float = 0.2  # PPO ratio clip
    grad_clip: float = 1.0
    entropy: float = 0.02  # entropy bonus
    max_lag: int = 0  # router versions that rollouts are behind, and batches in the air beside it; 0: on-policy
    objective: str = "ppo"  # ppo | decoupled (for max_lag > 1): clips around the acting or around the present weights
    weight_cap: float = 2.0  # with objective=decoupled: most that a decision made by earlier weights may count
    workers: int = 1  # Ray Train workers
    checkpoint_every: int = 5  # iterations
    max_failures: int = 2  # restarts of the Train workers
    micro_batch: int = 128  # trajectories in one forward pass of the learner; changes memory, not the gradient
    gradient_checkpointing: bool = False  # the learner keeps no activations inside an encoder layer: less memory
    cache_mb: int = 64  # MiB of key/value states of read texts that a rollout worker keeps for each version in use


@dataclass
class EvaluateConfig:
    """Frontier sweeps and intervals."""

    cost_weights: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0])
    random_shares: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    thresholds: int = 9  # thresholds of every threshold method, quantiles of its signal on validation
    bootstrap: int = 1000  # resamples over queries
    oracle: bool = True  # search each test query's fewest dear steps; affordable with short plain solutions only
    oracle_steps: int = 4000  # most steps that this search may ask for, per query
    accuracy_slack: float = 0.01  # operating point: cheapest within this of the large model on validation
    every: int = 10  # router iterations between points of the learning curve
    curve_cost_weights: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.4])  # swept at each of its points


@dataclass
class CalibrateConfig:
    """What each cost weight of a router gives, measured for serving."""

    cost_weights: list[float] = field(
        default_factory=lambda: [
            *[0.01, 0.02, 0.025, 0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.25],
            *[0.4, 0.6, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 10.0],
        ]
    )
    queries: int = 50  # held-out queries per suite, of the validation split behind data.validation_queries
    bootstrap: int = 1000  # resamples over queries
    confidence: float = 0.95  # of the intervals


@dataclass
class EstimateConfig:
    """What `--dry-run` assumes where nothing is measured yet. Nothing that runs reads it: change it freely."""

    tokens: int = 8000  # of a mean trajectory, its final answer apart
    step_tokens: int = 120  # of a mean step
    prompt_tokens: int = 250  # of a mean query in its prompt
    answer_tokens: int = 400  # of a mean final answer behind a thinking block
    rubric_tokens: int = 300  # of a mean rubric; a criterion adds a fifth of it to what the Judge reads
    large_share: float = 0.4  # of the steps that a router or a threshold sends to dearer models
    process_share: float = 0.3  # of the collected trajectories whose process quality must be measured
    gpu_tflops: float = 989.0  # peak of one GPU, 10^12 FLOP/s, bf16 without sparsity (H100 SXM, NVIDIA's data sheet)
    gpu_bandwidth: float = 3.35  # peak of its memory, 10^12 bytes/s (H100 SXM, NVIDIA's data sheet)
    read_utilisation: float = 0.4  # of the peak FLOP/s that reading (prefill) reaches
    train_utilisation: float = 0.3  # of the peak FLOP/s that training reaches
    write_utilisation: float = 0.6  # of the peak bandwidth that writing (decode) reaches
    overhead: float = 1.5  # hours are multiplied by this: loading, stragglers, one role waiting for another


@dataclass
class WandbConfig:
    """Weights & Biases, beside metrics.jsonl."""

    mode: str = "disabled"  # disabled | offline | online
    project: str = "roro_ray"


@dataclass
class Config:
    """Everything that a run needs; saved resolved in the run directory."""

    run_dir: str = "runs/demo"  # where everything of this run goes: a path, or a URI such as s3://bucket/run
    seed: int = 0
    pool: PoolConfig = field(default_factory=PoolConfig)
    data: DataConfig = field(default_factory=DataConfig)
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    warm: WarmStartConfig = field(default_factory=WarmStartConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    ppo: PpoConfig = field(default_factory=PpoConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    estimate: EstimateConfig = field(default_factory=EstimateConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
