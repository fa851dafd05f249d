"""Train the tiny SDXL base from nothing and write it as a diffusers folder.

    python scripts/build_tiny_sdxl.py --minutes 75 --out diffalign/world/models/tiny-sdxl

v-prediction with zero terminal SNR (eps fails on black and white backgrounds), uniform timesteps, 10 % caption dropout,
AdamW (0.9, 0.98), constant learning rate with a linear decay over the last 40 % of the time, EMA of the weights. Only
captions on the training side of the world's split are seen. `--resume` continues from the state file beside the output.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import time
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from diffusers.utils import logging as diffusers_logging

from diffalign.world.bases import build_untrained
from diffalign.world.scenes import CANVAS, draw, sample_captions, sample_scenes
from diffalign.world.verifier import verify

log = logging.getLogger("build_tiny_sdxl")


def tokenise(pipe, captions: list[str]) -> torch.Tensor:
    return pipe.tokenizer(
        captions, padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def encode(pipe, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Penultimate hidden states of both encoders, concatenated, and the pooled output of the second: as SDXL does."""
    first = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
    second = pipe.text_encoder_2(ids, output_hidden_states=True)
    return torch.cat([first, second.hidden_states[-2]], -1), second.text_embeds


@torch.no_grad()
def evaluate(pipe, n: int, guidance: float, steps: int, held_out: bool) -> dict[str, float]:
    captions = sample_captions(n, seed=7, held_out=held_out)
    noise = torch.randn(n, pipe.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(7))
    batches = [
        pipe(
            captions[i : i + 64],
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=CANVAS,
            width=CANVAS,
            latents=noise[i : i + 64],
            output_type="pt",
        ).images.float()
        for i in range(0, n, 64)
    ]
    results = verify(torch.cat(batches), captions)
    keys = ("strict", "score", "background", "count", "colour", "shape", "bound", "size", "relation")
    return {k: sum(r[k] for r in results if k in r) / max(1, sum(k in r for r in results)) for k in keys}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=75, help="wall time of the training")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--channels", type=int, nargs=2, default=(40, 80))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--scenes", type=int, default=150_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's default")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet (pays on runs over 10 minutes)")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    diffusers_logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)

    torch.manual_seed(args.seed)
    pipe = build_untrained(tuple(args.channels))
    pipe.set_progress_bar_config(disable=True)
    modules = torch.nn.ModuleList([pipe.unet, pipe.text_encoder, pipe.text_encoder_2])
    params = [p for p in modules.parameters() if p.requires_grad]
    # 1 - decay is the inverse of the averaging window in steps.
    ema = EMAModel(params, decay=0.9985)
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    state_path = args.out.with_name(args.out.name + ".state.pt")
    done_seconds, step = 0.0, 0
    curve: list[dict[str, float]] = []
    if args.resume:
        state = torch.load(state_path, weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        done_seconds, step, curve = state["seconds"], state["step"], state["curve"]

    log.info("drawing %d scenes", args.scenes)
    scenes = sample_scenes(args.scenes, seed=args.seed)
    ids = tokenise(pipe, [s.caption for s in scenes])
    empty = tokenise(pipe, [""])[0]
    with torch.no_grad():
        latents = torch.cat(
            [
                pipe.vae.encode(draw(scenes[i : i + 1000]) * 2 - 1).latent_dist.mode().to(torch.bfloat16)
                for i in range(0, len(scenes), 1000)
            ]
        )
    alphas = pipe.scheduler.alphas_cumprod
    time_ids = torch.tensor([[CANVAS, CANVAS, 0, 0, CANVAS, CANVAS]], dtype=torch.float32)
    unet = torch.compile(pipe.unet) if args.compile else pipe.unet
    log.info("%d UNet parameters, %s latents", sum(p.numel() for p in pipe.unet.parameters()), tuple(latents.shape))

    generator = torch.Generator().manual_seed(args.seed + step)
    total, start, last_look = args.minutes * 60, time.perf_counter(), done_seconds
    running = 0.0
    while True:
        seconds = done_seconds + time.perf_counter() - start
        if seconds >= total:
            break
        fraction = seconds / total
        decay = min(1.0, (1 - fraction) / 0.4)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 200) * max(decay, 0.01)
        pick = torch.randint(len(scenes), (args.batch,), generator=generator)
        x0 = latents[pick].float()
        tokens = ids[pick].clone()
        tokens[torch.rand(args.batch, generator=generator) < 0.1] = empty
        # Stratified timesteps: one per slice of the schedule, so that the loss is less noisy.
        u = (torch.arange(args.batch) + torch.rand(args.batch, generator=generator)) / args.batch
        t = (u * 1000).long().clamp(max=999)
        noise = torch.randn(x0.shape, generator=generator)
        alpha, sigma = alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
        hidden, pooled = encode(pipe, tokens)
        added = {"text_embeds": pooled, "time_ids": time_ids.expand(args.batch, -1)}
        out = unet(alpha * x0 + sigma * noise, t, hidden, added_cond_kwargs=added, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(out, alpha * noise - sigma * x0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in params if p.grad is not None], 1.0)
        optimizer.step()
        ema.step(params)
        step += 1
        running = loss.item() if running == 0.0 else 0.99 * running + 0.01 * loss.item()
        if not math.isfinite(running):
            raise FloatingPointError(f"loss is not finite at step {step}")
        if seconds - last_look > 240 or step == 50:
            last_look = seconds
            ema.store(params)
            ema.copy_to(params)
            row = evaluate(pipe, 96, guidance=2.0, steps=12, held_out=False)
            save(pipe, args, curve)
            ema.restore(params)
            curve.append({"seconds": round(seconds), "step": step, "loss": running} | row)
            log.info("%s", "  ".join(f"{k} {v:.3f}" if v < 10 else f"{k} {v:.0f}" for k, v in curve[-1].items()))
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
            torch.save(state | {"seconds": seconds, "step": step, "curve": curve}, state_path)

    ema.copy_to(params)
    for guidance in (1.0, 2.0, 3.0):
        for held_out in (False, True):
            row = evaluate(pipe, 256, guidance=guidance, steps=16, held_out=held_out)
            curve.append({"seconds": round(total), "step": step, "guidance": guidance, "held_out": held_out} | row)
            log.info("%s", curve[-1])
    save(pipe, args, curve)


def save(pipe, args: argparse.Namespace, curve: list[dict[str, float]]) -> None:
    """Write the folder in float16 (a few MB) with the training record beside the weights."""
    small = copy.deepcopy(pipe).to(dtype=torch.float16)
    small.vae.to(torch.float32)
    small.save_pretrained(args.out)
    settings = {k: (str(v) if isinstance(v, Path) else v) for k, v in vars(args).items() if k not in ("out", "threads")}
    record = {"settings": settings, "torch": torch.__version__, "curve": curve}
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
