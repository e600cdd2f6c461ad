"""Small data sets in the files that people download: tar archives, shards, Parquet."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from PIL import Image

from singer_jax.data.imagenet import imagenet_wnids


def jpeg(number: int) -> bytes:
    """Returns a different image for each number."""
    buffer = io.BytesIO()
    color = (number * 37 % 256, number * 91 % 256, number % 256)
    Image.new("RGB", (20 + number % 5, 18), color).save(buffer, "JPEG")
    return buffer.getvalue()


def tar_bytes(members: Mapping[str, bytes]) -> bytes:
    """Returns an uncompressed archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return buffer.getvalue()


def write_imagenet(folder: Path, classes: Iterable[int] = (3, 0, 999), each: int = 4) -> Path:
    """Writes ImageNet's two archives with some of its classes."""
    folder.mkdir(parents=True, exist_ok=True)
    wnids = imagenet_wnids()
    inner = {
        f"{wnids[label]}.tar": tar_bytes(
            {f"{wnids[label]}_{i}.JPEG": jpeg(10 * label + i) for i in range(each)}
        )
        for label in classes
    }
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(inner))
    validation = {f"ILSVRC2012_val_{n:08}.JPEG": jpeg(5000 + n) for n in (1, 2, 50_000)}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(validation))
    return folder


def write_webdataset(folder: Path, shards: int = 2, each: int = 6) -> Path:
    """Writes shards with a class and a JSON text for each image."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, first in (("train", 0), ("validation", 100)):
        for shard in range(shards):
            members: dict[str, bytes] = {}
            for i in range(each):
                number = first + shard * each + i
                members[f"./{number:06}.jpg"] = jpeg(number)
                members[f"./{number:06}.cls"] = str(number % 3).encode()
                members[f"./{number:06}.json"] = json.dumps({"caption": "none"}).encode()
            (folder / f"tiny-{split}-{shard:06}.tar").write_bytes(tar_bytes(members))
    return folder


def write_parquet(folder: Path, rows: int = 12, names: tuple[str, ...] = ("a", "b", "c")) -> Path:
    """Writes shards in the format of the Hub's library `datasets`."""
    folder.mkdir(parents=True, exist_ok=True)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    for split, first in (("train", 0), ("validation", 100), ("test", 200)):
        for shard in range(2):
            numbers = range(first + shard * rows, first + (shard + 1) * rows)
            images = [{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in numbers]
            labels = [-1 if split == "test" else n % len(names) for n in numbers]
            table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
            file = folder / f"{split}-{shard:05}-of-00002.parquet"
            pyarrow.parquet.write_table(
                table.replace_schema_metadata(about), file, row_group_size=5
            )
    return folder
