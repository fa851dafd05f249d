"""The configuration: one tree of frozen dataclasses, a section each. `diffalign.config_loading` reads and writes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained, and where its weights come from.

    Attributes:
        family: a file of `diffalign/families` ("sd", "sdxl", "causal_lm").
        pretrained: hub id, diffusers (or transformers) folder, single-file `.safetensors` checkpoint, or the name of a tiny
            base ("tiny-sdxl", "tiny-lm"). With `random_weights` it is the name of a published architecture ("sdxl", "sd15",
            "sd21", "sd21-base").
        revision: hub revision (branch, tag or commit).
        variant: file variant of the hub repository, such as "fp16".
        vae: another VAE (hub id, folder or single file); SDXL in fp16 needs an fp16-safe one.
        config: folder or hub id with the component configs and tokenizers of a single-file checkpoint (or VAE). None:
            the published architecture shipped with the package.
        random_weights: build `pretrained` as an architecture with random weights (tests, benchmarks, `plan`).
        prediction_type: override the scheduler's ("epsilon" or "v_prediction"), for checkpoints that do not say.
        flow_shift: override the scheduler's shift of a flow model (SD3: 3): larger is more noise, for training and sampling.
        max_sequence_length: tokens of the T5 or language-model text encoder; null: the stock pipeline's default.
        adapters: LoRA files or run folders that are fused into the network when it is loaded: the base then is the model
            with them (images).
        load_in_4bit: load the frozen weights of a language model in 4 bits (NF4; needs bitsandbytes and a GPU).
    """

    family: str
    pretrained: str
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    config: str | None = None
    random_weights: bool = False
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    flow_shift: float | None = None
    max_sequence_length: int | None = None
    adapters: tuple[str, ...] = ()
    load_in_4bit: bool = False


@dataclass(frozen=True, kw_only=True)
class WorldPairsConfig:
    """Make the training pairs from the tiny world first: sample the base, judge, and write Pick-a-Pic-schema parquet.

    Attributes:
        prompts: number of prompts; two images are sampled for each.
        taste: a rule of `diffalign/world/taste.py` that is added to the verifier's score.
        taste_weight: how much the taste counts against the verifier's score (both in [0, 1]).
        margin: score differences up to this are labelled as ties.
        unlabelled: share of rows written without a label, as in the real data set.
        corrupt: number of rows whose image bytes are cut short.
        num_inference_steps: sampler steps.
        guidance_scale: classifier-free guidance of the sampled images.
        jpeg_quality: of the written images (4:4:4 chroma).
        base: tiny base that is sampled. null: the run's own `model.pretrained` if it is one, else "tiny-sdxl".
        chosen: "sampled": the better of two samples is chosen. "drawn": the chosen image is a true drawing of the caption in
            the judge's taste, the rejected one a sample (subject and expert data).
        aspects: judge half of the rows by the verifier alone (aspect 0) and half by the taste alone (aspect 1) instead of by
            both.
        rewards: further judges whose scores are written as the images' `rewards`: "verifier", or rules and users of
            `diffalign/world/taste.py` alone. Empty: the judge's own score.
        maps: write the weights of PatchDPO, made of quality maps that compare patches of the sample with those of true
            drawings; needs chosen: drawn.
    """

    prompts: int = 640
    taste: str = "outlined"
    taste_weight: float = 0.5
    margin: float = 0.05
    unlabelled: float = 0.02
    corrupt: int = 2
    num_inference_steps: int = 12
    guidance_scale: float = 2.0
    jpeg_quality: int = 96
    base: Literal["tiny-sdxl", "tiny-sd3"] | None = None
    chosen: Literal["sampled", "drawn"] = "sampled"
    aspects: bool = False
    rewards: tuple[str, ...] = ()
    maps: bool = False


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which comparisons are trained on.

    Attributes:
        format: a reader of `diffalign/data/readers` ("pickapic", "pickapic_wds", "hpdv2", "image_preferences",
            "folder", "jsonl"; "text" for language models).
        sources: tried in order: local files or folders, then hub data set ids. The first that can be used is used.
        split: split name, as in the hub's file names ("train", "validation_unique", ...).
        max_pairs: stop after this many usable records; None reads all.
        max_disk_gb: refuse a source, or stop downloading, beyond this many gigabytes (1e9 bytes).
        keep_downloads: keep downloaded shards after they are cached; otherwise each is deleted once it is encoded.
        ties: "drop" removes them; "soft" keeps them with label 1/2. A tie is never a win.
        label_from: who says which image won: the "label"; the first of the rows' "rewards" (SmPO); or their "majority", one
            vote for each reward, whatever its scale (BalancedDPO, arXiv 2503.12575). Then equal rewards (votes) are ties,
            and labels are read for dropping people's ties alone.
        label: how sure it is that the chosen image is preferred: as "given"; or by the first reward, with probability
            sigmoid((r_chosen - r_rejected) / label_temperature): that itself ("soft"), or a draw from it at every visit
            ("sampled"; subject-driven RPO). Which image is the chosen one stays.
        label_temperature: see `label`; rewards in [0, 1] at 1, as published, give labels that are nearly coin flips.
        drop_duplicates: remove records with the same prompt and the same two images (in either order).
        exclude_prompts: text files (one prompt per line) or names of shipped lists whose prompts are removed (exact
            match after lower-casing and stripping): evaluation prompts do not belong into training.
        filter: `file.py:function`, called with each record (`diffalign.data.record.Record`); False removes it.
        max_unusable: abort when more than this share of the rows is unusable (0.5: a wrong format, not a few bad rows).
        weight_by_prompt: weight each pair by 1 / number of comparisons of its prompt, where the source says so.
        resolution: training size in pixels (the area, with buckets).
        buckets: group pairs by aspect ratio instead of cropping all to squares.
        crop: "center" or "random" (drawn once per image when it is cached).
        flip: flip both images of a pair together with probability 1/2 (drawn once when cached).
        num_frames: frames of a clip, for families that make videos: 1 + 4k for Wan, 1 + 8k for CogVideoX. 1 trains on
            still images and the first frames of clips; otherwise images and shorter clips are unusable.
        frame_stride: take every so manieth frame from the clip's start on. null spreads the frames evenly over the whole
            clip, so that clips of different lengths play at different speeds.
        world_pairs: make the data from the tiny world first (demos).
        retain_sources: unlearning: sources of what must be retained, read like `sources` (which then are forgotten). Not
            needed where rows have a `label` (0 forget, 1 retain).
        retain_split: split of the retain sources; None: the same name as `split`.
        rename: columns under other names, as "theirs=ours": ["question=prompt", "answer=completion"].
        world_text: make the data from the embedded text world first (demos).
    """

    format: str = "pickapic"
    sources: tuple[str, ...] = ()
    split: str = "train"
    max_pairs: int | None = None
    max_disk_gb: float | None = None
    keep_downloads: bool = True
    ties: Literal["drop", "soft"] = "drop"
    label_from: Literal["label", "rewards", "majority"] = "label"
    label: Literal["given", "soft", "sampled"] = "given"
    label_temperature: float = 1.0
    drop_duplicates: bool = True
    exclude_prompts: tuple[str, ...] = ()
    filter: str | None = None
    max_unusable: float = 0.5
    weight_by_prompt: bool = False
    resolution: int = 1024
    buckets: bool = False
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    num_frames: int = 1
    frame_stride: int | None = None
    world_pairs: WorldPairsConfig | None = None
    retain_sources: tuple[str, ...] = ()
    retain_split: str | None = None
    rename: tuple[str, ...] = ()
    world_text: WorldTextConfig | None = None


@dataclass(frozen=True, kw_only=True)
class WorldTextConfig:
    """Make the training data from the embedded text world first (demos of the `causal_lm` family).

    Attributes:
        kind: "pairs" and "unpaired" are sampled from the tiny model and judged by the exact verifier; "prompts" is for
            online training; "forget" holds facts to forget and facts to retain.
        size: number of prompts; ignored by "forget", whose sets are fixed.
    """

    kind: Literal["pairs", "unpaired", "prompts", "forget"] = "pairs"
    size: int = 600


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How texts become tokens and scores (family `causal_lm`).

    Attributes:
        max_length: tokens of prompt and response together. Longer prompts lose tokens on the side `truncate_prompt` names;
            then the response's end is cut; a row left without a response is counted and listed.
        max_prompt_length: tokens of the prompt, beyond which it is cut first. None: no limit of its own.
        truncate_prompt: "start" keeps the end of the prompt, "end" its beginning.
        chat_template: Jinja file used in place of the tokenizer's own template for conversational data.
        packing: put all rows of a micro-batch into one sequence without padding. Exact: attention does not cross rows.
        logits_chunk: response tokens whose logits are held at a time.
    """

    max_length: int = 1024
    max_prompt_length: int | None = None
    truncate_prompt: Literal["start", "end"] = "start"
    chat_template: str | None = None
    packing: bool = False
    logits_chunk: int = 1024


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How texts are sampled, for evaluation and online training (family `causal_lm`).

    Attributes:
        max_new_tokens: longest response.
        temperature: of the samples; 0 is greedy.
        top_p: nucleus; 1 keeps everything.
        top_k: most likely tokens kept; 0 keeps all. Online training needs top_p 1 and top_k 0: otherwise the log-probability
            of a sample is not the sampler's.
        batch_size: sequences per call.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 64


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Online training: sample answers or images to prompts, score them, train on them.

    Attributes:
        samples_per_prompt: answers or images per prompt (K), a group.
        steps_per_generation: optimiser steps that one round of samples serves.
        num_iterations: passes over the samples of a round.
        rewards: reward models, or for texts `file.py:function` (TRL's signature); their weighted sum is the reward.
        reward_weights: one per reward; empty: all 1.
        pairing: of the best and the worst image of a prompt, by the sum: "sum" takes them as they are; "dominance" makes
            them a tie where some reward says otherwise. null: as the objective was published (D3PO: dominance).
        prompts: images: a text file, a shipped list ("world_train", ...) or prompts; empty: the prompts of the data.
        num_prompts: how many of them; null takes all.
        policy: who samples images: "policy" as it is at the start of a round, "reference", or "lagged", a copy that follows
            the policy from round to round. null: as published (SePPO: the reference; DiffusionNFT: lagged).
        old_decay: how much of the lagged copy is kept at the end of a round: a number in [0, 1), or as DiffusionNFT's code:
            "copy" 0; "linear_to_0_5" min(step / 1000, 1/2); "delayed_linear_to_0_999" 0 up to step 75, then 0.0075 a step.
        num_inference_steps: sampler steps of images.
        guidance_scale: of the sampler and, for trajectories, of the scores; 1 is none. FLUX.1 [dev] is told it.
        negative_gradient: whether gradient flows through the unconditional branch of guided scores of a sampler's steps.
            null: as published (Flow-GRPO: false; DDPO: true).
        eta: 0 samples deterministically (DDIM, Euler), 1 fully stochastically. null: 1 for trajectories, else 0.
        shared_start: all images of a prompt start from the same noise. null: as the objective was published (D3PO,
            DanceGRPO: true; PSO, Flow-GRPO, DDPO: false).
        kernel: the sampler's stochastic step: "ddim" (every model), or of flow models "flow_sde" (Flow-GRPO), "constant_sde"
            (DanceGRPO), "cps" (Flow-CPS); `eta` is their noise level, null: 0.7, 0.3 and 0.8.
        window: policy gradients on steps: so many consecutive steps are stochastic and trained, the others deterministic;
            null: all.
        window_range: first and last possible start of the window; empty: 0 to half the steps.
        window_every: the window moves on by one step every so many rounds, from the first start to the last and over again
            (MixGRPO: 25); null: its start is drawn for every prompt and round (Flow-GRPO-Fast).
        history: policy gradients and other objectives on advantages: a reward is compared with the last so many rewards of
            its prompt, over rounds (DDPO's code: 16 or 32). null: with its round, as `objective.center` and
            `objective.scale_rewards` say. For short lists of prompts, and the one way to do without groups
            (`samples_per_prompt: 1`): of a long list no prompt is known soon.
        history_min: with fewer rewards of its prompt a reward is compared with all of its round (DDPO's code: 16).
        steps_per_sample: of every trajectory, how many of its steps are trained, drawn at random; null: all that have a
            density for trajectory objectives, and 1 for points on the way (Diffusion-DRO).
        first_step: the first sampler step that transition objectives train (SPO: 4 of 20).
        reward_scale, keep_threshold: of SPO: a step is trained if tanh(reward_scale (best - worst) / 2), the gap of the two
            candidates' probabilities, is above the threshold (published: 0.3, 0.4 for SDXL, at a logit scale of about 100).
        select: which image of a group an objective on chosen images learns from: "best", or "bradley_terry": drawn in
            proportion to exp(reward / select_temperature), as people would choose (arXiv 2407.09499).
        select_temperature: of "bradley_terry".
        checkpoint_steps: reward back-propagation and whole trajectories (PRDP): of trained sampler steps only the latents
            are kept, and the network is called again in the backward pass: memory of one step, one forward more. null:
            where several steps are trained.
        decode_batch_size: reward back-propagation: images that are decoded and scored with gradient at a time.
        offload_rewards: networks of rewards are in the CPU's memory while the policy trains, and on their device while a
            round is sampled and scored. Rewards on a server have none.
    """

    samples_per_prompt: int = 8
    steps_per_generation: int = 1
    num_iterations: int = 1
    rewards: tuple[str, ...] = ()
    reward_weights: tuple[float, ...] = ()
    pairing: Literal["sum", "dominance"] | None = None
    prompts: str | tuple[str, ...] = ()
    num_prompts: int | None = None
    policy: Literal["policy", "reference", "lagged"] | None = None
    old_decay: float | Literal["copy", "linear_to_0_5", "delayed_linear_to_0_999"] = "linear_to_0_5"
    num_inference_steps: int = 10
    guidance_scale: float = 1.0
    negative_gradient: bool | None = None
    eta: float | None = None
    kernel: Literal["ddim", "flow_sde", "constant_sde", "cps"] = "ddim"
    window: int | None = None
    window_range: tuple[int, ...] = ()
    window_every: int | None = None
    shared_start: bool | None = None
    history: int | None = None
    history_min: int = 16
    steps_per_sample: int | None = None
    first_step: int = 0
    reward_scale: float = 1.0
    keep_threshold: float = 0.3
    select: Literal["best", "bradley_terry"] = "best"
    select_temperature: float = 0.2
    checkpoint_steps: bool | None = None
    decode_batch_size: int = 4
    offload_rewards: bool = False

    def __post_init__(self) -> None:
        for name in ("steps_per_generation", "num_iterations", "num_inference_steps", "decode_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.eta is not None and not 0 <= self.eta <= (2 if self.kernel == "flow_sde" else 1):
            raise ValueError(f"eta is {self.eta}; expected 0 <= eta <= 1 (flow_sde: 2)")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}; expected at least 1 step")
        if self.history is not None and self.history < 2:
            raise ValueError(f"history is {self.history}; expected at least 2 rewards (DDPO's code: 16), or null")
        if self.history_min < 2:
            raise ValueError(f"history_min is {self.history_min}; expected at least 2 rewards")
        if self.history is not None and self.history_min > self.history:
            raise ValueError(
                f"history_min is {self.history_min}, history {self.history}; a prompt would never be known"
            )
        if self.window_every is not None and self.window_every < 1:
            raise ValueError(f"window_every is {self.window_every}; expected at least 1 round, or null")
        if self.window_range and (len(self.window_range) != 2 or not 0 <= self.window_range[0] <= self.window_range[1]):
            raise ValueError(
                f"window_range is {list(self.window_range)}; expected first and last start, 0 <= first <= last"
            )
        if isinstance(self.old_decay, float) and not 0 <= self.old_decay < 1:
            raise ValueError(f"old_decay is {self.old_decay}; expected 0 <= old_decay < 1, or the name of a schedule")
        if self.select_temperature <= 0:
            raise ValueError(f"select_temperature is {self.select_temperature}; expected a positive number")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The latent and text cache.

    Attributes:
        enabled: False encodes images and prompts at every step instead (same code, more time and memory).
        dir: where it is written; None means `<output_dir>/cache`.
        dtype: storage type of latents and text embeddings. float16 keeps 3 more bits than bfloat16 at unit scale.
        encode_dtype: computing type of the VAE; None means float32. SDXL's own VAE overflows in float16: name an
            fp16-safe one in `model.vae` for that. Text encoders compute in the type of `training.mixed_precision`.
        shard_size: pairs per shard; what a kill can lose.
        workers: threads that decode and resize images.
        batch_size: images per VAE call.
    """

    enabled: bool = True
    dir: str | None = None
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    encode_dtype: Literal["float16", "bfloat16", "float32"] | None = None
    shard_size: int = 256
    workers: int = 2
    batch_size: int = 8


@dataclass(frozen=True, kw_only=True)
class DenoisingConfig:
    """How images become scores: where the denoising error is measured.

    Attributes:
        timestep_min, timestep_max: inclusive bounds of the timestep draw; null means the last step.
        timestep_sampling: "uniform" over the timesteps; "logit_normal": t = T sigmoid(logit_mean + logit_std n); or, for
            sampled images, "sampler": the levels of their sampler but the last, in random order from pass to pass over a
            round. null: as the objective was published (DiffusionNFT: sampler), else as the family's models were trained
            (UNets uniform, flow models logit-normal).
        logit_mean, logit_std: of "logit_normal"; a larger mean draws noisier timesteps.
        proportion_empty_prompts: share of the samples whose prompt is replaced by the empty one (keeps classifier-free
            guidance trained); drawn once per sample and visit. The empty prompt is encoded, as in the published code;
            SDXL 1.0 itself samples with zeros instead.
        error_reduction: over the latent: "mean" as published, or "sum" (then beta must be smaller by the latent's size).
        noise: whether both images of a pair (and all of a group) get one timestep and noise, "shared", or each its own,
            "independent". null: as the objective was published.
        noising: how the noisy latent of an image is made: "forward" adds noise; "ddim_inversion" runs the policy's DDIM
            sampler backwards without guidance, and the target is the noise that the result implies (DDIM-InPO);
            "renoise_inversion" corrects every step of it (SmPO). null: as the objective was published.
        inversion_steps: levels of the inversion's grid (InPO's code: 10; SmPO's code: 5 for SD1.5, 10 for SDXL; its paper
            9).
        inversion_noise: noise added after every step of the inversion, in units of the DDIM step's deviation (InPO's code:
            0.1, which its comment calls optional). Without any, the implied noise is the network's own and holds little
            that is not known to it.
        inversion_level: "exact" makes the last step land on the timestep; "grid" stops at the last level below it, as the
            released code does, and its noise is that of the sampler's step from the level above (the code: one noise per
            image; here the pair's, or with `noise: independent` each image's).
        error_space: where errors are measured: "native" (what the network predicts, as published), "epsilon",
            "v_prediction", "sample" or "flow_prediction".
    """

    timestep_min: int = 0
    timestep_max: int | None = None
    timestep_sampling: Literal["uniform", "logit_normal", "sampler"] | None = None
    logit_mean: float = 0.0
    logit_std: float = 1.0
    proportion_empty_prompts: float = 0.0
    noise: Literal["shared", "independent"] | None = None
    noising: Literal["forward", "ddim_inversion", "renoise_inversion"] | None = None
    inversion_steps: int = 10
    inversion_noise: float = 0.0
    inversion_level: Literal["exact", "grid"] = "exact"
    error_reduction: Literal["mean", "sum"] = "mean"
    error_space: Literal["native", "epsilon", "v_prediction", "sample", "flow_prediction"] = "native"

    def __post_init__(self) -> None:
        if not 0 <= self.proportion_empty_prompts < 1:
            raise ValueError(f"proportion_empty_prompts is {self.proportion_empty_prompts}; expected 0 <= value < 1")
        if self.timestep_min < 0 or (self.timestep_max is not None and self.timestep_max < self.timestep_min):
            raise ValueError(
                f"timestep_min {self.timestep_min} and timestep_max {self.timestep_max} leave no timestep to draw"
            )
        if self.inversion_noise < 0:
            raise ValueError(f"inversion_noise is {self.inversion_noise}; expected 0 or more")
        if self.inversion_steps < 1:
            raise ValueError(f"inversion_steps is {self.inversion_steps}; expected at least 1")
        if self.logit_std <= 0:
            raise ValueError(f"logit_std is {self.logit_std}; expected a positive number")

    def timestep_range(self, num_timesteps: int) -> tuple[int, int]:
        """First and last timestep that are drawn, inclusive."""
        last = num_timesteps - 1 if self.timestep_max is None else min(self.timestep_max, num_timesteps - 1)
        return self.timestep_min, last


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """What the policy is compared with, by objectives that have a reference.

    Attributes:
        scheme: "frozen": the base model (adapters off). "sync": a copy of the adapter that follows the policy every `every`
            steps by `rate` (1 at every round: the previous iterate; 0.6 every 512 steps: TR-DPO; small at every step: an
            average). "pool": one of the base and all earlier copies, one of which is kept every `every` steps; drawn anew at
            random every time (SePPO). "mixture": the geometric mixture of the base, by `base_share`, and the synced copy
            (INPO, Nash-MD).
            "momentum": the synced copy, extrapolated from the one before by `momentum` (accelerated preference
            optimisation).
        every: optimiser steps between synchronisations.
        rate: share of the policy that goes into the copy, factor by factor as in the moving average of an adapter: below 1
            that is near to, and not quite, the average of the two models.
        base_share: of "mixture", in [0, 1].
        momentum: of "momentum", >= 0; the published value is UNVERIFIED (about 0.3).
        guidance_scale: of the reference's prediction, for objectives on groups of sampled images: their `beta` then pulls
            the policy, which goes without guidance, to what the reference predicts with it (CRD and DGPO: 4.5).
    """

    scheme: Literal["frozen", "sync", "pool", "mixture", "momentum"] = "frozen"
    every: int = 512
    rate: float = 1.0
    base_share: float = 0.5
    momentum: float = 0.3
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.guidance_scale < 1:
            raise ValueError(f"guidance_scale is {self.guidance_scale}; expected at least 1, which is none")
        if self.every < 1:
            raise ValueError(f"every is {self.every}; expected at least 1 optimiser step")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate is {self.rate}; expected 0 < rate <= 1")
        if not 0 <= self.base_share <= 1:
            raise ValueError(f"base_share is {self.base_share}; expected 0 <= base_share <= 1")
        if self.momentum < 0:
            raise ValueError(f"momentum is {self.momentum}; expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class NegativeConfig:
    """Training for the negative branch of classifier-free guidance: what guidance subtracts (images).

    Attributes:
        train: null: an ordinary run. "flip": the adapter learns what people do not like, for the negative branch alone:
            chosen and rejected images change places and rewards their sign, with any objective (Diffusion-NPO). "plain":
            what the objective teaches anyway is for the negative branch (Self-NPO, or fine-tuning on bad images).
            "guided": the adapter acts in the negative branch alone during training, too, and what is trained is the guided
            prediction, for the same rewards as ever (what the released code of Diffusion-NPO does for rewards): objectives
            on a sampler's steps, or that follow a reward's gradient, with `rollout.guidance_scale` above 1.
            "empty_prompts": one adapter for both branches: where the prompt is dropped
            (`denoising.proportion_empty_prompts`), chosen and rejected change places (Diff-SNPO). "joint": two adapters, one
            for chosen images and one for rejected ones, that act in the two branches (CHATS); each has `lora.rank`.
        beta: weight of the adapter in the negative branch when images are sampled.
        proportion_empty_prompts: of "joint": share of the rejected images whose prompt is replaced by the empty one.
        prompt_share: of "joint", when images are sampled: a in the negative branch's prompt, (1 + a) empty - a prompt.
    """

    train: Literal["flip", "plain", "guided", "empty_prompts", "joint"] | None = None
    beta: float = 1.0
    proportion_empty_prompts: float = 0.5
    prompt_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.proportion_empty_prompts <= 1:
            raise ValueError(
                f"proportion_empty_prompts is {self.proportion_empty_prompts}; expected a share from 0 to 1"
            )

    @property
    def alone(self) -> bool:
        """Whether the adapter is for the negative branch alone."""
        return self.train in ("flip", "plain", "guided")


@dataclass(frozen=True, kw_only=True)
class UsersConfig:
    """Training on the tastes of single users, who are described by a few of their pairs (PPD; images).

    Attributes:
        encoder: null: all pairs are one taste. "world_clip" (the tiny world's), "clip:WEIGHTS" or "vlm:WEIGHTS": what turns
            pairs of a user into an embedding, which the network sees while it is trained with any objective on pairs of the
            data.
        through: "attention": attentions to the user beside those to text, which alone are trained (PPD; `lora.rank: 0`).
            "gates": a LoRA, as `lora` says, whose ranks every user turns up and down; it reaches all of the LoRA's layers.
            "time": a LoRA, and a vector that every user adds to the embedded time.
        layers: of "vlm", whose hidden states of the last token are taken; the published ones are UNVERIFIED.
        examples: pairs that describe a user (PPD: 4).
        draws: embeddings of every user, each of other examples.
        min_pairs: users with fewer are left out; more than `examples`, so that a pair is never among its own examples.
        held_out_fraction: share of the users who are kept out of training, by a hash of their id.
        held_out: ids of users who are kept out, too.
        tokens: of "attention", of a user.
        token_size: of one of them.
        dropout: share of the pairs that are trained as nobody's.
    """

    encoder: str | None = None
    through: Literal["attention", "gates", "time"] = "attention"
    layers: tuple[int, ...] = (-8, -1)
    examples: int = 4
    draws: int = 4
    min_pairs: int = 5
    held_out_fraction: float = 0.0
    held_out: tuple[str, ...] = ()
    tokens: int = 8
    token_size: int = 256
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("examples", "draws", "tokens", "token_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.min_pairs <= self.examples:
            raise ValueError(f"min_pairs is {self.min_pairs}; expected more than examples ({self.examples})")
        for name in ("held_out_fraction", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 <= {name} < 1")

    @property
    def expected_width(self) -> int:
        """Of an embedding whose encoder is not loaded yet: CLIP ViT-L/14, a language model of 4,096, the tiny world's."""
        if self.encoder == "world_clip":
            return 256
        return 4096 * len(self.layers) if (self.encoder or "").startswith("vlm:") else 2 * 768


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Training on weighted sums of several rewards: one adapter for all weights, which are chosen when images are sampled,
    or for weights that are chosen here (images; pairs whose rows have `rewards`).

    Attributes:
        rewards: names of the rewards, in the order of the rows' `rewards` columns, at least two; kept with the adapter.
            Empty: pairs are labelled as the data say. Otherwise the chosen image of a pair is the one with the larger
            weighted sum, with weights drawn anew at every visit, which the network sees.
        fixed: weights of all pairs, which the network does not see: one LoRA for one trade.
        through: how weights act. "gates": every reward has its share of the ranks of the LoRA, which are weighed, and what
            mixtures need beyond that is learnt. "time": on the embedded time, beside a LoRA. "attention": by attentions of
            their own (`lora.rank: 0`).
        concentration: of the Dirichlet distribution that weights are drawn from; 1: all are as likely; below 1 corners are.
        scale: what is weighed: "rank": the share of the training images with a lower reward, which no monotone change of a
            reward alters; "deviation": rewards over their standard deviation; "raw": rewards as they are.
        margin: pairs whose weighted sums differ by less, in units of `scale`, are undecided: other weights are drawn; pairs
            that no weights decide are left out and counted.
        dropout: share of the visits without weights, labelled by equal weights: what the LoRA alone then is for.
        hidden: of "gates" and "time", units of the hidden layer between weights and what they do.
    """

    rewards: tuple[str, ...] = ()
    fixed: tuple[float, ...] = ()
    through: Literal["gates", "time", "attention"] = "gates"
    concentration: float = 1.0
    scale: Literal["rank", "deviation", "raw"] = "rank"
    margin: float = 0.05
    dropout: float = 0.1
    hidden: int = 128

    def __post_init__(self) -> None:
        if len(self.rewards) == 1 or len(set(self.rewards)) < len(self.rewards):
            raise ValueError(f"rewards are {', '.join(self.rewards)}; expected at least two different names, or none")
        if self.fixed and (
            len(self.fixed) != len(self.rewards) or min(self.fixed) < 0 or abs(sum(self.fixed) - 1) > 1e-3
        ):
            raise ValueError(
                f"fixed is {list(self.fixed)}; expected a weight >= 0 for each of {len(self.rewards)} rewards, with sum 1"
            )
        if self.concentration < 0.01 or self.margin < 0 or self.hidden < 1:
            raise ValueError(
                f"concentration is {self.concentration}, margin {self.margin} and hidden {self.hidden}; expected at least "
                "0.01, 0 and 1"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; expected 0 <= dropout < 1")

    @property
    def seen(self) -> bool:
        """Whether the network sees the weights."""
        return bool(self.rewards) and not self.fixed


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapter, in peft's terms.

    Attributes:
        rank: LoRA rank r. 0: none on the network, where the text encoders have one (TexForce), users have attentions of
            their own (PPD), or the weights themselves are changed (section `sparse`).
        alpha: scale is alpha / rank (alpha / sqrt(rank) with `use_rslora`). None means alpha = rank.
        targets: "attention" (queries, keys, values and outputs, of a transformer's text side, too), "attention+ff", "all"
            (every linear and convolution of the blocks), or a list of module name endings.
        dropout: on the adapter's input, training only.
        init: "gaussian", "default" (Kaiming; B is zero in both) or another of peft's `init_lora_weights`.
            Initialisations that change the base weights ("pissa", "olora", "corda", "eva", "loftq") are refused.
        use_rslora: rank-stabilised scale.
        use_dora: weight-decomposed LoRA.
        text_encoder_rank: images: rank of an adapter on the CLIP text encoders (families sd, sdxl and sd3; never T5), with
            `dropout`, `init` and `use_rslora` of this section; 0: none, text is encoded once. TexForce: 16.
        text_encoder_alpha: as `alpha`.
        text_encoder_targets: as `targets`; "attention" is q_proj, k_proj, v_proj and out_proj.
        experts: LoRA files in diffusers' naming, or their run folders, to be fused: they are frozen, and what is trained are
            gates that weigh them in every layer and at every time (TLPO's second stage; experimental). Other keys of this
            section then are those of the files.
        gate: weights of the experts in a layer: "softmax" (they sum to 1; at first each has an equal share) or "sigmoid"
            (each between 0 and 1).
        gate_features: cosines of the time that gates are linear in; 0: gates depend on the layer alone.
    """

    rank: int = 16
    alpha: float | None = None
    targets: str | tuple[str, ...] = "attention"
    dropout: float = 0.0
    init: str = "gaussian"
    use_rslora: bool = False
    use_dora: bool = False
    text_encoder_rank: int = 0
    text_encoder_alpha: float | None = None
    text_encoder_targets: str | tuple[str, ...] = "attention"
    experts: tuple[str, ...] = ()
    gate: Literal["softmax", "sigmoid"] = "softmax"
    gate_features: int = 8


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """Entries of the weights that are trained instead of a LoRA (`lora.rank: 0`), as a change beside the frozen base.

    Attributes:
        method: "sara": the entries smaller than a threshold (SaRA, arXiv 2409.06633). "lift": the largest entries of each
            matrix's low-rank part (LIFT, arXiv 2506.00772). "hft": every entry of a seeded half of the matrices (HFT, arXiv
            2404.18466). null: none of them.
        targets: which layers, as `lora.targets`.
        threshold: of "sara": entries with |w| below it are trained (published: 2e-3; try 5e-4 to 2e-3). The published
            learning rate is 1e-3 exp(-350 threshold), 5.0e-4 for 2e-3; it is not set by itself.
        biases_and_norms: of "sara": also the small entries of these layers' biases, and of the norms in the blocks, as
            published.
        nuclear_norm: of "sara": weight of a penalty on the sum of singular values of the trained entries W0 + change, all
            others zero, of one linear layer a step, drawn from those whose both sides are above 64 (published: 5e-4). It
            takes a singular value decomposition a step; 0: none.
        reselect_at: of "sara": after this optimiser step, entries that have grown to the threshold stay as they are
            (published: half of the run); null: all are trained to the end.
        rank: of "lift": k = rank (rows + columns) entries of a matrix are trained, as many as a LoRA of that rank has; a
            matrix with fewer is trained in full. A convolution is a matrix of its outputs and of everything else.
        filter_rank: of "lift": rank of the low-rank part.
    """

    method: Literal["sara", "lift", "hft"] | None = None
    targets: str | tuple[str, ...] = "all"
    threshold: float = 2e-3
    biases_and_norms: bool = False
    nuclear_norm: float = 0.0
    reselect_at: int | None = None
    rank: int = 128
    filter_rank: int = 128


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """What a reward model that is trained looks like (family `clip_reward`).

    Attributes:
        head: "cosine": exp(logit_scale) times the cosine, as PickScore. "aspects": a score for each of several aspects, of
            which every pair says which one it is about (`aspect`). "general": an embedding, for preferences that go round in
            circles (objective general_preference). "experts": a score for each of several criteria, and gates that weigh
            them by the prompt (MJ-VIDEO); a pair with an `aspect` is about that criterion, a pair without one about the
            gated score. null: an earlier reward's own, or the cosine.
        outputs: aspects, criteria, or dimensions of "general" (even; 2 already represents rock, paper, scissors; 6 is the
            published one).
        aspect_weights: of the aspects in the one score; empty: equal.
        criteria: of "experts", how many criteria each aspect has, as in [5, 4, 6]: gates weigh them within the aspect, and
            others the aspects (MJ-VIDEO: 28 criteria of 5 aspects). Empty: one gate over all criteria.
        criteria_weight: of "experts", what a pair about a criterion counts against one about the gated score (MJ-VIDEO's
            last stage has weights of 0.3 and 1; which losses they belong to is UNVERIFIED).
        gate_width: of "experts", hidden units of the gates (MJ-VIDEO: 1024).
        gate_temperature: of "experts", divides the gates' logits; the published value is UNVERIFIED.
        tuning: "lora": an adapter on both towers, which is merged when the reward is written; "full": all weights, as
            PickScore; "head": the head alone. A head is always trained.
        logit_scale: whether it is trained, too, in full tuning. Frozen, scores keep their scale when an earlier reward is
            tuned on.
    """

    head: Literal["cosine", "aspects", "general", "experts"] | None = None
    outputs: int = 1
    aspect_weights: tuple[float, ...] = ()
    criteria: tuple[int, ...] = ()
    criteria_weight: float = 0.3
    gate_width: int = 1024
    gate_temperature: float = 1.0
    tuning: Literal["lora", "full", "head"] = "lora"
    logit_scale: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The loop. Batch sizes count pairs (or items, for unpaired data), per device.

    Attributes:
        learning_rate: the value in use; nothing is multiplied into it.
        text_encoder_learning_rate: of the adapter on the text encoders, where the network has one, too; null: the same. The
            schedule's shape is that of `learning_rate`.
        train_batch_size: pairs per device and micro-batch. "auto" picks what fits the device's memory; then
            `gradient_accumulation_steps` is read as the number of pairs per device and step, and divided by it.
        gradient_accumulation_steps: micro-batches per optimiser step.
        max_train_steps: optimiser steps.
        lr_scheduler: a name of `diffusers.optimization.get_scheduler`.
        lr_warmup_steps: optimiser steps of linear warm-up.
        optimizer: "adamw", "adamw_fused", "adamw8bit" (bitsandbytes) or "adafactor".
        adam_beta1, adam_beta2, adam_weight_decay, adam_epsilon: AdamW's settings.
        max_grad_norm: global norm for clipping; 0 turns it off.
        mixed_precision: "no" (float32), "bf16" or "fp16". LoRA weights and losses stay float32.
        gradient_checkpointing: True, False, or "auto" (with `train_batch_size: auto`, from the device's memory).
        ema_decay: exponential moving average of the adapter; None turns it off. The average is what is saved and
            sampled.
        attention: "default" (PyTorch's own, which picks flash where it can) or "xformers".
        compile: torch.compile the repeated blocks.
        channels_last: memory format of the network.
        dataloader_workers: processes that read the cache ahead.
        checkpointing_steps: optimiser steps between checkpoints; 0 only writes the last.
        checkpoints_total_limit: how many are kept; the oldest go first.
        resume_from_checkpoint: "latest" (or nothing there: start), a checkpoint folder, or None (refuse a used folder).
        logging_steps: optimiser steps between rows of `metrics.jsonl`.
        sample_steps: optimiser steps between sample grids; 0 samples only before and after.
        cpu: train on the CPU even where an accelerator is present.
        threads: CPU threads of torch; 0 leaves its default.
        report_to: accelerate trackers ("tensorboard", "wandb", ...), in addition to `metrics.jsonl`.
    """

    learning_rate: float = 1e-5
    text_encoder_learning_rate: float | None = None
    train_batch_size: int | Literal["auto"] = 1
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 1000
    lr_scheduler: str = "constant_with_warmup"
    lr_warmup_steps: int = 0
    optimizer: Literal["adamw", "adamw_fused", "adamw8bit", "adafactor"] = "adamw"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.01
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool | Literal["auto"] = False
    ema_decay: float | None = None
    attention: str = "default"
    compile: bool = False
    channels_last: bool = False
    dataloader_workers: int = 0
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = 3
    resume_from_checkpoint: str | None = None
    logging_steps: int = 1
    sample_steps: int = 0
    cpu: bool = False
    threads: int = 0
    report_to: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How images are sampled for grids, evaluation and `generate`.

    Attributes:
        num_inference_steps: sampler steps.
        guidance_scale: classifier-free guidance; 1 turns it off.
        guidance_rescale: as in diffusers (0 off); about 0.7 suits zero-terminal-SNR models at high guidance.
        scheduler: a diffusers scheduler class name, or None for the model's own.
        negative_prompt: text of the unconditional branch.
        batch_size: images per call.
        resolution: pixels; None means the training resolution.
        num_frames: frames of a clip; None means as many as in training.
    """

    num_inference_steps: int = 30
    guidance_scale: float = 5.0
    guidance_rescale: float = 0.0
    scheduler: str | None = None
    negative_prompt: str = ""
    batch_size: int = 4
    resolution: int | None = None
    num_frames: int | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Base against adapter on the same prompts and seeds, at the end of training and by `diffalign evaluate`.

    Attributes:
        at_end: evaluate when training ends, and write `result.json`.
        prompts: a text file (one prompt per line), a shipped list ("world_heldout", ...), or a list of prompts.
        num_prompts: how many of them.
        images_per_prompt: repeats; a prompt's repeats are averaged before the interval is computed.
        rewards: reward models of `reward_models/`; the first is `metric` of `result.json`.
        seed: of the evaluation noise, independent of the training seed.
        held_out_fraction: share of the pairs kept out of training for the implicit accuracy.
        grid_prompts: how many prompts the before/after grid shows.
        every: optimiser steps between looks at the rewards during training, on `watch_prompts` of the prompts; 0: none. Of
            reward models: at the accuracy on held-out pairs.
        watch_prompts: how many of them, one image each.
        keep_best: one of `rewards`: adapter files and the evaluation at the end are those of the step at which its mean was
            highest, which must not be a reward that is trained on to guard against hacking. null: of the last step.
        patience: training ends after so many looks in a row that were not the best so far; 0: never before its last step.
    """

    at_end: bool = False
    prompts: str | tuple[str, ...] = ()
    num_prompts: int = 64
    images_per_prompt: int = 1
    rewards: tuple[str, ...] = ()
    seed: int = 1234
    held_out_fraction: float = 0.0
    grid_prompts: int = 8
    every: int = 0
    watch_prompts: int = 32
    keep_best: str | None = None
    patience: int = 0

    def __post_init__(self) -> None:
        if self.every < 0 or self.patience < 0:
            raise ValueError(f"every is {self.every} and patience {self.patience}; expected 0 or more")
        if (self.keep_best is not None) and not self.every:
            raise ValueError("keep_best is set, and every is 0, so nothing is looked at during training; set every")
        if self.patience and self.keep_best is None:
            raise ValueError(f"patience is {self.patience}; expected keep_best to say which reward must get better")
        if self.keep_best is not None and self.keep_best not in self.rewards:
            raise ValueError(f"keep_best is {self.keep_best!r}; expected one of rewards: {', '.join(self.rewards)}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything one run needs.

    Attributes:
        output_dir: where the run writes.
        seed: order, timesteps and noise of every sample are functions of (seed, sample id).
        objective: an instance of an objective of the preference core (`diffalign.losses`), chosen by `objective.name`.
    """

    output_dir: str
    seed: int = 0
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    denoising: DenoisingConfig = field(default_factory=DenoisingConfig)
    objective: Any
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    negative: NegativeConfig = field(default_factory=NegativeConfig)
    users: UsersConfig = field(default_factory=UsersConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def cache_dir(self) -> Path:
        return Path(self.cache.dir) if self.cache.dir else Path(self.output_dir) / "cache"
