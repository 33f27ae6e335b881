"""Train a tiny detector on a COCO file of discs; boxes stay ragged up to the loss: `python examples/detect.py`."""

import argparse
import json
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from loaders import Albumentations, CocoDetection, DataLoader, DevicePrefetcher, Normalize

SIDE, STRIDE = 96, 8  # pixels: of a picture, of a cell of the network's last layer
CATEGORIES = [{"id": 0, "name": "red"}, {"id": 1, "name": "green"}]
NORMALIZE = Normalize((0.5,) * 3, (0.25,) * 3, torch.float32)


def draw(folder: Path, count: int) -> Path:
    """Draw pictures of up to three discs, and the COCO file that describes them."""
    rng, images, boxes = np.random.default_rng(0), [], []
    folder.mkdir(exist_ok=True)
    for number in range(count):
        picture = rng.integers(0, 90, (120, 160, 3), np.uint8)
        for left in rng.choice([0, 53, 106], rng.integers(0, 4), replace=False).tolist():
            kind, radius, middle = (int(rng.integers(*limits)) for limits in ((0, 2), (10, 26), (30, 90)))
            cv2.circle(picture, (left + radius, middle), radius, ((60, 60, 220), (60, 220, 60))[kind], -1)
            box = {"bbox": [left, middle - radius, 2 * radius, 2 * radius], "iscrowd": 0, "id": len(boxes)}
            boxes.append(box | {"image_id": number, "category_id": kind})
        images.append({"id": number, "file_name": f"{number}.jpg", "width": 160, "height": 120})
        cv2.imwrite(str(folder / f"{number}.jpg"), picture)
    (folder / "boxes.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": CATEGORIES}))
    return folder / "boxes.json"


def targets(boxes: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each cell the class of the disc over it, 2 for none, and the distances to the sides of its box, in cells."""
    middles = (torch.arange(SIDE // STRIDE, device=boxes.device) + 0.5) * STRIDE
    cells = torch.cartesian_prod(middles, middles).flip(1)[:, None]  # x and y, row by row
    nowhere = boxes.new_full((1, 4), -SIDE)  # a picture without discs has boxes of shape (0, 4)
    boxes, labels = torch.cat([boxes, nowhere]), torch.cat([labels, labels.new_full((1,), 2)])
    distances = torch.cat([cells - boxes[:, :2], boxes[:, 2:] - cells], -1) / STRIDE
    nearest, disc = distances.amin(-1).max(-1)
    return torch.where(nearest > 0, labels[disc], 2), distances[torch.arange(len(cells)), disc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    boxes = A.BboxParams("pascal_voc", label_fields=["labels"], min_visibility=0.3)
    pipeline = Albumentations(A.Compose([A.RandomCrop(SIDE, SIDE), A.HorizontalFlip()], bbox_params=boxes))
    dataset = CocoDetection("discs", draw(Path("discs"), 96), pipeline)
    loader = DataLoader(dataset, 16, True, num_workers=options.workers, fields=dataset.ragged_fields, seed=0)
    shapes = (3, 16, 3, 2, 1), (16, 32, 3, 2, 1), (32, 48, 3, 2, 1), (48, 48, 5, 1, 2)
    net = nn.Sequential(*[each for shape in shapes for each in (nn.Conv2d(*shape), nn.SiLU())], nn.Conv2d(48, 7, 1))
    optimizer = torch.optim.AdamW(net.to(device).parameters(), lr=5e-3)
    for epoch in range(options.epochs):
        figures = []
        for batch in DevicePrefetcher(loader, device, transform=NORMALIZE):
            wanted, sides = map(torch.stack, zip(*map(targets, batch["boxes"], batch["labels"]), strict=True))
            scores, found = net(batch["image"]).flatten(2).mT.split([3, 4], -1)  # (B, cells, 3), (B, cells, 4)
            loss = F.cross_entropy(scores.mT, wanted) + F.l1_loss(found[wanted < 2], sides[wanted < 2])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            figures.append([loss.item(), (scores.argmax(-1) == wanted)[wanted < 2].float().mean().item()])
        loss, right = np.mean(figures, 0)
        print(f"epoch {epoch}: loss {loss:.3f}, {right:.0%} of cells on discs classified correctly")


if __name__ == "__main__":
    main()
