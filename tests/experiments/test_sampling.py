"""The report of samples, on images that say which class was asked for."""

import re

import numpy as np
import pytest

from esscher.experiments import sampling
from esscher.experiments.quality import Judge

JUDGE = Judge(lambda images: np.zeros(len(images)), lambda images: images, np.zeros((5, 3)), 0.9, 0.1)


@pytest.mark.parametrize(
    ("classes", "each", "caption"),
    [
        (3, 1, "one sample of each class."),
        (3, 4, "two samples of each class."),
        (12, 1, "one sample of each of the first 10 classes."),
        (12, 2, "two samples of each of the first 10 classes."),
    ],
)
def test_the_sheet_shows_under_each_class_what_was_asked_of_it(tmp_path, monkeypatch, classes, each, caption):
    """Even if some class has no real image, as a data set may have: the judge does not know their number."""
    seen = {}

    def image_grid(images, row_labels, col_labels, path):
        seen.update(images=images, columns=col_labels)
        return path

    monkeypatch.setattr(sampling.figures, "image_grid", image_grid)
    label = np.arange(classes * each) % classes
    sheets = {w: np.broadcast_to(label[:, None, None, None], (label.size, 4, 4, 1)) for w in (0.0, 2.0)}
    guided = {w: sampling.Quality(20, 0.5, 1.0) for w in sheets}
    sections = sampling.report(tmp_path, JUDGE, sheets, guided, {}, classes)
    columns = seen["images"].reshape(2, len(seen["columns"]), -1, 16)
    for column, name in enumerate(seen["columns"]):
        assert np.all(columns[:, column] == int(name))
    assert re.search(r"evaluations; (.*)", sections["Samples by guidance weight"]).group(1) == caption
