"""Train on a GPU as if the data were already there. The same script runs on a CPU.

python examples/train_device.py                      the demo's photographs
python examples/train_device.py FOLDER --epochs 5    FOLDER/train/<class>/*.jpg and FOLDER/val/<class>/*.jpg
"""

import argparse
from pathlib import Path

import albumentations as A
import torch
from demo.network import MEAN, SIZE, STD, SmallNet
from demo.photos import demo_photos
from torch.nn import functional as F

from loaders import Albumentations, DataLoader, DevicePrefetcher, ImageFolder, MixUp, Normalize, ScalarLog

AUGMENT = A.Compose([A.RandomResizedCrop(size=(SIZE, SIZE), scale=(0.5, 1.0)), A.HorizontalFlip(p=0.5)])
RESIZE = A.Compose([A.Resize(SIZE, SIZE)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="default: the demo's photographs")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"training on {device}")
    folder = options.folder or demo_photos()
    train_set = ImageFolder(folder / "train", transform=Albumentations(AUGMENT))
    val_set = ImageFolder(folder / "val", transform=Albumentations(RESIZE))
    settings = {"batch_size": 64, "num_workers": options.workers, "persistent_workers": options.workers > 0}
    loader = DataLoader(train_set, shuffle=True, seed=0, **settings)

    # Workers write uint8 into page-locked slots, the copy engine reads from them while the model computes, and the
    # device normalises and mixes the batches.
    normalize = Normalize(MEAN, STD, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    mix = MixUp(len(train_set.classes), alpha=0.1)
    batches = DevicePrefetcher(loader, device, transform=lambda batch: mix(normalize(batch)))
    val_batches = DevicePrefetcher(DataLoader(val_set, **settings), device, transform=normalize)

    net = SmallNet(len(train_set.classes)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=options.epochs * len(loader))
    log, step = ScalarLog(every=max(1, options.epochs * len(loader) // 4)), 0

    for _ in range(options.epochs):
        net.train()
        for batch in batches:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = F.cross_entropy(net(batch["image"]), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            # The sums stay on the device. They are sent to the host every few steps, and no step waits for them.
            if (means := log.add({"loss": loss})) is not None:
                print(f"step {step:5}: loss {means['loss']:.3f}", flush=True)
    if (means := log.flush()) is not None:
        print(f"step {step:5}: loss {means['loss']:.3f}")

    net.eval()
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        right = sum((net(batch["image"]).argmax(1) == batch["label"]).sum() for batch in val_batches)
    print(f"validation accuracy {right.item() / len(val_set):.1%}")


if __name__ == "__main__":  # workers may be started by importing this file
    main()
