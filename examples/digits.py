"""Handwritten digits from noise: a small class-conditional DiCo, trained from nothing in minutes on a CPU.

An ordinary PyTorch training loop; ``dk.fuse(model)`` is its only line that knows of the fused kernels. The objective is
rectified flow: on the straight line x_t = (1 - t) noise + t image the model predicts the velocity, image - noise, and a
sample is what following the predicted velocity from noise at t = 0 leads to at t = 1.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import dico_kernels as dk
from dico_kernels.reference import DiCo

CLASSES = 10
SIZE = 8  # DiCo halves its input twice: H and W are multiples of 4
TIMESTEPS = 1000  # the range the timestep embedder was made for; t runs from 0 to 1 here


def load_data(device: str = "cpu") -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits: images (1797, 1, 8, 8), float32 in -1..1, and labels (1797,), int64."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device=device)[:, None]
    return images / 8 - 1, torch.tensor(digits.target, device=device)  # their grey levels are 0..16


def make_model(fuse: bool = True, seed: int = 0, device: str = "cpu") -> DiCo:
    """A DiCo of 1.1 million parameters for these images, at its initialisation."""
    torch.manual_seed(seed)
    model = dk.create_model(
        "DiCo-S",
        fused=False,
        in_channels=1,
        num_classes=CLASSES,
        hidden_size=32,
        depth=(1, 1, 2, 1, 1),
        learn_sigma=False,
        class_dropout_prob=0.1,  # one label in ten becomes the null label: guidance needs both kinds of prediction
    ).to(device)
    if fuse:
        dk.fuse(model)
    return model


def train(
    model: DiCo, images: Tensor, labels: Tensor, steps: int, seed: int = 0, batch: int = 64, lr: float = 3e-3
) -> tuple[DiCo, list[float]]:
    """Train in place.

    Returns:
        The exponential moving average of the model, in evaluation mode, and the loss of every step.
    """
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 2), pct_start=0.1)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    losses = []
    model.train()
    progress = tqdm(range(steps), desc="training", unit="step", mininterval=0.5)
    for _ in progress:
        chosen = torch.randint(len(images), (batch,), device=images.device)
        image, noise = images[chosen], torch.randn_like(images[chosen])
        t = torch.randn(batch, device=images.device).sigmoid()  # more often in the middle, where it is hardest
        at = t[:, None, None, None]
        velocity = model((1 - at) * noise + at * image, t * TIMESTEPS, labels[chosen])
        loss = (velocity - (image - noise)).square().mean()

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update_parameters(model)
        losses.append(loss.item())
        progress.set_postfix(loss=f"{np.mean(losses[-100:]):.3f}")
    return ema.module.eval(), losses


@torch.no_grad()
def sample(model: DiCo, labels: Tensor, guidance: float = 2.0, steps: int = 40, seed: int = 0) -> Tensor:
    """One image a label, by Euler steps under classifier-free guidance: (N,) -> (N, 1, 8, 8) in -1..1."""
    torch.manual_seed(seed)
    device, n = labels.device, len(labels)
    x = torch.randn(n, 1, SIZE, SIZE, device=device)
    both = torch.cat([labels, torch.full_like(labels, CLASSES)])  # the labels, then as many null labels
    for step in tqdm(range(steps), desc="sampling", unit="step", mininterval=0.5):
        t = torch.full((1,), step / steps * TIMESTEPS, device=device)
        velocity = model.forward_with_cfg(torch.cat([x, x]), t, both, guidance)[:n]
        x = x + velocity / steps
    return x.clamp(-1, 1)


def save_grid(images: Tensor, columns: int, path: Path, scale: int = 4) -> None:
    """Write images (N, 1, H, W) as a PNG of N / columns rows, ``scale`` times as large, with a gap between them."""
    pixels = torch.nn.functional.pad(images.cpu(), (0, 1, 0, 1), value=-1.0)
    rows, (height, width) = len(pixels) // columns, pixels.shape[2:]
    grid = pixels.reshape(rows, columns, height, width).transpose(1, 2).reshape(rows * height, columns * width)
    picture = Image.fromarray(((grid + 1) * 127.5).round().to(torch.uint8).numpy())
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path, optimize=True)


def main() -> None:
    """Train, sample, save, and say how long each took."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="examples:\n"
        "  python examples/digits.py                         train, then write digits.png: one row a class\n"
        "  python examples/digits.py --no-fuse               the same in plain PyTorch, to compare the times\n"
        "  python examples/digits.py --steps 300 --samples 5 --out quick.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--no-fuse", action="store_true", help="leave the model in plain PyTorch")
    parser.add_argument("--steps", type=int, default=1200, help="training steps (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=20, help="samples a class (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("digits.png"), help="PNG to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    args = parser.parse_args()
    for name in ("steps", "samples"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")

    images, labels = load_data(args.device)
    model = make_model(not args.no_fuse, args.seed, args.device)
    start = time.perf_counter()
    ema, losses = train(model, images, labels, args.steps, args.seed)
    trained = time.perf_counter()
    generated = sample(ema, torch.arange(CLASSES, device=args.device).repeat_interleave(args.samples), seed=args.seed)
    save_grid(generated, args.samples, args.out)
    sampled = time.perf_counter()
    print(
        f"{'plain' if args.no_fuse else 'fused'} on {args.device}: "
        f"trained {args.steps} steps in {trained - start:.1f} s (loss {np.mean(losses[-100:]):.3f}), "
        f"sampled {len(generated)} images in {sampled - trained:.1f} s -> {args.out}"
    )


if __name__ == "__main__":
    main()
