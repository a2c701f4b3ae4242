"""Train the demo's model: about 40 minutes on two cores.

    python examples/fashion_mnist/train.py --data /usr/share/datasets/fashion-mnist

The data set is Debian's package dataset-fashion-mnist. The weights are an exponential moving average over the steps;
the test images are looked at once, after the last epoch.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from data import read
from model import FashionNet
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent


def augment(images: Tensor) -> Tensor:
    """Mirror half of the images and shift each by up to two pixels."""
    flip = torch.rand(len(images)) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    rows = torch.randint(0, 5, (len(images), 1)) + torch.arange(28)
    columns = torch.randint(0, 5, (len(images), 1)) + torch.arange(28)
    index = torch.arange(len(images))[:, None, None]
    return padded[:, 0][index, rows[:, :, None], columns[:, None, :]][:, None]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = [(model(x / 255).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500), strict=True)]
    return float(torch.stack(right).sum()) / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--out", type=Path, default=HERE / "weights.safetensors")
    options = parser.parse_args()
    torch.manual_seed(0)

    images, labels = read(options.data, "train")
    model = FashionNet().to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998), use_buffers=True
    )
    steps = options.epochs * (len(labels) // 128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps, pct_start=0.2)
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.05)

    start = time.time()
    for epoch in range(options.epochs):
        model.train()
        for batch in torch.randperm(len(labels)).split(128)[: len(labels) // 128]:
            loss = loss_function(model(augment(images[batch] / 255)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {time.time() - start:.0f} s", flush=True)

    test_images, test_labels = read(options.data, "t10k")
    print(f"test accuracy {100 * accuracy(average.module, test_images, test_labels):.2f} %")
    weights = {name: tensor.contiguous() for name, tensor in average.module.state_dict().items()}
    save_file(weights, options.out)


if __name__ == "__main__":
    main()
