"""The projecting autoencoder: losses and corruptions by hand, what it learns, and the scripts."""

import csv
import json

import numpy as np
import pytest
import torch
from helpers import LITE, SMALL, call, check_export, refuse
from PIL import Image
from scipy import ndimage

import evaluate
import train
from benchmarks import projection
from kit import data, folders
from kit.good import GoodImages, split
from kit.images import read_image
from methods import autoencoder, load
from methods.stages import stages_of
from synth import synthesize

SHAPE = (96, 96)  # of the images of projecting_run
EVERYWHERE = torch.ones(64, 64, dtype=torch.bool)


class Stub(torch.nn.Module):
    """A projection that adds 0.3 to every pixel. It checks that the batch norms use the batch's statistics."""

    roi = torch.ones(4, 4, dtype=torch.bool)

    def project(self, images: torch.Tensor) -> torch.Tensor:
        assert self.training
        return images + 0.3


def test_loss_of_the_two_regions_by_hand(monkeypatch):
    mask, clean = torch.zeros(2, 1, 4, 4), torch.tensor([0.3, 0.6, 0.9]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    mask[0, :, :2], mask[1, :, 0, 0] = 1, 1
    painted, bent, disc = mask * torch.tensor([0.1, 0.7]).view(2, 1, 1, 1), torch.zeros(2, 1, 4, 4), mask.clone()
    bent[0, :, 3], disc[0, :, 3] = 0.2, 1  # another row of the first image is bent
    monkeypatch.setattr(autoencoder, "bend", lambda images, mask, roi: (images - bent, torch.maximum(mask, disc)))
    stub = Stub().eval()
    found = autoencoder.Losses(stub)(torch.cat((clean, clean[:2] - painted)), mask)
    first = (8 * (0.3 - 0.1) ** 2 + 4 * (0.3 - 0.2) ** 2) / 12
    inside = (first + (0.3 - 0.7) ** 2) / 2  # 12 pixels and 1: the images count equally
    assert found["outside"].item() == pytest.approx(0.09) and found["inside"].item() == pytest.approx(inside)
    assert found["loss"].item() == pytest.approx(0.9 * 0.09 + 0.1 * inside) and not stub.training
    clean = clean.clone()
    clean[:, :, :, 3] = 5  # outside the region of interest
    stub.roi = stub.roi & (torch.arange(4) < 3)
    found = autoencoder.Losses(stub)(torch.cat((clean, torch.full((2, 3, 4, 4), 0.3) - painted)), mask)
    assert found["outside"].item() == pytest.approx((0.3**2 + 0) / 2)


def test_bend_moves_what_is_in_a_disc_where_there_is_contrast():
    """Two channels hold the coordinates of each pixel, so they show where it came from. SciPy moves the third one the
    same way."""
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    images, painted = torch.stack((1e-3 * y, 1e-3 * x, torch.zeros(64, 64))).repeat(40, 1, 1, 1), torch.zeros(64, 64)
    images[:, 2, 24:40, 24:40], painted[0, 0] = torch.rand(40, 16, 16), 1
    bent, masks = autoencoder.bend(images, painted.expand(40, 1, 64, 64), EVERYWHERE)
    assert bent.shape == images.shape and masks.unique().tolist() == [0, 1] and masks[:, 0, 0, 0].min() == 1
    discs, moves = masks - painted, (1e3 * (bent - images)[:, :2]).norm(dim=1, keepdim=True)
    assert moves[discs == 0].max() < 1 < 3 < moves.max() < 16
    some = discs.sum(dim=(1, 2, 3)) > 0
    assert 10 <= some.sum() <= 30 and moves[~some].max() < 1e-2 and moves[some].amax(dim=(1, 2, 3)).min() > 0.05
    centres = torch.stack([disc[0].nonzero().float().mean(dim=0) for disc in discs[some]])
    assert ((centres > 22) & (centres < 42)).all() and centres.std(dim=0).min() > 2  # at random, in the middle
    for before, after in zip(images.numpy(), bent.numpy(), strict=True):
        expected = ndimage.map_coordinates(before[2], 1e3 * after[:2], order=1, mode="nearest")
        assert np.abs(expected - after[2]).max() < 0.01
    flat = torch.ones(4, 3, 64, 64)
    assert torch.allclose(autoencoder.bend(flat, painted, EVERYWHERE)[0], flat)  # no contrast anywhere


def test_skips_take_the_encoder_or_the_decoder_as_their_gates_say():
    torch.manual_seed(0)
    network, images, found = autoencoder.Projection().eval(), torch.rand(1, 3, 64, 64), []
    for bias in (50.0, -50.0):
        torch.nn.init.constant_(network.gates[0].bias, bias)
        before = network(images)
        disturbed = network.up[0].register_forward_hook(lambda module, inputs, output: output + 1)
        found.append((network(images) - before).abs().max().item())
        disturbed.remove()
    assert found[0] == 0 and found[1] > 1e-3  # C = 1: only the encoder counts; C = 0: only the decoder


def test_skips_are_convex_combinations_of_encoder_and_decoder():
    torch.manual_seed(0)
    network, seen = autoencoder.Projection().double().eval(), {}
    for name in ("gates", "mirror"):
        getattr(network, name)[0].register_forward_hook(lambda m, inputs, _, name=name: seen.update({name: inputs}))
    with torch.no_grad():
        network(torch.rand(2, 3, 16, 16).double())
    encoder, decoder = seen["gates"][0].chunk(2, dim=1)
    share = ((seen["mirror"][0] - decoder) / (encoder - decoder)).where((encoder - decoder).abs() > 1e-6, torch.nan)
    middle = share.nanmean(dim=1, keepdim=True)
    assert middle.min() > 0 and middle.max() < 1 and (share - middle).abs().nan_to_num().max() < 1e-6 < middle.std()


def test_projection_repairs_and_is_idempotent(projecting_run, category):
    model, moves, distances = load(projecting_run / "model.pt"), [], []
    for i, image in enumerate(read_image(p, SHAPE) for p in folders.list_images(category / "test" / "good")):
        rng = np.random.default_rng(i)
        corrupted, mask, _ = synthesize(image, rng)
        clean, x = (torch.from_numpy(a).permute(2, 0, 1)[None] for a in (image, corrupted))
        with torch.no_grad():
            once = model.project(x)
            twice = model.project(once)
        distances.append([(y - clean).square().mean(dim=1)[0][torch.from_numpy(mask)].sum().item() for y in (x, once)])
        moves.append([(a - b).square().sum().item() for a, b in ((once, x), (twice, once))])
    (before, after), (first, second) = np.sum(distances, axis=0), np.sum(moves, axis=0)
    assert after < 0.5 * before  # the corrupted patch comes back nearer to the original
    assert second < 0.25 * first  # f(f(x)) is close to f(x)


def test_dilated_layers_take_part_in_the_repair(projecting_run, category):
    """In an earlier version they died in training unnoticed, because a skip connection bypassed them: f was the same
    without them."""
    model, outputs = load(projecting_run / "model.pt"), []
    images = [read_image(p, SHAPE) for p in folders.list_images(category / "test" / "good")]
    corrupted = [synthesize(image, np.random.default_rng(i))[0] for i, image in enumerate(images)]
    x = torch.from_numpy(np.stack(corrupted)).permute(0, 3, 1, 2)
    for _ in range(2):
        with torch.no_grad():
            outputs.append(model.project(x))
        model.projection.context.register_forward_hook(lambda layers, inputs, output: torch.zeros_like(output))
    share = (outputs[1] - outputs[0]).square().mean() / (outputs[0] - x).square().mean()
    assert share > 0.01, share


def test_projection_puts_the_mean_colour_back():
    torch.manual_seed(0)
    projection = autoencoder.Projection().eval()
    images, light = torch.rand(2, 3, 32, 40), torch.tensor([-0.1, 0.0, 0.2]).view(1, 3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(projection(images + light), projection(images) + light, atol=1e-5)


def test_energy_is_the_distance_to_the_nearest_movement_of_a_normal_image(projecting_run, category):
    model = load(projecting_run / "model.pt")
    model.full_precision = True
    images = data.read_batch(folders.list_images(category / "test" / "crack"), SHAPE)
    large = torch.nn.functional.interpolate(torch.cat((model.project(images), images)), (144, 144), mode="bilinear",
                                            antialias=True).clamp(0, 1)  # fmt: skip
    after, before = model.backbone.features(large).chunk(2)
    rows = (after - before).permute(0, 2, 3, 1).reshape(-1, after.shape[1])
    bank = model.prototypes.bank + model.prototypes.centre
    distance, index = torch.cdist(rows, bank, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
    expected = (distance / model.prototypes.spacing[index]).view(len(images), 18, 18)
    is_equal = (model.energies(images)[0] - expected).abs() < 1e-3 * expected.max()
    assert is_equal.float().mean() > 0.99 and expected.std() > 0.1  # only some cells of the bank are searched


def test_the_bank_is_of_the_present_projection(projecting_run, category):
    """The bank changes with the images that it is fitted to, and with each training step. Otherwise it depends on the
    seed alone."""
    model = load(projecting_run / "model.pt")
    files = folders.list_images(category / "train" / "good")
    images = data.read_batch(files, SHAPE)
    banks = []
    for shift in (0.0, 0.0, 0.1):
        model.projection.out.bias.data += shift
        model.fit(GoodImages([], files))
        banks.append(model.prototypes.bank.clone())
    assert torch.equal(banks[0], banks[1]) and (banks[2] - banks[1]).norm() > 0.01 * banks[1].norm()
    assert model.energies(images)[0].median() < 2  # normal movements lie near the bank
    model.projection.out.bias.data += 0.3
    assert model.energies(images)[0].median() > 2


def test_autoencoder_goes_through_the_same_scripts(projecting_run, category, tmp_path):
    with open(projecting_run / "log.csv") as file:
        assert next(csv.reader(file)) == ["epoch", "loss", "outside", "inside", "seconds"]
    call(evaluate.main, projecting_run)
    metrics = json.loads((projecting_run / "metrics.json").read_text())
    assert metrics["backbone"] == "efficientnet_lite0"
    assert metrics["image_auroc"] > 0.7 and metrics["pixel_auroc"] > 0.9
    call(evaluate.main, projecting_run, "--images", category / "test" / "crack", "--out", tmp_path / "new")
    assert len(list((tmp_path / "new").glob("*.png"))) == SMALL["test/crack"]
    crack = folders.list_images(category / "test" / "crack")[0]
    call(evaluate.main, projecting_run, "--explain", crack, "--out", tmp_path / "why.png")
    assert Image.open(tmp_path / "why.png").width > 900
    images = data.read_batch(folders.list_images(category / "test" / "good")[:3], SHAPE)
    model = load(projecting_run / "model.pt")
    with torch.no_grad():
        *_, (name, seen) = stages_of(model, images[:1])
        expected = model.energies_in_windows(images[:1])[0][0]
    assert name == "E, compared with the bank" and torch.allclose(seen, expected, rtol=0.01)
    check_export(projecting_run, images, tmp_path / "model.pt2", tolerance=1e-4, loads=False)
    call(projection.main, projecting_run)
    assert Image.open(projecting_run / "projection.png").width == 960


def test_only_runs_of_the_autoencoder_have_a_projection(nearest_run, capsys):
    refuse(projection.main, capsys, nearest_run, words=[nearest_run, "--method autoencoder"])


def test_an_odd_held_out_image_is_shown_and_ends_nothing(category, tmp_path, monkeypatch, capsys):
    """Only the held-out images calibrate the autoencoder. One that is unlike the others is named and drawn."""
    monkeypatch.setattr(autoencoder, "IMAGES_PER_EPOCH", 30)
    monkeypatch.setattr(train, "outliers", lambda scores: np.array([1]))
    options = ["--method", "autoencoder", *LITE, "--size", 64, "--epochs", 1, "--bank", 100]
    call(train.main, "--data", category, "--out", tmp_path, *options)
    held_out, _ = split(folders.list_images(category / "train" / "good"), seed=0)
    assert f"1 of the good images look unlike the others: {held_out[1].name}" in capsys.readouterr().out
    assert (tmp_path / "suspects.png").exists() and (tmp_path / "model.pt").exists()
