"""Speed of guidance whose negative branch has an adapter of its own, against plain guidance, alternating in one run.

    python scripts/benchmark_guidance.py                                             # tiny SDXL, CPU
    python scripts/benchmark_guidance.py --model sd15 --random-weights --side 256    # SD1.5's network with random weights
    python scripts/benchmark_guidance.py --model sdxl --random-weights --device cuda --dtype bfloat16 --side 1024

Four ways through the stock pipeline, without decoding:

    plain    classifier-free guidance with the adapter off
    both     the adapter in both branches, as an ordinary LoRA: what a LoRA costs anyway
    one      the adapter in the negative branch, both branches in one batch (`NegativeGuidance`)
    two      the same with a call for every branch, each with its own adapters

Times are medians over alternating rounds; throughput is relative to the plain way. The first round is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from diffalign import adapters
from diffalign.config import LoraConfig, ModelConfig, SamplingConfig
from diffalign.families import DECODER, ENCODERS, NETWORK, Around, load_family
from diffalign.sampling import sampling_mode
from diffalign.sampling.guidance import NegativeGuidance

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAME = "negative"


def ways(args: argparse.Namespace) -> dict[str, Callable[[], torch.Tensor]]:
    """The four ways to sample a batch."""
    config = ModelConfig(family=args.family, pretrained=args.model, random_weights=args.random_weights)
    family = load_family(config, device=args.device, dtype=DTYPES[args.dtype])
    family.load(ENCODERS)
    text = family.encode_prompts([f"a picture of thing number {i}" for i in range(args.batch)])
    empty = family.encode_negative("")
    family.unload(ENCODERS)
    family.load(NETWORK, DECODER)
    adapters.attach(family.network, LoraConfig(rank=args.rank, targets=args.targets), NAME)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in family.network.named_parameters():
            if "lora_B" in name:
                value.copy_(0.01 * torch.randn(value.shape, generator=draw))
    noise = torch.randn(args.batch, *family.latent_shape(args.side, args.side), generator=draw)
    sampling = SamplingConfig(num_inference_steps=args.steps, guidance_scale=args.guidance_scale)

    def way(on: bool, around: Around = nullcontext) -> Callable[[], torch.Tensor]:
        def sample() -> torch.Tensor:
            with torch.no_grad(), sampling_mode(family.network, adapters=on):
                return family.sample_latents(text, empty, noise, sampling, around=around)

        return sample

    def guidance(calls: str) -> Around:
        return lambda pipeline: NegativeGuidance(pipeline, NAME, calls=calls)

    return {
        "plain": way(False),
        "both": way(True),
        "one": way(False, guidance("one")),
        "two": way(False, guidance("two")),
    }


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every round by way."""
    made, seconds = ways(args), {name: [] for name in ("plain", "both", "one", "two")}
    for number in range(args.rounds + 1):
        for name, sample in made.items():
            if args.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            sample()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default=None, help="default: that of the model's name")
    parser.add_argument("--model", default="tiny-sdxl", help="folder, hub id, tiny base, or architecture")
    parser.add_argument("--random-weights", action="store_true", help="--model is an architecture")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--side", type=int, default=32, help="pixels")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="attention")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    args.family = args.family or ("sd" if args.model.startswith("sd1") else "sdxl" if "xl" in args.model else "sd3")
    if args.threads:
        torch.set_num_threads(args.threads)
    seconds = measure(args)
    plain = statistics.median(seconds["plain"])
    print(f"{args.model}, {args.dtype} on {args.device}, {args.side} px, {args.batch} image(s), {args.steps} steps")
    print(f"rank {args.rank} on {args.targets}, {args.rounds} rounds")
    print("| way | seconds a batch | throughput of plain |\n| --- | --- | --- |")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.3f} ({min(values):.3f} to {max(values):.3f}) | {plain / median:.2f} |")


if __name__ == "__main__":
    main()
