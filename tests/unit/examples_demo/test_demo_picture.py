import subprocess
import sys

import cv2
import numpy as np

from examples.demo.picture import RIGHT, WRONG, draw
from examples.demo.record import EpochRecord, Guess, Run, WindowRecord


def run_with(*guesses: tuple[str, str]) -> Run:
    image = np.full((80, 80, 3), 128, np.uint8)
    windows = [WindowRecord(0.5 + 0.1 * number, 0.1, 640, 1.0 / (1 + number)) for number in range(4)]
    shown = [Guess(image, label, guess, 0.875) for label, guess in guesses]
    return Run([EpochRecord(windows, 0.5), EpochRecord(windows, 0.9)], shown, 5.2)


def pixels_of(path, colour: str) -> int:
    image = cv2.imread(str(path))
    bgr = [int(colour[place : place + 2], 16) for place in (5, 3, 1)]
    return int((np.abs(image.astype(int) - bgr).max(axis=2) < 8).sum())


def test_right_guesses_are_green_and_wrong_ones_red(tmp_path):
    draw(run_with(*[("cat", "cat")] * 20), tmp_path / "right.png")
    assert pixels_of(tmp_path / "right.png", RIGHT) > 500
    assert pixels_of(tmp_path / "right.png", WRONG) == 0
    draw(run_with(*[("cat", "rocket")] * 20), tmp_path / "wrong.png")
    assert pixels_of(tmp_path / "wrong.png", WRONG) > 500
    assert pixels_of(tmp_path / "wrong.png", RIGHT) == 0


def test_nothing_is_cut_at_the_edges_of_the_picture(tmp_path):
    draw(run_with(*[("motorcycle", "astronaut")] * 20), tmp_path / "new folder" / "demo.png")
    image = cv2.imread(str(tmp_path / "new folder" / "demo.png"))
    assert image.shape == (800, 1400, 3)
    frame = np.concatenate([image[:2].ravel(), image[-2:].ravel(), image[:, :2].ravel(), image[:, -2:].ravel()])
    assert (frame == 255).all()
    assert (image[:, :700] < 250).any()
    assert (image[:, 800:] < 250).any()


def test_drawing_needs_neither_pyplot_nor_a_display():
    script = "import sys; import examples.demo.picture; print('matplotlib.pyplot' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
