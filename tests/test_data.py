"""Pictures and data sets: every kind of file that a user may give, and the numbers that come out."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mambatrim.data import Folder, Parquet, Zip, batches, load_images, open_dataset, preprocess, read_image
from mambatrim.models.spec import ModelSpec, Preprocess

CIFAR = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10" / "test.parquet"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = Preprocess((8, 8), 1.0, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def pattern(height: int, width: int) -> Image.Image:
    """A picture of scrambled numbers, the same everywhere."""
    counts = np.arange(height * width * 3, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(2**32)
    return Image.fromarray((counts >> np.uint64(24)).astype(np.uint8).reshape(height, width, 3))


def halves(width: int = 8, height: int = 4) -> Image.Image:
    """Red on the left, green on the right."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (width // 2, 0, width, height))
    return image


def spec_with(how: Preprocess) -> ModelSpec:
    return ModelSpec("toy", "vim", None, how, None, "Apache-2.0", "made here")


# reading


@pytest.mark.parametrize("ending", ["png", "bmp", "ppm", "tiff", "gif"])
def test_read_image_returns_the_pixels_in_rgb(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"image.{ending}"
    halves().save(path)
    image = read_image(str(path))
    assert (image.mode, image.size) == ("RGB", (8, 4))
    assert (image.getpixel((0, 0)), image.getpixel((7, 3))) == (RED, GREEN)


def test_read_image_goes_by_the_content_and_not_by_the_name(tmp_path: Path) -> None:
    halves().save(tmp_path / "image.txt", "PNG")
    assert read_image(tmp_path / "image.txt").getpixel((0, 0)) == RED


@pytest.mark.parametrize(("orientation", "corner", "size"), [(1, RED, (8, 4)), (3, GREEN, (8, 4)), (6, RED, (4, 8))])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied(tmp_path: Path, kind: str, orientation: int, corner: object, size: object) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = halves().resize((64, 32), Image.Resampling.NEAREST)
    image.save(tmp_path / "image", kind, exif=exif, **({"quality": 100} if kind == "JPEG" else {}))
    read = read_image(tmp_path / "image")
    assert (read.width // 8, read.height // 8) == size
    assert np.abs(np.subtract(read.getpixel((0, 0)), corner)).max() <= 3


@pytest.mark.filterwarnings("error")
def test_unreadable_exif_does_not_hide_the_picture(tmp_path: Path) -> None:
    halves().save(tmp_path / "image.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12\0\x03")
    assert read_image(tmp_path / "image.png").getpixel((0, 0)) == RED


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    halves().quantize(4).save(tmp_path / "image.png")
    assert Image.open(tmp_path / "image.png").mode == "P"
    image = read_image(tmp_path / "image.png")
    assert (image.getpixel((0, 0)), image.getpixel((7, 0))) == (RED, GREEN)


def transparent_rgba() -> Image.Image:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    return image


def transparent_palette() -> Image.Image:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([*RED, 0, 0, 0])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 1
    return image


def transparent_colour() -> Image.Image:
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), (0, 0, 0))
    image.info["transparency"] = (0, 0, 0)
    return image


@pytest.mark.parametrize("make", [transparent_rgba, transparent_palette, transparent_colour])
def test_what_is_transparent_becomes_white(tmp_path: Path, make: Callable[[], Image.Image]) -> None:
    made = make()
    made.save(tmp_path / "image.png", **{k: v for k, v in made.info.items() if k == "transparency"})
    image = read_image(tmp_path / "image.png")
    assert [image.getpixel((x, 0)) for x in range(2)] == [RED, WHITE]


def test_half_transparent_grey_is_mixed_with_white(tmp_path: Path) -> None:
    Image.new("LA", (1, 1), (0, 128)).save(tmp_path / "image.png")
    assert read_image(tmp_path / "image.png").getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_grey_of_16_bits_is_scaled_and_not_cut_off(tmp_path: Path, ending: str) -> None:
    Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)).save(tmp_path / f"image.{ending}")
    image = read_image(tmp_path / f"image.{ending}")
    assert [image.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (100, 100, 100), WHITE]


def test_big_endian_grey_of_16_bits_is_scaled(tmp_path: Path) -> None:
    (tmp_path / "image.pgm").write_bytes(b"P5\n2 1\n65535\n" + struct.pack(">2H", 257 * 7, 65535))
    image = read_image(tmp_path / "image.pgm")
    assert [image.getpixel((x, 0)) for x in range(2)] == [(7, 7, 7), WHITE]


def test_one_bit_and_grey_become_rgb(tmp_path: Path) -> None:
    Image.new("1", (1, 1), 1).save(tmp_path / "bit.png")
    Image.new("L", (1, 1), 90).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "bit.png").getpixel((0, 0)) == WHITE
    assert read_image(tmp_path / "grey.png").getpixel((0, 0)) == (90, 90, 90)


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "image.jpg", quality=100)
    assert np.abs(np.subtract(read_image(tmp_path / "image.jpg").getpixel((4, 4)), RED)).max() <= 3


# refusing


def make_text(path: Path) -> None:
    path.write_text("A cat sits on a mat.\n")


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


def make_truncated_jpeg(path: Path) -> None:
    pattern(64, 64).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_truncated_png(path: Path) -> None:
    pattern(64, 64).save(path, "PNG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def png(width: int, height: int) -> bytes:
    """A PNG whose header promises the size, and which has no pixels to speak of."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def make_bomb(path: Path) -> None:
    path.write_bytes(png(30_000, 30_000))


def make_without_pixels(path: Path) -> None:
    path.write_bytes(png(0, 5))


def make_reals(path: Path) -> None:
    Image.fromarray(np.ones((2, 2), dtype=np.float32)).save(path, "TIFF")


def make_large_integers(path: Path) -> None:
    Image.fromarray(np.full((2, 2), 1 << 20, dtype=np.int32)).save(path, "TIFF")


BAD = [
    (make_text, "is no image"),
    (make_empty, "is empty"),
    (make_truncated_jpeg, "is a damaged or incomplete image"),
    (make_truncated_png, "is a damaged or incomplete image"),
    (make_bomb, "more than 178,956,970 pixels"),
    (make_without_pixels, "is no image|is a damaged|has no pixels"),
    (make_reals, "cannot be converted from F to RGB: real numbers"),
    (make_large_integers, "cannot be converted from I to RGB: integers outside"),
    (Path.mkdir, "is not a file but a folder"),
    (lambda path: None, "there is no image"),
]


@pytest.mark.parametrize(("make", "words"), BAD)
@pytest.mark.filterwarnings("error")
def test_what_is_no_image_is_said_in_one_sentence(tmp_path: Path, make: Callable[[Path], None], words: str) -> None:
    path = tmp_path / "cat.jpg"
    make(path)
    with pytest.raises(ValueError, match=words) as error:
        read_image(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "cat.jpg")
    with pytest.raises(ValueError, match="is not a file but"):
        read_image(tmp_path / "cat.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "GIF", "BMP"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.filterwarnings("error")
def test_damage_anywhere_is_a_value_error_or_harmless(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    stream = io.BytesIO()
    pattern(12, 9).save(stream, kind)
    content = bytearray(stream.getvalue())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "image").write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        assert read_image(tmp_path / "image").mode == "RGB"
    except ValueError as error:
        assert "\n" not in str(error)


# preparing


def test_preprocess_has_the_values_of_torchvision() -> None:
    # from torchvision 0.28: Resize(36, BICUBIC), CenterCrop(32), ToTensor, Normalize(MEAN, STD)
    values = preprocess(pattern(40, 60), Preprocess((32, 32), 32 / 36, "bicubic", MEAN, STD))
    assert (tuple(values.shape), values.dtype) == ((3, 32, 32), torch.float32)
    first = torch.tensor([1.5296685695648193, 0.6734309792518616, -0.18280678987503052, -1.0390444993972778])
    middle = torch.tensor([2.0259103775024414, 1.0980392694473267, 0.415266215801239])
    torch.testing.assert_close(values[0, 0, :4], first, rtol=0, atol=1e-6)
    torch.testing.assert_close(values[1, 15, 10:13], middle, rtol=0, atol=1e-6)
    assert values[2, 31, 31].item() == pytest.approx(0.06047937646508217, abs=1e-6)
    assert values.double().mean().item() == pytest.approx(0.22591876481404446, abs=1e-6)


def test_an_image_of_the_right_size_is_only_normalised() -> None:
    image = pattern(8, 8)
    values = preprocess(image, Preprocess((8, 8), 1.0, "bicubic", MEAN, STD))
    wanted = (np.asarray(image) / 255 - MEAN) / STD
    torch.testing.assert_close(values.double(), torch.from_numpy(wanted.transpose(2, 0, 1)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("width", "height"), [(16, 8), (8, 16)])
def test_the_centre_is_kept(width: int, height: int) -> None:
    image = Image.new("RGB", (width, height))
    left, top = (width - 8) // 2, (height - 8) // 2
    image.paste(WHITE, (left, top, left + 8, top + 8))
    assert torch.equal(preprocess(image, PLAIN), torch.ones(3, 8, 8))


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 90), height=st.integers(1, 90), size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    crop=st.floats(0.3, 1.0), interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
)  # fmt: skip
def test_no_border_is_ever_added(
    width: int, height: int, size: tuple[int, int], crop: float, interpolation: str
) -> None:
    how = Preprocess(size, crop, interpolation, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert torch.equal(preprocess(Image.new("RGB", (width, height), "white"), how), torch.ones(3, *size))


def test_a_very_narrow_image_is_refused_before_it_fills_the_memory() -> None:
    with pytest.raises(ValueError, match="1 x 100000 pixels is too narrow"):
        preprocess(Image.new("RGB", (1, 100_000)), Preprocess((224, 224), 0.875, "bicubic", MEAN, STD))


def test_load_images_stacks_what_the_spec_asks_for(tmp_path: Path) -> None:
    halves(16, 16).save(tmp_path / "a.png")
    Image.new("L", (30, 20), 255).save(tmp_path / "b.png")
    both = load_images([tmp_path / "a.png", str(tmp_path / "b.png")], spec_with(PLAIN))
    assert (tuple(both.shape), both.dtype) == ((2, 3, 8, 8), torch.float32)
    assert torch.equal(both[1], torch.ones(3, 8, 8))
    assert torch.equal(load_images(tmp_path / "a.png", spec_with(PLAIN)), both[:1])


def test_load_images_needs_a_path() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        load_images([], spec_with(PLAIN))


# data sets


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for name, colour, count in (("wolf", "red", 1), ("bear", "lime", 2), ("cat", "white", 1), (".cache", "red", 1)):
        (root / name / "deeper").mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (10, 10), colour).save(root / name / f"{index}.png")
    Image.new("RGB", (10, 10), "white").save(root / "cat" / "deeper" / "z.JPG")
    (root / "cat" / "notes.txt").write_text("not a picture")
    (root / "README.md").write_text("about")
    return root


def test_folder_has_sorted_classes_and_files(folder: Path) -> None:
    dataset = Folder(folder)
    assert dataset.classes == ("bear", "cat", "wolf")
    assert [label for _, label in dataset.samples] == [0, 0, 1, 1, 2]
    assert [file.name for file, _ in dataset.samples] == ["0.png", "1.png", "0.png", "z.JPG", "0.png"]
    image, label = dataset[0]
    assert (len(dataset), image.getpixel((0, 0)), label) == (5, GREEN, 0)
    with pytest.raises(IndexError):
        dataset[5]


def test_an_empty_class_keeps_its_label(folder: Path) -> None:
    (folder / "ant").mkdir()
    assert Folder(folder).classes == ("ant", "bear", "cat", "wolf")
    assert Folder(folder)[0][1] == 1


def zipped(folder: Path, path: Path, entries_of_folders: bool = False) -> Path:
    """The folder in a zip file, in an order that nobody would choose."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            if file.is_file() or entries_of_folders:
                archive.write(file, file.relative_to(folder))
    return path


def test_zip_is_read_like_the_folder_in_it(folder: Path, tmp_path: Path) -> None:
    on_disk, dataset = Folder(folder), Zip(zipped(folder, tmp_path / "photos.zip"))
    assert (len(dataset), dataset.classes) == (5, ("bear", "cat", "wolf"))
    assert [(image.tobytes(), label) for image, label in (dataset[i] for i in range(5))] == [
        (image.tobytes(), label) for image, label in (on_disk[i] for i in range(5))
    ]
    assert dataset.samples[3] == ("cat/deeper/z.JPG", 1)
    with pytest.raises(IndexError):
        dataset[5]


def test_an_empty_class_in_a_zip_keeps_its_label(folder: Path, tmp_path: Path) -> None:
    (folder / "ant").mkdir()
    dataset = Zip(zipped(folder, tmp_path / "photos.zip", entries_of_folders=True))
    assert dataset.classes == ("ant", "bear", "cat", "wolf") and dataset[0][1] == 1


def test_zip_refuses_what_it_cannot_read(folder: Path, tmp_path: Path) -> None:
    whole = zipped(folder, tmp_path / "photos.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.zip").write_text("howl")
    (tmp_path / "empty.zip").write_bytes(b"")
    for name in ("cut", "text", "empty"):
        with pytest.raises(ValueError, match=f"{name}.zip is a damaged zip file or none at all") as error:
            Zip(tmp_path / f"{name}.zip")
        assert "\n" not in str(error.value)
    with zipfile.ZipFile(tmp_path / "flat.zip", "w") as archive:
        archive.write(folder / "wolf" / "0.png", "0.png")
    with pytest.raises(ValueError, match="flat.zip has no images in folders"):
        Zip(tmp_path / "flat.zip")
    with pytest.raises(ValueError, match="there is no file"):
        Zip(tmp_path / "missing.zip")


def test_a_damaged_entry_of_a_zip_is_named(folder: Path, tmp_path: Path) -> None:
    path = zipped(folder, tmp_path / "photos.zip")
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("wolf/0.png").header_offset + 30 + len("wolf/0.png") + 8
    path.write_bytes(content[:place] + bytes(byte ^ 0x55 for byte in content[place : place + 8]) + content[place + 8 :])
    with pytest.raises(ValueError, match="wolf/0.png in .*photos.zip is damaged or cannot be unpacked") as error:
        list(batches(Zip(path), PLAIN, 2))
    assert "\n" not in str(error.value)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.filterwarnings("error")
def test_damage_in_a_zip_is_a_value_error_or_harmless(folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(zipped(folder, tmp_path / "photos.zip").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "photos.zip").write_bytes(content)
    try:
        dataset = Zip(tmp_path / "photos.zip")
        assert all(dataset[i][0].mode == "RGB" for i in range(len(dataset)))
    except ValueError as error:
        assert "\n" not in str(error)


def write_parquet(
    path: Path, labels: list[int], names: list[str] | None = None, group: int = 2, content: bytes | None = None
) -> Path:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = []
    for label in labels:
        stream = io.BytesIO()
        Image.new("RGB", (4, 4), (label * 10, 0, 0)).save(stream, "PNG")
        images.append({"bytes": stream.getvalue() if content is None else content, "path": None})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, kind), "label": pa.array(labels, pa.int64())})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, path, row_group_size=group)
    return path


def test_parquet_gives_pictures_labels_and_names(tmp_path: Path) -> None:
    dataset = Parquet(write_parquet(tmp_path / "a.parquet", [2, 0, 1, 2, 0], ["cat", "dog", "owl"]))
    assert (len(dataset), dataset.classes) == (5, ("cat", "dog", "owl"))
    assert [(image.getpixel((0, 0)), label) for image, label in (dataset[i] for i in range(5))] == [
        ((label * 10, 0, 0), label) for label in (2, 0, 1, 2, 0)
    ]
    assert dataset[-1][1] == 0
    with pytest.raises(IndexError):
        dataset[5]


def test_parquet_without_names_calls_classes_by_their_labels(tmp_path: Path) -> None:
    assert Parquet(write_parquet(tmp_path / "a.parquet", [0, 3])).classes == ("0", "1", "2", "3")


def test_parquet_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    (tmp_path / "text.parquet").write_text("hello")
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"label": [1]}), tmp_path / "columns.parquet")
    for name in ("text", "columns"):
        with pytest.raises(ValueError, match="is no parquet file with the columns image"):
            Parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match="labels from 0 to 2 for 2 classes"):
        Parquet(write_parquet(tmp_path / "labels.parquet", [0, 2], ["a", "b"]))
    with pytest.raises(ValueError, match="labels from -1 to 2"):
        Parquet(write_parquet(tmp_path / "negative.parquet", [-1, 2], content=b"x"))
    with pytest.raises(ValueError, match="has no rows"):
        Parquet(write_parquet(tmp_path / "empty.parquet", []))
    with pytest.raises(ValueError, match="there is no file"):
        Parquet(tmp_path / "missing.parquet")


@pytest.mark.parametrize(("content", "words"), [(b"", "holds no image"), (b"text", "is no image")])
def test_a_row_without_an_image_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", [0, 1], content=content)
    with pytest.raises(ValueError, match=f"row 1 of .*a.parquet {words}"):
        Parquet(path)[1]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.compute", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        Parquet(tmp_path / "a.parquet")


def test_open_dataset_goes_by_what_is_there(folder: Path, tmp_path: Path) -> None:
    assert isinstance(open_dataset(folder), Folder)
    assert isinstance(open_dataset(zipped(folder, tmp_path / "photos.ZIP")), Zip)
    (tmp_path / "tables").mkdir()
    path = write_parquet(tmp_path / "tables" / "a.parquet", [0, 1])
    assert isinstance(open_dataset(path), Parquet)
    assert isinstance(open_dataset(str(tmp_path / "tables")), Parquet)
    write_parquet(tmp_path / "tables" / "b.parquet", [0, 1])
    with pytest.raises(ValueError, match="several data sets, name one of them: a.parquet, b.parquet"):
        open_dataset(tmp_path / "tables")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="has no images in folders"):
        open_dataset(tmp_path / "nothing")
    with pytest.raises(ValueError, match="there is no data set"):
        open_dataset(tmp_path / "missing")


def test_batches_give_everything_once_and_in_order(folder: Path) -> None:
    parts = list(batches(Folder(folder), PLAIN, 2))
    assert [tuple(images.shape) for images, _ in parts] == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    labels = torch.cat([label for _, label in parts])
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, 0, 1, 1, 2]
    assert torch.equal(parts[0][0][0, :, 0, 0], torch.tensor([0.0, 1.0, 0.0]))


def test_batches_refuse_a_size_below_one(folder: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        next(batches(Folder(folder), PLAIN, 0))


def test_batches_name_the_image_that_cannot_be_read(folder: Path) -> None:
    (folder / "wolf" / "0.png").write_text("howl")
    with pytest.raises(ValueError, match=r"wolf.0\.png is no image"):
        list(batches(Folder(folder), PLAIN, 3))


@pytest.mark.skipif(not CIFAR.is_file(), reason="needs the CIFAR-10 file in ../shared/data")
def test_the_cifar_file_is_read() -> None:
    pytest.importorskip("pyarrow")
    dataset = open_dataset(CIFAR)
    image, label = dataset[4999]
    assert (len(dataset), image.size, image.mode) == (5000, (32, 32), "RGB")
    assert dataset.classes[3] == "cat" and 0 <= label < 10
