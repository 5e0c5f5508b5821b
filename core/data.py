"""Labelled image sets with random access, and batches that depend on the step alone.

Sets come from TFDS as ArrayRecord files, so any row is read without the ones before it and without TensorFlow. A batch
is a function of `(seed, step)`: a resumed run replays nothing and sees bitwise what an uninterrupted one sees.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import io
import logging
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from esscher.core.errors import UsageError

__all__ = ["Images", "Source", "Table", "arrays", "batches", "load", "normalise", "prefetch"]

_DIGITS_VERSION = "1.0.0"
_DIGITS_TEST_SIZE = 297  # of 1,797
_KEEP_DECODED_BELOW = 2**30  # bytes


class Images:
    """One split of a labelled image set: `images[i]` is `{"image": uint8[H,W,C], "label": int}`.

    Decoding a PNG costs some 0.1 ms, ten times a training step's budget per batch; so splits below a gigabyte stay
    decoded in memory, each row from its first use on.
    """

    def __init__(self, source: Sequence[Any], shape: tuple[int, int, int], num_classes: int, folder: Any = None):
        """Wraps a TFDS data source; `shape` is `(H, W, C)`, and `folder` where it lies, for errors."""
        self.shape = shape
        self.num_classes = num_classes
        self._source, self._folder = source, folder
        n = len(source)
        self._decoded = np.zeros(n, bool) if n * math.prod(shape) <= _KEEP_DECODED_BELOW else None
        if self._decoded is not None:
            self._images, self._labels = np.empty((n, *shape), np.uint8), np.empty(n, np.int32)

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._source)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One row."""
        images, labels = self.rows(np.array([row]))
        return {"image": images[0], "label": int(labels[0])}

    def rows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images `uint8[n,H,W,C]` and labels `int32[n]` of the given rows, `int[n]`."""
        if self._decoded is None:
            return self._decode(rows)
        missing = np.unique(rows[~self._decoded[rows]])
        if missing.size:
            self._images[missing], self._labels[missing] = self._decode(missing)
            self._decoded[missing] = True
        return self._images[rows], self._labels[rows]

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The rows as a batch: `{"image": float32[n,H,W,C] in [-1, 1], "label": int32[n]}`."""
        images, labels = self.rows(rows)
        return {"image": normalise(images), "label": labels}

    def _decode(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        try:
            examples = self._source.__getitems__([int(row) for row in rows])
            images, labels = (np.array([x[name] for x in examples]) for name in ("image", "label"))
        except Exception as error:  # whatever a damaged file makes TFDS raise
            raise _damaged(self._folder, error) from error
        if labels.min() < 0 or labels.max() >= self.num_classes:
            got = f"got {labels.min()} to {labels.max()}"
            raise UsageError(f"labels in {self._folder} must be 0 to {self.num_classes - 1}, {got}: take another split")
        return images, labels.astype(np.int32)


def normalise(images: np.ndarray) -> np.ndarray:
    """Pixels from `0 .. 255` to `[-1, 1]` in float32: `x / 127.5 - 1`."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def arrays(source: Images) -> tuple[np.ndarray, np.ndarray]:
    """The whole split in its stored order: images `float32[N,H,W,C]` in `[-1, 1]` and labels `int32[N]`."""
    images, labels = source.rows(np.arange(len(source)))
    return normalise(images), labels


class Source(Protocol):
    """Rows with random access."""

    def __len__(self) -> int:
        """The number of rows."""

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The given rows, `int[n]`, as arrays with `n` rows each."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of arrays that fit into memory."""

    columns: dict[str, np.ndarray]  # of one length

    def __post_init__(self) -> None:
        """Checks the lengths."""
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns must be of one length, got {lengths}")

    def __len__(self) -> int:
        """The number of rows."""
        return len(next(iter(self.columns.values())))

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The given rows, `int[n]`."""
        return {name: column[rows] for name, column in self.columns.items()}


# --- batches ----------------------------------------------------------------------------------------------------------


def batches(source: Source, *, batch_size: int, seed: int, shuffle: bool = True) -> Any:
    """An endless Grain dataset of batches: `batches[step]` is the batch of that step, on any machine.

    The rows of all epochs stand in one line, each epoch permuted anew; step `k` takes rows `k B .. (k + 1) B` of the
    line.

    Args:
      source: the rows.
      batch_size: `B`, over all devices.
      seed: non-negative; with the epoch it fixes the permutation.
      shuffle: whether to permute; without it every epoch is in stored order.

    Returns:
      A `grain.MapDataset` of what `source.read` gives for `B` rows.

    Raises:
      ValueError: an empty source, or a batch size below 1.
    """
    import grain

    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not len(source):
        raise ValueError("source must have at least one row, got an empty one")
    n = len(source)

    # Grain's own shuffle walks a cipher, row by row: 24 us a row, 3 ms for a batch of 128. A permutation kept per epoch
    # costs 30 us a batch, and random access stays.
    @functools.lru_cache(maxsize=2)
    def order(epoch):
        return np.random.default_rng([seed, epoch]).permutation(n) if shuffle else np.arange(n)

    def read(step):
        epochs, offsets = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n)
        rows = np.concatenate([order(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)])
        return source.read(rows)

    return grain.MapDataset.range(sys.maxsize).map(read)


def prefetch(dataset: Any, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """The batches of `dataset` from step `start` on, made ahead of time by two threads."""
    import grain

    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(dataset[start:].to_iter_dataset(options))


# --- data sets --------------------------------------------------------------------------------------------------------


def load(name: str = "digits", split: str = "train", data_dir: str | os.PathLike | None = None) -> Images:
    """A split of a labelled image set, prepared on first use.

    "digits" are the 1,797 handwritten digits that scikit-learn carries (8 x 8; its 0 .. 16 become 0 .. 255), 1,500 in
    "train" and 297 in "test", every class in proportion. Any other name is TFDS's; a set that already lies in
    `data_dir` needs neither a network nor TensorFlow.

    Args:
      name: "digits" or a TFDS name such as "mnist".
      split: a split or a slice of one, `"train[:80%]"`.
      data_dir: an existing folder of TFDS data sets; by default `$ESSCHER_DATA_DIR`, or else `~/.cache/esscher/data`.

    Returns:
      The split, with `shape = (H, W, C)` and `num_classes`.

    Raises:
      UsageError: an unknown name or split, a missing folder, a set that cannot be prepared or is not labelled images.
    """
    folder = _data_dir(data_dir, name)
    with _quiet():
        builder = _digits(folder) if name == "digits" else _from_tfds(name, folder)
        shape, num_classes = _image_features(builder, name)
        splits = list(builder.info.splits)
        try:
            source = builder.as_data_source(split)
        except NotImplementedError:
            stored = builder.info.file_format.value
            raise UsageError(
                f"data set {name!r} lies in {folder} as {stored}, which has no random access; {_how_to_prepare(name)}"
            ) from None
        except ValueError as error:
            if split in splits:
                raise _damaged(builder.data_dir, error) from error
            raise UsageError(f"data set {name!r} has no split {split!r}; it has {', '.join(splits)}") from None
        images = Images(source, shape, num_classes, builder.data_dir)
        images[0]  # if the files are cut, it is said now
    return images


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No advice from TFDS (that OpenCV is faster, that a folder is new): nothing a user of this package can act on."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _data_dir(data_dir: str | os.PathLike | None, name: str) -> pathlib.Path:
    given = data_dir or os.environ.get("ESSCHER_DATA_DIR")
    folder = pathlib.Path(given or "~/.cache/esscher/data").expanduser().absolute()
    if given and not folder.is_dir():
        raise UsageError(
            f"data folder {folder} does not exist; give one that does, it then holds (or will hold) {name!r}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        advice = "give another one with --data-dir or ESSCHER_DATA_DIR"
        raise UsageError(f"cannot make the data folder {folder} ({error.strerror}); {advice}") from None
    return folder


def _damaged(folder: Any, error: Exception) -> UsageError:
    return UsageError(f"data in {folder} is damaged ({_first_line(error)}); delete that folder and run again")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _how_to_prepare(name: str) -> str:
    return (
        f"prepare it once with `tfds build {name} --file_format=array_record --data_dir=DIR` where there is a network "
        f"and TensorFlow, then give --data-dir=DIR"
    )


def _image_features(builder: Any, name: str) -> tuple[tuple[int, int, int], int]:
    features = dict(builder.info.features or {})
    image, label = features.get("image"), features.get("label")
    shape = tuple(getattr(image, "shape", ()))
    if len(shape) != 3 or None in shape or image.np_dtype != np.uint8 or not getattr(label, "num_classes", None):
        raise UsageError(
            f"data set {name!r} is not labelled 8-bit images of one size; choose one such as mnist, cifar10"
        )
    return shape, label.num_classes


# TFDS retries for minutes before it says that there is no network; a name that does not resolve says it at once.
_PREPARE = """
import socket, sys, urllib.parse, urllib.request
import tensorflow_datasets as tfds
builder = tfds.builder(sys.argv[1], data_dir=sys.argv[2], file_format="array_record")
hosts = {urllib.parse.urlsplit(url).hostname for url in builder.url_infos or () if "://" in url}
for host in hosts if not urllib.request.getproxies() else ():
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        sys.exit(f"no network: cannot find {host}")
builder.download_and_prepare()
"""


def _from_tfds(name: str, folder: pathlib.Path) -> Any:
    """A builder that reads a prepared TFDS set from its files alone.

    The set's own code, where it is needed, runs in another process: it may want TensorFlow, which would take this one's
    accelerators.
    """
    import tensorflow_datasets as tfds

    try:
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError:
        pass  # not there yet
    except Exception as error:  # a name that TFDS cannot parse, or files that it cannot
        raise UsageError(f"TFDS cannot open data set {name!r} in {folder}: {_first_line(error)}") from error
    known = tfds.list_builders(with_community_datasets=False)
    if re.split("[/:]", name)[0] not in known:
        near = difflib.get_close_matches(name, ["digits", *known])
        hint = f"did you mean {' or '.join(near)}?" if near else "the names are 'digits' and those TFDS lists"
        raise UsageError(f"unknown data set {name!r}; {hint}")
    print(f"preparing data set {name!r} in {folder}, this once", flush=True)
    done = subprocess.run([sys.executable, "-c", _PREPARE, name, folder], capture_output=True, text=True, check=False)
    try:  # whatever the exit code: another process may have been first
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1][:300]
        raise UsageError(
            f"data set {name!r} could not be prepared in {folder} ({reason}); {_how_to_prepare(name)}"
        ) from None


def _digits(folder: pathlib.Path) -> Any:
    """The builder of the digits, prepared aside and moved into place at once.

    So neither a process killed on the way nor two that start together can leave half of it; the second's is dropped.
    """
    import tensorflow_datasets as tfds

    final = folder / "digits" / _DIGITS_VERSION
    if not final.exists():
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".preparing-") as aside:
                silence = io.StringIO()  # TFDS reports progress in a dozen bars
                with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
                    _digits_builder_class()(data_dir=aside, file_format="array_record").download_and_prepare()
                final.parent.mkdir(exist_ok=True)
                os.rename(pathlib.Path(aside, "digits", _DIGITS_VERSION), final)
        except OSError as error:
            if not final.exists():
                raise UsageError(f"cannot prepare the digits in {folder}: {error}") from error
    try:
        return tfds.builder_from_directory(final)
    except Exception as error:  # JSON, protobuf and TFDS errors alike
        raise UsageError(f"data in {final} is damaged; delete that folder and run again") from error


@functools.cache
def _digits_builder_class() -> type:
    import tensorflow_datasets as tfds
    from PIL import Image
    from sklearn import datasets

    class Digits(tfds.core.GeneratorBasedBuilder):
        """The handwritten digits of scikit-learn."""

        VERSION = tfds.core.Version(_DIGITS_VERSION)
        code_path = None  # there are no checksum files to look for beside this module

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description="1,797 handwritten digits, 8 x 8, from 43 people (UCI, as carried by scikit-learn).",
                homepage="https://archive.ics.uci.edu/dataset/80",
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(8, 8, 1)),
                        "label": tfds.features.ClassLabel(num_classes=10),
                    }
                ),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager):
            digits = datasets.load_digits()
            test = _stratified_test_rows(digits.target, _DIGITS_TEST_SIZE)
            return {
                "train": self._generate_examples(digits, sorted(set(range(len(digits.target))) - test)),
                "test": self._generate_examples(digits, sorted(test)),
            }

        def _generate_examples(self, digits, rows):
            for row in rows:
                pixels = np.rint(digits.images[row] * (255 / 16)).astype(np.uint8)
                # As a PIL image, because from an array TFDS would make the PNG with TensorFlow.
                yield row, {"image": Image.fromarray(pixels), "label": int(digits.target[row])}

    return Digits


def _stratified_test_rows(labels: np.ndarray, size: int) -> set[int]:
    """About `size` rows, each class in proportion, chosen by a hash so that no library's generator can change them."""

    def rank(row):
        return hashlib.sha256(f"esscher digits {row}".encode()).digest()

    chosen = set()
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label).tolist()
        chosen.update(sorted(rows, key=rank)[: round(len(rows) * size / len(labels))])
    return chosen
