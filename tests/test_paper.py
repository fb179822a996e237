"""CL-Flow in the paper's own form: losses by hand, the gradients they give, and the scripts."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import LITE, SMALL, call, check_export, refuse
from PIL import Image
from torchvision.models.feature_extraction import create_feature_extractor

import clflow
import evaluate
import train
from flows import Flow2D
from kit import data, folders
from kit.backbone import BACKBONES
from kit.good import GoodImages, split
from kit.settings import PaperSettings
from methods import load, paper

SETTINGS = PaperSettings(images=4, held_out=1, size=64, backbone="efficientnet_lite0", steps=2)


def make_model(**changes) -> paper.Paper:
    """A small, untrained model with random parameters in all flows. A flow that starts as the identity would pass
    vacuously."""
    torch.manual_seed(0)
    model = paper.Paper(replace(SETTINGS, **changes)).eval()
    with torch.no_grad():
        for p in model.flows.parameters():
            p.normal_(0, 0.1)
    return model


# ---------------------------------------------------------------- features and flows


def test_what_is_trained_are_the_three_flows_of_fastflow():
    """FastFlow's parameter counts with ResNet18: with 3x3 kernels, and with 3x3 and 1x1 kernels in turn."""
    model = paper.Paper(PaperSettings(images=4, held_out=1))
    trained = [p for p in paper.Losses(model).parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 4_657_408
    alternating = [Flow2D(channels, 8, (3, 1)) for channels in model.backbone.widths]
    assert sum(p.numel() for flow in alternating for p in flow.parameters()) == 2_593_024


@pytest.mark.parametrize("name, widths", [("efficientnet_lite0", [24, 40, 112]), ("resnet18", [64, 128, 256])])
def test_a_backbone_gives_three_scales_and_joins_them(name, widths):
    backbone, images = BACKBONES[name](strides=(4, 8, 16)), torch.rand(1, 3, 96, 80)
    scales = backbone.scales(images)
    assert [x.shape[1] for x in scales] == backbone.widths == widths and backbone.stride == 4
    assert [x.shape[2:] for x in scales] == [(24, 20), (12, 10), (6, 5)]
    joined = backbone.features(images)
    assert joined.shape == (1, sum(widths), 24, 20) and torch.equal(joined[:, : widths[0]], scales[0])


def test_the_three_scales_are_those_of_torchvision_averaged(tmp_path):
    net = torchvision.models.resnet18().eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    backbone = BACKBONES["resnet18"](strides=(4, 8, 16))
    backbone.load_imagenet(str(tmp_path / "net.pth"))
    images = torch.rand(2, 3, 96, 64)
    layers = create_feature_extractor(net, ["layer1", "layer2", "layer3"])(backbone.normalised(images)).values()
    for found, layer in zip(backbone.scales(images), layers, strict=True):
        middle = sum(layer[:, :, 1 + y : 3 + y, 1 + x : 3 + x] for y in (-1, 0, 1) for x in (-1, 0, 1)) / 9
        assert (found[:, :, 1:3, 1:3] - middle).abs().max() < 1e-4 * layer.abs().max() and middle.std() > 0


def test_features_are_standardised_channel_by_channel_over_all_positions(category):
    model = make_model()
    model.backbone.load_imagenet()
    files = folders.list_images(category / "train" / "good")
    model.fit(GoodImages(files[20:], files[:20]))
    scales = [x.double() for x in model.scales(data.read_batch(files[:20], (64, 64)))]
    for x, norm in zip(scales, model.norms, strict=True):
        variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)
        expected = (x - mean) / (variance + 1e-3 * variance.mean()).sqrt()
        assert torch.allclose(norm(x.float()).double(), expected, atol=1e-3) and expected.std() > 0.9


def test_energies_are_the_exact_likelihood_of_each_scale_at_the_finest_positions():
    """The flows are still permutations, so the energy is half the mean square of the standardised features."""
    torch.manual_seed(0)
    model = paper.Paper(SETTINGS).eval()
    for norm in model.norms:
        norm.mean.uniform_(0, 1)
        norm.deviation.uniform_(1, 2)
    images = torch.rand(2, 3, 64, 96)
    found = model.energies(images)
    assert [e.shape for e in found] == 3 * [(2, 16, 24)]
    for e, x, norm in zip(found, model.backbone.scales(images), model.norms, strict=True):
        half = ((x - norm.mean) / norm.deviation).square().mean(dim=1) / 2
        tame = torch.where(half <= 1, half, 1 + half.log())
        enlarged = F.interpolate(tame[:, None], (16, 24), mode="bilinear")[:, 0]
        assert torch.allclose(e, enlarged, atol=1e-4) and e.std() > 0


def test_the_volume_that_a_flow_changes_counts_in_the_energy():
    model = make_model()
    images = torch.rand(1, 3, 64, 64)
    before = [e.clone() for e in model.energies(images)]
    with torch.no_grad():
        for flow in model.flows:
            flow.couplings[-1].offset.zero_()
            flow.couplings[-1].log_scale += 0.5  # z grows by e^0.5, log|det| by C / 2
    for (z, log_det), e, old in zip(model.latents(images), model.energies(images), before, strict=True):
        exact = 0.5 * z.square().mean(dim=1) - log_det / z.shape[1]
        enlarged = F.interpolate(clflow.tamed(exact)[:, None], (16, 16), mode="bilinear")[:, 0]
        assert torch.allclose(e, enlarged, atol=1e-5) and (e - old).abs().max() > 0.1


# ---------------------------------------------------------------- positions


def test_positions_in_boxes_are_those_with_a_pixel_of_the_box():
    rng = np.random.default_rng(0)
    boxes, masks = [], torch.zeros(50, 1, 64, 96)
    for mask in masks:
        y0, y1 = sorted(rng.choice(65, 2, replace=False))
        x0, x1 = sorted(rng.choice(97, 2, replace=False))
        mask[0, y0:y1, x0:x1] = 1
        boxes.append((y0, x0, y1, x1))
    for shape in ((16, 24), (8, 12), (4, 6)):
        found = paper.positions_in_boxes(torch.tensor(boxes), (64, 96), shape)
        tiles = masks.view(50, shape[0], 64 // shape[0], shape[1], 96 // shape[1])
        assert torch.equal(found, tiles.amax(dim=(2, 4)) > 0)


def test_drawn_places_are_marked_and_rows_are_read_there():
    torch.manual_seed(0)
    where = torch.rand(3, 5, 4) < 0.3
    places = paper.drawn_places(where)
    assert places.shape == (3, paper.POSITIONS) and where.flatten(1).gather(1, places).all()
    assert all(len(set(row.tolist())) > 1 for row in places)
    maps = torch.randn(3, 7, 5, 4)
    rows = paper.rows_at(maps, places)
    for i, place in enumerate(places.flatten().tolist()):
        assert torch.equal(rows[i], maps[i // paper.POSITIONS, :, place // 4, place % 4])


# ---------------------------------------------------------------- the losses by hand


def test_log_odds_by_hand_and_what_gets_a_gradient():
    normal = torch.tensor([0.1, 0.2, 0.3, 0.6], requires_grad=True)
    e = torch.tensor([0.3, 1.5], requires_grad=True)
    odds = paper.log_odds(e, normal)
    sigma = math.sqrt(sum((v - 0.3) ** 2 for v in (0.1, 0.2, 0.3, 0.6)) / 3)
    border = 0.3 + 3 * sigma
    p_normal = [1 / (1 + math.exp(-(border - v) / sigma)) for v in (0.3, 1.5)]
    assert (1 - odds.sigmoid()).tolist() == pytest.approx(p_normal, rel=1e-4)
    odds.sum().backward()
    assert normal.grad is None and (e.grad > 0).all()


def test_classification_leaves_what_is_typically_normal_to_the_likelihood():
    """The gradient at the mean normal energy is a hundredth of the gradient at a missed anomaly."""
    normal, anomalous = torch.randn(1000), torch.zeros(1, requires_grad=True)
    typical = normal.mean()[None].requires_grad_()
    clflow.classification_loss(paper.log_odds(typical, normal), paper.log_odds(anomalous, normal), 0.1).backward()
    assert anomalous.grad.item() < -0.5 and abs(typical.grad.item()) < 0.01


def test_contrast_cosine_pushes_the_negative_box_away_and_pulls_globally():
    box = torch.tensor([[1.0, 0.0]], requires_grad=True)
    negative = torch.tensor([[3.0, 3.0]], requires_grad=True)
    pull = torch.tensor([[0.0, 2.0]], requires_grad=True)
    loss = paper.contrast_cosine(box, negative, pull, temperature=1.0)
    cosine = math.sqrt(0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(cosine)), rel=1e-5)
    loss.backward()
    away, nearer = (F.cosine_similarity(box, x - 0.1 * x.grad).item() for x in (negative, pull))
    assert away < cosine and nearer > 0


def cross_entropy(odds: float, label: float) -> float:
    p = 1 / (1 + math.exp(-odds))
    return -label * math.log(p) - (1 - label) * math.log(1 - p)


class Given(torch.nn.Module):
    """A model with given latents at two scales, in place of flows."""

    def __init__(self, latents, **changes):
        super().__init__()
        given = {"classification_weight": 0.3, "contrast_weight": 0.7, "smoothing": 0.2, "temperature": 0.5}
        self.settings = replace(SETTINGS, **given | changes)
        self.latents = lambda images: latents
        self.inside = lambda shape: torch.ones(shape, dtype=torch.bool)


@pytest.mark.parametrize("contrast", ["cosine", "energy"])
def test_losses_against_a_loop_over_positions(monkeypatch, contrast):
    """There are three images x+, and an x- for each of the first two. For each x-, one position that its defect touches
    is drawn, and another one from its box."""
    torch.manual_seed(0)
    latents = [(torch.randn(5, 6, n, n), torch.randn(5, n, n)) for n in (4, 2)]
    mask = torch.zeros(2, 1, 16, 16)
    mask[0, 0, 1, 14] = mask[0, 0, 15, 3] = mask[1, 0, 9, 9] = 1
    boxes = torch.tensor([[1, 3, 16, 15], [9, 9, 10, 10]])
    first = [[(0, 3), (2, 2)], [(0, 1), (1, 1)]]  # the first position that is touched, by scale and image
    inside = [[(0, 1), (2, 2)], [(0, 1), (1, 1)]]  # the second position inside the box; the first is not touched
    monkeypatch.setattr(paper, "POSITIONS", 1)

    def draw(where):
        """The first marked place; for boxes the second one, if there is one, so that it differs from the touched
        one."""
        marked = [torch.nonzero(row.flatten())[:, 0] for row in where]
        drawn.append([len(m) for m in marked])
        index = len(drawn) % 2 == 0 and contrast == "cosine"  # touched, box, touched, box
        return torch.stack([m[min(int(index), len(m) - 1)] for m in marked])[:, None]

    drawn = []
    monkeypatch.setattr(paper, "drawn_places", draw)
    monkeypatch.setattr(torch, "randint", lambda high, size: torch.arange(size[0]) + 5)  # places anywhere in x+
    found = paper.Losses(Given(latents, contrast=contrast))(None, mask, boxes)

    nll, classification, info = [], [], []
    for scale, (z, log_det) in enumerate(latents):
        n = z.shape[2]
        e = [[[sum(float(v) ** 2 for v in z[i, :, y, x]) / 12 - float(log_det[i, y, x]) / 6 for x in range(n)]
              for y in range(n)] for i in range(5)]  # fmt: skip
        normal = [e[i][y][x] for i in range(3) for y in range(n) for x in range(n)]
        nll.append(np.mean(normal))
        tame = [v if v <= 1 else 1 + math.log(v) for v in normal]
        mean, sigma = np.mean(tame), np.std(tame, ddof=1)
        anomalous = [e[3 + i][y][x] for i, (y, x) in enumerate(first[scale])]
        anomalous = [v if v <= 1 else 1 + math.log(v) for v in anomalous]
        wrong = [cross_entropy((v - mean) / sigma - 3, 0.1) for v in tame]
        missed = [cross_entropy((v - mean) / sigma - 3, 0.9) for v in anomalous]
        classification.append(np.mean(wrong) + np.mean(missed))
        if contrast == "energy":
            rivals = sum(math.exp(v / 0.5) for v in tame)
            info += [np.mean([-math.log(math.exp(v / 0.5) / (math.exp(v / 0.5) + rivals)) for v in anomalous])]
            continue
        normal_rows = [z[i, :, y, x] for i in range(3) for y in range(n) for x in range(n)]
        negatives = [z[3 + i, :, y, x] for i, (y, x) in enumerate(inside[scale])]
        each = []
        for i, (y, x) in enumerate(inside[scale]):
            anchor = z[i, :, y, x]
            similar = math.exp(F.cosine_similarity(anchor, normal_rows[5 + i], dim=0) / 0.5)
            rivals = sum(math.exp(F.cosine_similarity(anchor, other, dim=0) / 0.5) for other in negatives)
            each.append(-math.log(similar / (similar + rivals)))
        info.append(np.mean(each))
    expected = [np.mean(nll), np.mean(classification), np.mean(info)]
    assert [found[name].item() for name in ("nll", "classification", "contrast")] == pytest.approx(expected, rel=1e-4)
    total = expected[0] + 0.3 * expected[1] + 0.7 * expected[2]
    assert found["loss"].item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("contrast", ["cosine", "energy", None])
def test_what_lies_outside_the_region_of_interest_is_not_learnt(contrast):
    weights = {"contrast": contrast} if contrast else {"classification_weight": 0, "contrast_weight": 0}
    mask, boxes = torch.zeros(1, 1, 16, 16), torch.tensor([[0, 0, 12, 8]])
    mask[0, 0, :4, :8] = 1
    found = []
    for outside in (0.0, 9.0):
        z = torch.arange(4 * 6 * 16).view(4, 6, 4, 4) / 100
        z[:, :, 2:] = outside
        model = Given([(z, torch.zeros(4, 4, 4))], **weights)
        model.inside = lambda shape: torch.arange(4)[:, None].expand(4, 4) < 2  # the upper half
        torch.manual_seed(0)
        found.append(paper.Losses(model)(torch.zeros(4, 3, 16, 16), mask, boxes)["loss"].item())
    assert found[0] == found[1]


@pytest.mark.parametrize("contrast", ["cosine", "energy"])
@pytest.mark.parametrize("name", ["nll", "classification", "contrast"])
def test_the_gradient_of_each_loss_reaches_all_three_flows_and_nothing_else(name, contrast):
    model = make_model(contrast=contrast)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 10:30, 20:50] = 1
    paper.Losses(model)(torch.rand(3, 3, 64, 64), mask, torch.tensor([[10, 20, 30, 50]]))[name].backward()
    for flow in model.flows:
        assert all(step.subnet[0].weight.grad.abs().max() > 0 for step in flow.couplings[:-1])
    assert all(p.grad is None for p in (*model.backbone.parameters(), *model.norms.buffers()))


def test_a_loss_without_weight_is_left_out():
    images, mask, boxes = torch.rand(3, 3, 64, 64), torch.ones(1, 1, 64, 64), torch.tensor([[0, 0, 64, 64]])
    both = paper.Losses(make_model())(images, mask, boxes)
    for off, left in (("classification", "contrast"), ("contrast", "classification")):
        assert list(paper.Losses(make_model(**{f"{off}_weight": 0}))(images, mask, boxes)) == ["loss", "nll", left]
    likelihood = paper.Losses(make_model(classification_weight=0, contrast_weight=0))(images, mask, boxes)
    assert list(likelihood) == ["loss", "nll"] and likelihood["loss"] == likelihood["nll"]
    assert likelihood["nll"].item() == pytest.approx(both["nll"].item(), rel=1e-4)  # from x+ alone in both


# ---------------------------------------------------------------- the same scripts


def test_paper_goes_through_the_same_scripts(paper_run, category, tmp_path):
    """Trained while test/ was out of reach."""
    with open(paper_run / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "loss", "nll", "classification", "contrast", "seconds"]
    assert float(rows[-1]["nll"]) < float(rows[0]["nll"]) - 0.05
    call(evaluate.main, paper_run)
    metrics = json.loads((paper_run / "metrics.json").read_text())
    assert metrics["backbone"] == "efficientnet_lite0"
    assert metrics["image_auroc"] > 0.9 and metrics["pixel_auroc"] > 0.9
    call(evaluate.main, paper_run, "--images", category / "test" / "crack", "--out", tmp_path / "new")
    assert len(list((tmp_path / "new").glob("*.png"))) == SMALL["test/crack"]
    image = folders.list_images(category / "test" / "crack")[0]
    call(evaluate.main, paper_run, "--explain", image, "--out", tmp_path / "explained.png")
    assert Image.open(tmp_path / "explained.png").width > 500
    images = data.read_batch(folders.list_images(category / "test" / "good")[:3], (128, 128))
    check_export(paper_run, images, tmp_path / "model.pt2", tolerance=1e-3, loads=False)


def test_the_held_out_images_calibrate_the_paper_s_form(paper_run, category):
    model = load(paper_run / "model.pt")
    held_out, _ = split(folders.list_images(category / "train" / "good"), seed=0)
    scores = [model.inspect(path).score for path in held_out]
    assert model.good_scores[0].tolist() == pytest.approx(scores, abs=0.02) and len(model.levels) == 3


def test_options_that_the_paper_s_form_lacks_are_refused(category, tmp_path, capsys):
    def attempt(*arguments, words):
        command = ["--data", category, "--out", tmp_path / "out", "--method", "paper", *LITE]
        refuse(train.main, capsys, *command, *arguments, words=words)

    attempt("--bank", 100, words=["--bank has no effect with --method paper"])
    attempt("--no-local", words=["--local has no effect with --method paper"])
    attempt("--defects", category, words=["--defects has no effect with --method paper"])
    attempt("--contrast-weight", 0, "--contrast", "energy", words=["--contrast has no effect"])
    attempt("--contrast", "odds", words=["--contrast", "odds", "cosine", "energy"])
    attempt("--size", 2048, words=["--size 2048", "paper", "2097152 pixels"])
