"""Train a small network on a folder of photographs.

python examples/train.py                      the demo's photographs
python examples/train.py FOLDER --epochs 5    FOLDER/train/<class>/*.jpg and FOLDER/val/<class>/*.jpg
"""

import argparse
from pathlib import Path

import albumentations as A
import torch
from demo.network import SIZE, SmallNet, normalise, save
from demo.photos import demo_photos
from torch.nn import functional as F

from loaders import Albumentations, DataLoader, DevicePrefetcher, ImageFolder

AUGMENT = A.Compose(
    [
        A.RandomResizedCrop(size=(SIZE, SIZE), scale=(0.5, 1.0)),
        A.HorizontalFlip(p=0.5),
        A.ColorJitter(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.01),
    ]
)
RESIZE = A.Compose([A.Resize(SIZE, SIZE)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="default: the demo's photographs")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("network.pt"), help="where to save the trained network")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = options.folder or demo_photos()

    # Datasets do not use torch: a sample is {"image": uint8 (H, W, 3) RGB, "label": int}.
    train_set = ImageFolder(folder / "train", transform=Albumentations(AUGMENT))
    val_set = ImageFolder(folder / "val", transform=Albumentations(RESIZE))
    # `seed` fixes the order and every augmentation, with any number of workers.
    loader = DataLoader(train_set, batch_size=64, shuffle=True, num_workers=options.workers, seed=0)
    val_loader = DataLoader(val_set, batch_size=64, num_workers=options.workers)

    # uint8 is copied to the device; `normalise` converts it to float there.
    batches = DevicePrefetcher(loader, device, transform=normalise)
    val_batches = DevicePrefetcher(val_loader, device, transform=normalise)

    net = SmallNet(len(train_set.classes)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=options.epochs * len(loader))

    for epoch in range(1, options.epochs + 1):
        net.train()
        for batch in batches:
            loss = F.cross_entropy(net(batch["image"]), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

        net.eval()
        with torch.inference_mode():
            right = sum((net(batch["image"]).argmax(1) == batch["label"]).sum() for batch in val_batches)
        print(
            f"epoch {epoch}: loss {loss.item():.3f}, validation accuracy {right.item() / len(val_set):.1%}", flush=True
        )

    save(options.out, net, train_set.classes)
    print(loader.report().verdict)


if __name__ == "__main__":  # workers may be started by importing this file
    main()
