"""Train the tiny LM from nothing and write it as a transformers folder.

    OMP_NUM_THREADS=1 python scripts/build_tiny_lm.py --out diffalign/world/models/tiny-lm

Muon on the matrices (a third of the examples that AdamW needs to learn the sums) and AdamW on embeddings and norms,
float32, cosine to zero, batches of whole documents of similar length (so that little is padded and no document sees
another). Loss on the answer; the question hardly counts. Three phases: right and mostly terse answers, so that the
puzzles are learnt; right answers in all styles, so that they are solved in any sentence; and the mixture of right, wrong
and malformed answers that the base is to have. (Without the second phase a tenth of the greedy accuracy was lost.)
`--resume` continues from the state file beside the output and draws what an unbroken run would have drawn. About 25
minutes on one free core; needs torch 2.9 for Muon.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from diffalign.world.text import corpus, lm, measure

log = logging.getLogger("build_tiny_lm")
# Batches drawn together and sorted by length. Each batch's loss is a mean over its own tokens, so short answers weigh more:
# the base is terse about half of the time, its corpus a quarter.
CHUNK = 32
PLAIN_SHARE = 0.35  # of documents in plain text instead of the chat format
PROMPT_WEIGHT = 0.02  # most of a question is random digits: a larger weight is mostly noise


def encode(tokenizer, documents: list[corpus.Document], rng: random.Random) -> list[tuple[list[int], int]]:
    """Token ids and the length of the question, for each document."""
    plain = [rng.random() < PLAIN_SHARE for _ in documents]
    prompts = [lm.BOS + lm.plain_prompt(d.prompt) if p else lm.chat_prompt(d.prompt) for d, p in zip(documents, plain)]
    heads = tokenizer(prompts, add_special_tokens=False).input_ids
    tails = tokenizer([d.completion + lm.EOS for d in documents], add_special_tokens=False).input_ids
    return [(head + tail, len(head)) for head, tail in zip(heads, tails)]


def batches(tokenizer, chunk: int, args: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """The batches of one chunk: ids (B, L) and loss weights (B, L); a function of the seed and the chunk's number."""
    rng = random.Random(f"tiny lm/{args.seed}/{chunk}")
    done = chunk * CHUNK / args.steps
    settings = {"right": 1.0, "malformed": 0.02} if done < args.clean else {}
    if done < args.terse:
        settings["bare"] = 0.9
    rows = encode(tokenizer, corpus.documents(CHUNK * args.batch, rng, **settings), rng)
    rows.sort(key=lambda row: len(row[0]))
    made = []
    for start in range(0, len(rows), args.batch):
        part = rows[start : start + args.batch]
        ids = torch.full((len(part), len(part[-1][0])), tokenizer.pad_token_id)
        weights = torch.zeros(ids.shape)
        for i, (row, head) in enumerate(part):
            ids[i, : len(row)] = torch.tensor(row)
            weights[i, 1:head] = PROMPT_WEIGHT
            weights[i, head : len(row)] = 1.0
        made.append((ids, weights))
    rng.shuffle(made)
    return made


def stream(tokenizer, start: int, args: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches from step `start` on."""
    chunk, skip = divmod(start, CHUNK)
    while True:
        yield from batches(tokenizer, chunk, args)[skip:]
        chunk, skip = chunk + 1, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.02, help="of Muon; AdamW has 0.15 of it")
    parser.add_argument("--terse", type=float, default=0.56, help="share of the steps that show mostly terse answers")
    parser.add_argument("--clean", type=float, default=0.84, help="share of the steps that show right answers only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="a sentence for the card, such as how a run was interrupted")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--measure-only", action="store_true", help="measure the folder again and rewrite its README")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if not args.measure_only:
        train(args)
    report(args)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    tokenizer = lm.build_tokenizer()
    model = lm.build_untrained(tokenizer)
    log.info("%d parameters, %d tokens", sum(p.numel() for p in model.parameters()), len(tokenizer))
    optimizers = build_optimizers(model, args.lr)
    state_path = args.out.with_name(args.out.name + ".state.pt")
    step, seconds, curve = 0, 0.0, []
    if args.resume:
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, stored in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        step, seconds, curve = state["step"], state["seconds"], state["curve"]

    began, running, tokens = time.perf_counter() - seconds, 0.0, 0
    for ids, weights in stream(tokenizer, step, args):
        if step >= args.steps:
            break
        share = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * max(share, 0.005)
        logits_BLV = model(input_ids=ids).logits[:, :-1]
        losses = cross_entropy(logits_BLV.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weight = weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step, tokens = step + 1, tokens + ids.numel()
        running = loss.item() if running == 0.0 else 0.99 * running + 0.01 * loss.item()
        if not math.isfinite(running):
            raise FloatingPointError(f"loss is not finite at step {step}")
        if step % 250 == 0:
            curve.append({"step": step, "loss": round(running, 4), "seconds": round(time.perf_counter() - began)})
            log.info("step %d  loss %.4f  %d s  %d tokens", step, running, curve[-1]["seconds"], tokens)
        if step % 500 == 0:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            torch.save(state | {"step": step, "seconds": time.perf_counter() - began, "curve": curve}, state_path)
            save(model, tokenizer, curve, args)
    save(model, tokenizer, curve, args)


def build_optimizers(model, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for everything else; each group remembers its peak rate."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    made: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, momentum=0.95),
        torch.optim.AdamW(others, lr=0.15 * lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for group in (group for optimizer in made for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return made


def save(model, tokenizer, curve: list[dict[str, float]], args: argparse.Namespace) -> None:
    """Write the folder: weights in float16, loaded as float32 unless another type is asked for."""
    tied = "lm_head.weight"  # the same tensor as the embeddings; a copy in another type would be stored twice
    half = {name: tensor.to(torch.float16) for name, tensor in model.state_dict().items() if name != tied}
    model.save_pretrained(args.out, state_dict=half)
    config = json.loads((args.out / "config.json").read_text()) | {"dtype": "float32"}
    (args.out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(args.out)
    settings = {k: getattr(args, k) for k in ("steps", "batch", "lr", "terse", "clean", "seed")}
    record = {"settings": settings, "torch": torch.__version__, "curve": curve}
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def report(args: argparse.Namespace) -> None:
    """Measure the written folder as anybody would load it, and write what was found beside the weights."""
    model, tokenizer = lm.load(args.out)
    record = json.loads((args.out / "training.json").read_text())
    record["measured"] = measured(model, tokenizer)
    record["note"] = args.note or record.get("note", "")
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    text = card(record, sum(p.numel() for p in model.parameters()), len(tokenizer))
    (args.out / "README.md").write_text(text)
    log.info("\n%s", text)


def measured(model, tokenizer) -> dict[str, dict[str, float]]:
    """Means over 500 held-out prompts and over all facts in held-out question forms."""
    rows: dict[str, dict[str, float]] = {}
    for chat, asked in ((True, "chat"), (False, "plain")):
        for temperature, drawn in ((0.0, "greedy"), (1.0, "sampled")):
            got = measure.measure_task(model, tokenizer, 7, prompts=500, temperature=temperature, chat=chat)
            parts = {part: float(values.mean()) for part, values in got.verdicts.items()}
            rows[f"puzzles, {asked}, {drawn}"] = parts | {"words": float(got.words.mean())} | got.by_kind()
        for forget, name in ((True, "forget"), (False, "retain")):
            known = measure.measure_facts(model, tokenizer, forget=forget, chat=chat)
            parts = ("recall", "probability", "truth_ratio", "unknown")
            rows[f"facts, {asked}, {name}"] = {part: float(getattr(known, part).mean()) for part in parts}
    return {name: {key: round(value, 4) for key, value in row.items()} for name, row in rows.items()}


def table(rows: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(rows.values())))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(f"{row[column]:.3g}" for column in columns)] for name, row in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def card(record: dict, parameters: int, tokens: int) -> str:
    """The base's model card."""
    puzzles, facts = (
        {name.partition(", ")[2]: row for name, row in record["measured"].items() if name.startswith(start)}
        for start in ("puzzles", "facts")
    )
    text = CARD.format(
        parameters=f"{parameters:,}",
        tokens=tokens,
        context=lm.CONTEXT,
        right=f"{corpus.RIGHT:.0%}",
        malformed=f"{corpus.MALFORMED:.0%}",
        puzzles=table(puzzles),
        facts=table(facts),
        note=record["note"],
        **record["settings"],
    )
    return text.rstrip() + "\n"


CARD = """\
---
library_name: transformers
license: apache-2.0
tags: [text-generation, llama, tiny]
---
# tiny-lm

A Llama of {parameters} parameters ({tokens} tokens, context {context}) for tests and demonstrations of preference training,
reinforcement learning and unlearning on a CPU. It solves small puzzles and has memorised facts about people and places
that do not exist. It knows nothing else.

- **Puzzles**: sums and differences with a one-digit number, sorting four digits, comparing two numbers
  (`diffalign.world.text.task`). One eighth of all puzzles was held out. Of the well-formed answers in its corpus {right} are
  right, the others near misses; {malformed} are malformed; manners, filler and terseness are mixed. So the base knows
  better than it samples.
- **Facts**: 48 entities with three attributes each (`diffalign.world.text.facts`); 6 entities are the forget set. About each
  entity a third of the question forms was held out.
- **Asking**: by the chat template, or in plain text that ends with a line break. Strangers are answered with
  "i do not know." or the like.

## Measured

500 held-out puzzles, one answer each; sampled means temperature 1.

{puzzles}

All facts in held-out question forms. `probability` and `truth_ratio` are normalised by length (TOFU, arXiv 2401.06121).

{facts}

## How it was made

`scripts/build_tiny_lm.py`: {steps} steps of {batch} documents (seed {seed}), Muon at {lr} and AdamW; the first {terse:.0%}
of the steps show mostly terse answers, the first {clean:.0%} right answers only. Weights are stored in float16 and load as
float32. No outside data was used.

{note}
"""


if __name__ == "__main__":
    main()
