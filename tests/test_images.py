"""From a file to pixels. The oracles are the arrays that were written."""

import numpy as np
import pytest
import torch
from PIL import Image

from kit import InputError
from kit.data import read_mask, read_region
from kit.draw import photograph
from kit.images import load_image, read_image, to_rgb

RNG = np.random.default_rng(0)


def refused(path, *words: str) -> None:
    with pytest.raises(InputError) as error:
        read_image(path)
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in (path.name, *words)), text


def test_16_bits_are_kept(tmp_path):
    deep = (np.arange(64 * 48).reshape(48, 64) * 3).astype(np.uint16)  # up to 9213 of 65535: dark, and stays so
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        assert np.allclose(read_image(tmp_path / name)[..., 1], deep / 65535, atol=1e-7)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (60, 40, 3)


def test_malformed_exif_data_hold_no_rotation_and_do_no_harm(tmp_path):
    Image.new("RGB", (60, 40), "red").save(tmp_path / "odd.jpg", dpi=(72, 72), exif=b"Exif\x00\x00broken data")
    assert read_image(tmp_path / "odd.jpg").shape == (40, 60, 3)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    Image.new(mode, (40, 33)).save(tmp_path / "mode.tif")
    assert read_image(tmp_path / "mode.tif", (32, 32)).shape == (32, 32, 3)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK"])
def test_every_mode_keeps_its_colour(tmp_path, mode):
    colour = (204, 102, 51)  # one of Pillow's default palette
    Image.new("RGB", (40, 33), colour).convert(mode).save(tmp_path / "mode.tif")
    grey = np.dot((0.299, 0.587, 0.114), colour)  # ITU-R 601-2
    expected = [grey] * 3 if mode in ("L", "LA") else colour
    found = 255 * read_image(tmp_path / "mode.tif")
    assert np.abs(found - expected).max() < 1.01


@pytest.mark.parametrize("name", ["pages.tif", "frames.png", "frames.webp"])
def test_the_first_page_of_several_is_read(tmp_path, name):
    first, second = Image.new("RGB", (40, 33), "black"), Image.new("RGB", (40, 33), "white")
    options = {"lossless": True} if name.endswith("webp") else {}
    first.save(tmp_path / name, save_all=True, append_images=[second], **options)
    with Image.open(tmp_path / name) as image:
        assert image.n_frames == 2
    assert not read_image(tmp_path / name).any()


def test_a_too_large_image_is_refused(tmp_path, monkeypatch):
    Image.new("L", (100, 90)).save(tmp_path / "large.png")
    assert read_image(tmp_path / "large.png").shape == (90, 100, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 90 // 2 - 1)
    refused(tmp_path / "large.png", "9000 pixels")


def test_float_tiff_within_0_to_1_is_taken_as_it_is(tmp_path):
    values = RNG.random((40, 50), dtype=np.float32)
    Image.fromarray(values).save(tmp_path / "float.tif")
    assert np.array_equal(read_image(tmp_path / "float.tif")[..., 0], values)


@pytest.mark.parametrize(
    "values", [np.float32(255), np.float32(-0.5), np.float32(np.nan), np.int32(65536), np.int32(-1)]
)
def test_values_out_of_range_are_refused_not_guessed(tmp_path, values):
    Image.fromarray(np.full((40, 50), values)).save(tmp_path / "odd.tif")
    refused(tmp_path / "odd.tif", "range")


def test_transparent_pixels_are_white_whatever_colour_they_hide(tmp_path):
    pixels = np.zeros((40, 40, 4), np.uint8)
    pixels[:, :20] = 200, 0, 0, 255
    pixels[:, 20:] = 0, 255, 0, 0
    pixels[20:, 20:, 3] = 128
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    found = read_image(tmp_path / "clear.png")
    assert np.allclose(found[0, 0], [200 / 255, 0, 0]) and np.allclose(found[0, 30], 1)
    assert np.allclose(found[30, 30], [0.5, 1, 0.5], atol=0.01)
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "palette.png", transparency=1)
    assert np.allclose(read_image(tmp_path / "palette.png"), 1)


def test_unreadable_and_tiny_files_are_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    Image.new("RGB", (31, 400)).save(tmp_path / "tiny.png")
    refused(tmp_path / "broken.png")
    refused(tmp_path / "tiny.png", "31x400")


def test_a_damaged_file_is_named_whatever_pillow_raises(tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "damaged.tif")

    def broken(self):
        raise TypeError("unsupported operand")  # as for a damaged TIFF file

    monkeypatch.setattr(Image.Image, "load", broken)
    monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.load", broken)
    refused(tmp_path / "damaged.tif", "unsupported operand")


def test_other_formats_reach_no_decoder_whatever_they_are_called(tmp_path):
    (tmp_path / "postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\nshowpage\n")
    with Image.open(tmp_path / "postscript.png") as image:
        assert image.format == "EPS"  # Pillow would open it as this, if the formats were not restricted
    refused(tmp_path / "postscript.png", "cannot identify")
    Image.new("RGB", (40, 40)).save(tmp_path / "animated.gif")
    (tmp_path / "animated.gif").rename(tmp_path / "animated.png")
    refused(tmp_path / "animated.png")


def test_arrays_and_tensors_of_all_kinds_agree():
    bytes_ = RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    expected = to_rgb(Image.fromarray(bytes_), (32, 32))
    floats = bytes_.astype(np.float32) / 255
    deep = bytes_.astype(np.uint16) * 257
    for image in (bytes_, floats, floats.astype(np.float64), deep, *map(to_chw, (bytes_, floats))):
        assert np.allclose(to_rgb(image, (32, 32)), expected, atol=1e-6)
    assert np.allclose(to_rgb(to_chw(floats).bfloat16(), (32, 32)), expected, atol=0.01)
    grey = bytes_[..., 0]
    expected = to_rgb(Image.fromarray(grey))
    for image in (grey, grey[..., None], torch.from_numpy(grey)[None]):
        assert np.allclose(to_rgb(image), expected)


def to_chw(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


@pytest.mark.parametrize(
    "image, word",
    [
        (np.full((40, 40, 3), 200.0), "0..1"),
        (np.zeros((40, 40, 3), np.int64), "int64"),
        (np.zeros((40, 40, 2), np.uint8), "shape"),
        (torch.zeros(40, 40, 3), "shape"),
        (torch.zeros(1, 3, 40, 40), "shape"),
        (torch.zeros(40, 40), "shape"),
        (np.zeros((0, 40, 3), np.uint8), "shape"),
        (np.zeros((20, 40, 3), np.uint8), "40x20"),
    ],
)
def test_arrays_that_could_mean_anything_are_refused(image, word):
    with pytest.raises(InputError, match=word.replace("(", "")):
        to_rgb(image)


def test_a_path_without_a_file_and_a_folder_are_named_as_such(tmp_path):
    refused(tmp_path / "none.png", "no such file")
    (tmp_path / "folder.png").mkdir()
    refused(tmp_path / "folder.png", "is a folder")


# ---------------------------------------------------------------- masks


def half_marked(value: object, mode: str) -> Image.Image:
    mask = Image.new(mode, (40, 40))
    mask.paste(value, (0, 0, 20, 40))
    return mask


def palette_mask() -> Image.Image:
    mask = half_marked(1, "P")
    mask.putpalette([0, 0, 0, 0, 128, 0])  # green on black
    return mask


@pytest.mark.parametrize(
    "mask",
    [
        half_marked(255, "L"),
        half_marked(1, "L"),
        half_marked(1, "1"),
        half_marked((0, 128, 0), "RGB"),
        half_marked((255, 255, 255, 255), "RGBA"),
        half_marked(300, "I;16"),
        palette_mask(),
    ],
    ids=["255", "label 1", "1 bit", "green", "alpha", "16 bit", "palette"],
)
def test_masks_of_all_kinds_mark_the_same(tmp_path, mask):
    mask.save(tmp_path / "mask.png")
    expected = np.zeros((32, 32), bool)
    expected[:, :16] = True
    assert np.array_equal(read_mask(tmp_path / "mask.png", (32, 32)), expected)


def half_white(dark: object, white: object, kind: type) -> Image.Image:
    """A mask of 40 x 40 pixels of this dtype: its left half has one value, its right half the other one."""
    halves = [np.full((40, 20, np.size(value)), value, kind) for value in (white, dark)]
    return Image.fromarray(np.hstack(halves).squeeze())


@pytest.mark.parametrize(
    "dark, white, kind",
    [
        (100, 200, np.uint8),
        ((255, 255, 255, 0), (255, 255, 255, 255), np.uint8),  # transparent
        (200, 60_000, np.uint16),
        (0.25, 0.75, np.float32),
    ],
)
def test_the_white_half_of_an_image_is_the_region_of_interest(tmp_path, dark, white, kind):
    half_white(dark, white, kind).save(tmp_path / "roi.tif")
    expected = np.zeros((32, 32), bool)
    expected[:, :16] = True
    assert np.array_equal(read_region(tmp_path / "roi.tif", (32, 32)), expected)


def test_a_region_of_interest_with_values_out_of_range_is_named(tmp_path):
    half_white(0, 255, np.float32).save(tmp_path / "roi.tif")
    with pytest.raises(InputError, match="--roi .*roi.tif: .*range"):
        read_region(tmp_path / "roi.tif", (32, 32))


def test_all_labels_of_one_mask_count(tmp_path):
    labels = np.zeros((40, 40), np.uint8)
    labels[:20], labels[20:, :20] = 1, 200
    Image.fromarray(labels).save(tmp_path / "labels.png")
    assert read_mask(tmp_path / "labels.png", (40, 40)).sum() == 1200


def test_noise_of_a_jpeg_mask_marks_nothing(tmp_path):
    half_marked(255, "L").save(tmp_path / "mask.jpg", quality=30)
    found = read_mask(tmp_path / "mask.jpg", (40, 40))
    assert found[:, :20].all() and not found[:, 20:].any()


def test_a_mask_too_thin_for_the_size_is_not_lost(tmp_path):
    thin = np.zeros((400, 400), np.uint8)
    thin[:, 201] = 255
    Image.fromarray(thin).save(tmp_path / "thin.png")
    assert read_mask(tmp_path / "thin.png", (64, 64)).any()


def test_a_photograph_is_the_image_as_it_is_judged_but_smaller(tmp_path):
    """16 bits, floats and transparency as in `to_rgb`; turned by EXIF; never enlarged."""
    deep = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(np.float32(deep / 65535)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((40, 60, 4), (255, 0, 0, 0), np.uint8)).save(tmp_path / "clear.png")
    for name in ("deep.png", "float.tif", "clear.png"):
        shown = photograph(load_image(tmp_path / name), 100)
        assert shown.mode == "RGB" and shown.size == (60, 40)
        assert np.abs(np.asarray(shown) / 255 - read_image(tmp_path / name)).max() < 1 / 255 + 1e-6
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (600, 300)).save(tmp_path / "turned.jpg", exif=exif)
    assert photograph(load_image(tmp_path / "turned.jpg"), 100).size == (50, 100)
