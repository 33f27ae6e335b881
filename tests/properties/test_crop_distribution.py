"""The regions of RandomResizedCrop are distributed as torchvision's are."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest

from loaders import RandomResizedCrop
from loaders.randomness.streams import enter_sample, leave_sample

DRAWS = 4000
# The Kolmogorov-Smirnov statistic of two equal distributions exceeds this once in 10,000 times.
THRESHOLD = math.sqrt(-math.log(1e-4 / 2) / DRAWS)

SIZES = [(470, 400), (500, 100), (90, 1200), (33, 45)]
LIMITS = [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.5, 0.9), (0.5, 2.0)), ((0.9, 1.0), (2.0, 3.0))]


def documented_rule(width, height, scale, ratio, rng):
    """(left, top, width, height) by the rule that torchvision documents: its own code where it is installed."""
    if importlib.util.find_spec("torchvision"):
        import torch
        from torchvision.transforms import RandomResizedCrop as Theirs

        top, left, down, across = Theirs.get_params(torch.zeros(1, height, width), list(scale), list(ratio))
        return left, top, across, down
    for _ in range(10):
        area = rng.uniform(*scale) * width * height
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            return rng.integers(0, width - across + 1), rng.integers(0, height - down + 1), across, down
    across, down = width, height
    if width / height < min(ratio):
        down = round(width / min(ratio))
    elif width / height > max(ratio):
        across = round(height * max(ratio))
    return (width - across) // 2, (height - down) // 2, across, down


def distance(one, other):
    """The largest distance between the two cumulative distributions."""
    one, other = np.sort(one), np.sort(other)
    values = np.union1d(one, other)
    return np.abs(np.searchsorted(one, values, "right") - np.searchsorted(other, values, "right")).max() / DRAWS


def views(regions):
    """What is compared, one number per region each: single quantities, and pairs, which show dependences."""
    left, top, width, height = np.array(regions, float).T
    return {
        "left": left,
        "top": top,
        "width": width,
        "height": height,
        "area": width * height,
        "ratio": width / height,
        "right": left + width,
        "bottom": top + height,
        "place": left * 3 - top,
        "place within size": left / width + top / height,
    }


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("size", SIZES)
def test_regions_are_distributed_as_torchvisions(size, limits):
    rng = np.random.default_rng(7)
    if importlib.util.find_spec("torchvision"):
        import torch

        torch.manual_seed(7)
    expected = [documented_rule(*size, *limits, rng) for _ in range(DRAWS)]
    crop, drawn = RandomResizedCrop(224, *limits), []
    for position in range(DRAWS):
        enter_sample(11, 3, position)
        drawn.append(crop.region(*size))
    leave_sample()
    expected, drawn = views(expected), views(drawn)
    far = {name: distance(drawn[name], expected[name]) for name in drawn}
    assert {name: value for name, value in far.items() if value > THRESHOLD} == {}


def test_the_comparison_sees_small_differences():
    rng = np.random.default_rng(7)
    one = views([documented_rule(470, 400, *LIMITS[0], rng) for _ in range(DRAWS)])
    other = views([documented_rule(470, 400, (0.15, 1.0), (3 / 4, 4 / 3), rng) for _ in range(DRAWS)])
    assert distance(one["area"], other["area"]) > THRESHOLD
    other = views([documented_rule(470, 400, (0.08, 1.0), (0.7, 4 / 3), rng) for _ in range(DRAWS)])
    assert distance(one["ratio"], other["ratio"]) > THRESHOLD
