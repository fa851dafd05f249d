"""Train the tiny SD3 base from nothing and write it as a diffusers folder.

    python scripts/build_tiny_sd3.py --minutes 90 --compile --out diffalign/world/models/tiny-sd3

Flow matching on the codec and the frozen text encoders of `tiny-sdxl`, whose embeddings of all captions are computed once.
Half of the times are uniform, half logit-normal (0, 1); 10 % caption dropout. Muon on the matrices of the blocks, AdamW on
the rest, constant rate with a linear decay over the last 40 % of the time, EMA of the weights. Only captions on the training
side of the world's split are seen. `--resume` continues from the state file beside the output.
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

from diffalign.world.bases import build_untrained_sd3
from diffalign.world.scenes import CANVAS, all_specs, draw, sample_captions, sample_scenes
from diffalign.world.verifier import verify

log = logging.getLogger("build_tiny_sd3")
KEYS = ("strict", "score", "background", "count", "colour", "shape", "bound", "size", "relation")


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum in float32: torch's own computes in bfloat16, which CPUs without it emulate."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(buffer, group["momentum"])
                wide = x.shape[0] <= x.shape[1]
                x = x if wide else x.T
                x = x / (x.norm() + 1e-7)
                for _ in range(5):  # Newton-Schulz towards the nearest orthogonal matrix; K. Jordan's coefficients
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                x = x if wide else x.T
                p.add_(x, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


@torch.no_grad()
def encode_all(pipe, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [
        pipe.encode_prompt(c, None, None, do_classifier_free_guidance=False, max_sequence_length=0)
        for c in (captions[i : i + 256] for i in range(0, len(captions), 256))
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[2] for p in parts])


@torch.no_grad()
def evaluate(pipe, n: int, guidance: float, steps: int, held_out: bool) -> dict[str, float]:
    captions = sample_captions(n, seed=7, held_out=held_out)
    noise = torch.randn(n, pipe.transformer.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(7))
    batches = [
        pipe(
            captions[i : i + 64],
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=CANVAS,
            width=CANVAS,
            latents=noise[i : i + 64],
            output_type="pt",
            max_sequence_length=0,
        ).images.float()
        for i in range(0, n, 64)
    ]
    results = verify(torch.cat(batches), captions)
    return {k: sum(r[k] for r in results if k in r) / max(1, sum(k in r for r in results)) for k in KEYS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=90, help="wall time of the training")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3, help="of AdamW")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--scenes", type=int, default=150_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's default")
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer (1.2x here)")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    diffusers_logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)

    torch.manual_seed(args.seed)
    pipe = build_untrained_sd3(args.width, args.layers)
    pipe.set_progress_bar_config(disable=True)
    model = pipe.transformer
    params = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for n, p in model.named_parameters() if n.startswith("transformer_blocks") and p.ndim == 2]
    others = [p for p in params if not any(p is h for h in hidden)]
    ema = EMAModel(params, decay=0.9985)
    optimizers = {
        "muon": Muon(hidden, args.muon_lr),
        "adamw": torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01),
    }
    rates = {"muon": args.muon_lr, "adamw": args.lr}
    state_path = args.out.with_name(args.out.name + ".state.pt")
    done_seconds, step = 0.0, 0
    curve: list[dict[str, float]] = []
    if args.resume:
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state[name])
        ema.load_state_dict(state["ema"])
        done_seconds, step, curve = state["seconds"], state["step"], state["curve"]

    captions = ["", *(spec.caption() for spec in all_specs())]
    number = {caption: i for i, caption in enumerate(captions)}
    text, pooled = encode_all(pipe, captions)
    log.info("drawing %d scenes", args.scenes)
    scenes = sample_scenes(args.scenes, seed=args.seed)
    ids = torch.tensor([number[s.caption] for s in scenes])
    with torch.no_grad():
        latents = torch.cat(
            [
                pipe.vae.encode(draw(scenes[i : i + 1000]) * 2 - 1).latent_dist.mode().to(torch.bfloat16)
                for i in range(0, len(scenes), 1000)
            ]
        )
    network = torch.compile(model) if args.compile else model
    log.info("%d parameters, text %s, latents %s", sum(p.numel() for p in params), tuple(text.shape), latents.shape)

    generator = torch.Generator().manual_seed(args.seed + step)
    total, start, last_look = args.minutes * 60, time.perf_counter(), done_seconds
    running = 0.0
    while True:
        seconds = done_seconds + time.perf_counter() - start
        if seconds >= total:
            break
        decay = min(1.0, (1 - seconds / total) / 0.4)
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[name] * min(1.0, (step + 1) / 200) * max(decay, 0.01)
        pick = torch.randint(len(scenes), (args.batch,), generator=generator)
        x0 = latents[pick].float()
        caption = ids[pick].clone()
        caption[torch.rand(args.batch, generator=generator) < 0.1] = number[""]
        # Stratified times: one per slice, so that the loss is less noisy; every second one is pushed to the middle.
        u = (torch.arange(args.batch) + torch.rand(args.batch, generator=generator)) / args.batch
        u[::2] = torch.sigmoid(torch.special.ndtri(u[::2].clamp(1e-4, 1 - 1e-4)))
        noise = torch.randn(x0.shape, generator=generator)
        t = u.view(-1, 1, 1, 1)
        out = network(
            hidden_states=(1 - t) * x0 + t * noise,
            encoder_hidden_states=text[caption],
            pooled_projections=pooled[caption],
            timestep=u * 1000,
            return_dict=False,
        )[0]
        loss = torch.nn.functional.mse_loss(out, noise - x0)
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in others if p.grad is not None], 1.0)
        for optimizer in optimizers.values():
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
            state = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
            state |= {"model": model.state_dict(), "ema": ema.state_dict()}
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
