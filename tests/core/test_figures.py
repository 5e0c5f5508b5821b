"""Figures show every image in its place, and every curve; the same input is the same file."""

import sys

import matplotlib.image
import numpy as np
import pytest

from esscher.core import figures


def pixels(path):
    return matplotlib.image.imread(path)[..., :3]


def test_a_sheet_shows_every_image_pixel_by_pixel_in_its_place(tmp_path):
    images = 1 - np.random.default_rng(0).integers(0, 256, (2, 4, 8, 8, 1)) / 127.5  # what a PNG can hold
    path = figures.image_grid(images, ["w = 0", "w = 1"], ["0", "1"], tmp_path / "sheet.png")
    sheet = pixels(path)
    gap, wide, scale = 2, 10, 4
    left = sheet.shape[1] - 6 - (4 * 32 + 3 * gap + wide)
    for row, col in np.ndindex(2, 4):
        top = 26 + row * (32 + gap + gap)
        start = left + col * (32 + gap) + (wide if col >= 2 else 0)
        shown = sheet[top : top + 32, start : start + 32].reshape(8, scale, 8, scale, 3)
        ink = np.broadcast_to((1 - images[row, col]) / 2, (8, 8, 3))[:, None, :, None]
        np.testing.assert_allclose(shown, np.broadcast_to(ink, shown.shape), atol=1e-6)


def test_captions_stand_under_their_group_and_move_no_column(tmp_path):
    images = np.full((2, 4, 8, 8, 1), 1.0)
    labels = ["a\nof two lines", "b"], ["0", "1"]
    plain = pixels(figures.image_grid(images, *labels, tmp_path / "plain.png"))
    captions = [["", ""], ["", "here"]]
    sheet = pixels(figures.image_grid(images, *labels, tmp_path / "captions.png", captions=captions))
    assert sheet.shape[:2] == (plain.shape[0] + 2 * 24, plain.shape[1])
    left, right = np.split(sheet[-30:, -(4 * 32 + 2 * 2 + 10 + 6) : -6], [2 * 32 + 2 + 5], axis=1)
    assert left.min() == 1  # nothing but paper
    assert right.min() < 0.6
    with pytest.raises(ValueError, match="captions must be 2 rows of 2, one for each group"):
        figures.image_grid(images, *labels, tmp_path / "a.png", captions=[["", ""]])


def test_a_colour_sheet_keeps_its_colours(tmp_path):
    images = np.stack([np.full((8, 8, 3), [1.0, -1.0, 0.0]), np.full((8, 8, 3), [-1.0, 1.0, 5.0])])[:, None]
    sheet = pixels(figures.image_grid(images, ["a", "b"], [""], tmp_path / "sheet.png"))
    for colour in ([1, 0, 128 / 255], [0, 1, 1]):
        assert np.sum(np.abs(sheet - colour).max(-1) < 2 / 255) == 32 * 32


def test_a_sheet_of_the_wrong_shape_or_labels_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"images must be \[R, C, H, W, 1 or 3\], got \[2, 8, 8, 1\]"):
        figures.image_grid(np.zeros((2, 8, 8, 1)), ["a"], ["b"], tmp_path / "a.png")
    with pytest.raises(ValueError, match="2 and 2 labels must divide the 2 x 3 images"):
        figures.image_grid(np.zeros((2, 3, 8, 8, 1)), ["a", "b"], ["c", "d"], tmp_path / "a.png")


def test_figures_of_one_or_many_curves_are_drawn_and_the_same_input_is_the_same_file(tmp_path):
    x = np.arange(1, 31)
    quality = {
        name: (np.array([10, 20, 40]), y / np.array([1, 2, 4]), np.full(3, 0.1)) for name, y in [("a", 1), ("b", 2)]
    }
    panels = {
        "one": [figures.Panel({"loss": (x, 1 / x)}, "step", "loss", log_y=True)],
        "quality": [figures.Panel(quality, "evaluations", "distance", log_x=True, references={"floor": 0.3})] * 2,
        "sweep": [figures.Panel({f"lr={i}": (x, i / x) for i in range(1, 40)}, "step", "loss", log_y=True)],
    }
    for name, drawn in panels.items():
        first, second = (figures.lines(tmp_path / f"{name}{i}.png", *drawn) for i in range(2))
        assert first.read_bytes() == second.read_bytes()
        assert len(np.unique(pixels(first).reshape(-1, 3), axis=0)) > 20
    # Blue is the first label's in both panels, and nothing of Matplotlib's global state was touched.
    blue = np.abs(pixels(tmp_path / "quality0.png") - np.array([0, 0x72, 0xB2]) / 255).max(-1) < 1 / 255
    left, right = np.array_split(blue[:, : int(blue.shape[1] * 0.8)], 2, axis=1)
    assert min(left.sum(), right.sum()) > 50
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
def test_a_logarithmic_axis_without_positive_values_stays_linear(tmp_path, value, recwarn):
    series = {"a": ([1, 2], [value] * 2), "none": ([], [])}
    x, y = (figures.Panel(values, "x", "y", True, True) for values in ({"a": ([value], [1])}, series))
    assert figures.lines(tmp_path / "a.png", x, y).stat().st_size
    assert not [w for w in recwarn if "log" in str(w.message)]


def test_an_empty_panel_is_an_empty_frame(tmp_path):
    assert figures.lines(tmp_path / "a.png", figures.Panel({}, "x", "y", True, True)).stat().st_size
