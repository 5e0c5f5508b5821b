"""Digits are the real ones; batches depend on seed and step alone; wrong input gives one line."""

import collections
import json
import os
import pathlib
import subprocess
import sys
import time

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn import datasets

from esscher.core import data
from esscher.core.errors import UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    data.load(data_dir=path)
    return path


@pytest.fixture(scope="module")
def train(folder):
    return data.load("digits", "train", folder)


def toy_builder(**features):
    """A class of builders of 12 colour images, as someone else might have prepared them."""

    class ToyShapes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("2.0.0")
        code_path = None

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(12):
                picture = Image.fromarray(np.full((4, 6, 3), 20 * i, np.uint8))
                yield i, {name: picture if name == "image" else i % 3 for name in features}

    return ToyShapes


with tfds.core.registered.skip_registration():
    LABELLED = toy_builder(
        image=tfds.features.Image(shape=(4, 6, 3)), label=tfds.features.ClassLabel(names=["a", "b", "c"])
    )
    UNLABELLED = toy_builder(image=tfds.features.Image(shape=(4, 6, 3)))
    ANY_SIZE = toy_builder(image=tfds.features.Image(), label=tfds.features.ClassLabel(num_classes=3))


def prepare(builder_class, folder):
    builder_class(data_dir=folder, file_format="array_record").download_and_prepare()


def one_line(call, *arguments, **keywords):
    """The message of the UsageError that a call raises, which must be one line."""
    with pytest.raises(UsageError) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- the digits -------------------------------------------------------------------------------------------------------


def test_the_splits_are_scikit_learns_digits_each_once(folder):
    splits = [data.load("digits", split, folder) for split in ("train", "test")]
    assert [len(split) for split in splits] == [1500, 297]
    assert all((split.shape, split.num_classes) == ((8, 8, 1), 10) for split in splits)
    pixels, labels = zip(*(split.rows(np.arange(len(split))) for split in splits), strict=True)
    pixels, labels = np.concatenate(pixels)[..., 0], np.concatenate(labels)
    assert (pixels.dtype, labels.dtype, pixels.max()) == (np.uint8, np.int32, 255)

    def count(images, labels):
        return collections.Counter((x.astype(int).tobytes(), int(y)) for x, y in zip(images, labels, strict=True))

    real = datasets.load_digits()
    assert count(np.rint(pixels * (16 / 255)), labels) == count(real.images, real.target)


def test_every_class_has_its_share_of_the_test_split(folder):
    share = [np.bincount(data.arrays(data.load("digits", split, folder))[1]) for split in ("train", "test")]
    expected = np.bincount(datasets.load_digits().target) * 297 / 1797
    assert np.abs(share[1] - expected).max() <= 0.5
    assert sum(share[1]) == 297


def test_arrays_are_the_rows_mapped_to_plus_minus_one(train):
    images, labels = data.arrays(train)
    assert (images.dtype, images.shape, images.min(), images.max()) == (np.float32, (1500, 8, 8, 1), -1, 1)
    for row in (0, 7, 1499):
        np.testing.assert_allclose(images[row], train[row]["image"] / 127.5 - 1, atol=1e-6)
        assert labels[row] == train[row]["label"]


def test_a_set_too_large_to_keep_decoded_gives_the_same_rows(train, folder, monkeypatch):
    monkeypatch.setattr(data, "_KEEP_DECODED_BELOW", 0)
    rows = np.array([5, 3, 5, 1400])
    for kept, decoded in zip(train.rows(rows), data.load("digits", "train", folder).rows(rows), strict=True):
        np.testing.assert_array_equal(kept, decoded)


PREPARE = """
import os, sys, time
from esscher.core import data
heavy = {"tensorflow_datasets", "grain", "sklearn", "matplotlib", "orbax"} & sys.modules.keys()
assert not heavy, heavy
while time.time() < float(sys.argv[2]):
    pass
source = data.load(data_dir=sys.argv[1])
batches = data.batches(source, batch_size=8, seed=0)
batch = next(data.prefetch(batches, 3))
assert "tensorflow" not in sys.modules
print(len(source), batch["label"].tolist())
"""


def test_two_processes_prepare_at_once_after_a_killed_one_and_none_imports_tensorflow(tmp_path):
    (tmp_path / ".preparing-killed" / "digits" / "1.0.0").mkdir(parents=True)
    start = str(time.time() + 2.5)  # by when both have imported what they need
    command = [sys.executable, "-c", PREPARE, str(tmp_path), start]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert printed[0] == printed[1]
    assert printed[0][0].startswith("1500 ")
    assert printed[0][1] == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == [".preparing-killed", "digits"]


def test_an_interrupted_preparation_leaves_nothing_and_the_next_succeeds(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            data.load(data_dir=tmp_path)
    assert not (tmp_path / "digits" / "1.0.0").exists()
    assert len(data.load(data_dir=tmp_path)) == 1500


# --- batches ----------------------------------------------------------------------------------------------------------


class Rows(list):
    """A data source in memory."""

    def __getitems__(self, keys):
        return [self[key] for key in keys]


def stand_in(n):
    """A split whose row `i` is a 1 x 1 image with the label `i`."""
    return data.Images(Rows({"image": np.full((1, 1, 1), i, np.uint8), "label": i} for i in range(n)), (1, 1, 1), n)


def labels_of(batches, steps):
    return np.stack([batches[step]["label"] for step in steps])


def test_a_batch_is_a_function_of_seed_and_step(train, folder):
    again = data.load("digits", "train", folder)
    batches = data.batches(train, batch_size=32, seed=5)
    assert isinstance(batches, grain.MapDataset)
    for step in (200, 0, 46, 47):
        other = data.batches(again, batch_size=32, seed=5)[step]
        assert {name: (x.dtype, x.shape) for name, x in other.items()} == {
            "image": (np.float32, (32, 8, 8, 1)),
            "label": (np.int32, (32,)),
        }
        for name, x in batches[step].items():
            np.testing.assert_array_equal(x, other[name])
    assert (labels_of(batches, range(3)) != labels_of(data.batches(train, batch_size=32, seed=6), range(3))).any()


def test_every_epoch_has_each_row_once_in_another_order():
    seen = labels_of(data.batches(stand_in(70), batch_size=8, seed=1), range(35)).reshape(4, 70)
    np.testing.assert_array_equal(np.sort(seen), np.tile(np.arange(70), (4, 1)))
    assert all((seen[i] != seen[j]).mean() > 0.8 for i in range(4) for j in range(i))
    assert (seen[0] != np.arange(70)).mean() > 0.8
    # Epochs of one seed are not epochs of its neighbour.
    shifted = labels_of(data.batches(stand_in(70), batch_size=8, seed=2), range(35)).reshape(4, 70)
    assert (seen[1] != shifted[0]).mean() > 0.8


def test_without_shuffling_rows_come_in_stored_order_again_and_again():
    seen = labels_of(data.batches(stand_in(10), batch_size=4, seed=0, shuffle=False), range(5))
    np.testing.assert_array_equal(seen.ravel(), np.arange(20) % 10)


def test_prefetching_starts_at_any_step_and_keeps_the_order(train):
    batches = data.batches(train, batch_size=16, seed=0)
    ahead = data.prefetch(batches, 90)
    for step in range(90, 110):
        np.testing.assert_array_equal(next(ahead)["image"], batches[step]["image"])


@pytest.mark.parametrize("batch_size", [0, -4])
def test_a_batch_size_below_one_is_rejected(batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
        data.batches(stand_in(5), batch_size=batch_size, seed=0)


def test_a_table_gives_rows_of_all_its_columns():
    table = data.Table({"a": np.arange(5), "b": np.arange(10).reshape(5, 2)})
    batch = data.batches(table, batch_size=3, seed=0, shuffle=False)[1]
    np.testing.assert_array_equal(batch["a"], [3, 4, 0])
    np.testing.assert_array_equal(batch["b"], [[6, 7], [8, 9], [0, 1]])


def test_a_table_of_columns_that_differ_in_length_is_rejected():
    with pytest.raises(ValueError, match=r"columns must be of one length, got \{'a': 5, 'b': 4\}"):
        data.Table({"a": np.arange(5), "b": np.zeros((4, 2))})


def test_an_empty_split_is_rejected():
    with pytest.raises(ValueError, match="at least one row"):
        data.batches(stand_in(0), batch_size=1, seed=0)


# --- other data sets, and what users get wrong ------------------------------------------------------------------------


def test_a_prepared_tfds_set_is_read_by_name_without_its_code_or_a_network(tmp_path, monkeypatch):
    prepare(LABELLED, tmp_path)
    monkeypatch.setattr(subprocess, "run", None)
    images = data.load("toy_shapes", "train", tmp_path)
    assert (len(images), images.shape, images.num_classes) == (12, (4, 6, 3), 3)
    for row in range(12):
        value = images[row]["image"]
        assert (value == value[0, 0, 0]).all()
        assert images[row]["label"] == value[0, 0, 0] // 20 % 3
    assert len(data.load("toy_shapes", "train[:25%]", tmp_path)) == 3


@pytest.mark.parametrize("builder", [UNLABELLED, ANY_SIZE])
def test_a_set_that_is_not_labelled_images_of_one_size_is_refused(builder, tmp_path):
    prepare(builder, tmp_path)
    assert "not labelled 8-bit images of one size" in one_line(data.load, "toy_shapes", "train", tmp_path)


def test_a_set_without_random_access_is_refused_with_the_command_that_helps(tmp_path):
    prepare(LABELLED, tmp_path)
    info = tmp_path / "toy_shapes" / "2.0.0" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    assert "tfds build toy_shapes --file_format=array_record" in one_line(data.load, "toy_shapes", "train", tmp_path)


def test_unknown_names_get_one_line_with_the_nearest(folder):
    assert "did you mean mnist" in one_line(data.load, "minst", "train", folder)
    assert "unknown data set 'qqqqq'" in one_line(data.load, "qqqqq", "train", folder)
    assert "'../x'" in one_line(data.load, "../x", "train", folder)


@pytest.mark.parametrize("split", ["validation", "train[:x"])
def test_an_unknown_split_gets_one_line_with_those_there_are(folder, split):
    assert f"has no split '{split}'; it has train, test" in one_line(data.load, "digits", split, folder)


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_a_missing_data_folder_gets_one_line_and_is_not_made(tmp_path, name, monkeypatch):
    missing = tmp_path / "nowhere"
    assert f"{missing} does not exist" in one_line(data.load, name, "train", missing)
    monkeypatch.setenv("ESSCHER_DATA_DIR", str(missing))
    assert f"{missing} does not exist" in one_line(data.load, name)
    assert not missing.exists()


def test_a_data_folder_that_cannot_be_made_gets_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("ESSCHER_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".cache").write_text("a file where a folder should be")
    assert "--data-dir or ESSCHER_DATA_DIR" in one_line(data.load)


def test_no_network_gets_one_line_with_the_reason_and_the_way_out(tmp_path, monkeypatch, capsys):
    def fail(command, **keywords):
        assert command[-2:] == ["mnist", tmp_path]
        return subprocess.CompletedProcess(command, 1, "", "Traceback\n  many lines\nConnectionError: no route\n")

    monkeypatch.setattr(subprocess, "run", fail)
    message = one_line(data.load, "mnist", "train", tmp_path)
    assert "(ConnectionError: no route)" in message
    assert "tfds build mnist --file_format=array_record" in message
    assert capsys.readouterr().out == f"preparing data set 'mnist' in {tmp_path}, this once\n"


def test_a_set_that_another_process_prepared_meanwhile_is_read(tmp_path, monkeypatch):
    def fail_second(command, **keywords):
        with tfds.core.registered.skip_registration():
            builder = type("MNIST", (LABELLED,), {"name": "mnist"})
        prepare(builder, tmp_path)
        return subprocess.CompletedProcess(command, 1, "", "OSError: directory not empty")

    monkeypatch.setattr(subprocess, "run", fail_second)
    assert len(data.load("mnist", "train", tmp_path)) == 12


@pytest.mark.parametrize(
    ("name", "content"),
    [("digits-train.array_record-00000-of-00001", b""), ("dataset_info.json", b"{"), ("features.json", b"")],
)
def test_a_damaged_set_gets_one_line_that_names_the_folder_to_delete(tmp_path, name, content):
    data.load(data_dir=tmp_path)
    prepared = pathlib.Path(tmp_path, "digits", "1.0.0")
    (prepared / name).write_bytes(content)
    assert f"{prepared} is damaged" in one_line(data.load, data_dir=tmp_path)


def test_labels_that_are_no_classes_get_one_line():
    rows = Rows({"image": np.zeros((1, 1, 1), np.uint8), "label": label} for label in (0, 1, -1))
    images = data.Images(rows, (1, 1, 1), 2)
    assert images[1]["label"] == 1
    with pytest.raises(UsageError, match=r"must be 0 to 1, got -1 to 0: take another split"):
        images.rows(np.array([0, 2]))


def test_damage_past_the_first_row_gets_the_same_line_when_it_is_read(tmp_path):
    data.load(data_dir=tmp_path)
    prepared = pathlib.Path(tmp_path, "digits", "1.0.0")
    path = prepared / "digits-train.array_record-00000-of-00001"
    content = bytearray(path.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 2000)
    content[middle] = bytes(255 - x for x in content[middle])
    path.write_bytes(content)
    images = data.load(data_dir=tmp_path)
    assert f"{prepared} is damaged" in one_line(data.arrays, images)
    batches = data.prefetch(data.batches(images, batch_size=len(images), seed=0))
    assert f"{prepared} is damaged" in one_line(next, batches)
