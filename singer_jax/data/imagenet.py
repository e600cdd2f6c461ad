"""The classes of ImageNet-1k and the truth of its validation images, from tensorflow_datasets."""

from __future__ import annotations

import importlib.resources
from collections.abc import Collection


def imagenet_wnids() -> list[str]:
    """Returns the WordNet ids of ImageNet-1k's classes, in the order of their labels."""
    return _listed("labels.txt")


def validation_wnids() -> list[str]:
    """Returns the WordNet ids of the validation images, in the order of their numbers."""
    return _listed("validation_labels.txt")


def is_imagenet(class_names: Collection[str]) -> bool:
    """Returns whether classes are ImageNet's, whose images no reader turns by their EXIF tags."""
    return bool(class_names) and set(class_names) <= set(imagenet_wnids())


def _listed(name: str) -> list[str]:
    package = importlib.resources.files("tensorflow_datasets")
    return (package / "datasets" / "imagenet2012" / name).read_text().split()
