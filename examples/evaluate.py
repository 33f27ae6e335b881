"""Run a trained network over a folder of photographs and save its outputs as `.npy` files, in dataset order.

python examples/train.py --out network.pt             trains a network
python examples/evaluate.py                           the demo's validation photographs
python examples/evaluate.py FOLDER --out found        FOLDER/<class>/*.jpg → found/features.npy, found/scores.npy
"""

import argparse
import sys
from pathlib import Path

import albumentations as A
import torch
from demo.network import SIZE, load, normalise
from demo.photos import demo_photos
from torch.nn import functional as F

from loaders import Albumentations, DataLoader, DevicePrefetcher, ImageFolder, OutputCollector, ScalarLog


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="default: the demo's validation photographs")
    parser.add_argument("--network", type=Path, default=Path("network.pt"), help="the file that train.py saved")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("found"))
    options = parser.parse_args()

    if not options.network.exists():
        sys.exit(f'no network at "{options.network}": run `python examples/train.py --out {options.network}` first.')
    net, classes = load(options.network)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net.to(device, memory_format=torch.channels_last)

    dataset = ImageFolder(
        options.folder or demo_photos() / "val", transform=Albumentations(A.Compose([A.Resize(SIZE, SIZE)]))
    )
    if dataset.classes != classes:
        sys.exit(f"the network knows {classes}, the folder has {dataset.classes}.")
    loader = DataLoader(dataset, options.batch_size, num_workers=options.workers, return_index=True)

    # Neither makes the device wait: rows are copied while it works, and sums stay on it until they are sent.
    collector = OutputCollector(len(dataset), options.out)
    log = ScalarLog(every=10)
    samples = 0
    with torch.inference_mode():
        for batch, index in DevicePrefetcher(loader, device):
            features = net.features(normalise(batch)["image"]).mean(dim=(2, 3))
            logits = net.head(features)
            collector.add({"features": features, "scores": logits.softmax(dim=1)}, index)

            loss = F.cross_entropy(logits, batch["label"])
            right = (logits.argmax(dim=1) == batch["label"]).float().mean()
            samples += len(index)
            means = log.add({"loss": loss, "accuracy": right}, weight=len(index))
            if means is not None:
                print(f"at {samples} photographs: {describe(means)}", flush=True)
    rest = log.flush()
    if rest is not None:
        print(f"the rest of {samples} photographs: {describe(rest)}")

    found = collector.result()  # ndarrays over the files: row n belongs to photograph n
    certainty = found["scores"].max(axis=1)
    worst = int(certainty.argmin())
    name, guess = Path(dataset.paths[worst]).name, classes[found["scores"][worst].argmax()]
    print(f"Least certain of {name}: {guess}, {certainty[worst]:.0%}")
    print(f"Saved: {', '.join(f'{name} {array.shape}' for name, array in found.items())} in {options.out}")


def describe(means: dict[str, float]) -> str:
    return f"loss {means['loss']:.3f}, accuracy {means['accuracy']:.1%}"


if __name__ == "__main__":  # workers may be started by importing this file
    main()
