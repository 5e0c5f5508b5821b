"""Judges of generated images: a classifier trained on real ones, and a Fréchet distance with its floor."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from esscher.objectives.metrics import frechet_distance

__all__ = ["Judge", "agreement", "distance", "fit_judge"]


LARGEST_TRAINING_SET = 10_000  # of the classifier, whose cost grows with the square


class Judge(NamedTuple):
    """What was learned from real images; all take images `[N, H, W, C]`."""

    classify: Callable[[np.ndarray], np.ndarray]  # -> labels [N]
    features: Callable[[np.ndarray], np.ndarray]  # -> principal components [N, K]
    real_features: np.ndarray  # [N, K] of the training split
    accuracy: float  # of the classifier on the test split
    floor: float  # Fréchet distance between the real training and test splits


def fit_judge(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], *, components: int = 20, seed: int = 0
) -> Judge:
    """Trains a support vector machine (RBF kernel) and principal components on real images.

    Args:
      train: images `[N, H, W, C]` and labels `[N]`.
      test: the same, held out: they give the classifier's accuracy and the floor of the distance.
      components: how many principal components the Fréchet distance sees, at most.
      seed: of the classifier.
    """
    from sklearn.decomposition import PCA
    from sklearn.svm import SVC

    flat = lambda images: np.asarray(images, np.float64).reshape(len(images), -1)  # noqa: E731
    few = slice(LARGEST_TRAINING_SET)
    machine = SVC(C=10.0, gamma="scale", random_state=seed).fit(flat(train[0][few]), train[1][few])
    images = flat(train[0])
    pca = PCA(min(components, *images.shape), random_state=seed).fit(images)

    def features(images: np.ndarray) -> np.ndarray:
        return pca.transform(flat(images))

    def classify(images: np.ndarray) -> np.ndarray:
        return machine.predict(flat(images))

    real = features(train[0])
    floor = float(frechet_distance(jnp.asarray(real), jnp.asarray(features(test[0]))))
    return Judge(classify, features, real, float(np.mean(classify(test[0]) == test[1])), floor)


def agreement(judge: Judge, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images that the classifier puts into the class that was asked for."""
    return float(np.mean(judge.classify(images) == labels))


def distance(judge: Judge, images: np.ndarray) -> float:
    """Fréchet distance from the real training images, in their principal components; compare with `judge.floor`."""
    return float(frechet_distance(jnp.asarray(judge.real_features), jnp.asarray(judge.features(images))))
