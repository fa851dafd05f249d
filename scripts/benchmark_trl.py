"""DPO steps of diffalign and of TRL's DPOTrainer: the same language model, pairs, batch and optimiser; ratios.

    python scripts/benchmark_trl.py                        tiny LM of the package, 512 pairs
    python scripts/benchmark_trl.py --model wide           random Llama, width 512, 8 layers, vocabulary 32,000

Every measurement is a process of its own (peak memory), the two sides take turns, and the figures are medians over
`--repeats`. Both train a LoRA on all linear layers in float32 without checkpointing. A step lasts from the end of
one step to the end of the next, data and logging included. Needs `trl` (in the `test` extra). Prints JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def make_inputs(args: argparse.Namespace, folder: Path) -> None:
    """Write the model and the pairs that both sides read."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from diffalign.world.names import base_folder
    from diffalign.world.text import task

    base = base_folder("tiny-lm")
    tokenizer = AutoTokenizer.from_pretrained(base)
    if args.model == "tiny":
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32000,
                hidden_size=512,
                intermediate_size=1376,
                num_hidden_layers=8,
                num_attention_heads=8,
                max_position_embeddings=512,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
            )
        )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    prompts = task.sample_prompts(args.pairs, seed=0, held_out=False)
    filler = " ".join(["the answer is"] * args.words)
    rows = [
        {"prompt": prompt, "chosen": f" {filler} {i % 90}.", "rejected": f" {filler} {(i + 7) % 90}, maybe."}
        for i, prompt in enumerate(prompts)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def middle(ends: list[float]) -> float:
    """Median time between the ends of consecutive steps, the first two left out."""
    return statistics.median(b - a for a, b in itertools.pairwise(ends[1:]))


def ours(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """`diffalign.trainer.train` on the inputs."""
    from diffalign.config_loading import build
    from diffalign.progress import Progress
    from diffalign.trainer import train

    ends: list[float] = []
    advance = Progress.advance

    def timed(self: Progress, *more: Any) -> None:
        ends.append(time.perf_counter())
        advance(self, *more)

    Progress.advance = timed  # type: ignore[method-assign]

    with tempfile.TemporaryDirectory() as out:
        result = train(
            build(
                {
                    "output_dir": out,
                    "model": {"family": "causal_lm", "pretrained": str(folder / "model")},
                    "data": {"format": "text", "sources": [str(folder / "pairs.jsonl")], "drop_duplicates": False},
                    "text": {"max_length": args.max_length},
                    "objective": {"name": "dpo", "beta": 0.1},
                    "lora": {"rank": 16, "targets": "all"},
                    "training": {
                        "learning_rate": 1e-4,
                        "train_batch_size": args.batch,
                        "max_train_steps": args.steps,
                        "lr_scheduler": "constant",
                        "adam_weight_decay": 0.0,
                        "checkpointing_steps": 0,
                        "cpu": True,
                        "threads": args.threads,
                    },
                }
            )
        )
        rows = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    return {"seconds_per_step": middle(ends), "first_loss": rows[0]["loss"], "last_loss": rows[-1]["loss"]}


def theirs(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """TRL's DPOTrainer on the inputs."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(args.threads)
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    with tempfile.TemporaryDirectory() as out:
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
            args=DPOConfig(
                output_dir=out,
                per_device_train_batch_size=args.batch,
                max_steps=args.steps,
                learning_rate=1e-4,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_length=args.max_length,
                beta=0.1,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
            peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", init_lora_weights="gaussian"),
            callbacks=[Clock()],
        )
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"seconds_per_step": middle(ends), "first_loss": losses[0], "last_loss": losses[-1]}


def measure(side: str, folder: Path) -> dict[str, Any]:
    """Run one side in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", str(folder)]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["tiny", "wide"], default="tiny")
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--words", type=int, default=4, help="length of the answers, in repeats of three words")
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        found = {"ours": ours, "trl": theirs}[args.side](args, args.folder)
        found["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps(found))
        return 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_inputs(args, folder)
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
        for _ in range(args.repeats):
            for side, found in runs.items():
                found.append(measure(side, folder))
    medians = {
        side: {name: statistics.median(run[name] for run in found) for name in found[0]} for side, found in runs.items()
    }
    ratios = {name: medians["ours"][name] / medians["trl"][name] for name in ("seconds_per_step", "peak_gb")}
    settings = {k: v for k, v in vars(args).items() if k not in ("side", "folder")}
    print(json.dumps({"settings": settings, **medians, "ours / trl": ratios}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
