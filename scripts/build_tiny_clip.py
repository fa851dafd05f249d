"""Train the tiny CLIP from nothing and write it as a transformers folder.

    python scripts/build_tiny_clip.py --minutes 13 --out diffalign/world/models/tiny-clip

Every step takes pictures with their captions and, for each, an edited caption and a taste before either. Two losses: InfoNCE
over the captions of the batch for pictures that keep all promises, and the squared distance of every cosine from what the
exact verifier (or an annotator of that taste) says of the picture. Pictures are drawn scenes, samples of tiny-sdxl, its
one-step predictions from any noise level, and blends of those in the codec's latents, so that what is judged covers the way
from bad to good; all get mild noise and blur. A quarter of each batch comes from pictures that are *hacked*: again and again
moved a step along the gradient of their own cosine, within what the codec can draw, and judged anew by the verifier. So the
model is shown what a generator does that is optimised against it.

A third loss helps the image tower along, which would need ten times as long without it: every patch tells the colour, shape
and style of the thing that it is a part of, and the embedding what is in the picture, as the verifier reads it. Their heads
are thrown away.

Only captions on the training side of the world's split are seen; figures are of held-out captions.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from diffalign.config import WorldPairsConfig
from diffalign.rewards import CLIP_MEAN, CLIP_STD, cosine, normalise
from diffalign.world import clip
from diffalign.world.clip import TASTE_WEIGHT, build_untrained, styled
from diffalign.world.pairs import load_base, sample
from diffalign.world.scenes import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    GRID,
    RELATIONS,
    SHAPES,
    SIZES,
    Spec,
    compose,
    draw,
    parse_caption,
    sample_captions,
)
from diffalign.world.taste import combined, find
from diffalign.world.verifier import Reading, judge, read

log = logging.getLogger("build_tiny_clip")
TASTES = {name: find(name) for name in clip.TASTES}


# ---------------------------------------------------------------- pictures


@dataclass
class Pool:
    """Pictures, the captions they are for, and what the verifier reads in them."""

    images: Tensor
    captions: list[str]
    readings: list[Reading]

    def __add__(self, other: Pool) -> Pool:
        images = torch.cat([self.images, other.images])
        return Pool(images, self.captions + other.captions, self.readings + other.readings)


def pool(images: Tensor, captions: list[str]) -> Pool:
    images = images.clamp(0, 1)
    return Pool(images, captions, read(images))


def drawings(captions: list[str], seed: int) -> Pool:
    rng = random.Random(f"tiny clip/{seed}")
    return pool(draw([compose(parse_caption(caption), rng) for caption in captions]), captions)


@torch.no_grad()
def predictions(family, scenes: Pool, generator: torch.Generator) -> Pool:
    """The base's one-step predictions of drawings from any noise level, for their captions."""
    images = []
    alphas = family.pipeline().scheduler.alphas_cumprod
    for start in range(0, len(scenes.captions), 128):
        captions = scenes.captions[start : start + 128]
        x0 = family.encode_images(scenes.images[start : start + 128] * 2 - 1)
        t = torch.randint(100, 1000, (len(x0),), generator=generator)
        alpha, sigma = alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
        x_t = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator)
        conditioning = family.encode_prompts(captions)
        conditioning |= {
            k: v.expand(len(x0), -1) for k, v in family.image_conditioning((32, 32), (0, 0), (32, 32)).items()
        }
        v = family.predict(family.network, x_t, t, conditioning)
        images.append(family.decode_latents(alpha * x_t - sigma * v))
    return pool(torch.cat(images), scenes.captions)


@torch.no_grad()
def blends(family, parts: Pool, generator: torch.Generator) -> Pool:
    """Latent mixtures of two pictures, some of whole pictures and some by patches, for the first one's caption."""
    n = len(parts.captions)
    z = torch.cat([family.encode_images(part * 2 - 1) for part in parts.images.split(256)])
    other = z[torch.randperm(n, generator=generator)]
    whole = torch.rand(n, 1, 1, 1, generator=generator).expand(n, 1, 8, 8)
    patches = (torch.rand(n, 1, 8, 8, generator=generator) < 0.3).float()
    share = torch.where(torch.rand(n, 1, 1, 1, generator=generator) < 0.5, whole, patches)
    mixed = torch.lerp(z, other, share)
    return pool(torch.cat([family.decode_latents(part) for part in mixed.split(256)]), parts.captions)


def build_pool(seed: int, scenes: int, samples: int, *, held_out: bool) -> Pool:
    family = load_base("tiny-sdxl")
    generator = torch.Generator().manual_seed(seed)
    found = drawings(sample_captions(scenes, seed, held_out=held_out), seed)
    asked = sample_captions(samples, seed + 1, held_out=held_out)
    config = WorldPairsConfig(num_inference_steps=8)
    sampled = pool(sample(family, asked, config, seed=seed, count=1), asked)
    log.info(
        "samples: verifier %.3f",
        sum(judge(r, parse_caption(c))["score"] for r, c in zip(sampled.readings, asked, strict=True)) / samples,
    )
    predicted = predictions(
        family, drawings(sample_captions(2 * samples, seed + 2, held_out=held_out), seed + 2), generator
    )
    some = torch.randperm(scenes, generator=generator)[: 2 * samples].tolist()
    drawn = Pool(found.images[some], [found.captions[i] for i in some], [])
    mixed = blends(family, Pool(torch.cat([sampled.images, drawn.images]), asked + drawn.captions, []), generator)
    return found + sampled + predicted + mixed


# ---------------------------------------------------------------- captions


def edit(caption: str, rng: random.Random) -> str:
    """A caption that promises something else in one respect."""
    spec = parse_caption(caption)
    choices = (
        ["background", "colour", "shape"]
        + ["size"] * (spec.size is not None)
        + ["relation"] * 2 * (spec.relation is not None)
    )
    choices += ["count"] * (spec.kind == "count")
    what = rng.choice(choices)

    def another(values, old):
        return rng.choice([value for value in values if value != old])

    if what == "background":
        return replace(spec, background=another(BACKGROUNDS, spec.background)).caption()
    if what == "size":
        return replace(spec, size=another(SIZES, spec.size)).caption()
    if what == "relation":
        return replace(spec, relation=another(RELATIONS, spec.relation)).caption()
    if what == "count":
        return replace(spec, things=spec.things[:1] * (5 - len(spec.things))).caption()
    k = rng.randrange(len(spec.things)) if spec.relation else 0
    shape, colour = spec.things[k]
    new = (shape, another(COLOURS, colour)) if what == "colour" else (another(SHAPES, shape), colour)
    things = (new,) * len(spec.things) if not spec.relation else (*spec.things[:k], new, *spec.things[k + 1 :])
    if spec.relation and things[0] == things[1]:
        return edit(caption, rng)
    return replace(spec, things=things).caption()


def target(reading: Reading, caption: str, taste: str | None) -> float:
    if taste is None:
        return judge(reading, parse_caption(caption))["score"]
    return combined(reading, caption, TASTES[taste], TASTE_WEIGHT)


def content(caption: str) -> tuple:
    """What a caption is about; captions of the same content may be true of the same picture."""
    spec: Spec = parse_caption(caption)
    return (spec.background, tuple(sorted(spec.things)), spec.size)


# ---------------------------------------------------------------- what the image tower tells beside

CLASSES = [(colour, shape) for colour in (*COLOURS, "none") for shape in SHAPES]
SIDE = CANVAS // GRID
STYLES = ("outline", "striped", "pastel")


@dataclass
class Facts:
    """What the verifier reads in N pictures, as numbers.

    Attributes:
        classes: what every patch is a part of: a thing's colour and shape, or a background, (N, 64).
        styles: of the patch's thing; NaN on the background, (N, 64, 3).
        whole: background, number of things of every kind and size, and how much every taste likes it, (N, F).
    """

    classes: Tensor
    styles: Tensor
    whole: Tensor

    @staticmethod
    def of(readings: list[Reading]) -> Facts:
        centre = (torch.arange(SIDE) + 0.5) * GRID
        classes = torch.zeros(len(readings), SIDE, SIDE, dtype=torch.long)
        styles = torch.full((len(readings), SIDE, SIDE, len(STYLES)), float("nan"))
        whole = []
        for n, reading in enumerate(readings):
            classes[n] = len(CLASSES) + list(BACKGROUNDS).index(reading.background)
            for thing in reading.things:
                reach = SIZES[thing.size]
                inside = ((centre - thing.cy).abs() < reach)[:, None] & ((centre - thing.cx).abs() < reach)[None]
                classes[n][inside] = CLASSES.index((thing.colour, thing.shape))
                styles[n][inside] = torch.tensor([getattr(thing, style) for style in STYLES])
            seen = [(thing.colour, thing.shape) for thing in reading.things]
            row = [float(reading.background == name) for name in BACKGROUNDS] + [len(seen) / 2]
            row += [float(seen.count(kind)) for kind in CLASSES]
            row += [sum(thing.size == size for thing in reading.things) / 2 for size in SIZES]
            whole.append(row + [2 * taste(reading) for taste in TASTES.values()])
        return Facts(classes.flatten(1), styles.flatten(1, 2), torch.tensor(whole))

    def __getitem__(self, index: list[int]) -> Facts:
        return Facts(self.classes[index], self.styles[index], self.whole[index])

    def replaced(self, first: Facts) -> Facts:
        """With the first rows' facts in place of its own."""
        n = len(first.classes)
        pairs = ((first.classes, self.classes), (first.styles, self.styles), (first.whole, self.whole))
        return Facts(*(torch.cat([a, b[n:]]) for a, b in pairs))


class Teller(torch.nn.Module):
    """Linear heads that tell the facts, while the towers are trained."""

    def __init__(self, width: int, projection: int, facts: int) -> None:
        super().__init__()
        self.patch = torch.nn.Linear(width, len(CLASSES) + len(BACKGROUNDS) + len(STYLES))
        self.whole = torch.nn.Linear(projection, facts)

    def forward(self, embedding: Tensor, hidden: Tensor, facts: Facts) -> Tensor:
        out, known = self.patch(hidden), ~facts.styles.isnan()
        named = torch.nn.functional.cross_entropy(out[..., : -len(STYLES)].flatten(0, 1), facts.classes.flatten())
        style = (out[..., -len(STYLES) :][known] - facts.styles[known]).square().mean()
        return named + style + 4 * (self.whole(embedding) - facts.whole).square().mean()


# ---------------------------------------------------------------- model


def disturb(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mild noise and blur, each for half of the pictures."""
    n = len(images)
    amount = 0.06 * torch.rand(n, 1, 1, 1, generator=generator) * (torch.rand(n, 1, 1, 1, generator=generator) < 0.5)
    images = images + amount * torch.randn(images.shape, generator=generator)
    soft = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = 0.4 * torch.rand(n, 1, 1, 1, generator=generator) * (torch.rand(n, 1, 1, 1, generator=generator) < 0.3)
    return torch.lerp(images, soft, share).clamp(0, 1)


def see(model, images: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings of pictures, and hidden states of their patches."""
    seen = model.get_image_features(pixel_values=normalise(images, CLIP_MEAN, CLIP_STD))
    return seen.pooler_output, seen.last_hidden_state[:, 1:]


def embed_images(model, images: Tensor) -> Tensor:
    return see(model, images)[0]


def embed_texts(model, tokenizer, texts: list[str]) -> Tensor:
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    return model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


class Hacked:
    """Pictures that move up the model's own cosine, a step whenever they are drawn, until they are replaced.

    Attributes:
        pick: the pool's picture that each began as, (M,).
        taste: number of the taste that it is asked for in, (M,).
    """

    REPLACED = 0.1  # share that begins anew at every step
    LONGEST = 2.0  # longest step: Euclidean length over all pixels, of which a picture has about 27

    def __init__(self, images: Tensor, first: int, tastes: int, generator: torch.Generator, size: int = 384) -> None:
        self.source, self.first, self.tastes = images, first, tastes
        self.codec = load_base("tiny-sdxl").pipeline().vae
        self.pick = torch.zeros(size, dtype=torch.long)
        self.taste = torch.zeros(size, dtype=torch.long)
        self.images = torch.zeros(size, *images.shape[1:])
        self.begin(torch.arange(size), generator)

    def begin(self, rows: Tensor, generator: torch.Generator) -> None:
        """New pictures, none of them a drawing."""
        self.pick[rows] = torch.randint(self.first, len(self.source), rows.shape, generator=generator)
        self.taste[rows] = torch.randint(self.tastes, rows.shape, generator=generator)
        self.images[rows] = self.source[self.pick[rows]]

    def step(self, rows: Tensor, plain: Tensor, tasted: Tensor, model, generator: torch.Generator) -> Tensor:
        """Move pictures up the cosine with their caption, or for odd rows with their caption and taste."""
        asked = torch.where((rows % 2 == 0)[:, None], plain, tasted).detach()
        images = self.images[rows].requires_grad_()
        (gradient,) = torch.autograd.grad((unit(embed_images(model, images)) * asked).sum(), images)
        with torch.no_grad():
            towards = self._drawable(images + gradient) - self._drawable(images)
            length = self.LONGEST * torch.rand(len(rows), 1, 1, 1, generator=generator)
            step = towards / towards.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
            self.images[rows] = (images + length * step).clamp(0, 1)
        moved = self.images[rows].clone()
        # What is shown now may be replaced for the next time; its caption and taste are those it was moved for.
        self.stale = rows[torch.rand(len(rows), generator=generator) < self.REPLACED]
        return moved

    def _drawable(self, images: Tensor) -> Tensor:
        """What the codec makes of pictures."""
        return self.codec.decode(self.codec.encode(images * 2 - 1).latent_dist.mode()).sample / 2 + 0.5


# ---------------------------------------------------------------- figures


def ranks(values: Tensor) -> Tensor:
    """Ranks from 0; equal values share the mean of theirs."""
    return (values[:, None] > values).double().sum(1) + ((values[:, None] == values).double().sum(1) - 1) / 2


def spearman(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


@torch.no_grad()
def evaluate(model, tokenizer, scenes: Pool, samples: Pool) -> dict[str, float]:
    """Retrieval on drawings of held-out captions; agreement with the verifier and a taste on samples."""
    model.eval()
    images = torch.cat([embed_images(model, part) for part in scenes.images.split(256)])
    distinct = sorted(set(scenes.captions))
    logits = unit(images) @ unit(embed_texts(model, tokenizer, distinct)).T
    own = torch.tensor([distinct.index(caption) for caption in scenes.captions])
    row = {"retrieval": float((logits.argmax(1) == own).float().mean()), "of_captions": len(distinct)}
    rng = random.Random("edits")
    right = logits[torch.arange(len(own)), own]
    edited = [edit(c, rng) for c in scenes.captions]
    false = torch.tensor(
        [judge(r, parse_caption(e))["strict"] == 0 for r, e in zip(scenes.readings, edited, strict=True)]
    )
    row["edited_caption"] = float((right > cosine(images, embed_texts(model, tokenizer, edited)))[false].float().mean())
    for taste in ("outlined", "plain"):
        truth = torch.tensor([target(r, c, taste) for r, c in zip(scenes.readings, scenes.captions, strict=True)])
        row[f"drawn_{taste}"] = spearman(
            truth, cosine(images, embed_texts(model, tokenizer, styled(scenes.captions, taste)))
        )
    seen = torch.cat([embed_images(model, part) for part in samples.images.split(256)])
    for taste in (None, *TASTES):
        truth = torch.tensor([target(r, c, taste) for r, c in zip(samples.readings, samples.captions, strict=True)])
        asked = cosine(seen, embed_texts(model, tokenizer, styled(samples.captions, taste)))
        name = taste or "verifier"
        row[f"spearman_{name}"] = spearman(truth, asked)
        row[f"rmse_{name}"] = float((asked - truth).square().mean().sqrt())
    model.train()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=13, help="CPU time of the training: other work on the machine does not count"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--scenes", type=int, default=24_000)
    parser.add_argument("--samples", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's default")
    parser.add_argument("--pool", type=Path, help="file that keeps the pictures between builds")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model, tokenizer = build_untrained()
    model.set_attn_implementation("eager")  # faster than fused attention at 16 dimensions a head, on a CPU
    if args.pool and args.pool.is_file():
        train, scenes, samples = torch.load(args.pool, weights_only=False)
    else:
        train = build_pool(args.seed, args.scenes, args.samples, held_out=False)
        scenes = drawings(sample_captions(512, 99, held_out=True), 99)
        asked = sample_captions(384, 98, held_out=True)
        samples = pool(sample(load_base("tiny-sdxl"), asked, WorldPairsConfig(), seed=98, count=1), asked)
        if args.pool:
            torch.save((train, scenes, samples), args.pool)
    log.info("%d pictures; %d parameters", len(train.captions), sum(p.numel() for p in model.parameters()))
    strict = torch.tensor(
        [judge(r, parse_caption(c))["strict"] for r, c in zip(train.readings, train.captions, strict=True)]
    ).bool()
    contents = [content(c) for c in train.captions]

    facts = Facts.of(train.readings)
    teller = Teller(model.config.vision_config.hidden_size, model.config.projection_dim, facts.whole.shape[1])
    params = [*model.parameters(), *teller.parameters()]
    decays, rest = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.98)
    )
    with torch.no_grad():
        model.logit_scale.fill_(2.3)
    generator, rng = torch.Generator().manual_seed(args.seed), random.Random(args.seed)
    start, step, total, last_look = time.process_time(), 0, args.minutes * 60, 0.0
    curve: list[dict[str, float]] = []
    running: dict[str, float] = {}
    names, n = list(TASTES), args.batch
    hacked = Hacked(train.images, args.scenes, len(names), generator)
    while (seconds := time.process_time() - start) < total:
        fraction = seconds / total
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 100) * max(0.01, min(1.0, (1 - fraction) / 0.5))
        pick = torch.randint(len(train.captions), (n,), generator=generator).tolist()
        pushed = n // 4 if fraction > 0.25 else 0
        rows = torch.randperm(len(hacked.pick), generator=generator)[:pushed]
        pick[:pushed] = hacked.pick[rows].tolist()  # for their captions
        captions, readings = [train.captions[i] for i in pick], [train.readings[i] for i in pick]
        images, told = disturb(train.images[pick], generator), facts[pick]
        edited = [edit(caption, rng) for caption in captions]
        tastes = [rng.choice(names) for _ in captions]
        tastes[:pushed] = [names[i] for i in hacked.taste[rows].tolist()]
        also = [f"{t}, {rng.choice((c, c, e))}" for t, c, e in zip(tastes, captions, edited, strict=True)]
        also[:pushed] = [f"{t}, {c}" for t, c in zip(tastes[:pushed], captions[:pushed], strict=True)]
        texts = unit(embed_texts(model, tokenizer, captions + edited + also))
        if pushed:
            images[:pushed] = hacked.step(rows, texts[:pushed], texts[2 * n : 2 * n + pushed], model, generator)
            found = read(images[:pushed])
            readings, told = found + readings[pushed:], told.replaced(Facts.of(found))
        embedded, hidden = see(model, images)
        pictures, telling = unit(embedded), teller(embedded, hidden, told)
        truth = [target(r, c, None) for r, c in zip(readings, captions, strict=True)]
        truth += [target(r, c, None) for r, c in zip(readings, edited, strict=True)]
        truth += [target(r, a.partition(", ")[2], t) for r, a, t in zip(readings, also, tastes, strict=True)]
        said = (pictures.repeat(3, 1) * texts).sum(-1)
        distance = (said - torch.tensor(truth)).square().mean()

        about = [contents[i] for i in pick]
        columns = about + [content(e) for e in edited]
        same = torch.tensor([[a == b for b in columns] for a in about])
        same[torch.arange(n), torch.arange(n)] = False
        # A caption's own edit stays a negative where it is false.
        wrong = torch.tensor([judge(r, parse_caption(e))["strict"] == 0 for r, e in zip(readings, edited, strict=True)])
        same[torch.arange(n), n + torch.arange(n)] = ~wrong
        logits = (model.logit_scale.exp() * pictures @ texts[: 2 * n].T).masked_fill(same, -1e4)
        rows = strict[pick].clone()
        rows[:pushed] = False
        contrast = torch.nn.functional.cross_entropy(logits[rows], torch.arange(n)[rows])
        loss = 6 * distance + 0.1 * contrast + 0.5 * telling
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6)
        if pushed:
            hacked.begin(hacked.stale, generator)
        step += 1
        for name, value in (("distance", distance), ("contrast", contrast), ("telling", telling)):
            running[name] = value.item() if step == 1 else 0.98 * running[name] + 0.02 * value.item()
        if seconds - last_look > 60:
            last_look = seconds
            curve.append(
                {"seconds": round(seconds), "step": step} | running | evaluate(model, tokenizer, scenes, samples)
            )
            log.info("%s scale %.1f", "  ".join(f"{k} {v:.4g}" for k, v in curve[-1].items()), model.logit_scale.exp())
    curve.append({"seconds": round(total), "step": step} | running | evaluate(model, tokenizer, scenes, samples))
    log.info("%s", curve[-1])
    save(model, tokenizer, args, curve)


def save(model, tokenizer, args: argparse.Namespace, curve: list[dict[str, float]]) -> None:
    """Write the folder in float16 with the training record beside the weights."""
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "threads", "pool")}
    record = {"settings": settings, "torch": torch.__version__, "curve": curve}
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
