"""Train the sample model of `samples/`: a small depthwise-separable CNN on scikit-learn's handwritten digits.

    python tools/train_sample.py            writes samples/digits.pt2, digits_calibration.npz and digits_test.npz
    python tools/train_sample.py --check    trains again and compares with what is in samples/, writing nothing there

The same machine and package versions give the same bytes; another processor may round differently and train other weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
FILES = ("digits.pt2", "digits_calibration.npz", "digits_test.npz")
SEED = 0
EPOCHS = 30
BATCH = 32
CALIBRATION_IMAGES = 256


class Separable(nn.Module):
    """A depthwise 3x3 and a pointwise 1x1 convolution, each with batch norm, and the two kinds of relu."""

    def __init__(self, channels_in: int, channels_out: int, *, stride: int = 1):
        super().__init__()
        self.residual = stride == 1 and channels_in == channels_out
        self.depthwise = nn.Conv2d(channels_in, channels_in, 3, stride, 1, groups=channels_in, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.relu1 = nn.ReLU6()
        self.pointwise = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.depthwise(x)))
        y = self.relu2(self.norm2(self.pointwise(y)))
        return x + y if self.residual else y


class DigitsNet(nn.Module):
    """`[N, 1, 8, 8]` images in [-1, 1] to `[N, 10]` logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Separable(16, 32), Separable(32, 32), Separable(32, 64, stride=2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.pool(self.blocks(self.stem(images))).flatten(1))


def split_digits() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Train images, test images, train labels, test labels: a stratified split of the 1797 digits, a quarter held out."""
    digits = load_digits()
    images = (digits.images[:, None] / 8.0 - 1.0).astype(np.float32)  # 0..16 to [-1, 1]
    labels = digits.target.astype(np.int64)
    train, test, train_labels, test_labels = train_test_split(images, labels, test_size=0.25, random_state=SEED, stratify=labels)
    return train, test, train_labels, test_labels


def train(images: Tensor, labels: Tensor) -> DigitsNet:
    """The trained model in eval mode. Every epoch sees the images shifted by up to one pixel."""
    torch.manual_seed(SEED)
    model = DigitsNet().train()
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps)
    padded = nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images))[: steps // EPOCHS * BATCH].split(BATCH):
            down, right = torch.randint(0, 3, (2,)).tolist()
            batch = padded[chosen, :, down : down + 8, right : right + 8]
            loss = nn.functional.cross_entropy(model(batch), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def export(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The captured model with a dynamic batch, without what names this machine's files."""
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                for key in ("stack_trace", "from_node", "nn_module_stack", "custom"):
                    node.meta.pop(key, None)
    return program


def write(folder: Path) -> float:
    """Train, write the three files into `folder`, and return the accuracy on the held-out test images."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    images, test_images, labels, test_labels = split_digits()
    model = train(torch.from_numpy(images), torch.from_numpy(labels))
    correct = model(torch.from_numpy(test_images)).argmax(1).numpy() == test_labels
    torch.export.save(export(model, torch.from_numpy(images[:2])), folder / FILES[0])
    np.savez_compressed(folder / FILES[1], images=images[:CALIBRATION_IMAGES])
    np.savez_compressed(folder / FILES[2], images=test_images, labels=test_labels)
    return float(correct.mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the files in samples/ and write nothing there")
    if not parser.parse_args().check:
        SAMPLES.mkdir(exist_ok=True)
        print(f"test accuracy {write(SAMPLES):.2%}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        print(f"test accuracy {write(Path(folder)):.2%}")
        changed = [name for name in FILES if (Path(folder) / name).read_bytes() != (SAMPLES / name).read_bytes()]
    print(f"differs: {', '.join(changed)}" if changed else "all files are the same")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
