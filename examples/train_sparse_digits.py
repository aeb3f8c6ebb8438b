"""Train a small 2:4-sparse CNN on real data by the published recipe, and export it to ONNX.

The recipe is the one of Mishra et al., "Accelerating Sparse Deep Neural Networks" (2021,
arXiv:2104.08378), with the rules of its reference implementation, ASP in NVIDIA/apex:

1. train the dense network;
2. prune it once by magnitude to the 2:4 pattern;
3. train again from the pruned weights, with the same schedule and the mask fixed.

The data are scikit-learn's digits: 1,797 scanned 8x8 digits. The first 1,197 train, the last 600 are held out and
never touch a weight, a statistic or a calibration. In dataset order, not shuffled: neighbouring images resemble one
another, so a shuffled split would flatter every row of the table.

    pip install "triton-repo-manager[train]"
    python examples/train_sparse_digits.py --seed 0 --output /tmp/digits
"""

from __future__ import annotations

import argparse
import copy
import itertools
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

TRAINING_IMAGES = 1197
CALIBRATION_IMAGES = 128
OPSET = 17

Masks = dict[str, Tensor]


@dataclass(frozen=True)
class Schedule:
    """One training run; dense training and retraining use the same one, as the recipe says."""

    epochs: int = 40
    batch_size: int = 64
    peak_learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4


@dataclass(frozen=True)
class Digits:
    """Images `[N, 1, 8, 8]` float32 in 0..1 and labels `[N]` int64, split once and for all."""

    train_images: np.ndarray
    train_labels: np.ndarray
    held_out_images: np.ndarray
    held_out_labels: np.ndarray


@dataclass(frozen=True)
class Variants:
    """The three networks of a seed, all with the same layers."""

    dense: nn.Module
    pruned: nn.Module
    sparse: nn.Module


def load_data() -> Digits:
    """Return the digits, scaled from 0..16 to 0..1, in the fixed split."""
    bunch = load_digits()
    images = (bunch.images[:, np.newaxis] / 16).astype(np.float32)
    labels = bunch.target.astype(np.int64)
    cut = TRAINING_IMAGES
    return Digits(images[:cut], labels[:cut], images[cut:], labels[cut:])


def build_network() -> nn.Sequential:
    """Return the untrained CNN: three convolutions with batch normalisation, two linear layers.

    The first convolution (one input channel) and the last layer (ten outputs) cannot take the pattern, by ASP's rule
    in `is_eligible`; they hold 2 % of the weights.
    """

    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (inputs, outputs) in enumerate([(1, 16), (16, 32), (32, 64)], start=1):
        layers[f"conv{number}"] = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        layers[f"norm{number}"] = nn.BatchNorm2d(outputs)
        layers[f"relu{number}"] = nn.ReLU()
        if number > 1:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    layers["linear1"] = nn.Linear(256, 64)
    layers["relu4"] = nn.ReLU()
    layers["linear2"] = nn.Linear(64, 10)
    return nn.Sequential(layers)


def is_eligible(module: nn.Module) -> bool:
    """Tell whether ASP would prune this layer: output channels divide by 8, input channels by 16."""
    if not isinstance(module, nn.Conv2d | nn.Linear):
        return False
    outputs, inputs = module.weight.shape[:2]
    return outputs % 8 == 0 and inputs % 16 == 0


def two_four_mask(weight: Tensor) -> Tensor:
    """Return ASP's mask: of the 6 patterns of 2 in 4, the one with the largest sum of magnitudes.

    Args:
        weight: `[K, C, ...]` with C divisible by 4; groups of four run along C.

    Returns:
        Zeros and ones of the same shape and type.
    """
    kept = list(itertools.combinations(range(4), 2))
    patterns = torch.zeros(len(kept), 4, dtype=weight.dtype)
    for row, columns in enumerate(kept):
        patterns[row, list(columns)] = 1
    channels_last = weight.detach().movedim(1, -1)
    scores = channels_last.reshape(-1, 4).abs() @ patterns.T
    return patterns[scores.argmax(dim=1)].reshape(channels_last.shape).movedim(-1, 1).contiguous()


def masks_of(network: nn.Module) -> Masks:
    """Return the mask of every eligible weight, by the parameter's name."""
    return {f"{name}.weight": two_four_mask(m.weight) for name, m in network.named_modules() if is_eligible(m)}


def apply_masks(network: nn.Module, masks: Masks) -> None:
    """Set the masked weights to zero, in place."""
    with torch.no_grad():
        for name, mask in masks.items():
            network.get_parameter(name).mul_(mask)


def train(network: nn.Module, digits: Digits, schedule: Schedule, seed: int, masks: Masks | None = None) -> None:
    """Train in place: SGD, one-cycle learning rate, images shifted by up to one pixel.

    Args:
        network: what to train.
        digits: only its training part is read.
        schedule: epochs and rates.
        seed: of the order of the images and of their shifts.
        masks: weights to hold at zero; as ASP does, gradients are masked before each step and weights after it.
    """
    held = masks or {}
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.from_numpy(digits.train_images), torch.from_numpy(digits.train_labels)
    steps = -(-len(images) // schedule.batch_size)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=schedule.peak_learning_rate,
        momentum=schedule.momentum,
        weight_decay=schedule.weight_decay,
    )
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.peak_learning_rate, total_steps=schedule.epochs * steps, cycle_momentum=False
    )
    network.train()
    for _ in range(schedule.epochs):
        for batch in torch.randperm(len(images), generator=generator).split(schedule.batch_size):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(shifted(images[batch], generator)), labels[batch])
            loss.backward()
            for name, mask in held.items():
                network.get_parameter(name).grad.mul_(mask)
            optimizer.step()
            apply_masks(network, held)
            rate.step()
    network.eval()


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images `[N, 1, 8, 8]`, each moved by -1, 0 or 1 pixel along both axes, zeros moving in."""
    size = images.shape[-1]
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    offsets = torch.randint(0, 3, (2, len(images), 1), generator=generator)
    rows, columns = offsets + torch.arange(size)
    index = torch.arange(len(images))[:, None, None]
    return padded[index, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def train_variants(seed: int, digits: Digits, schedule: Schedule) -> Variants:
    """Run the recipe: dense, pruned without retraining, pruned and retrained."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # The sum of a gradient depends on how many threads share it; for this size one is faster.
    torch.use_deterministic_algorithms(True)
    dense = build_network()
    train(dense, digits, schedule, seed)
    masks = masks_of(dense)
    pruned = copy.deepcopy(dense)
    apply_masks(pruned, masks)
    sparse = copy.deepcopy(pruned)
    train(sparse, digits, schedule, seed, masks)
    return Variants(dense, pruned, sparse)


def accuracy(network: nn.Module, digits: Digits) -> float:
    """Return the share of held-out images PyTorch classifies right."""
    with torch.no_grad():
        predicted = network(torch.from_numpy(digits.held_out_images)).argmax(dim=1)
    return float((predicted.numpy() == digits.held_out_labels).mean())


def folded(network: nn.Sequential) -> nn.Sequential:
    """Return a copy with every batch normalisation folded into its convolution.

    It scales whole output channels, so a zero stays a zero and the pattern holds.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, layer in copy.deepcopy(network).eval().named_children():
        if isinstance(layer, nn.BatchNorm2d):
            previous = next(reversed(layers))
            layers[previous] = nn.utils.fuse_conv_bn_eval(layers[previous], layer)
        else:
            layers[name] = layer
    return nn.Sequential(layers)


def export_onnx(network: nn.Sequential, path: Path) -> None:
    """Write the network as ONNX: `image` `[batch, 1, 8, 8]` in, `logits` `[batch, 10]` out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # The newer exporter wants onnxscript as well.
        torch.onnx.export(
            folded(network),
            (torch.zeros(2, 1, 8, 8),),
            str(path),
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )


def save_data(digits: Digits, folder: Path) -> None:
    """Write the calibration set (training images only) and the held-out set beside the models."""
    spread = np.linspace(0, len(digits.train_images) - 1, CALIBRATION_IMAGES).round().astype(int)
    np.savez_compressed(folder / "digits_calibration.npz", image=digits.train_images[spread])
    np.savez_compressed(
        folder / "digits_held_out.npz",
        image=digits.held_out_images,
        labels=digits.held_out_labels.astype(np.uint8),
    )


def main() -> None:
    """Train one seed; write the three models and the two data sets; say how accurate they are."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the images' order")
    parser.add_argument("--epochs", type=int, default=Schedule.epochs, help="epochs of each of the two trainings")
    parser.add_argument("--output", type=Path, default=Path("digits"), help="folder for the ONNX models and the data")
    arguments = parser.parse_args()

    arguments.output.mkdir(parents=True, exist_ok=True)
    digits = load_data()
    variants = train_variants(arguments.seed, digits, Schedule(epochs=arguments.epochs))
    for name in ("dense", "pruned", "sparse"):
        network = getattr(variants, name)
        path = arguments.output / f"digits_{name}.onnx"
        export_onnx(network, path)
        print(f"{path}: {accuracy(network, digits):.2%} of {len(digits.held_out_labels)} held-out images right")
    save_data(digits, arguments.output)


if __name__ == "__main__":
    main()
