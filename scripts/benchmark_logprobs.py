"""Time and peak memory of token log-probabilities with gradient, chunked (ours) against the whole logits in float32.

    python scripts/benchmark_logprobs.py [--device cuda] [--dtype bfloat16]

Hidden states of a batch of rows go through a frozen head, and gradients come back to them. "all": the plain way takes
every position of the batch, as code does that calls the model for its logits; "same": only the scored tokens, as ours.
Each measurement is a process of its own; memory is the growth of its peak over what it held before. Also counts how many
positions of a batch are padding, for lengths as they are found in preference data. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.text.logprobs import Head, token_scores

WAYS = ("ours", "same", "all")


def plain(hidden: Tensor, labels: Tensor, head: Head, scored: Tensor | None) -> Tensor:
    """float32 log-softmax of all logits; `scored` picks positions afterwards."""
    logp = head(hidden).float().log_softmax(-1)
    every = logp.gather(1, labels[:, None])[:, 0]
    return every if scored is None else every[scored]


def peak(device: torch.device) -> float:
    """Megabytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6


def measure(way: str, vocabulary: int, args: argparse.Namespace, results: Any) -> None:
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    draw = torch.Generator().manual_seed(0)
    positions = args.tokens * 2  # half of a row is its prompt
    hidden = torch.randn(positions, args.width, generator=draw).to(device, dtype)
    labels = torch.randint(0, vocabulary, (positions,), generator=draw).to(device)
    scored = torch.arange(positions, device=device) % 2 == 1
    layer = nn.Linear(args.width, vocabulary, bias=False).requires_grad_(False).to(device, dtype)
    head = Head(layer)
    hidden.requires_grad_()

    def step() -> None:
        hidden.grad = None
        if way == "all":
            found = plain(hidden, labels, head, scored)
        elif way == "same":
            found = plain(hidden[scored], labels[scored], head, None)
        else:
            found, _ = token_scores(hidden[scored], labels[scored], head, chunk=args.chunk)
        found.sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    warm, warm_labels = torch.randn(2, args.width, device=device, dtype=dtype), labels[:2]
    token_scores(warm.requires_grad_(), warm_labels, head)[0].sum().backward()
    before = peak(device)
    step()
    memory = peak(device) - before
    times = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    results.put({"seconds": sorted(times)[len(times) // 2], "megabytes": memory})


def padding(rows: int, batches: int = 2000) -> float:
    """Share of padding in batches of random order; log-normal lengths with mean 350 and sigma 0.8, cut at 1024."""
    draw = torch.Generator().manual_seed(0)
    spread = torch.randn(batches, rows, generator=draw) * 0.8
    lengths = (350 * (spread - 0.32).exp()).clamp(8, 1024)
    return float(1 - lengths.sum() / (lengths.amax(1) * rows).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[600, 50_000])
    parser.add_argument("--tokens", type=int, default=1024, help="scored tokens")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    found: dict[str, Any] = {"settings": vars(args), "torch": torch.__version__}
    context = multiprocessing.get_context("spawn")
    for vocabulary in args.vocabularies:
        measured = {}
        for way in WAYS:
            results = context.SimpleQueue()
            worker = context.Process(target=measure, args=(way, vocabulary, args, results))
            worker.start()
            worker.join()
            if worker.exitcode:
                raise SystemExit(f"the measurement {way!r} with {vocabulary} tokens failed")
            measured[way] = results.get()
        ratios = {
            f"ours / {way}": {
                key: round(measured["ours"][key] / max(measured[way][key], 1e-9), 3) for key in measured[way]
            }
            for way in WAYS[1:]
        }
        found[f"vocabulary {vocabulary}"] = measured | ratios
    found["padding"] = {f"{rows} rows": round(padding(rows), 3) for rows in (2, 4, 8, 16, 32)}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
