"""The nearest neighbour: distances, coreset and spacing against loops; the same scripts."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import LITE, NEAREST, call, check_export, refuse, visible
from PIL import Image
from scipy.spatial import distance

import evaluate
import train
from bank import Prototypes, covering
from kit import InputError, data, folders, search
from kit.backbone import BACKBONES
from kit.good import split
from kit.settings import NearestSettings
from methods import load
from methods.nearest import Nearest, scaled_distances
from methods.stages import stages_of

RNG = np.random.default_rng(0)


def prototypes(bank) -> Prototypes:
    """Prototypes with a given bank (P, C)."""
    bank = torch.as_tensor(bank, dtype=torch.float32)
    found = Prototypes(bank.shape[1])
    found.centre.copy_(bank.mean(dim=0))
    found.bank = bank - found.centre
    found.spacing = torch.ones(len(bank))
    found.origin = torch.zeros(len(bank), dtype=torch.long)
    search.divide(found)
    return found


@pytest.mark.parametrize("fast, exports", [(False, False), (True, False), (True, True)])
def test_the_nearest_prototype_is_that_of_scipy(monkeypatch, fast, exports):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: exports)
    rows, bank = RNG.random((52, 7)) + 100, RNG.random((40, 7)) + 100
    mine = prototypes(bank)
    mine.fast = fast
    found = torch.from_numpy(np.float32(rows))
    index, difference = mine.nearest(found, 4, torch.float32)
    expected = distance.cdist(rows, bank)
    assert np.array_equal(index, expected.argmin(axis=1))
    assert np.allclose(difference.norm(dim=1), expected.min(axis=1), atol=1e-4)


@pytest.mark.parametrize("exports", [False, True])
def test_the_fast_search_finds_what_the_plain_one_finds(monkeypatch, exports):
    """On the same bank; without nothing, without some images, or without each row's own image. Leaving out all
    prototypes is refused."""
    monkeypatch.setattr(search, "CELL", 64)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: exports)
    bank, rows = clustered(2000, 600)
    mine = prototypes(bank)
    mine.origin = torch.arange(2000) % 5
    own = torch.arange(600) % 5
    for excluded in (None, torch.tensor([[1, 3]]).expand(len(rows), -1), own[:, None]):
        mine.fast = True
        fast, _ = mine.nearest(rows, 10, torch.float32, excluded)
        mine.fast = False
        plain, _ = mine.nearest(rows, excluded=excluded)
        assert (fast == plain).float().mean() > 0.99
        if excluded is not None:
            assert (mine.origin[plain][:, None] != excluded).all()
    for mine.fast in (True, False):
        with pytest.raises(InputError, match="copies of each other"):
            mine.nearest(rows, 10, torch.float32, torch.arange(5).expand(len(rows), -1))


def test_half_the_bits_find_one_that_is_as_near():
    rows, bank = torch.randn(500, 64) + 20, torch.randn(200, 64) + 20
    mine = prototypes(bank)
    far, near = (mine.nearest(rows, 1, dtype)[1].norm(dim=1) for dtype in (torch.bfloat16, torch.float32))
    assert (far / near).mean() < 1.002 and (far / near).max() < 1.03


def clustered(*counts: int) -> list[torch.Tensor]:
    """For each count, rows (count, 16) around the same sixty places."""
    generator = torch.Generator().manual_seed(0)
    places = 20 * torch.randn(60, 16, generator=generator)
    found = []
    for count in counts:
        near = places[torch.randint(60, (count,), generator=generator)]
        found.append(near + torch.randn(count, 16, generator=generator))
    return found


def test_cells_find_the_prototype_that_a_search_through_all_finds(monkeypatch):
    monkeypatch.setattr(search, "CELL", 64)
    bank, rows = clustered(2000, 3000)
    mine = prototypes(bank)
    expected = torch.cdist(rows - mine.centre, mine.bank).argmin(dim=1)
    assert len(mine.cell_centres) == 32 and len(expected.unique()) > 1000
    mine.spacing.fill_(1e6)  # no row is far
    assert (mine.nearest(rows, 1, torch.float32)[0] == expected).float().mean() > 0.99
    monkeypatch.setattr(search, "LOOKED_INTO", 1)
    found, difference = mine.nearest(rows, 1, torch.float32)
    assert 0.5 < (found == expected).float().mean() < 0.999
    distances = difference.norm(dim=1)
    mine.spacing.fill_(distances.median())  # half of the rows are far, and search more cells
    is_far = distances > distances.median()
    again, difference = mine.nearest(rows, 1, torch.float32)
    assert torch.equal(difference, rows - mine.centre - mine.bank[again])
    assert torch.equal(again[is_far], expected[is_far]) and torch.equal(again[~is_far], found[~is_far])
    assert not torch.equal(found[is_far], expected[is_far])
    monkeypatch.setattr(search, "LOOKED_INTO_IF_FAR", 1)
    assert torch.equal(mine.nearest(rows, 1, torch.float32)[0], found)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # an export searches through all
    assert torch.equal(mine.nearest(rows, 10, torch.float32)[0], expected)


def test_a_prototype_keeps_its_spacing_and_origin_in_its_cell():
    (bank,) = clustered(500)
    mine = prototypes(bank)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    before = mine.bank[order]
    mine.bank, mine.spacing, mine.origin = before, before[:, 0], torch.arange(500)
    search.divide(mine)
    assert torch.equal(mine.bank, before[mine.origin]) and torch.equal(mine.spacing, before[mine.origin, 0])
    cell = torch.arange(len(mine.cell_centres)).repeat_interleave(mine.cell_sizes)
    nearest_cell = torch.cdist(mine.bank, mine.cell_centres).argmin(dim=1)
    assert (nearest_cell == cell).float().mean() > 0.95  # k-means may be stopped
    means = torch.stack([mine.bank[cell == number].mean(dim=0) for number in range(len(mine.cell_centres))])
    assert (means - mine.cell_centres).norm() < 0.1 * means.norm()


def test_a_cell_that_does_not_count_is_not_looked_into():
    """All prototypes near the row are left out. It finds the nearest of the others."""
    near = torch.randn(600, 4, generator=torch.Generator().manual_seed(0))
    far = torch.tensor([[50.0, 0, 0, 0], [60, 0, 0, 0]])
    mine = prototypes(torch.cat((near, far)))
    mine.origin = (mine.bank + mine.centre)[:, 0].gt(40).long()  # the near ones are of image 0
    (index,), _ = mine.nearest(torch.zeros(1, 4), 1, torch.float32, torch.tensor([[0]]))
    assert mine.bank[index] + mine.centre == pytest.approx(far[0].numpy(), abs=1e-4)


@pytest.mark.parametrize("exports", [False, True])
def test_each_row_leaves_out_prototypes_of_its_own(monkeypatch, exports):
    """In cells, and in a search through all prototypes. The rows have any order of images, and each row leaves out two
    images. Some cells belong to a single image."""
    monkeypatch.setattr(search, "CELL", 64)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: exports)
    bank, rows = clustered(2000, 600)
    mine = prototypes(bank)
    mine.origin = torch.where(torch.arange(2000) < 1000, torch.arange(2000) // 100, torch.arange(2000)) % 5
    own = torch.from_numpy(RNG.integers(5, size=600))
    excluded = torch.stack((own, (own + 1) % 5), dim=1)
    is_out = (mine.origin == excluded[:, :1]) | (mine.origin == excluded[:, 1:])
    distances, expected = torch.cdist(rows - mine.centre, mine.bank).masked_fill(is_out, torch.inf).min(dim=1)
    mine.spacing.fill_(distances.median())  # half of the rows are far
    found, _ = mine.nearest(rows, 10, torch.float32, excluded)
    assert (found == expected).float().mean() > 0.99
    assert (found != mine.nearest(rows, 10, torch.float32)[0]).float().mean() > 0.3
    for looks in ("LOOKED_INTO", "LOOKED_INTO_IF_FAR"):
        monkeypatch.setattr(search, looks, 1)
        found, _ = mine.nearest(rows, 10, torch.float32, excluded)
        assert not is_out.gather(1, found[:, None]).any()


def test_features_that_are_no_numbers_are_refused():
    rows = torch.full((20, 4), torch.nan)
    with pytest.raises(InputError, match="--weights"):
        Prototypes(4).fit(rows, torch.zeros(20, dtype=torch.long), 2, torch.Generator())


def test_equal_prototypes_make_fewer_cells():
    mine = prototypes(torch.eye(4).repeat(50, 1))
    assert len(mine.cell_centres) <= 4 and mine.cell_sizes.sum() == 200
    assert torch.equal(mine.bank[mine.nearest(torch.eye(4), 1, torch.float32)[0]] + mine.centre, torch.eye(4))


@pytest.mark.parametrize("farthest", [2, 5, 1024])
def test_the_bank_covers_the_rows_as_a_greedy_loop_does(monkeypatch, farthest):
    """Random directions keep the order of distances only approximately. Here the rows' own dimensions replace them."""
    monkeypatch.setattr(search, "FARTHEST", farthest)
    monkeypatch.setattr(search, "SKETCH", 4)
    monkeypatch.setattr(torch, "randn", lambda *shape, generator: 2 * torch.eye(4))  # 2 is the root of SKETCH
    rows = torch.from_numpy(np.random.default_rng(0).random((300, 4), dtype=np.float32))
    chosen = [0]
    for _ in range(39):
        to_chosen = distance.cdist(rows, rows[chosen]).min(axis=1)
        chosen.append(int(np.argmax(to_chosen)))
    assert search.covering(rows, 40, torch.Generator()).tolist() == chosen
    assert covering(rows, 40).tolist() == chosen
    plain = Prototypes(4, fast=False)
    plain.fit(rows, torch.arange(300), 40, torch.Generator())
    assert sorted(plain.origin.tolist()) == sorted(chosen)
    between = np.sort(distance.cdist(rows[plain.origin], rows[chosen]), axis=1)
    mean = between[:, 1:6].mean(axis=1)
    assert np.allclose(np.maximum(mean, np.quantile(mean, 0.5, method="lower")), plain.spacing, rtol=1e-3)


def test_a_bank_reaches_rare_rows_that_a_random_choice_would_miss():
    rows = torch.cat((torch.randn(5000, 16, generator=torch.Generator().manual_seed(0)), 20 + torch.zeros(1, 16)))
    assert 5000 in search.covering(rows, 20, torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("local", [True, False])
def test_energies_by_hand(monkeypatch, local):
    """Rows of a dense and of a sparse kind. With `local`, the same distance counts more among the dense rows."""
    settings = NearestSettings(backbone=LITE[1], size=16, images=3, held_out=1, bank=3, local=local)
    model = Nearest(settings)
    model.prototypes = prototypes([[0.0, 0, 0], [10, 0, 0], [30, 0, 0]])
    model.prototypes.spacing.copy_(torch.tensor([1.0, 2.0, 6.0]))
    x = torch.tensor([[1.0, 0, 0], [10, 0, 4], [31, 0, 0], [4, 0, 0]])
    monkeypatch.setattr(model, "features", lambda images: x.T.reshape(1, 3, 2, 2))
    (e,) = model.energies(torch.empty(1, 3, 16, 16))
    expected = [1 / 1, 4 / 2, 1 / 6, 4 / 1] if local else [1 / 3, 4 / 3, 1 / 3, 4 / 3]
    assert e.flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_features_join_two_strides_position_by_position(monkeypatch):
    """The coarse map is averaged, then laid over the fine one."""
    fine, coarse = torch.rand(1, 2, 4, 4), torch.rand(1, 1, 2, 2)
    backbone = BACKBONES[LITE[1]]()
    monkeypatch.setattr(backbone, "layers", lambda images: [fine, coarse])
    x = backbone.features(torch.empty(1, 3, 32, 32))
    assert x.shape == (1, 3, 4, 4)
    neighbours = [fine[0, 1, i, j] for i, j in itertools.product((0, 1), (0, 1))]  # four at the corner, not nine
    assert x[0, 1, 0, 0].item() == pytest.approx(float(np.mean(neighbours)), abs=1e-5)
    assert x[0, 2].mean().item() == pytest.approx(coarse.mean().item(), abs=1e-5)  # 2x2: the mean everywhere


def test_spacing_is_the_mean_distance_to_the_five_nearest_of_the_bank_or_the_median_of_these(nearest_run):
    model = load(nearest_run / "model.pt")
    assert model.prototypes.bank.shape == (400, 40 + 112)
    between = np.sort(distance.cdist(model.prototypes.bank, model.prototypes.bank), axis=1)
    mean = between[:, 1:6].mean(axis=1)
    expected = np.maximum(mean, np.quantile(mean, 0.5, method="lower"))
    assert np.allclose(expected, model.prototypes.spacing, rtol=1e-3) and mean.min() < 0.9 * expected.min()


def test_a_training_image_is_judged_as_by_a_bank_without_it(nearest_run, category):
    """Only its own prototypes do not count. With them it would score far too low."""
    model = load(nearest_run / "model.pt")
    held_out, trained_on = split(folders.list_images(category / "train/good"), seed=0)
    assert model.good_scores.shape == (2, 24)
    number = 5
    x = model.features(data.read_batch([trained_on[number]], (128, 128)))
    own = model.prototypes.origin == number
    assert 0 < own.sum() < 100 and set(model.prototypes.origin.tolist()) <= set(range(len(trained_on)))
    bank = (model.prototypes.bank + model.prototypes.centre)[~own]
    rows = x[0].flatten(1).T.float()
    to_others = torch.cdist(rows, bank).min(dim=1)
    expected = to_others.values / model.prototypes.spacing[~own][to_others.indices]
    model.full_precision = True  # in bfloat16, nearly equal distances may be confused
    found = scaled_distances(model.prototypes, x, True, model.dtype, torch.tensor([number]))
    assert torch.allclose(found.flatten(), expected, rtol=0.01)
    assert scaled_distances(model.prototypes, x, True, model.dtype).mean() < 0.9 * expected.mean()
    # Each kept prototype is nearest to itself, so the numbers belong to the right images.
    kept = model.prototypes.bank[own] + model.prototypes.centre
    assert torch.cdist(kept, rows).min(dim=1).values.max() < 0.1 * kept.norm(dim=1).mean()


def test_it_goes_through_the_same_scripts(nearest_run, category, tmp_path):
    assert visible(nearest_run) == ["model.pt"]
    run = shutil.copytree(nearest_run, tmp_path / "run")
    call(evaluate.main, run)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["method"] == "nearest" and metrics["image_auroc"] > 0.85 and metrics["pixel_auroc"] > 0.9
    images = data.read_batch(folders.list_images(category / "test" / "chip")[:3], (128, 128))
    chip = folders.list_images(category / "test" / "chip")[0]
    call(evaluate.main, nearest_run, "--explain", chip, "--out", tmp_path / "why.png")
    assert Image.open(tmp_path / "why.png").width > 900
    model = load(nearest_run / "model.pt")
    ((name, seen),) = stages_of(model, images[:1])
    with torch.no_grad():
        assert name == "expert 1" and torch.equal(seen, model.energies_in_windows(images[:1])[0][0])
    check_export(nearest_run, images, tmp_path / "model.pt2", tolerance=1e-3, loads=False)


def test_stopped_after_its_bank_was_chosen_it_goes_on_with_it(nearest_run, category, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    command = ["--data", category, "--out", tmp_path, *NEAREST]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "finish", stop)
        call(train.main, *command)
    assert visible(tmp_path / "unfinished") == ["state.pt"]
    monkeypatch.setattr(Prototypes, "fit", stop)  # the bank must not be chosen again
    call(train.main, *command, "--resume")
    assert visible(tmp_path) == ["model.pt"]
    whole, parts = (load(run / "model.pt").state_dict() for run in (nearest_run, tmp_path))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_options_of_a_training_it_does_not_have_are_refused(category, tmp_path, capsys):
    command = ["--data", category, "--out", tmp_path / "out", "--method", "nearest"]
    for flag, value in (("--epochs", 3), ("--lr", 0.1), ("--batch", 4), ("--contrast", "energy"), ("--textures", "x")):
        refuse(train.main, capsys, *command, flag, value, words=[flag, "--method nearest"])
    refuse(train.main, capsys, *command, "--keep-epochs", words=["--keep-epochs", "--method nearest"])
    refuse(train.main, capsys, "--data", category, "--out", tmp_path / "out", "--method", "autoencoder", "--no-local",
           words=["--local", "autoencoder"])  # fmt: skip
