import subprocess
import sys
import time
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import QUICK, ROOT, NoBackbone, call
from PIL import Image
from torch.utils.data import DataLoader

import kit.good
import train
from kit.folders import list_images
from kit.good import GoodImages, Painter, held_out_count, split, widened
from kit.images import read_image, to_tensor
from kit.processes import ALONE, Processes
from kit.settings import UNIT, as_shape
from methods import load
from methods.pairs import PairLoader, pairs
from synth import bounding_box, synthesize


def make_painter(category, processes: Processes = ALONE, size=64, textures=(), paint=synthesize) -> Painter:
    good = GoodImages([], list_images(category / "train/good"), list(textures), processes)
    shape = as_shape(size)
    roi, settings = torch.ones(shape, dtype=torch.bool), SimpleNamespace(seed=0)
    model = SimpleNamespace(shape=shape, roi=roi, settings=settings, backbone=NoBackbone())
    return Painter(good, paint, model)


@pytest.mark.parametrize("shape", [(384, 1408), (192, 2752), (96, 5984), (1024, 1024)])
def test_sides_of_patches_can_be_halved_as_often_as_those_of_images(category, shape):
    patch = make_painter(category, size=shape).patch
    assert all(0 < side <= whole and side % UNIT == 0 for side, whole in zip(patch, shape, strict=True))


LOADING = """
import multiprocessing, numpy as np, kit, time
from kit.good import loader
batches = iter(loader(range(1000), lambda numbers: np.zeros((8, 500, 500)), batch=1, shuffle=False))
next(batches)
print(*[process.pid for process in multiprocessing.active_children()], flush=True)
time.sleep(100)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no background processes")
def test_background_processes_end_with_a_killed_parent():
    """Their results do not fit into the pipes, so they wait for a reader."""
    parent = subprocess.Popen([sys.executable, "-c", LOADING], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert workers and all(map(is_running, workers))
    parent.kill()
    deadline = time.time() + 20
    while any(map(is_running, workers)) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, workers))


def is_running(pid: int) -> bool:
    """Whether a process exists that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------- held-out images


@pytest.mark.parametrize(
    "images, held_out", [(2, 1), (7, 1), (8, 2), (31, 7), (32, 8), (80, 8), (209, 21), (20000, 1000)]
)
def test_how_many_images_are_held_out(images, held_out):
    assert held_out_count(images) == held_out


def test_held_out_images_are_not_trained_on(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(50)]
    held_out, trained_on = split(files, seed=3)
    assert len(held_out) == 8 and set(held_out) | set(trained_on) == set(files) and not set(held_out) & set(trained_on)
    assert split(files, seed=3) == (held_out, trained_on) != split(files, seed=4)


# ---------------------------------------------------------------- batches of the others


@pytest.mark.parametrize("world, size", [(2, 8), (2, 5), (3, 8), (3, 2)])
def test_processes_divide_a_batch(category, world, size):
    indices = [5, 3, 8, 1, 9, 2, 7, 4][:size]
    whole, masks, boxes = pairs(make_painter(category), indices)
    assert len(masks) == (size + 1) // 2 and len(whole) == size + len(masks)
    assert [tuple(box) for box in boxes] == [bounding_box(mask[..., 0] > 0) for mask in masks]
    assert np.array_equal(whole[: len(masks)] * (masks == 0), whole[size:] * (masks == 0))  # made from the first ones
    normal, anomalous = [], []
    for rank in range(world):
        images, masks, _ = pairs(make_painter(category, Processes(rank, world)), indices)
        normal += list(images[: -len(masks)])
        anomalous += list(images[-len(masks) :])
    assert {x.sum() for x in normal} == {x.sum() for x in whole[:size]}
    if size >= 2 * world:  # there is an x- for each process
        assert len(normal) == size
        assert sorted(x.sum() for x in anomalous) == sorted(x.sum() for x in whole[size:])


def test_what_is_painted_depends_on_seed_epoch_and_image_alone(category):
    painter = make_painter(category)
    images, _, _ = pairs(painter, [3, 4])
    again, _, _ = pairs(painter, [3, 9])
    assert np.array_equal(images[2], again[2])
    painter.epoch = 1
    assert not np.array_equal(pairs(painter, [3, 4])[0][2], images[2])
    painter.epoch, painter.seed = 0, 1
    assert not np.array_equal(pairs(painter, [3, 4])[0][2], images[2])


def test_half_of_the_defects_take_their_content_from_a_texture(category, tmp_path):
    """The others take it from a good image. The texture is white; no good image is."""
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    others = []

    def paint(image, rng, other, roi):
        others.append(other)
        return image, np.ones(image.shape[:2], bool), (0, 0, 1, 1)

    painter = make_painter(category, textures=[tmp_path / "white.png"], paint=paint)
    for number in range(200):
        painter.pair(number)
    from_texture = sum((other == 1).all() for other in others)
    assert 75 <= from_texture <= 125
    good = [painter.image(path) for path in painter.files]
    from_good = sum(any(np.array_equal(other, image) for image in good) for other in others)
    assert from_good == 200 - from_texture


@pytest.mark.parametrize("workers", [False, True])
def test_the_order_of_the_images_is_drawn_when_an_epoch_begins(category, monkeypatch, workers):
    """Afterwards each process of a training sets a seed of its own. The order is the same with and without background
    processes."""
    batches = DataLoader(range(24), 8, shuffle=True, num_workers=int(workers), collate_fn=list)
    torch.manual_seed(5)
    expected = [number for batch in batches for number in batch]
    if workers:
        monkeypatch.setattr(kit.good, "DataLoader", DataLoader)
    painter = make_painter(category)
    seen = PairLoader(painter, 24, 8, torch.device("cpu"))
    torch.manual_seed(5)
    epoch = seen.epoch(1)
    torch.manual_seed(6)
    images = torch.cat([images[:8] for images, _, _ in epoch])
    files = torch.from_numpy(np.stack([painter.untouched(number) for number in expected])).permute(0, 3, 1, 2)
    assert sorted(expected) == list(range(24)) and torch.equal(images, files)


def test_small_sets_are_repeated(category):
    assert len(PairLoader(make_painter(category), 100, 1, torch.device("cpu"))) == 4 * 24  # about 100


def test_images_beyond_the_cache_are_read_anew(category, monkeypatch):
    monkeypatch.setattr(kit.good, "CACHE_BYTES", 3 * 6 * 64 * 64)
    painter = make_painter(category)
    assert len(painter.cache) == 3
    expected = [read_image(path, (64, 64)) for path in painter.files]
    assert all(np.allclose(painter.untouched(i), expected[i], atol=1e-3) for i in range(24))  # float16


@pytest.mark.usefixtures("background_processes")
def test_batches_need_no_shared_memory(category, monkeypatch):
    """Workers send arrays, not tensors: tensors go through shared memory, and a container has only 64 MB of it, less
    than a few batches."""

    def refuse(tensor):
        raise AssertionError("a tensor is about to be sent through shared memory")

    for kind in (torch.Tensor, torch.UntypedStorage):
        monkeypatch.setitem(ForkingPickler._extra_reducers, kind, refuse)
    painter = make_painter(category)
    for make, images, masks in ((partial(pairs, painter), 12, 4), (painter.all_surrounded, 8, 8)):
        loader = kit.good.loader(range(24), make, batch=8, shuffle=True)
        assert loader.num_workers > 0
        loader.timeout = 30  # a worker that cannot send hangs
        batch = next(iter(loader))
        assert batch[0].shape == (images, 64, 64, 3) and batch[1].shape == (masks, 64, 64, 1)


def test_good_images_are_shared_between_the_processes(category):
    parts = [torch.cat(list(make_painter(category, Processes(rank, 5)).normal())) for rank in range(5)]
    whole = torch.cat(list(make_painter(category).normal()))
    assert whole.shape == (24, 3, 64, 64)
    assert sorted(x.sum().item() for x in torch.cat(parts)) == sorted(x.sum().item() for x in whole)


@pytest.mark.parametrize("count", [10, 100])
def test_as_many_are_painted_as_asked_for_file_by_file(category, count):
    painter = make_painter(category)
    seen = list(painter.painted(count))
    numbers = np.concatenate([numbers for _, _, numbers in seen])
    assert len(numbers) == len(set(numbers)) == count
    files = numbers % 24
    assert np.bincount(files, minlength=24).max() - np.bincount(files, minlength=24).min() == 1
    assert (np.diff(files) != 0).sum() == len(set(files)) - 1  # numbers of the same file follow each other
    for after, masks, numbers in seen:
        for image, mask, number in zip(after, masks, numbers, strict=True):
            changed = (to_tensor(painter.untouched(number)[None])[0] != image).any(dim=0)
            assert changed.any() and not changed[mask[0] == 0].any()


def test_processes_share_what_is_painted(category):
    whole = np.concatenate([numbers for _, _, numbers in make_painter(category).painted(30)])
    parts = [n for rank in range(3) for _, _, n in make_painter(category, Processes(rank, 3)).painted(30)]
    assert sorted(np.concatenate(parts)) == sorted(whole)


def test_a_large_image_is_decoded_once_for_all_that_is_painted_on_it(category, monkeypatch):
    monkeypatch.setattr(kit.good, "CACHE_BYTES", 0)
    monkeypatch.setattr(kit.good, "PATCH", 32)
    monkeypatch.setattr(kit.good.sys, "platform", "none")  # paint in this process
    read = []
    monkeypatch.setattr(kit.good, "read_image", lambda path, shape: read.append(path) or read_image(path, shape))
    painted = list(make_painter(category, size=128).painted(100))
    assert sum(len(numbers) for _, _, numbers in painted) == 100 and max(painted[0][0].shape[2:]) <= 32 + 2 * UNIT
    assert len(read) == len(set(read)) == 24


def test_a_patch_gets_its_surroundings_from_the_grid_of_the_whole_image():
    assert widened(slice(300, 812), 192, 4096) == slice(96, 1024)
    assert widened(slice(0, 512), 192, 4096) == slice(0, 704)
    assert widened(slice(488, 1000), 192, 1000) == slice(288, 1000)
    assert widened(slice(300, 812), None, 1000) == slice(0, 1000)


def test_without_a_loss_that_learns_from_defects_none_are_painted(category, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kit.rows.painted_rows", None)
    options = [*QUICK, "--classification-weight", 0, "--contrast-weight", 0]
    call(train.main, "--data", category, "--out", tmp_path / "run", *options)
    said = capsys.readouterr().out
    assert "painting" not in said and "nll" in said and "loss nan" not in said
    assert load(tmp_path / "run" / "model.pt").good_scores.shape == (2, 24)


@pytest.mark.parametrize("least, times", [(24, 1), (25, 2), (64, 3)])
def test_each_image_has_as_many_camera_copies_whatever_the_processes(category, monkeypatch, least, times):
    """The copies are the same each time, similar to the image, and different from each other. With two processes, each
    makes a part of them."""
    monkeypatch.setattr("kit.good.LEAST_COPIES", least)
    painter = make_painter(category)
    copies = torch.cat(list(painter.copies()))
    images = torch.cat(list(painter.normal())).repeat(times, 1, 1, 1)
    assert copies.shape == images.shape == (times * 24, 3, 64, 64)
    assert len({copy.numpy().tobytes() for copy in copies}) == times * 24
    assert painter.image_index(np.array(painter.copy_numbers())).tolist() == times * list(range(24))
    away = (copies - images).abs().mean(dim=(1, 2, 3))
    to_another = (copies - images.roll(1, 0)).abs().mean(dim=(1, 2, 3))
    assert (away > 0).all() and (away < to_another).all()
    for rank in (0, 1):
        mine = torch.cat(list(make_painter(category, Processes(rank, 2)).copies()))
        assert torch.equal(mine, copies[rank::2])
