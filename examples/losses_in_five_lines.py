"""The loss core on its own: the same function for a denoising model and for a text model. Needs torch only.

python examples/losses_in_five_lines.py
"""

import torch

from diffalign import losses


def main() -> None:
    """Print the loss, the margin and the gradient of three pairs, for both kinds of score."""
    # A denoising model: the score is minus one half of the mean squared error, so beta is the published beta_dpo.
    error_w = torch.tensor([0.1002, 0.0998, 0.1010], requires_grad=True)  # policy, chosen images
    error_l = torch.tensor([0.1005, 0.1004, 0.1003], requires_grad=True)  # policy, rejected images
    reference = torch.full((3,), 0.1)  # the same network with its adapters off
    out = losses.dpo(-0.5 * error_w, -0.5 * error_l, -0.5 * reference, -0.5 * reference, beta=5000)
    out.loss.mean().backward()
    print("images  loss", out.loss.detach(), "margin", out.logits, "accuracy", out.accuracy)
    print("        gradient by the chosen images' error", error_w.grad)  # positive: descent lowers it

    # A text model: the score is the sum of the response's token log-probabilities. The function does not change.
    chosen, rejected = torch.tensor([-42.0, -37.5]), torch.tensor([-40.0, -44.0])
    out = losses.dpo(chosen, rejected, chosen - 1, rejected + 1, beta=0.1)
    print("text    loss", out.loss, "margin", out.logits, "accuracy", out.accuracy)


if __name__ == "__main__":
    main()
