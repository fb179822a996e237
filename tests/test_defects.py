"""Real defects in addition to good images: their rows, how often these are drawn, which test images are left; and
corrections.json."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import QUICK, call, mask_of, refuse, take_few_steps
from PIL import Image

import clflow
import evaluate
import train
from kit import InputError, data, folders, rows
from kit.data import read_mask
from kit.detector import read_checkpoint
from kit.good import Defect
from kit.images import read_image
from kit.real_defects import list_defects
from kit.rows import Feed, GoodRows, Rows, augmented, defect_mask_of, defect_rows, good_rows
from methods import load


@pytest.fixture
def model(finished_run) -> clflow.CLFlow:
    return load(finished_run / "model.pt")


def pixel_box(position: int, pixels: int, positions: int) -> slice:
    """The pixels along an axis that belong to this position, if there are `positions` of them."""
    side = pixels // positions
    return slice(position * side, (position + 1) * side)


# ---------------------------------------------------------------- rows


def test_rows_are_those_that_the_mask_touches_in_the_region_of_interest(model, category, monkeypatch):
    """Computed position by position, from the pixels of the mask."""
    monkeypatch.setattr("kit.rows.DEFECT_COPIES", 1)
    (test,) = [t for t in folders.labelled_images(category) if t.defect_type == "crack"][:1]
    roi = torch.zeros(192, 192, dtype=torch.bool)
    mask = read_mask(test.mask, (192, 192))
    rows, columns = np.nonzero(mask)
    roi[:, : int(np.median(columns))] = True  # cuts the crack in two
    model.set_roi(roi)
    found = defect_rows(model, [Defect(test.path, test.mask)])
    w = model.encode(data.read_batch([test.path], model.shape))[0]
    _, height, width = w.shape
    expected = []
    for i in range(height):
        for j in range(width):
            box = pixel_box(i, 192, height), pixel_box(j, 192, width)
            if (mask & roi.numpy())[box].any():
                expected.append(w[:, i, j])
    assert 2 < len(expected) < height * width / 4
    assert torch.equal(found, torch.stack(expected).half())


def test_each_defect_counts_eight_times_and_many_defects_less_often(model, category, monkeypatch):
    asked = []

    def noted(image, mask, count, rng):
        asked.append(count)
        yield image, mask

    monkeypatch.setattr(rows, "augmented", noted)
    defects = list_defects(category / "test" / "crack", None)[:2]
    defect_rows(model, defects)
    assert asked == [8, 8] and rows.MOST_DEFECT_IMAGES / 8 == 75
    for most, each in ((16, 8), (15, 7), (9, 4), (1, 1)):
        asked.clear()
        monkeypatch.setattr(rows, "MOST_DEFECT_IMAGES", most)
        defect_rows(model, defects)
        assert asked == [each, each]


def test_copies_move_image_and_mask_together(category):
    """The image is a picture of its mask, so every copy must be a picture of its mask, too."""
    mask = np.zeros((64, 96), dtype=bool)
    mask[10:14, 20:50] = mask[30:50, 60:63] = True
    image = np.repeat(np.where(mask, 0.8, 0.3)[..., None], 3, axis=-1).astype(np.float32)
    pairs = list(augmented(image, mask, 8, np.random.default_rng(0)))
    assert np.array_equal(pairs[0][0], image) and np.array_equal(pairs[0][1], mask)
    for copied, where in pairs:
        assert copied.shape == image.shape and copied.dtype == np.float32 and where.any()
        assert np.array_equal(copied[..., 0] > 0.5, where)
    assert len({where.tobytes() for _, where in pairs}) > 6 and len({copied.max() for copied, _ in pairs}) > 6


def test_without_a_mask_the_defect_is_where_the_map_stands_out(model, category):
    for test in folders.labelled_images(category):
        if not test.anomalous:
            continue
        image = read_image(test.path, model.shape)
        found = defect_mask_of(model, Defect(test.path, None), image)
        true = np.asarray(Image.fromarray(mask_of(test.path)).resize((192, 192))) > 0
        near = np.argwhere(found)[:, None] - np.argwhere(true)[None]
        distances = np.sqrt((near**2).sum(axis=2)).min(axis=1)
        maps, _ = model(torch.from_numpy(image).permute(2, 0, 1)[None])
        anomaly_map = maps[0].numpy()
        assert found.sum() == 37 and anomaly_map[found].min() > anomaly_map[~found].max()  # a thousandth of 192 x 192
        assert np.median(distances) < 20  # pixels: two and a half positions
    model.set_roi(torch.arange(192).repeat(192, 1) < 10)  # the defect is outside
    found = defect_mask_of(model, Defect(test.path, None), image)
    assert found.any() and not found[:, 10:].any()


def test_real_rows_are_half_of_the_anomalous_ones_however_few_and_in_all_folds(model):
    channels = model.backbone.channels
    generator = torch.Generator().manual_seed(0)
    normal = GoodRows(
        torch.rand(60, channels, generator=generator).half(),
        torch.arange(3).repeat_interleave(20),
        originals=60,
        inside=torch.ones(4, 5).bool(),
    )
    painted = Rows(torch.rand(30, channels, generator=generator).half(), torch.arange(3).repeat_interleave(10))
    real = torch.full((2, model.whitening.out_features + 1), 99.0).half()
    plain = Feed(model, normal, painted)
    feed = plain.with_real_defects(real)
    for some in (feed, feed.subset(torch.tensor([True, False, True]))):
        good, anomalous = some.draw(64)
        is_real = (anomalous == 99).all(dim=1)
        assert len(good) == 64 and len(anomalous) == 16 and is_real.sum() == 8
    assert not (plain.draw(64)[1] == 99).any()


def test_masks_are_found_in_both_layouts(category, tmp_path):
    found = list_defects(category / "test" / "crack", None)
    assert [defect.mask for defect in found] == [category / "ground_truth/crack" / d.path.name for d in found]
    shutil.copytree(category / "test" / "crack", tmp_path / "bad")
    assert [defect.mask for defect in list_defects(tmp_path / "bad", None)] == [None] * 4
    shutil.copytree(category / "ground_truth" / "crack", tmp_path / "ground_truth" / "bad")
    assert all(defect.mask for defect in list_defects(tmp_path / "bad", None))
    (tmp_path / "drawn").mkdir()
    shutil.copy(found[1].mask, tmp_path / "drawn" / f"{found[1].path.stem}_mask.png")
    named = list_defects(tmp_path / "bad", tmp_path / "drawn")
    assert [bool(defect.mask) for defect in named] == [False, True, False, False]


def test_a_folder_whose_images_are_all_in_subfolders_is_not_missing(category, tmp_path):
    with pytest.raises(InputError, match="--defects .*test: no images in this folder .subfolders are not read"):
        list_defects(category / "test", None)
    with pytest.raises(InputError, match="--defects .*none: no such folder"):
        list_defects(tmp_path / "none", None)


# ---------------------------------------------------------------- the scripts


def test_what_defects_teach_is_known_and_left_out_of_the_figures(category, tmp_path, capsys):
    """A copy is recognised by its bytes: of a test image in another folder, and of a good training image among the test
    images. 13 of the 17 test images are left."""
    mine = shutil.copytree(category, tmp_path / "mine")
    shutil.copytree(mine / "test" / "chip", tmp_path / "bad")
    (tmp_path / "bad" / "003.png").unlink()
    shutil.copy(mine / "train" / "good" / "000.png", mine / "test" / "good" / "copy.png")
    command = ["--data", mine, "--out", tmp_path / "run", *QUICK]
    masks = ["--defects", tmp_path / "bad", "--defect-masks", mine / "ground_truth" / "chip"]
    call(train.main, *command, *masks)
    assert "a preliminary training" not in capsys.readouterr().out
    call(evaluate.main, tmp_path / "run")
    said = capsys.readouterr().out
    names = "chip/000.png, chip/001.png, chip/002.png, good/copy.png"
    assert f"left out 4 test images, since the detector was trained with them: {names}\n" in said
    pictures = {path.name for path in (tmp_path / "run" / "pictures" / "chip").iterdir()}
    assert pictures == {"003.png.png"} and len(list((tmp_path / "run" / "pictures").glob("*/*"))) == 17
    # An image is also recognised by its path, even if the file has changed since.
    Image.new("RGB", (256, 256)).save(tmp_path / "bad" / "000.png")
    call(evaluate.main, tmp_path / "run", "--data", mine)
    assert "4 test images" in capsys.readouterr().out
    refuse(train.main, capsys, *command, *masks, "--resume", words=["other --defects or --corrections"])
    refuse(train.main, capsys, *command, "--resume", words=["was started with --defects", tmp_path / "bad"])


def test_a_kind_that_was_given_is_found_more_surely(category, tmp_path, monkeypatch):
    """Without masks. The highest log-odds of other images with such defects lie above those of good images."""
    take_few_steps(monkeypatch, painted=32, steps=20, in_thirds=2)
    mine = shutil.copytree(category, tmp_path / "mine")
    shutil.rmtree(mine / "ground_truth")
    (tmp_path / "bad").mkdir()
    given, others = folders.list_images(mine / "test" / "chip")[:2], folders.list_images(mine / "test" / "chip")[2:]
    for path in given:
        shutil.copy(path, tmp_path / "bad")
    odds = []
    for name, more in (("without", []), ("with", ["--defects", tmp_path / "bad"])):
        call(train.main, "--data", mine, "--out", tmp_path / name, *QUICK, "--size", 128, "--batch", 256, *more)
        model = load(tmp_path / name / "model.pt")
        normal = model.energies(data.read_batch(folders.list_images(mine / "test" / "good"), model.shape))[-1]
        defective = model.energies(data.read_batch(others, model.shape))[-1]
        odds.append(float(defective.flatten(1).amax(dim=1).mean() - normal.flatten(1).amax(dim=1).mean()))
    assert odds[1] > odds[0] + 0.3, odds


def test_interrupted_training_with_defects_resumes_to_the_same_weights(category, tmp_path, monkeypatch):
    """--resume repeats the preliminary training, which finds where the defects are."""
    monkeypatch.setattr(clflow, "STEPS_PER_EPOCH", 4)
    shutil.copytree(category / "test" / "crack", tmp_path / "bad")
    command = ["--data", category, "--defects", tmp_path / "bad", *QUICK, "--epochs", 2]
    call(train.main, *command, "--out", tmp_path / "whole")
    step, steps = torch.optim.Adam.step, []

    def interrupted(self, *args):
        steps.append(1)
        if len(steps) == 2 * 4 + 4 + 2:  # the preliminary training, an epoch, two steps
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(train.main, *command, "--out", tmp_path / "parts")
    call(train.main, *command, "--out", tmp_path / "parts", "--resume")
    whole, parts = (load(tmp_path / name / "model.pt").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_corrections_make_defects_and_good_images(category, tmp_path, monkeypatch):
    seen = {}

    def watching_good(model, pairs):
        seen["trained_on"] = set(pairs.files)
        return good_rows(model, pairs)

    def watching_defects(model, defects):
        seen["defects"] = [(defect.path, defect.mask) for defect in defects]
        return defect_rows(model, defects)

    monkeypatch.setattr("kit.rows.good_rows", watching_good)
    monkeypatch.setattr("kit.rows.defect_rows", watching_defects)
    good = folders.list_images(category / "train" / "good")
    missed = [category / "test/stain/001.png", good[4]]  # the second one was among the good images
    alarm = category / "test" / "good" / "002.png"
    told = {"missed": missed, "false_alarms": [alarm], "not_good": [good[7]]}
    file = tmp_path / "corrections.json"
    file.write_text(json.dumps({name: [str(path) for path in paths] for name, paths in told.items()}))
    call(train.main, "--data", category, "--out", tmp_path / "run", *QUICK, "--corrections", file)
    assert seen["defects"] == [(path, None) for path in missed]
    model = load(tmp_path / "run" / "model.pt")
    settings = read_checkpoint(tmp_path / "run" / "model.pt")["settings"]
    assert settings["images"] == model.good_scores.shape[1] == 24 - 2 + 1
    assert not seen["trained_on"] & {good[4], good[7]}
    assert {path for path, _ in settings["taught"]} == {str(path.resolve()) for path in [*missed, alarm]}
    call(train.main, "--data", category, "--out", tmp_path / "run", *QUICK, "--corrections", file, "--resume")


def test_a_good_image_that_is_also_a_defect_is_left_out(tiny, tmp_path, capsys):
    good = folders.list_images(tiny / "train" / "good")
    (tmp_path / "bad").mkdir()
    shutil.copy(good[3], tmp_path / "bad" / "other-name.png")
    shutil.copy(next((tiny / "test" / "chip").iterdir()), tmp_path / "bad")
    call(train.main, "--data", tiny, "--out", tmp_path / "run", *QUICK, "--defects", tmp_path / "bad")
    said = capsys.readouterr().out
    assert f"left out 1 of {len(good)} good images, as copies of other ones or of given defects" in said
    assert f"reading {len(good) - 1} good images" in said and ", set from " in said


def test_a_copy_of_what_is_not_good_is_left_out_too(tiny, tmp_path, capsys):
    mine = shutil.copytree(tiny / "train" / "good", tmp_path / "mine")
    shutil.copy(mine / "000.png", mine / "copy.png")
    (tmp_path / "c.json").write_text(json.dumps({"not_good": [str(mine / "000.png")]}))
    call(train.main, "--data", mine, "--out", tmp_path / "run", *QUICK, "--corrections", tmp_path / "c.json")
    assert f"reading {len(list(mine.iterdir())) - 2} good images" in capsys.readouterr().out


def test_bad_defects_and_corrections(category, tmp_path, capsys):
    def attempt(*arguments, words):
        refuse(train.main, capsys, "--data", category, "--out", tmp_path / "out", *QUICK, *arguments, words=words)

    def attempt_corrections(text, words):
        (tmp_path / "c.json").write_text(text)
        attempt("--corrections", tmp_path / "c.json", words=["--corrections", *words])

    here = str(category / "test/crack/000.png")
    attempt_corrections('{"missed": [', ["c.json", "JSON"])
    attempt_corrections("[]", ["not a corrections file", "missed"])
    attempt_corrections('{"mised": []}', ["not a corrections file", "missed"])
    attempt_corrections('{"missed": [1]}', ["not a corrections file"])
    attempt_corrections('{"missed": []}', ["contains no images"])
    attempt_corrections(json.dumps({"missed": ["/gone.png"]}), ["/gone.png", "there is no file"])
    attempt_corrections(json.dumps({"missed": [here], "false_alarms": [here]}), ["two of its lists"])
    attempt_corrections(json.dumps({"not_good": [here]}), ["not among the good images"])
    attempt("--corrections", tmp_path / "gone.json", words=["gone.json"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "black").mkdir()
    attempt("--defects", tmp_path / "empty", words=["--defects", "no images"])
    crack = ["--defects", category / "test" / "crack"]
    attempt(*crack, "--defect-masks", tmp_path / "empty", words=["--defect-masks", "no mask"])
    for path in folders.list_images(category / "test" / "crack"):
        Image.new("L", (256, 256)).save(tmp_path / "black" / path.name)
    attempt(*crack, "--defect-masks", tmp_path / "black", words=["--defects", "no mask marks anything"])
    attempt("--defect-masks", tmp_path / "empty", words=["--defect-masks has no effect without --defects"])
    none = ["--classification-weight", 0, "--contrast-weight", 0]
    attempt(*crack, *none, words=["--classification-weight 0", "real defects"])
    for method in ("paper", "nearest", "autoencoder"):
        command = ["--data", category, "--out", tmp_path / "out", "--method", method]
        refuse(train.main, capsys, *command, *crack, words=[f"--defects has no effect with --method {method}"])
    for name in ("a", "b"):
        shutil.copytree(category / "train", tmp_path / "all" / name / "train")
    several = ["--data", tmp_path / "all", "--out", tmp_path / "out", *QUICK]
    refuse(train.main, capsys, *several, *crack, words=["--defects", "one category"])
