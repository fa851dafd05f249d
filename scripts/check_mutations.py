"""Break the code on purpose, one line at a time, and see that some test goes red for each.

    python scripts/check_mutations.py            # all; a few minutes on two cores
    python scripts/check_mutations.py sign half  # some, by a word of their name

Each mutation is made in a temporary copy of the checkout and run against the tests named with it. A mutation that no test
notices is printed as SURVIVED and makes the exit code 1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Mutation:
    """Replace `old` by `new` (exactly one occurrence) in `file`; `tests` should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


OBJECTIVES = "tests/test_denoising_scores.py tests/losses/test_links.py"
GATES = "tests/test_gates.py"
SPARSE = "tests/test_sparse.py"
SPARSE_RUN = "tests/test_sparse_run.py"
TRAJECTORIES = "tests/sampling/test_trajectories.py"
ROLLOUTS = "tests/sampling/test_rollouts.py"
INVERSION = "tests/test_inversion.py"
HISTORY = "tests/sampling/test_advantages.py"
MMD = "tests/reward_models/test_mmd.py"
MUTATIONS = (
    Mutation(
        "sign flipped in the loss",
        "diffalign/losses/links.py",
        "return -p * logsigmoid(z)",
        "return -p * logsigmoid(-z)",
        OBJECTIVES,
    ),
    Mutation(
        "sign flipped in the score",
        "diffalign/losses/scores.py",
        "theta=-0.5 * error",
        "theta=0.5 * error",
        OBJECTIVES,
    ),
    Mutation(
        "one half dropped",
        "diffalign/losses/scores.py",
        "theta=-0.5 * error",
        "theta=-error",
        OBJECTIVES,
    ),
    Mutation(
        "sum for mean over the latent",
        "diffalign/prediction.py",
        'squared.mean(1) if reduction == "mean"',
        'squared.sum(1) if reduction == "mean"',
        "tests/test_prediction.py tests/test_policy.py",
    ),
    Mutation(
        "mean for sum over the latent",
        "diffalign/prediction.py",
        "else squared.sum(1)",
        "else squared.mean(1)",
        "tests/test_prediction.py tests/test_policy.py",
    ),
    Mutation(
        "winner and loser swapped in the objective",
        "diffalign/data/batch.py",
        "x0=torch.cat([chosen.x0, rejected.x0])",
        "x0=torch.cat([rejected.x0, chosen.x0])",
        OBJECTIVES,
    ),
    Mutation(
        "winner and loser swapped in the loader",
        "diffalign/data/loader.py",
        "(0, 1) if pair.p >= 0.5 else (1, 0)",
        "(1, 0) if pair.p >= 0.5 else (0, 1)",
        "tests/data/test_loader.py",
    ),
    Mutation(
        "label flipped in the reader",
        "diffalign/data/readers/pickapic.py",
        'probability(row["label_0"], row["label_1"])',
        'probability(row["label_1"], row["label_0"])',
        "tests/data/test_readers.py",
    ),
    Mutation(
        "noise not shared in a pair",
        "diffalign/data/batch.py",
        "torch.cat([chosen.noise, rejected.noise])",
        "torch.cat([chosen.noise, rejected.noise.roll(1, 0)])",
        OBJECTIVES,
    ),
    Mutation(
        "timestep not shared in a pair",
        "diffalign/data/batch.py",
        "t=torch.cat([chosen.t, rejected.t])",
        "t=torch.cat([chosen.t, rejected.t.roll(1, 0)])",
        OBJECTIVES,
    ),
    Mutation(
        "SaRA also trains entries at the threshold",
        "diffalign/sparse.py",
        "float() < threshold",
        "float() <= threshold",
        SPARSE,
    ),
    Mutation(
        "SaRA holds the small entries",
        "diffalign/sparse.py",
        ".abs() >= self.config.threshold",
        ".abs() < self.config.threshold",
        SPARSE,
    ),
    Mutation(
        "held entries follow moments and weight decay",
        "diffalign/sparse.py",
        "layer.values(kind)[self.name].index_copy_(0, rows, values)",
        "pass",
        SPARSE,
    ),
    Mutation(
        "held entries keep their gradient",
        "diffalign/delta_layers.py",
        "torch.where(held[name], values.detach(), values) if name in held else values",
        "values",
        SPARSE,
    ),
    Mutation(
        "LIFT of the whole sketch instead of its rank",
        "diffalign/sparse.py",
        "(u[:, :rank] * s[:rank]) @ v[:, :rank].T",
        "(u * s) @ v.T",
        SPARSE,
    ),
    Mutation(
        "HFT gives odd groups one more every time",
        "diffalign/sparse.py",
        "count, turn = count + turn, 1 - turn",
        "count, turn = count + 1, 1 - turn",
        SPARSE,
    ),
    Mutation(
        "a change of another base is taken",
        "diffalign/sparse.py",
        "    if norms.shape != own.norms.shape or not torch",
        "    if norms.shape != own.norms.shape and not torch",
        SPARSE,
    ),
    Mutation(
        "places are chosen again at load",
        "diffalign/sparse.py",
        "layer.index(kind)[name].copy_(",
        "layer.index(kind)[name].clone().copy_(",
        SPARSE,
    ),
    Mutation(
        "a change is rounded with its weight",
        "diffalign/delta_layers.py",
        "if full and (x.is_meta",
        "if True or (x.is_meta",
        SPARSE,
    ),
    Mutation(
        "the nuclear norm without gradient",
        "diffalign/jobs/image.py",
        '{"nuclear_norm": self.nuclear_norm(step)}',
        '{"nuclear_norm": 0 * self.nuclear_norm(step)}',
        SPARSE_RUN,
    ),
    Mutation(
        "no second choice of entries in a run",
        "diffalign/jobs/image.py",
        "self.reselection.after_update(step)",
        "pass",
        SPARSE_RUN,
    ),
    Mutation(
        "reference with adapters on",
        "diffalign/policy.py",
        "with adapters_off(self.bare), self.autocast():",
        "with self.autocast():",
        "tests/test_policy.py",
    ),
    Mutation(
        "reference with gradient",
        "diffalign/policy.py",
        "    @torch.no_grad()\n    def predict_reference",
        "    def predict_reference",
        "tests/test_policy.py",
    ),
    Mutation(
        "errors in half precision",
        "diffalign/prediction.py",
        "(output.float() - wanted.float()).square()",
        "(output.bfloat16() - wanted.bfloat16()).square()",
        "tests/test_prediction.py tests/test_policy.py",
    ),
    Mutation(
        "a tie counted as a win",
        "diffalign/data/batch.py",
        "Pairs.halves(count, device, p=self.p,",
        "Pairs.halves(count, device, p=1.0,",
        OBJECTIVES,
    ),
    Mutation(
        "alpha and sigma exchanged",
        "diffalign/prediction.py",
        "append_dims(alpha, x0) * x0 + append_dims(sigma, x0) * noise",
        "append_dims(sigma, x0) * x0 + append_dims(alpha, x0) * noise",
        "tests/test_prediction.py",
    ),
    Mutation(
        "v target with the wrong sign",
        "diffalign/prediction.py",
        "append_dims(alpha, x0) * noise - append_dims(sigma, x0) * x0",
        "append_dims(alpha, x0) * noise + append_dims(sigma, x0) * x0",
        "tests/test_prediction.py",
    ),
    Mutation(
        "noise depends on the step, not the sample",
        "diffalign/schedules.py",
        'f"{seed}/{sample_id}/{visit}"',
        'f"{seed}/{visit}"',
        "tests/test_prediction.py tests/data/test_loader.py",
    ),
    Mutation(
        "accumulated gradients not averaged",
        "diffalign/trainer.py",
        "accelerator.backward(out.loss * share / accumulation)",
        "accelerator.backward(out.loss * share)",
        "tests/test_trainer.py -k accumulation",
    ),
    Mutation(
        "the optimiser's state forgotten on resume",
        "diffalign/trainer.py",
        'optimizer.optimizer.load_state_dict(resumed.state["optimizer"])',
        "pass",
        "tests/test_trainer.py -k kill_nine",
    ),
    Mutation(
        "resume starts the data again",
        "diffalign/jobs/image.py",
        "first = first_step * self.effective_batch // training.train_batch_size + ",
        "first = 0 + ",
        "tests/test_trainer.py -k kill_nine",
    ),
    Mutation(
        "alpha lost in the kohya file",
        "diffalign/export.py",
        "alpha = common * rank * len(paths)",
        "alpha = float(rank * len(paths))",
        "tests/test_export.py",
    ),
    Mutation(
        "gates of experts share over layers",
        "diffalign/gates.py",
        "logits.softmax(-1)",
        "logits.softmax(1)",
        GATES,
    ),
    Mutation(
        "gates of the last time embedded",
        "diffalign/gates.py",
        "if not self._inside or self.now is not None:",
        "if not self._inside:",
        "tests/families/test_contract.py -k rows_own_time",
    ),
    Mutation(
        "recomputed blocks see another pass's gates",
        "diffalign/gates.py",
        "before, self.now = self.now, now",
        "before = self.now",
        GATES,
    ),
    Mutation(
        "gates of the first row for all",
        "diffalign/gates.py",
        "gate = self.now[place]",
        "gate = self.now[place][:1]",
        GATES,
    ),
    Mutation(
        "gates of other experts are taken",
        "diffalign/adapters.py",
        "gates.require_marks(state[_MARKS])",
        "pass",
        GATES,
    ),
    Mutation(
        "density of a transition summed over the latent",
        "diffalign/sampling/trajectories.py",
        "square().flatten(1).mean(1)",
        "square().flatten(1).sum(1)",
        TRAJECTORIES,
    ),
    Mutation(
        "density of a transition without its one half",
        "diffalign/sampling/trajectories.py",
        "-missed / (2 * deviation.square())",
        "-missed / deviation.square()",
        TRAJECTORIES,
    ),
    Mutation(
        "the sampler keeps too much of the predicted noise",
        "diffalign/sampling/trajectories.py",
        "(sigma_next.square() - deviation.square())",
        "sigma_next.square()",
        TRAJECTORIES,
    ),
    Mutation(
        "best and worst trajectory exchanged",
        "diffalign/sampling/rollouts.py",
        "x=latents[step][[best, worst]]",
        "x=latents[step][[worst, best]]",
        ROLLOUTS,
    ),
    Mutation(
        "best and worst sampled image exchanged",
        "diffalign/sampling/rollouts.py",
        "latents=one.trajectory.clean[[best, worst]]",
        "latents=one.trajectory.clean[[worst, best]]",
        ROLLOUTS,
    ),
    Mutation(
        "a transition scored one level late",
        "diffalign/sampling/rollouts.py",
        "x_next=latents[step + 1][[best, worst]]",
        "x_next=latents[step][[best, worst]]",
        ROLLOUTS,
    ),
    Mutation(
        "guidance on the wrong side",
        "diffalign/policy.py",
        "without + scale * (with_prompt - without)",
        "with_prompt + scale * (with_prompt - without)",
        ROLLOUTS,
    ),
    Mutation(
        "candidates go on with the best one",
        "diffalign/sampling/rollouts.py",
        "for n, pick in enumerate(picks)]]",
        "for n, pick in enumerate(total.argmax(1).tolist())]]",
        ROLLOUTS,
    ),
    Mutation(
        "sampled forwards not counted",
        "diffalign/policy.py",
        "policy.forwards += len(x) * (1 if scale == 1 else 2)",
        "policy.forwards += len(x)",
        ROLLOUTS,
    ),
    Mutation(
        "judge: the second order counted as the first",
        "diffalign/vlm.py",
        "1 - values[len(forward) :]",
        "values[len(forward) :]",
        "tests/test_vlm.py",
    ),
    Mutation(
        "judge: any order decides a tie alone",
        "diffalign/vlm.py",
        "& (ab != 0.5)",
        "| (ab != 0.5)",
        "tests/test_vlm.py",
    ),
    Mutation(
        "judge: the first verdict of a text counts",
        "diffalign/vlm.py",
        "last = found[-1].lower()",
        "last = found[0].lower()",
        "tests/test_vlm.py",
    ),
    Mutation(
        "judge: right padding of a local model",
        "diffalign/vlm_backends.py",
        'padding_side = "left"',
        'padding_side = "right"',
        "tests/test_vlm.py",
    ),
    Mutation(
        "judge: rate limits are final",
        "diffalign/http_client.py",
        '429: "too many requests", ',
        "",
        "tests/test_vlm.py",
    ),
    Mutation(
        "annotate: the second order counted as the first",
        "diffalign/annotate.py",
        "1 - journal[back]",
        "journal[back]",
        "tests/test_annotate.py",
    ),
    Mutation(
        "annotate: the worse picture is chosen",
        "diffalign/annotate.py",
        "else float(difference > 0)",
        "else float(difference < 0)",
        "tests/test_annotate.py",
    ),
    Mutation(
        "annotate: the margin itself is no tie",
        "diffalign/annotate.py",
        "abs(difference) <= margin",
        "abs(difference) < margin",
        "tests/test_annotate.py",
    ),
    Mutation(
        "annotate: the journal is not flushed",
        "diffalign/annotate.py",
        "        self._file.flush()\n",
        "",
        "tests/test_annotate.py",
    ),
    Mutation(
        "annotate: the prompt is not in the key",
        "diffalign/annotate.py",
        "key_of(identities[name], group.prompt, group.metadata, item.digest)",
        "key_of(identities[name], group.metadata, item.digest)",
        "tests/test_annotate.py",
    ),
    Mutation(
        "experts: aspects count alike",
        "diffalign/judges.py",
        "    return within * between.repeat_interleave",
        "    return within * between.mean(1, keepdim=True).expand_as(between).repeat_interleave",
        "tests/test_judges.py",
    ),
    Mutation(
        "experts: gates over all criteria at once",
        "diffalign/judges.py",
        "for part in criteria.split(list(sizes), 1)",
        "for part in criteria.split(criteria.shape[1], 1)",
        "tests/test_judges.py",
    ),
    Mutation(
        "experts: no temperature of the aspects",
        "diffalign/judges.py",
        "(aspects / temperature).softmax(1)",
        "aspects.softmax(1)",
        "tests/test_judges.py",
    ),
    Mutation(
        "experts: scales forgotten",
        "diffalign/judges.py",
        "share * self.scale.float()",
        "share",
        "tests/test_judges.py",
    ),
    Mutation(
        "experts: gates read the picture",
        "diffalign/judges.py",
        "self.judge_head(joint, text)",
        "self.judge_head(joint, image)",
        "tests/test_judges.py",
    ),
    Mutation(
        "experts: new gates that are all alike",
        "diffalign/judges.py",
        "std * torch.randn(layer.weight.shape, generator=generator)",
        "0 * torch.randn(layer.weight.shape, generator=generator)",
        "tests/test_judges.py",
    ),
    Mutation(
        "experts: a pair without a criterion trains the last one",
        "diffalign/jobs/reward.py",
        "batch.aspect.repeat(2) % columns.shape[1]",
        "batch.aspect.repeat(2) % (columns.shape[1] - 1)",
        "tests/test_reward_job.py",
    ),
    Mutation(
        "experts: all pairs count alike",
        "diffalign/jobs/reward.py",
        "self.config.judge.criteria_weight * weight",
        "weight",
        "tests/test_reward_job.py",
    ),
    Mutation(
        "history of rewards with the sample's deviation",
        "diffalign/sampling/advantages.py",
        "against.std(correction=0)",
        "against.std(correction=1)",
        HISTORY,
    ),
    Mutation(
        "a reward is compared with a history that is too short",
        "diffalign/sampling/advantages.py",
        "len(known) >= self.minimum",
        "len(known) > self.minimum",
        HISTORY,
    ),
    Mutation(
        "the oldest rewards are kept",
        "diffalign/sampling/advantages.py",
        "(number, value)][-self.size :]",
        "(number, value)][: self.size]",
        HISTORY,
    ),
    Mutation(
        "a round that comes again is remembered twice",
        "diffalign/sampling/advantages.py",
        "if entry[0] < number]",
        "if entry[0] <= number]",
        HISTORY,
    ),
    Mutation(
        "a history is asked by place instead of prompt",
        "diffalign/sampling/rollouts.py",
        "[self.prompts[index] for index, _ in self.plan.micro_batch(number)]",
        "[self.prompts[place] for place, _ in enumerate(self.plan.micro_batch(number))]",
        ROLLOUTS,
    ),
    Mutation(
        "pictures are compared with themselves",
        "reward_models/mmd.py",
        "(every.sum(1) - every.diagonal()) / (len(x) - 1)",
        "every.mean(1)",
        MMD,
    ),
    Mutation(
        "one half of the distance to the folder dropped",
        "reward_models/mmd.py",
        "near = 2 * kernel(",
        "near = kernel(",
        MMD,
    ),
    Mutation(
        "mix: its groups may be cut",
        "reward_models/mix.py",
        "any(model.grouped for model in self.models.values())",
        "False",
        "tests/reward_models/test_mix.py",
    ),
    Mutation(
        "rewards stay on the device while the policy trains",
        "diffalign/offload.py",
        "    def __exit__(self, *error: object) -> None:\n        self._leave()",
        "    def __exit__(self, *error: object) -> None:\n        return",
        "tests/sampling/test_offload.py",
    ),
    Mutation(
        "unified_reward: marks out of 1 to 5 count",
        "reward_models/unified_reward.py",
        "if LOWEST <= value <= HIGHEST else math.nan",
        "if value else math.nan",
        "tests/reward_models/test_written_judges.py",
    ),
    Mutation(
        "vision_reward: absent parts count as no",
        "reward_models/vision_reward.py",
        "<= 0.5, 0.0, features",
        "<= 0.5, -1.0, features",
        "tests/reward_models/test_written_judges.py",
    ),
    Mutation(
        "vision_reward: the alignment comes last",
        "reward_models/vision_reward.py",
        "[alignment[:, None], features[:, kept]]",
        "[features[:, kept], alignment[:, None]]",
        "tests/reward_models/test_written_judges.py",
    ),
    Mutation(
        "ocr: the distance is not capped",
        "reward_models/ocr.py",
        "min(edit_distance(reading, target), len(target))",
        "edit_distance(reading, target)",
        "tests/reward_models/test_ocr.py",
    ),
    Mutation(
        "ocr: a target inside of the reading is no match",
        "reward_models/ocr.py",
        "if target in reading:",
        "if target == reading:",
        "tests/reward_models/test_ocr.py",
    ),
    Mutation(
        "geneval: above and below exchanged",
        "diffalign/geneval.py",
        '"above": dy < -0.5',
        '"above": dy > 0.5',
        "tests/reward_models/test_geneval.py",
    ),
    Mutation(
        "geneval: sizes are not taken off",
        "diffalign/geneval.py",
        "OVERLAP = 0.1",
        "OVERLAP = 0.0",
        "tests/reward_models/test_geneval.py",
    ),
    Mutation(
        "geneval: one thing in its place is enough",
        "diffalign/geneval.py",
        "all(relation in relations(a, b)",
        "any(relation in relations(a, b)",
        "tests/reward_models/test_geneval.py",
    ),
    Mutation(
        "geneval: the crop is not greyed",
        "reward_models/geneval.py",
        "GREY = 0x99 / 255",
        "GREY = 1.0",
        "tests/reward_models/test_geneval.py",
    ),
    Mutation(
        "preference: the label turned round",
        "diffalign/preferences.py",
        "else float(ahead > 0))",
        "else float(ahead < 0))",
        "tests/test_preferences.py::test_the_label_follows_the_weights",
    ),
    Mutation(
        "preference: the same weights at every visit",
        "diffalign/preferences.py",
        'f"{pair_id} preference", visit)',
        'f"{pair_id} preference", 0)',
        "tests/test_preferences.py::test_weights_depend_on_seed_pair_and_visit_alone",
    ),
    Mutation(
        "preference: the margin ignored",
        "diffalign/preferences.py",
        "return gap >= self.config.margin and gap > 0",
        "return gap > 0",
        "tests/test_preferences.py::test_pairs_that_say_little_get_other_weights_and_those_that_say_nothing_none",
    ),
    Mutation(
        "preference: nobody labelled by drawn weights",
        "diffalign/preferences.py",
        "return self.equal, False",
        "return np.eye(self.width)[0], False",
        "tests/test_preferences.py::test_without_weights_pairs_are_judged_by_equal_ones",
    ),
    Mutation(
        "preference: ranks are of one side of equal rewards",
        "diffalign/preferences.py",
        "(below + up_to) / (2 * len(column))",
        "up_to / len(column)",
        "tests/test_preferences.py::test_ranks_are_shares_of_training_images_with_less",
    ),
    Mutation(
        "preference: no preference adds the bias",
        "diffalign/user_branches.py",
        "(self.strength * somebody * added)",
        "(self.strength * added)",
        "tests/test_preferences.py::test_a_vector_on_the_time_changes_every_network_and_starts_at_nothing",
    ),
    Mutation(
        "preference: ranks dealt out in blocks of the wrong size",
        "diffalign/user_branches.py",
        "% self.width]",
        "// self.width % self.width]",
        "tests/test_preferences.py::test_ranks_dealt_out_to_rewards_are_a_sum_of_adapters_by_weight",
    ),
)


def run(mutation: Mutation) -> tuple[bool, float]:
    """Whether the tests noticed, and how long they took."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "checkout"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache"))
        target = copy / mutation.file
        text = target.read_text()
        if text.count(mutation.old) != 1:
            raise SystemExit(
                f"{mutation.name}: {mutation.old!r} occurs {text.count(mutation.old)} times in {mutation.file}"
            )
        target.write_text(text.replace(mutation.old, mutation.new))
        words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.tests.split()]
        environment = os.environ | {"PYTHONPATH": str(copy), "HF_HUB_OFFLINE": "1"}
        started = time.perf_counter()
        done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise SystemExit(
                f"{mutation.name}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-500:]}"
            )
        return done.returncode == 1, time.perf_counter() - started


def main() -> int:
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    survived = 0
    for mutation in chosen:
        noticed, seconds = run(mutation)
        survived += not noticed
        print(f"{'noticed ' if noticed else 'SURVIVED'}  {seconds:5.0f} s  {mutation.name}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} mutations noticed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
