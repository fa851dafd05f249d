"""Time and memory of one Diffusion-DPO step: ours against the plain public way, alternating in one run.

    python scripts/benchmark_step.py                                        # tiny SDXL, CPU
    python scripts/benchmark_step.py --family sdxl --random-weights --device cuda --resolution 1024

The plain way is what the public research scripts do: decode-ready pixels through the VAE and prompts through the text
encoders at every step, a frozen second copy of the UNet as the reference, and separate forwards for winner and loser. Ours
reads the cache, runs winner and loser in one forward, and takes the reference from the same network with adapters off. Both
train the same LoRA with the same optimiser on the same pairs, in the same precision and without gradient checkpointing
(unless asked for), and both see the same timesteps and noise, so that their losses can be compared: they are printed.

The tiny base's own codec costs next to nothing, while SDXL's autoencoder costs 0.72 of a UNet forward per image. With
`--plain-vae kl` the plain way also runs an AutoencoderKL of the pilot's size (16-32-32 channels) over the pixels, for its
cost alone. Both settings are worth reporting, each under its name.

Times are medians over alternating rounds; the ratio is of those medians. Memory is the peak of separate processes: resident
set on the CPU, allocated device memory on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from diffalign import adapters
from diffalign.config import DenoisingConfig, LoraConfig, ModelConfig
from diffalign.config_loading import build
from diffalign.data.batch import collate
from diffalign.data.loader import BatchPlan, PairMicroBatches
from diffalign.families import DECODER, ENCODERS, NETWORK, DenoisingFamily, load_family
from diffalign.losses import DPO
from diffalign.policy import Policy
from diffalign.prediction import add_noise, target
from diffalign.world.bases import build_untrained

PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "4090": 165, "L40S": 362}  # dense bf16 data-sheet values
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(args: argparse.Namespace) -> DenoisingFamily:
    if args.width > 1:
        with tempfile.TemporaryDirectory() as folder:
            build_untrained((40 * args.width, 80 * args.width)).save_pretrained(folder)
            family = load_family(ModelConfig(family="sdxl", pretrained=folder), device=args.device)
            family.load(NETWORK, ENCODERS, DECODER)
        return family
    config = ModelConfig(family="sdxl", pretrained=args.model, random_weights=args.random_weights)
    family = load_family(config, device=args.device, dtype=DTYPES[args.dtype], vae_dtype=torch.float32)
    family.load(NETWORK, ENCODERS, DECODER)
    return family


class Pairs:
    """Random pictures and prompts as the plain way wants them (pixels, texts) and as ours does (latents, embeddings)."""

    def __init__(self, family: DenoisingFamily, n: int, resolution: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.pixels = torch.rand(n, 2, 3, resolution, resolution, generator=g) * 2 - 1
        self.prompts = [f"a picture of thing number {i}" for i in range(n)]
        self.size = (resolution, resolution)
        self.latents = torch.stack([family.encode_images(pair).cpu() for pair in self.pixels])
        text = family.encode_prompts(self.prompts)
        self.texts = [{k: v[i].cpu() for k, v in text.items()} for i in range(n)]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def target_sizes(self) -> list[tuple[int, int]]:
        return [self.size] * len(self)

    def text(self, prompt: str) -> dict[str, torch.Tensor]:
        return self.texts[self.prompts.index(prompt)] if prompt else self.texts[0]

    def pair(self, index: int):
        from diffalign.data.encode import EncodedPair

        return EncodedPair(
            id=f"pair{index}",
            prompt=self.prompts[index],
            latents=(self.latents[index, 0], self.latents[index, 1]),
            p=1.0,
            weight=1.0,
            user=None,
            original_sizes=(self.size, self.size),
            crops=((0, 0), (0, 0)),
            target_size=self.size,
        )


def ours(args: argparse.Namespace, family: DenoisingFamily, pairs: Pairs) -> Callable[[int], float]:
    """Our step: cache read, one concatenated forward, adapters-off reference."""
    network = family.network
    params = adapters.attach(network, LoraConfig(rank=args.rank, targets=args.targets), seed=0)
    if args.checkpointing:
        network.enable_gradient_checkpointing()
    objective = DPO(beta=args.beta)
    plan = BatchPlan(range(len(pairs)), pairs.target_sizes, args.batch, seed=0)
    dataset = PairMicroBatches(pairs, plan, DenoisingConfig(), family, seed=0)
    autocast = (lambda: torch.autocast(args.device, DTYPES[args.dtype])) if args.dtype != "float32" else None
    policy = Policy(family, network, network, autocast) if autocast else Policy(family, network)
    optimizer = torch.optim.AdamW(params, lr=args.lr)

    def step(k: int) -> float:
        batch = dataset[k].to(family.device)
        loss = objective(*policy.scores(batch, objective)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        return loss.item()

    return step


def plain(args: argparse.Namespace, family: DenoisingFamily, pairs: Pairs) -> Callable[[int], float]:
    """The plain way: encoders at every step, a frozen copy, four forwards."""
    reference = copy.deepcopy(family.network).requires_grad_(False).eval()
    network = family.network
    params = adapters.attach(network, LoraConfig(rank=args.rank, targets=args.targets), seed=0)
    if args.checkpointing:
        network.enable_gradient_checkpointing()
    plan = BatchPlan(range(len(pairs)), pairs.target_sizes, args.batch, seed=0)
    dataset = PairMicroBatches(pairs, plan, DenoisingConfig(), family, seed=0)
    optimizer = torch.optim.AdamW(params, lr=args.lr)
    schedule, dtype = family.schedule, DTYPES[args.dtype]
    costly = None
    if args.plain_vae == "kl":
        costly = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 32),
            norm_num_groups=8,
        )
        costly = costly.to(args.device).requires_grad_(False).eval()

    def step(k: int) -> float:
        picked = plan.micro_batch(k)
        # The same timesteps and noise as ours; reading the cached latents along with them is not what costs here.
        drawn = collate([dataset.example(index, visit) for index, visit in picked]).to(family.device)
        text = family.encode_prompts([pairs.prompts[index] for index, _ in picked])
        alpha, sigma = schedule.alpha_sigma(drawn.t)
        errors = []
        with torch.autocast(args.device, dtype, enabled=dtype != torch.float32):
            for side in (0, 1):
                pixels = torch.stack([pairs.pixels[index, side] for index, _ in picked])
                x0 = family.encode_images(pixels)
                if costly is not None:
                    with torch.no_grad():
                        costly.encode(pixels.to(args.device))
                x_t = add_noise(x0, drawn.noise, alpha, sigma).to(dtype)
                wanted = target(schedule.prediction_type, x0, drawn.noise, alpha, sigma)
                conditioning = text | (drawn.chosen_image if side == 0 else drawn.rejected_image)
                output = family.predict(network, x_t, drawn.t, conditioning)
                with torch.no_grad():
                    frozen = family.predict(reference, x_t, drawn.t, conditioning)
                ours_error = (output.float() - wanted).square().mean((1, 2, 3))
                errors.append(ours_error - (frozen.float() - wanted).square().mean((1, 2, 3)))
        loss = -torch.nn.functional.logsigmoid(-0.5 * args.beta * (errors[0] - errors[1])).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        return loss.item()

    return step


WAYS = {"plain": plain, "ours": ours}


def prepare(args: argparse.Namespace, way: str) -> Callable[[int], float]:
    torch.manual_seed(0)
    family = load(args)
    pairs = Pairs(family, args.pairs, args.resolution)
    step = WAYS[way](args, family, pairs)
    if way == "ours":
        family.unload(ENCODERS)
    return step


def synchronise(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def measure_memory(args: argparse.Namespace) -> None:
    """Child process: a few steps of one way, then its peak memory as JSON."""
    step = prepare(args, args.memory_of)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        gc.collect()
        reset_peak()
    started = time.perf_counter()
    for k in range(3):
        step(k)
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resident_peak()
    print(json.dumps({"peak_bytes": peak, "seconds": time.perf_counter() - started}))


def reset_peak() -> None:
    """Forget the peak of loading, where the system can (Linux)."""
    marker = Path("/proc/self/clear_refs")
    if marker.exists():
        marker.write_text("5")


def resident_peak() -> int:
    """Peak resident set in bytes, since `reset_peak` on Linux and since the start elsewhere."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_of(way: str) -> int:
    """Peak memory of a way in a process of its own."""
    words = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--memory-of", way]
    out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return int(json.loads(out.strip().splitlines()[-1])["peak_bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-sdxl", help="tiny-sdxl, a folder, a hub id, or an architecture")
    parser.add_argument("--family", choices=["sdxl"], default="sdxl")
    parser.add_argument("--random-weights", action="store_true", help="the published SDXL architecture, no download")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: float32 on the CPU, bfloat16 on a GPU")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--batch", type=int, help="pairs per step")
    parser.add_argument("--pairs", type=int, help="distinct pairs")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default="attention")
    parser.add_argument("--beta", type=float, default=500.0)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--width", type=int, default=1, help="tiny SDXL with random weights, so many times as wide")
    parser.add_argument("--plain-vae", choices=["own", "kl"], default="own", help="autoencoder of the plain way")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="steps per way and round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--memory-only", action="store_true", help="where two models do not fit into memory together")
    parser.add_argument("--memory-of", choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.random_weights and args.model == "tiny-sdxl":
        args.model = "sdxl"
    tiny = args.model == "tiny-sdxl"
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    args.resolution = args.resolution or (32 if tiny else 1024)
    args.batch = args.batch or (16 if tiny else 2)
    args.pairs = args.pairs or 4 * args.batch
    torch.set_num_threads(args.threads)
    if args.memory_of:
        measure_memory(args)
        return

    report: dict[str, object] = {"settings": {k: v for k, v in vars(args).items() if k != "memory_of"}}
    if not args.skip_memory:
        peaks = {way: peak_of(way) for way in WAYS}
        report["peak_gb"] = {way: round(peak / 1e9, 3) for way, peak in peaks.items()}
        report["peak_saved_gb"] = round((peaks["plain"] - peaks["ours"]) / 1e9, 3)
        network = load(args).network
        report["reference_copy_gb"] = round(sum(p.numel() * p.element_size() for p in network.parameters()) / 1e9, 3)
    if args.memory_only:
        print(json.dumps(report, indent=1))
        return
    steps = {way: prepare(args, way) for way in WAYS}
    losses: dict[str, list[float]] = {way: [] for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    k = dict.fromkeys(WAYS, 0)
    for round_number in range(args.rounds + 1):  # the first one warms up
        for way, step in steps.items():
            synchronise(args)
            started = time.perf_counter()
            for _ in range(args.steps):
                losses[way].append(step(k[way]))
                k[way] += 1
            synchronise(args)
            if round_number:
                seconds[way].append((time.perf_counter() - started) / args.steps / args.batch)
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    report["seconds_per_pair"] = {way: round(value, 5) for way, value in medians.items()}
    report["seconds_per_pair_range"] = {way: [round(min(v), 5), round(max(v), 5)] for way, v in seconds.items()}
    report["ratio_ours_to_plain"] = round(medians["ours"] / medians["plain"], 3)
    gap = max(abs(a - b) for a, b in zip(losses["plain"], losses["ours"], strict=True))
    report["largest_loss_difference"] = gap
    report["pairs_per_second"] = {way: round(1 / value, 3) for way, value in medians.items()}
    if args.device == "cuda":
        report |= device_share(args, medians["ours"])
    print(json.dumps(report, indent=1))


def device_share(args: argparse.Namespace, seconds_per_pair: float) -> dict[str, object]:
    """FLOP rate of our step and its share of the card's data-sheet peak."""
    from diffalign.plan import make_plan

    with tempfile.TemporaryDirectory() as folder:
        tree = {
            "output_dir": folder,
            "model": {"family": "sdxl", "pretrained": args.model, "random_weights": args.random_weights},
            "data": {"sources": [folder], "resolution": args.resolution},
            "objective": {"name": "dpo", "beta_dpo": args.beta},
            "lora": {"rank": args.rank, "targets": args.targets},
            "training": {"train_batch_size": args.batch, "gradient_checkpointing": args.checkpointing},
        }
        flops = make_plan(build(tree)).flops_per_pair
    name = torch.cuda.get_device_name()
    rate = flops / seconds_per_pair / 1e12
    peak = next((value for key, value in PEAK_TFLOPS.items() if key in name), None)
    share = {"share_of_peak": round(rate / peak, 3)} if peak else {}
    return {
        "device": name,
        "tflops": round(rate, 1),
        "torch": torch.__version__,
        "path": str(Path(__file__).name),
    } | share


if __name__ == "__main__":
    main()
