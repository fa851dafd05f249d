"""Draw a finished run's before/after grid as one picture, enlarged, base above and adapter below.

python scripts/draw_before_after.py runs/demo_dpo-1 docs/images/demo_before_after.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    index = json.loads((args.run / "samples" / "index.json").read_text())
    prompts, steps = index["prompts"], index["steps"]
    columns = 6
    groups = [range(i, min(i + columns, len(prompts))) for i in range(0, len(prompts), columns)]
    figure, axes = plt.subplots(2 * len(groups), columns, figsize=(1.5 * columns, 3.5 * len(groups)), squeeze=False)
    for g, group in enumerate(groups):
        for c, i in enumerate(group):
            for r, step in enumerate((steps[0], steps[-1])):
                axis = axes[2 * g + r][c]
                axis.imshow(plt.imread(args.run / index["files"][str(step)][i]), interpolation="nearest")
                if r == 0:
                    words = prompts[i].split(" on a ")
                    axis.set_title(f"{words[0]}\non a {words[1]}", fontsize=6)
                if c == 0:
                    axis.set_ylabel("base" if r == 0 else "aligned", fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(False)
    figure.tight_layout(h_pad=0.4, w_pad=0.3)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
