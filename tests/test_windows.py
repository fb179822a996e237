"""Large images in windows: the same as the whole, in bounded memory."""

import numpy as np
import pytest
import torch
from helpers import LITE, call

import clflow
import kit.good
import kit.rows
import kit.windows
import synth
import train
from kit.backbone import BACKBONES, as_rows
from kit.data import read_batch
from kit.folders import list_images
from kit.rows import origins
from kit.settings import CLFlowSettings
from kit.windows import at_once, cuts, in_windows, overlapping_parts
from methods import load
from synth import synthesize


def test_cuts_are_equal_parts():
    assert cuts(500) == [0, 500] and cuts(1024) == [0, 1024]
    assert cuts(2600) == [0, 864, 1728, 2600] and cuts(4096) == [0, 1024, 2048, 3072, 4096]
    assert at_once((384, 384)) == 8 and at_once((1024, 1024)) == 2 and at_once((4096, 4096)) == 1


def test_parts_overlap_by_half_and_are_all_of_an_image():
    for shape in ((100, 80), (256, 4096), (3136, 4032), (60, 61)):
        found = overlapping_parts(shape, 40)
        assert len({(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in found}) == 1
        for axis, length in enumerate(shape):
            places = sorted({(part[axis].start, part[axis].stop) for part in found})
            assert places[0][0] == 0 and places[-1][1] == length
            assert max(np.diff([start for start, _ in places])) <= (places[0][1] + 1) / 2
    assert overlapping_parts((50, 60), 40) == [(slice(0, 50), slice(0, 60))]
    assert [rows.start for rows, _ in overlapping_parts((100, 40), 40)] == [0, 20, 40, 60]
    strip = overlapping_parts((32, 1000), 40)
    assert strip[0] == (slice(0, 32), slice(0, 50)) and strip[-1] == (slice(0, 32), slice(950, 1000))


def test_windows_are_put_together(monkeypatch):
    """For a function with a stride of 4 whose positions depend on 8 pixels around them."""
    monkeypatch.setattr(kit.windows, "PIXELS", 100)
    monkeypatch.setattr(kit.windows, "CORE", 64)
    images = torch.rand(2, 3, 150, 200, generator=torch.Generator().manual_seed(0))
    asked = []

    def mean_around(part):
        asked.append(part.shape)
        mean = torch.nn.functional.avg_pool2d(part, 17, stride=4, padding=8, count_include_pad=False)
        return [mean, mean[:, 0].square()]

    found = in_windows(mean_around, images, 4, 8)
    assert len(asked) == 3 * 4 and max(max(shape[2:]) for shape in asked) <= 64 + 16
    for part, whole in zip(found, mean_around(images), strict=True):
        assert torch.allclose(part, whole, atol=1e-6)


@pytest.mark.parametrize("name, height", [("resnet18", 640), (LITE[1], 640), ("wide_resnet50_2", 192)])
def test_features_of_windows_are_those_of_the_whole(monkeypatch, name, height):
    """Of two by three windows; of the largest network three in a row, to save time."""
    torch.manual_seed(0)
    backbone = BACKBONES[name]()
    if name == LITE[1]:
        backbone.load_imagenet()
    images = torch.nn.functional.interpolate(torch.rand(1, 3, height // 8, 104), scale_factor=8, mode="bilinear")
    whole = backbone.features(images)
    monkeypatch.setattr(kit.windows, "PIXELS", 100)
    monkeypatch.setattr(kit.windows, "CORE", 320)
    (found,) = in_windows(lambda part: [backbone.features(part)], images, backbone.stride, backbone.reach)
    assert found.shape == whole.shape
    assert (found - whole).abs().max() < 1e-3 * whole.abs().max() and whole.std() > 0


def test_features_of_what_is_painted_are_those_of_the_whole_image(category, monkeypatch):
    """Defects are painted on a patch. No feature of the patch may see padding where the image continues."""
    monkeypatch.setattr(kit.good, "PATCH", 128)
    monkeypatch.setattr(kit.good.sys, "platform", "none")  # paint in this process
    torch.manual_seed(0)
    shape = (512, 608)
    model = clflow.CLFlow(CLFlowSettings(images=24, held_out=6, size=shape, backbone=LITE[1])).eval()
    model.backbone.load_imagenet()
    painter = kit.good.Painter(kit.good.GoodImages([], list_images(category / "train/good")), synthesize, model)
    compared = 0
    for after, mask, (number,) in painter.painted(12):
        rows, columns = painter.surroundings(number)
        whole = painter.image(painter.files[painter.image_index(number)]).copy()
        whole[rows, columns] = after[0].permute(1, 2, 0)
        expected = model.features(kit.good.to_tensor(whole[None]))
        expected = expected[:, :, rows.start // 8 : rows.stop // 8, columns.start // 8 : columns.stop // 8]
        found = model.features(after)
        touched = kit.rows.touches(mask, found.shape[2:])
        difference = (found - expected).permute(0, 2, 3, 1)[touched].abs().max()
        assert difference < 2e-3 * expected.abs().max()
        compared += int(touched.sum())
        assert not mask.all() and mask.shape[2:] != shape
    assert compared > 20


def test_a_large_image_is_trained_on_and_judged_in_parts(tiny, tmp_path, monkeypatch):
    """With limits that make 128 x 128 a large image: scores are those of the whole image, and defects are painted on a
    patch."""
    options = ["--data", tiny, *LITE, "--size", 256, "--epochs", 1, "--batch", 64, "--out", tmp_path / "run"]
    monkeypatch.setattr(kit.good, "PATCH", 96)
    painted_on = set()
    synthesize = synth.synthesize

    def watched(image, rng, other, roi, defects):
        painted_on.add((image.shape, other.shape, roi.shape))
        return synthesize(image, rng, other, roi, defects)

    monkeypatch.setattr("synth.synthesize", watched)
    import sklearn.cluster  # noqa: F401 (while the platform has its true name)

    monkeypatch.setattr(kit.good.sys, "platform", "none")  # paint in this process
    call(train.main, *options)
    assert painted_on == {((96, 96, 3), (96, 96, 3), (96, 96))}
    model = load(tmp_path / "run" / "model.pt")
    model.full_precision = True
    images = torch.from_numpy(np.random.default_rng(0).random((2, 3, 256, 256), dtype=np.float32))
    whole = model(images)
    monkeypatch.setattr(kit.windows, "PIXELS", 1000)
    monkeypatch.setattr(kit.windows, "CORE", 128)
    parts = []
    energies = model.energies
    monkeypatch.setattr(model, "energies", lambda *args: parts.append(args[0].shape) or energies(*args))
    monkeypatch.setattr("kit.windows.STRIP", 100)
    in_parts = model(images)
    assert len(parts) == 4
    for one, other in zip(whole, in_parts, strict=True):
        assert (one - other).abs().max() < 1e-3 * one.abs().max()


def test_held_out_images_that_do_not_fit_into_memory_are_encoded_anew(category, monkeypatch):
    torch.manual_seed(0)
    model = clflow.CLFlow(CLFlowSettings(images=5, held_out=1, size=64, backbone=LITE[1], bank=40)).eval()
    files = list_images(category / "train/good")[:11]
    rows = model.features(read_batch(files[:5], model.shape))
    model.fit(as_rows(rows), origins(as_rows(rows), range(5)), rows[0, 0].numel())
    kept = list(kit.rows.HeldOut(model, files))
    monkeypatch.setattr(kit.rows, "HELD_OUT_BYTES", kept[0].numel() * kept[0].element_size())
    bounded = kit.rows.HeldOut(model, files)
    assert len(bounded.codes) == 1 and sum(len(code) for code in bounded.codes) == 8
    for _ in range(2):  # as often as it is asked
        assert torch.equal(torch.cat(list(bounded)), torch.cat(kept))
