"""Writes every data set of Table 1, tiny, in the layout and formats of its official archive."""

import json
from pathlib import Path

import h5py
import numpy as np
import scipy.io
from PIL import Image

from singer_jax.data.imagenet import imagenet_wnids

WNIDS = [imagenet_wnids()[index] for index in (0, 7, 999)]


def picture(seed: int, size: tuple[int, int] = (30, 24)) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def save(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path, quality=95)


def imagenet(root: Path) -> None:
    for split, count in (("train", 4), ("val", 2)):
        for label, wnid in enumerate(WNIDS):
            for number in range(count):
                save(root / "imagenet" / split / wnid / f"{number}.JPEG", 100 * label + number)


def imagenet_v2(root: Path) -> None:
    for name in ("0", "7", "10", "999"):
        for number in range(2):
            folder = root / "imagenetv2-matched-frequency-format-val" / name
            save(folder / f"{number}.jpeg", 50 + int(name) + number)


def imagenet_r(root: Path) -> None:
    for label, wnid in enumerate(WNIDS[:2]):
        save(root / "imagenet-r" / wnid / "art_0.jpg", 300 + label)


def ade20k(root: Path) -> None:
    for split, count in (("training", 4), ("validation", 3)):
        for number in range(count):
            name = f"ADE_{split[:3]}_{number:08}"
            save(root / "ADEChallengeData2016" / "images" / split / f"{name}.jpg", number)
            mask = np.random.default_rng(number).integers(0, 4, (24, 30)).astype(np.uint8)
            mask[0, 0] = 150
            folder = root / "ADEChallengeData2016" / "annotations" / split
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(folder / f"{name}.png")


def nyud(root: Path, scale: float = 1.0) -> None:
    folder = root / "nyu_depth_v2"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = np.stack([np.asarray(picture(n, (32, 24))) for n in range(6)])
    depths = rng.uniform(0.5, 9.5, (6, 24, 32)).astype(np.float32) * scale
    depths[:, :3, :3] = 0
    with h5py.File(folder / "nyu_depth_v2_labeled.mat", "w") as file:  # MATLAB's axes
        file["images"] = images.transpose(0, 3, 2, 1)
        file["depths"] = depths.transpose(0, 2, 1)
    splits = {"trainNdxs": np.array([[1], [3], [4], [6]]), "testNdxs": np.array([[2], [5]])}
    scipy.io.savemat(folder / "splits.mat", splits)


def inat19(root: Path) -> None:
    folder = root / "inaturalist2019"
    for split, ids in (("train", range(6)), ("val", range(6, 9))):
        files = [f"train_val2019/Birds/{n % 3}/{n}.jpg" for n in ids]
        for number, file in zip(ids, files, strict=True):
            save(folder / file, 400 + number)
        content = {
            "categories": [{"id": n, "name": str(n)} for n in range(3)],
            "images": [{"id": n, "file_name": file} for n, file in zip(ids, files, strict=True)],
            "annotations": [{"id": n, "image_id": n, "category_id": n % 3} for n in ids],
        }
        (folder / f"{split}2019.json").write_text(json.dumps(content))


def aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b" / "data"
    variants = ["707-320", "A340-300", "Boeing 717"]
    rows = {"train": [], "val": []}
    for number in range(9):
        save(data / "images" / f"{1000 + number:07}.jpg", 500 + number)
        rows["train" if number < 6 else "val"].append((f"{1000 + number:07}", variants[number % 3]))
    (data / "variants.txt").write_text("\n".join(variants) + "\n")
    for split, lines in rows.items():
        text = "".join(f"{image} {variant}\n" for image, variant in lines)
        (data / f"images_variant_{split}.txt").write_text(text)


def pet(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for split, numbers in (("trainval", range(6)), ("test", range(6, 9))):
        lines = "#Image CLASS-ID SPECIES BREED ID\n"
        for number in numbers:
            name = f"Breed_{number % 3}_{number}"
            save(folder / "images" / f"{name}.jpg", 600 + number)
            lines += f"{name} {number % 3 + 1} 1 1\n"
        (folder / "annotations" / f"{split}.txt").write_text(lines)


def food(root: Path) -> None:
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    classes = ["apple_pie", "baklava", "waffles"]
    (folder / "meta" / "classes.txt").write_text("\n".join(classes) + "\n")
    for split, numbers in (("train", range(6)), ("test", range(6, 9))):
        names = [f"{classes[n % 3]}/{n}" for n in numbers]
        for number, name in zip(numbers, names, strict=True):
            save(folder / "images" / f"{name}.jpg", 700 + number)
        (folder / "meta" / f"{split}.txt").write_text("\n".join(names) + "\n")


def flowers(root: Path) -> None:
    folder = root / "flowers-102"
    for number in range(9):
        save(folder / "jpg" / f"image_{number + 1:05}.jpg", 800 + number)
    labels = np.arange(9)[None] % 3 + 1
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": labels.astype(np.uint8)})
    splits = {"trnid": [[1, 2, 3, 4, 5, 6]], "valid": [[7, 8]], "tstid": [[9]]}
    scipy.io.savemat(folder / "setid.mat", {k: np.array(v, np.uint16) for k, v in splits.items()})


def write_all(root: Path) -> Path:
    for write in (imagenet, imagenet_v2, imagenet_r, ade20k, nyud):
        write(root)
    for write in (inat19, aircraft, pet, food, flowers):
        write(root)
    return root


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Mean and standard deviation by which the official code normalises each task's images.
STATISTICS = dict.fromkeys(
    ("imagenet", "imagenet_v2", "imagenet_r", "inat19", "aircraft", "pet", "food", "flowers"),
    IMAGENET,
) | {
    "ade20k": ((0.48897059, 0.46548275, 0.4294), (0.22861765, 0.22948039, 0.24054667)),
    "nyud": ((0.485, 0.425, 0.385), (0.229, 0.224, 0.225)),
}


def normalised(task: str, pixels: np.ndarray) -> np.ndarray:
    """Returns pixels of 0 to 255, normalised as in the official code."""
    mean, std = map(np.float64, STATISTICS[task])
    return (pixels / 255 - mean) / std
