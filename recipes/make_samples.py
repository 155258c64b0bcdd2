"""Make the zip of sample images that mambatrim ships, from the CIFAR-10 test file.

    python recipes/make_samples.py TEST.parquet [--per-class 100] [--out src/mambatrim/assets/cifar10_samples.zip]

As many images of each class as wanted, drawn with a fixed seed, their encoded bytes stored as they are in the parquet
file: CLASS/ROW.jpg, ROW being the row there. The same file gives the same zip, byte for byte.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import zipfile
from collections import defaultdict
from pathlib import Path

import pyarrow.parquet
from PIL import Image

SEED = 0
OUT = Path(__file__).resolve().parents[1] / "src" / "mambatrim" / "assets" / "cifar10_samples.zip"
ENDINGS = {"JPEG": "jpg", "PNG": "png"}


def choose(labels: list[int], per_class: int) -> list[int]:
    """Rows of the chosen images, by class and then by row."""
    rows: dict[int, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        rows[label].append(row)
    generator = random.Random(SEED)
    return [row for label in sorted(rows) for row in sorted(generator.sample(rows[label], per_class))]


def main() -> None:
    parser = argparse.ArgumentParser(description="make the zip of sample images from the CIFAR-10 test file")
    parser.add_argument("data", help="test.parquet")
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    table = pyarrow.parquet.read_table(options.data, columns=["image", "label"])
    names = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    labels, images = table["label"].to_pylist(), table["image"]
    rows = choose(labels, options.per_class)
    with zipfile.ZipFile(options.out, "w", zipfile.ZIP_STORED) as archive:
        for row in rows:
            content = images[row]["bytes"].as_py()
            ending = ENDINGS[Image.open(io.BytesIO(content)).format or ""]
            # a fixed date, and not today's: the zip can be compared with one made again
            archive.writestr(zipfile.ZipInfo(f"{names[labels[row]]}/{row:04}.{ending}"), content)
    print(f"{len(rows)} images in {options.out}, {options.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
