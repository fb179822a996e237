from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kit.good
from kit.data import list_images
from kit.good import GoodImages, Pairs, held_out_count, split
from kit.processes import Processes
from synth import synthesize


def make_pairs(category, processes: Processes = Processes(), size: int = 64) -> Pairs:  # noqa: B008 (it is frozen)
    good = GoodImages([], list_images(category / "train/good"), [], processes)
    shape = (size, size)
    model = SimpleNamespace(shape=shape, roi=torch.ones(shape, dtype=torch.bool), settings=SimpleNamespace(seed=0))
    return Pairs(good, synthesize, model, 100)


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
    whole, masks, numbers = make_pairs(category).__getitems__(indices)
    assert numbers.tolist() == indices[: len(masks)]
    assert len(masks) == (size + 1) // 2 and len(whole) == size + len(masks)
    assert np.array_equal(whole[: len(masks)] * (masks == 0), whole[size:] * (masks == 0))  # made from the first ones
    normal, anomalous = [], []
    for rank in range(world):
        images, masks, _ = make_pairs(category, Processes(rank, world)).__getitems__(indices)
        normal += list(images[: -len(masks)])
        anomalous += list(images[-len(masks) :])
    assert {x.sum() for x in normal} == {x.sum() for x in whole[:size]}
    if size >= 2 * world:  # there is an x- for each process
        assert len(normal) == size
        assert sorted(x.sum() for x in anomalous) == sorted(x.sum() for x in whole[size:])


def test_what_is_painted_depends_on_seed_epoch_and_image_alone(category):
    pairs = make_pairs(category)
    images, _, _ = pairs.__getitems__([3, 4])
    again, _, _ = pairs.__getitems__([3, 9])
    assert np.array_equal(images[2], again[2])
    pairs.epoch = 1
    assert not np.array_equal(pairs.__getitems__([3, 4])[0][2], images[2])


def test_small_sets_are_repeated(category):
    assert len(make_pairs(category)) == 4 * 24  # about 100


def test_images_beyond_the_cache_are_read_anew(category, monkeypatch):
    monkeypatch.setattr(kit.good, "CACHE_BYTES", 3 * 6 * 64 * 64)
    pairs = make_pairs(category)
    assert len(pairs.cache) == 3
    images, _, _ = pairs.__getitems__(list(range(8)))
    expected, _, _ = make_pairs(category, size=64).__getitems__(list(range(8)))
    assert np.allclose(images[:8], expected[:8], atol=1e-3)  # the cache has half the bits


def test_batches_need_no_shared_memory(category, monkeypatch):
    """A container has 64 MB of it, less than a few batches. What a worker sends must not be a tensor: that would go
    there."""

    def refuse(tensor):
        raise AssertionError("a tensor is about to be sent through shared memory")

    loader = kit.good.loader(make_pairs(category), batch=8)
    assert loader.num_workers > 0
    loader.timeout = 30  # a worker that cannot send says nothing
    for kind in (torch.Tensor, torch.UntypedStorage):
        monkeypatch.setitem(ForkingPickler._extra_reducers, kind, refuse)
    images, masks, _ = next(iter(loader))
    assert images.shape == (12, 64, 64, 3) and masks.shape == (4, 64, 64, 1)


def test_good_images_are_shared_between_the_processes(category):
    parts = [torch.cat(list(make_pairs(category, Processes(rank, 5)).normal())) for rank in range(5)]
    whole = torch.cat(list(make_pairs(category).normal()))
    assert whole.shape == (24, 3, 64, 64)
    assert sorted(x.sum().item() for x in torch.cat(parts)) == sorted(x.sum().item() for x in whole)


def test_as_many_are_painted_as_asked_for_and_anew_when_all_have_been(category):
    pairs = make_pairs(category)
    seen = list(pairs.painted(100))  # 96 images, x- of half of them in an epoch
    assert 100 <= sum(len(mask) for _, _, mask, _ in seen) < 108 and pairs.epoch == 3
    normal = torch.cat(list(pairs.normal()))
    for before, after, mask, numbers in seen:
        assert torch.equal(before, normal[numbers])
        changed = (before != after).any(dim=1, keepdim=True)
        assert changed.any() and not changed[mask == 0].any()
