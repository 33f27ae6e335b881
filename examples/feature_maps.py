"""Plot the feature maps of a layer of the demo's network for a photograph, captured by a forward hook.

python examples/feature_maps.py PHOTO.jpg --layer 1

The network is the one that `python -m examples.demo` trained.
"""

import argparse
import sys
from pathlib import Path

import cv2
import torch
from demo.network import MEAN, SIZE, STD, load, normalise
from demo.photos import cache_folder, demo_photos
from matplotlib.figure import Figure

from loaders import as_tensor, read_image, to_image, to_numpy

ROWS, COLUMNS = 3, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path, nargs="?", help="default: one of the demo's validation photographs")
    parser.add_argument("--layer", type=int, default=0, choices=range(5), help="which convolution, counted from 0")
    parser.add_argument("--out", type=Path, default=Path("feature_maps.png"))
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        net, _ = load(cache_folder() / "network.pt")
    except FileNotFoundError as error:
        sys.exit(str(error))
    photo = read_image(options.photo or demo_photos() / "val" / "pagoda" / "001.jpg")
    small = cv2.resize(photo, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    batch = normalise({"image": as_tensor(small, copy=False).to(device)[None]})

    seen = []
    layer = net.to(device).features[options.layer]
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    net(batch["image"])
    hook.remove()
    # They are on the device and part of a graph; `to_numpy` detaches them and copies them to the host in one call.
    maps = to_numpy(seen[0])[0]

    figure = Figure(figsize=(13, 4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2.4))
    axes = left.subplots()
    axes.imshow(to_image(batch["image"], MEAN, STD)[0])
    axes.set_title("input of the network")
    axes.axis("off")
    channels, height, width = maps.shape
    right.suptitle(f"layer {options.layer}: {ROWS * COLUMNS} of {channels} channels, {height} by {width} pixels each")
    for axes, channel in zip(right.subplots(ROWS, COLUMNS).flat, maps, strict=False):
        axes.imshow(channel, cmap="magma")
        axes.axis("off")
    figure.savefig(options.out)
    print(f"Layer {options.layer} on {device}: {channels} maps of {height} by {width}. Picture: {options.out}")


if __name__ == "__main__":
    main()
