import numpy as np
import pytest

pytest.importorskip("yaml")
pytest.importorskip("matplotlib")

from matplotlib.colors import to_rgb
from PIL import Image

from pipelines import figure

METHODS = ["base", "base_bn", "base_swa", "base_temperature", "base_short", "base_long"]
METHODS += ["dalign", "dalign_better", "letter", "two_phase_random", "solve"]
METHODS += ["last_layer", "another"]


def draw(path):
    colors = [figure.color(method, METHODS) for method in METHODS]
    with figure.drawing(path, figsize=(8, 4)) as drawn:
        axes = drawn.subplots()
        # Much of one colour, and next to nothing of the others.
        axes.imshow(np.linspace(0, 1, 10_000).reshape(100, 100), aspect="auto")
        for k, color in enumerate(colors):
            axes.plot([10 * k], [10 * k], "s", markersize=3, color=color)
    return colors


def test_rare_colors_are_what_was_drawn(tmp_path):
    colors = draw(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert len(image.getcolors()) <= 256
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    for color in colors:
        wanted = np.round(255 * np.array(to_rgb(color)))
        assert np.abs(pixels - wanted).max(axis=1).min() <= 16


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        draw(tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
