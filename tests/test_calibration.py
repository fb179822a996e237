"""The scores of good images: outliers among them are named, and do not decide the threshold."""

import contextlib
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import LITE, NEAREST, QUICK, NoBackbone, call, refuse, take_few_steps
from PIL import Image

import evaluate
import train
from bank import Prototypes
from kit import InputError, calibration, data, draw, folders
from kit.demo import draw_button
from kit.detector import Detector
from kit.good import GoodImages, camera_copy, held_out_count, side_light
from kit.images import read_image
from kit.processes import Processes
from kit.rows import Feed, HeldOut
from kit.settings import LEAST_IMAGES, OPTIONS, NearestSettings
from methods import load


def test_a_defective_image_among_the_good_is_shown_and_does_not_decide(category, tmp_path, capsys):
    good = tmp_path / "good"
    shutil.copytree(category / "train/good", good)
    seed = ["--seed", 1]  # with seed 0 the two runs hold out images that differ much
    call(train.main, "--data", good, "--out", tmp_path / "clean", *NEAREST, *seed)
    assert "unlike the others" not in capsys.readouterr().out and not (tmp_path / "clean/suspects.png").exists()
    shutil.copy(folders.list_images(category / "test/chip")[3], good / "chip.png")
    call(train.main, "--data", good, "--out", tmp_path / "spoilt", *NEAREST, *seed)
    assert "1 of the good images look unlike the others: chip.png" in capsys.readouterr().out
    assert Image.open(tmp_path / "spoilt/suspects.png").width == 960
    clean, spoilt = load(tmp_path / "clean/model.pt"), load(tmp_path / "spoilt/model.pt")
    assert spoilt.good_scores.shape == (2, 25)
    limits = clean.thresholds().score, spoilt.thresholds().score
    assert limits[1] == pytest.approx(limits[0], rel=0.15)
    chip = folders.list_images(category / "test/chip")[1]
    assert clean.inspect(chip).anomalous and spoilt.inspect(chip).anomalous


# ---------------------------------------------------------------- a threshold from new images


@cache
def button(day: int, number: int) -> np.ndarray:
    return draw_button(np.random.default_rng([100 + day, number]), "good")[0]


def draw_buttons(to: Path, count: int, day: int) -> Path:
    """A folder of good images that belong to no category."""
    for number in range(count):
        draw.save_picture(to / f"{number}.png", Image.fromarray(button(day, number)))
    return to


def test_an_odd_image_among_those_that_recalibrate_is_named(run, tmp_path, capsys):
    new = draw_buttons(tmp_path / "new", 12, day=1)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(new / "odd.png")
    call(evaluate.main, run, "--recalibrate", new)
    assert "1 of these images look unlike the others: odd.png" in capsys.readouterr().out


def test_of_many_images_some_are_drawn(nearest_run, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(nearest_run, tmp_path / "run")
    monkeypatch.setattr(evaluate, "LIMIT", 10)
    call(evaluate.main, run, "--recalibrate", draw_buttons(tmp_path / "new", 24, day=1))
    said = capsys.readouterr().out
    assert "using 10 of 24 images" in said and "from 10 good images" in said and "left out" not in said
    assert "series" not in said
    assert load(run / "recalibrated.pt").good_scores.shape == (2, 10)


@pytest.mark.parametrize("trained", ["finished_run", "projecting_run"])
def test_images_of_the_training_do_not_recalibrate(category, request, tmp_path, capsys, trained):
    run, good = tmp_path / "run", category / "train/good"
    shutil.copytree(request.getfixturevalue(trained), run)
    words = ["--recalibrate", "0 new images", "give at least 5"]
    refuse(evaluate.main, capsys, run, "--recalibrate", good, words=words)
    mixed = draw_buttons(tmp_path / "mixed", 12, day=2)
    for number in range(24):  # under other names; they are recognised by their bytes
        shutil.copy(good / f"{number:03}.png", mixed / f"copy_{number}.png")
    call(evaluate.main, run, "--recalibrate", mixed)
    said = capsys.readouterr().out
    assert "left out 24 of 36 images: the detector was trained or calibrated with them" in said
    assert "from 12 good images" in said
    refuse(evaluate.main, capsys, run / "recalibrated.pt", "--recalibrate", mixed, words=words)  # it knows them all
    # It flags no more of other good images than it promises.
    model = load(run / "recalibrated.pt")
    others = draw_buttons(tmp_path / "others", 16, day=3)
    flagged = sum(model.inspect(path).anomalous for path in sorted(others.iterdir()))
    assert flagged / 16 <= model.thresholds().at_most


def test_copies_of_one_image_count_once(category, nearest_run, tmp_path, capsys):
    (tmp_path / "six").mkdir()
    (tmp_path / "twice").mkdir()
    for number, path in enumerate(folders.list_images(category / "train/good")[:6]):
        shutil.copy(category / "test/good/000.png", tmp_path / "six" / f"{number}.png")
        shutil.copy(path, tmp_path / "twice" / f"{number}.png")
        shutil.copy(path, tmp_path / "twice" / f"{number} again.png")
    out = Path(shutil.copytree(nearest_run, tmp_path / "run"))
    refuse(evaluate.main, capsys, out, "--recalibrate", tmp_path / "six", words=["only 1 new image", "at least 5"])
    command = ["--data", tmp_path / "six", "--out", tmp_path / "other", *NEAREST]
    refuse(train.main, capsys, *command, words=["only 1 good image", "at least 5"])
    call(train.main, "--data", tmp_path / "twice", "--out", tmp_path / "other", *NEAREST)
    said = capsys.readouterr().out
    assert "left out 6 of 12 good images, as copies of other ones\n" in said and ", set from 6 good images" in said


def test_altered_copies_of_the_training_are_warned_of(category, nearest_run, tmp_path, capsys):
    shutil.copytree(nearest_run, tmp_path / "run")
    for path in folders.list_images(category / "train/good"):  # the same pixels in another file format
        (tmp_path / "copies").mkdir(exist_ok=True)
        Image.open(path).save(tmp_path / "copies" / f"{path.stem}.bmp")
    capsys.readouterr()
    call(evaluate.main, tmp_path / "run", "--recalibrate", tmp_path / "copies")
    assert "warning: these images score clearly lower" in capsys.readouterr().out


def test_what_calibrates_is_judged_in_usual_brightness_like_new_images(run, category):
    """Held-out images in unusual light get the scores that the detector gives them when it judges."""
    model = load(run / "model.pt")
    model.brightness[0] *= 1.5  # so all images are unusually dark
    held_out = folders.list_images(category / "train" / "good")[:6]
    images = data.read_batch(held_out, model.shape)
    assert not torch.equal(model.in_usual_brightness(images), images)
    HeldOut(model, held_out).calibrate()
    assert torch.allclose(model.good_scores[0], model(images)[1], rtol=0.02)


def test_a_series_of_new_images_counts_as_few(nearest_run, tmp_path, capsys):
    run = shutil.copytree(nearest_run, tmp_path / "run")

    def frames(buttons: int, times: int, to: Path) -> Path:
        rng = np.random.default_rng(0)
        for number in range(buttons):
            image, _ = draw_button(np.random.default_rng([200, number]), "good")
            for copy in range(times):
                moved = np.roll(image, rng.integers(-2, 3, 2), axis=(0, 1)) * rng.uniform(0.98, 1.02)
                draw.save_picture(to / f"{number}_{copy}.png", Image.fromarray(np.uint8(moved.clip(0, 255))))
        return to

    call(evaluate.main, run, "--recalibrate", frames(10, 6, tmp_path / "frames"))
    said = capsys.readouterr().out
    different = int(load(run / "recalibrated.pt").different)
    assert "look like a series" in said and 7 <= different <= 13 and f"from {different} good images" in said
    with pytest.raises(InputError, match="--recalibrate: only 3 different new images; give at least 5"):
        evaluate.recalibrate(Scored(), [Path("not_read.png")] * 30, alike=10.0)


# ---------------------------------------------------------------- thirds and held-out images


def test_scores_of_thirds_are_brought_to_the_height_of_held_out_ones():
    scores = torch.tensor([[2.0, 4.0, 6.0, 8.0], [1.0, 1.0, 3.0, 3.0]])  # medians 5 and 2
    two = torch.tensor([[1.0, 1.5], [2.0, 2.0]])  # medians 1.25 and 2
    factor = calibration.factor_to_held_out(scores, two)
    assert factor.tolist() == pytest.approx([(1.25 / 5) ** (2 / 4), 1])
    many = two.repeat(1, 100)  # with many held-out images, the factor is nearly the ratio of the medians
    assert calibration.factor_to_held_out(scores, many).tolist() == pytest.approx([1.25 / 5, 1], rel=0.02)
    assert calibration.factor_to_held_out(torch.zeros(2, 3), two).isfinite().all()


# ---------------------------------------------------------------- too few images


@pytest.mark.parametrize("method, least", [("clflow", 5), ("nearest", 5), ("autoencoder", 20), ("paper", 20)])
def test_training_asks_for_enough_images(tmp_path, capsys, method, least):
    few = draw_buttons(tmp_path / "few", least - 1, day=4)
    words = ["--data", f"only {least - 1} good images", f"give at least {least}"]
    refuse(train.main, capsys, "--data", few, "--out", tmp_path / "run", "--method", method, *LITE, words=words)
    assert least == OPTIONS[method].least_images
    calibrating = held_out_count(least) if method in ("autoencoder", "paper") else least
    assert calibrating == LEAST_IMAGES


@pytest.mark.parametrize("method", ["clflow", "nearest"])
def test_a_detector_of_the_fewest_images_keeps_its_promise(tmp_path, monkeypatch, method):
    take_few_steps(monkeypatch, painted=64, steps=50)
    few = draw_buttons(tmp_path / "few", LEAST_IMAGES, day=5)
    options = NEAREST if method == "nearest" else [*LITE, "--epochs", 2, "--size", 192, "--batch", 256]
    call(train.main, "--data", few, "--out", tmp_path / "run", *options)
    model = load(tmp_path / "run" / "model.pt")
    assert model.good_scores.shape == (2, LEAST_IMAGES)
    others = draw_buttons(tmp_path / "others", 20, day=6)
    flagged = sum(model.inspect(path).anomalous for path in sorted(others.iterdir()))
    promised = model.thresholds().at_most
    chance = (promised * (1 - promised) / 20) ** 0.5  # standard deviation of a share of 20 images
    assert flagged / 20 <= promised + 2 * chance


def test_a_whitening_of_few_rows_is_refused(tmp_path, capsys):
    """Rows that the whitening was fitted on would look more normal than new ones: 18 of 20 new images were flagged."""
    few = draw_buttons(tmp_path / "few", 8, day=5)
    words = ["--data", "only 384 feature vectors", "larger --size"]
    refuse(train.main, capsys, "--data", few, "--out", tmp_path / "run", *QUICK, words=words)


class Pupil:
    """Stands for a CL-Flow. Its flow and its classifier are the sets of images that taught them. It notes who judges
    each image, and gives every image the score 2."""

    device = torch.device("cpu")
    settings = SimpleNamespace(seed=0, epochs=1)

    def __init__(self):
        self.flow, self.classifier = {"all"}, {"all"}
        self.judges = {}

    def renew_experts(self):
        self.flow, self.classifier = set(), set()

    def expert_energies(self, code):
        """The code of an image is its number."""
        self.judges[int(code)] = self.flow, self.classifier
        return [code]

    def scores(self, energies):
        return torch.full((2, 1), 2.0)


def test_a_third_is_never_judged_by_what_it_taught():
    """Afterwards the model has its own flow and classifier again. Two held-out images score 1 with these, and 5 with
    others, so the thirds' scores of 2 are multiplied by (1 / 2)^(2 / (2 + 2))."""
    good = files_called(*(f"{number}.png" for number in range(12)))
    validation = calibration.CrossValidation(good, 0, alike=1.0)
    model = Pupil()
    own = model.flow, model.classifier

    def calibrate():
        is_own = model.flow is own[0] and model.classifier is own[1]
        model.good_scores = torch.full((2, 2), 1.0 if is_own else 5.0)
        model.calibrated_on = []

    feed = object.__new__(Feed)  # three rows of each good image, two of each painted one
    feed.normal_images, feed.anomalous_images = torch.arange(12).repeat(3), torch.arange(12).repeat(2)
    feed.normal_index, feed.anomalous_index = torch.arange(36), torch.arange(24)
    feed.stored_code_map = torch.tensor

    def epochs(feed, name):
        model.flow.update(feed.normal_images[feed.normal_index].tolist())
        model.classifier.update(feed.anomalous_images[feed.anomalous_index].tolist())
        yield

    held_out = SimpleNamespace(model=model, calibrate=calibrate)
    calibration.calibrate_by_cross_validation(validation, feed, held_out, epochs)
    thirds = [set(range(start, start + 4)) for start in (0, 4, 8)]
    for third in thirds:
        others = set(range(12)) - third
        assert all(model.judges[image] == (others, others) for image in third)
    assert model.flow is own[0] and model.classifier is own[1]
    assert model.good_scores.tolist() == [pytest.approx([1, 1] + [2 * 0.5**0.5] * 12)] * 2


def test_a_process_without_images_to_train_on_is_refused():
    """If one of the processes only has images of a single third, training is refused before it starts."""
    files = [Path(f"{number}.png") for number in range(4)]
    for processes, is_enough in ((1, True), (2, True), (4, False)):
        validation = calibration.CrossValidation(GoodImages([], files, [], Processes(0, processes)), 0, alike=1.0)
        if is_enough:
            validation.check_processes()
        else:
            with pytest.raises(InputError, match="4 processes, too many for 4 training images; start fewer"):
                validation.check_processes()


def test_a_series_of_too_few_different_images_is_refused():
    good = files_called(*(f"{number:03}.png" for number in range(30)))
    with pytest.raises(InputError, match="these 30 images .* about 3 different images; training needs at least 5"):
        calibration.CrossValidation(good, 0, alike=10.0)


# ---------------------------------------------------------------- as if they were new


def files_called(*names) -> GoodImages:
    return GoodImages([], [Path(name) for name in names])


def test_blocks_are_contiguous_in_the_natural_order_of_names():
    files = [Path(f"day/{number}.png") for number in (10, 2, 1, 11, 3, 20)]
    assert calibration.blocks(files, 3).tolist() == [1, 0, 0, 2, 1, 2]  # 1 2 | 3 10 | 11 20
    mixed = [Path(name) for name in ("b.png", "12.png", "a3.png", "a3b.png")]
    assert sorted(calibration.blocks(mixed, 4).tolist()) == [0, 1, 2, 3]  # names and numbers are comparable


def test_an_image_is_judged_without_itself_and_in_a_series_without_its_fifth():
    good = files_called(*(f"{number:03}.png" for number in range(30)))
    alone, series = calibration.CrossValidation(good, 0, alike=1.2), calibration.CrossValidation(good, 0, alike=3.0)
    assert alone.excluded(12).tolist() == [12] and not alone.is_series and alone.different == 30
    assert series.excluded(12).tolist() == list(range(12, 18)) and series.is_series and series.different == 10
    few = calibration.CrossValidation(files_called(*"abcdefgh"), 0, alike=9.0)  # too few images to recognise a series
    assert not few.is_series


@pytest.mark.parametrize("first_of_pair, alike", [(0, 19), (1, 0)])
def test_how_alike_neighbours_are_by_hand(first_of_pair, alike):
    """Twenty images, two in each tenth, with one prototype each. An image's nearest other prototype is that of its
    twin. By chance, one of 19 comes from its own tenth. All twins are in the same tenth, or all in different ones."""
    numbers = (torch.arange(20) + first_of_pair) % 20
    rows = torch.stack((10.0 * (numbers // 2), 1.0 * (numbers % 2)), dim=1)
    prototypes = Prototypes(2, fast=False)
    prototypes.bank, prototypes.origin = rows, torch.arange(20)
    files = [Path(f"{number}.png") for number in range(20)]
    found = calibration.alike_in_order(prototypes, torch.float32, files, rows, torch.arange(20))
    assert found == pytest.approx(alike)


class Scored(Detector):
    """The energies of an image are its grey value plus the number of images that are left out."""

    def __init__(self):
        super().__init__(NearestSettings(images=30, held_out=2, size=64), NoBackbone(), [1.0])

    def energies(self, images, excluded=None):
        return [torch.full((len(images), 8, 8), float(images.mean()) + len(excluded))]

    def expert_energies(self, code):
        return [code]


@pytest.mark.parametrize("processes", [1, 3])
def test_scores_belong_to_their_images_whatever_the_processes(tmp_path, monkeypatch, processes):
    for number in range(30):
        Image.new("RGB", (64, 64), (5 * number,) * 3).save(tmp_path / f"{number}.png")
    good = GoodImages([], folders.list_images(tmp_path))  # 0, 1, 10, 11, ...: not the natural order
    parts = []
    monkeypatch.setattr(Processes, "concatenated", lambda self, rows: parts.append(rows) or torch.cat(parts))
    found = {}
    for fold in range(calibration.FOLDS):
        parts.clear()
        for rank in range(processes):
            shared = GoodImages([], good.trained_on, [], Processes(rank, processes))
            if rank < processes - 1:  # the last process gets the results of all
                with contextlib.suppress(ValueError):
                    calibration.CrossValidation(shared, 0, 3.0).scores(Scored(), fold)
            else:
                found |= calibration.CrossValidation(shared, 0, 3.0).scores(Scored(), fold)
    for number, path in enumerate(good.trained_on):
        assert found[number][0].item() == pytest.approx(5 * int(path.stem) / 255 + 6, abs=1e-3)


def test_an_image_whose_energies_are_known_is_not_read(tmp_path):
    good = files_called("0.png", "1.png", "2.png")  # there are no such files
    validation = calibration.CrossValidation(good, 0, alike=1.0)
    found = {}
    for fold in range(calibration.FOLDS):
        feed = SimpleNamespace(stored_code_map=lambda number: torch.full((1, 8, 8), 10.0 + number))
        found |= validation.scores(Scored(), fold, feed)
    assert {number: round(score.item()) for number, (score, _) in found.items()} == {0: 10, 1: 11, 2: 12}


def test_a_series_is_named_and_its_threshold_holds_for_other_images(tmp_path, capsys):
    """Frames of a camera: ten buttons, eight times each."""
    rng = np.random.default_rng(0)
    for number in range(10):
        image, _ = draw_button(np.random.default_rng([0, number]), "good")
        for copy in range(8):
            moved = np.roll(image, rng.integers(-2, 3, 2), axis=(0, 1)) * rng.uniform(0.98, 1.02)
            draw.save_picture(tmp_path / "good" / f"{number}_{copy}.png", Image.fromarray(np.uint8(moved.clip(0, 255))))
    call(train.main, "--data", tmp_path / "good", "--out", tmp_path / "run", *NEAREST)
    said = capsys.readouterr().out
    model = load(tmp_path / "run" / "model.pt")
    different = int(model.different)
    assert "look like a series" in said and f"about {different} different" in said
    assert model.good_scores.shape == (2, 72)  # not the held-out ones, which have neighbours among the others
    assert model.thresholds().images == different
    others = [draw_button(np.random.default_rng([9, number]), "good")[0] for number in range(40)]
    scores = np.array([model.inspect(image).score for image in others])
    assert (scores > model.thresholds(0.02).score).mean() <= 0.06


def test_independent_images_are_no_series(nearest_run):
    said = nearest_run.with_name("said.txt").read_text()
    assert "reading 24 good images" in said and "a series" not in said
    assert load(nearest_run / "model.pt").different == 24


@pytest.mark.parametrize("kind, make, most", [(0, camera_copy, 1.2), (1, side_light, 2.0)])
@pytest.mark.parametrize("learns", [False, True])
def test_training_says_how_many_changed_copies_exceed_the_threshold(
    run, category, monkeypatch, capsys, learns, kind, make, most
):
    """All copies if the threshold is very low, none if it is very high, one if it is just below the highest score. If a
    method learns from camera copies, unusual images get an allowance, up to a maximum."""
    monkeypatch.setattr(calibration, "COPIES", 6)
    model = load(run / "model.pt")
    model.LEARNS_CAMERA_COPIES = learns
    model.allowances.fill_(1)
    held_out = folders.list_images(category / "train" / "good")[:6]
    scores = []
    for number, path in enumerate(held_out):
        rng = np.random.default_rng([0, number, 1 + kind])  # training copies have [0, number]
        copy = make(read_image(path, model.shape), rng)
        scores.append(model(torch.from_numpy(copy).permute(2, 0, 1)[None])[1].item())
    highest, second = sorted(scores, reverse=True)[:2]
    usual = model.good_scores / model.thresholds().score  # scores whose threshold is 1
    model.camera[0] += 9  # so all images are unusual, in all ways
    usual_camera = model.camera.clone()
    for limit, expected in ((highest / 100, 6), ((highest + second) / 2, 1), (2 * highest, 0)):
        model.good_scores = usual * limit
        model.camera = usual_camera.clone()
        calibration.judge_changed_copies(model, held_out)
        said = capsys.readouterr().out.splitlines()[kind]
        assert ("in light from one side" in said) == bool(kind)
        assert model.thresholds().score == pytest.approx(limit, rel=0.01)
        if not learns or limit > highest:
            assert f": {expected} of 6" in said and "divided" not in said
            assert model.allowances[kind] == 1
        if learns and limit < second / 2:
            assert f"is divided by {most:.2f}" in said and model.allowances[kind] == pytest.approx(most)
            images = data.read_batch(held_out[:2], model.shape)
            maps, lower = model(images)
            model.camera.fill_(torch.nan)  # nothing is known, so nothing is unusual
            higher_maps, higher = model(images)
            assert torch.allclose(2 * lower, higher) and torch.allclose(2 * maps, higher_maps)  # the higher one
            again = load_again(model, run)
            assert torch.equal(again.allowances, model.allowances)
            again.calibrate([[torch.rand(6, 4, 4)] * len(model.shares)])
            assert (again.allowances == 1).all()  # a new calibration starts without them


def load_again(model, run):
    model.save(run / "again.pt")
    return load(run / "again.pt")
