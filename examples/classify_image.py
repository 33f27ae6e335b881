"""Classify one photograph: imread → resize → normalise → network → softmax → to_numpy → plot.

python examples/classify_image.py PHOTO.jpg

Uses torchvision's ResNet-18 if torchvision and its weights are on this machine (nothing is downloaded), else the
network that `python -m examples.demo` trained.
"""

import argparse
import sys
from pathlib import Path

import cv2
import torch
from demo.network import SIZE, load, normalise
from demo.photos import cache_folder, demo_photos
from matplotlib.figure import Figure

from loaders import as_tensor, to_numpy


def resnet18_at_hand():
    """ImageNet's ResNet-18, its classes and its image size; None if torchvision or the weights are missing."""
    try:
        from torchvision.models import ResNet18_Weights, resnet18
    except (ImportError, RuntimeError):  # RuntimeError: a torchvision that was built for another torch
        return None
    weights = ResNet18_Weights.IMAGENET1K_V1
    file = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    if not file.exists():
        return None
    net = resnet18()
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return net.eval(), weights.meta["categories"], 224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path, nargs="?", help="default: one of the demo's validation photographs")
    parser.add_argument("--out", type=Path, default=Path("classified.png"))
    options = parser.parse_args()

    try:
        net, classes, size = resnet18_at_hand() or (*load(cache_folder() / "network.pt"), SIZE)
    except FileNotFoundError as error:
        sys.exit(str(error))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = options.photo or demo_photos() / "val" / "coffee" / "000.jpg"

    bgr = cv2.imread(str(path))
    if bgr is None:
        sys.exit(f'OpenCV cannot read "{path}".')
    rgb = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    small = cv2.resize(rgb, (size, size), interpolation=cv2.INTER_AREA)
    image = as_tensor(small, copy=False).to(device)  # the same bytes, then one copy to the device
    batch = normalise({"image": image[None]})

    scores = net.to(device)(batch["image"]).softmax(dim=1)
    probabilities = to_numpy(scores[0])  # detached, on the host, an ndarray that you own
    best = probabilities.argsort()[::-1][:5]

    figure = Figure(figsize=(9, 4), layout="constrained")
    photo, bars = figure.subplots(1, 2)
    photo.imshow(rgb)
    photo.set_title(f"{classes[best[0]]}, {probabilities[best[0]]:.0%}")
    photo.axis("off")
    bars.barh([classes[index] for index in best][::-1], 100 * probabilities[best][::-1])
    bars.set_xlim(0, 100)
    bars.set_xlabel("probability (%)")
    figure.savefig(options.out)
    print(f"{path.name}: {classes[best[0]]}, {probabilities[best[0]]:.0%}. Picture: {options.out}")


if __name__ == "__main__":
    main()
