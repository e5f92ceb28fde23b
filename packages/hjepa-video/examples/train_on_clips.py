"""Train a small VideoHJEPA on a folder of videos: python examples/train_on_clips.py FOLDER --steps 100."""

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence

import torch

from hjepa_data import DataError, ViewGroup
from hjepa_video import ClipStreamConfig, list_clips, video_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and print the loss of each level as it falls."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="videos (mp4, mkv, avi, ...), subfolders included")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="clips of a step")
    parser.add_argument("--model", default="vit_nano_patch8")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--fps", type=float, default=4.0, help="frames a second of a clip")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="decoding threads beside the training")
    options = parser.parse_args(arguments)
    try:
        train(options)
    except (DataError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def train(options: argparse.Namespace) -> None:
    """Run the training loop: loss, backward, step, moving average."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stream = ClipStreamConfig(
        global_batch_size=options.batch,
        frames=options.frames,
        fps=options.fps,
        view=ViewGroup(size=(options.size, options.size)),
        short_side=round(options.size * 1.5),
        threads=options.threads,
    ).build(list_clips(options.folder), seed=options.seed)
    model = video_config(options.model, frames=options.frames, size=options.size).build(seed=options.seed).to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.04)
    start = time.monotonic()
    # A program that ends without closing the stream waits for the batches that are prepared ahead.
    with contextlib.closing(stream):
        for step, batch in zip(range(options.steps), stream, strict=False):
            output = model(batch.to(device), step)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            with torch.no_grad():
                for online, target in model.ema_pairs():
                    for ours, theirs in zip(online.parameters(), target.parameters(), strict=True):
                        theirs.lerp_(ours, 1 - 0.999)
            if step % 10 == 0 or step == options.steps - 1:
                levels = "  ".join(f"{name} {value.item():.3f}" for name, value in output.metrics.items())
                speed = (step + 1) * options.batch / (time.monotonic() - start)
                print(f"step {step:4d}  loss {output.loss.item():.4f}  {levels}  {speed:.1f} clips/s", flush=True)
    if stream.skipped:
        print(f"videos left out: {dict(stream.skipped)}")


if __name__ == "__main__":
    raise SystemExit(main())
