import shutil
from pathlib import Path

import pytest
from PIL import Image

from kit import InputError
from kit.folders import (
    category_folders,
    category_name,
    good_folder,
    has_tests,
    labelled_images,
    list_images,
    print_unread,
    unused_subfolders,
    usable,
)


def touch(folder, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (32, 32)).save(folder / name)


def test_masks_are_matched_by_stem(tmp_path):
    touch(tmp_path, "test/ok/0.bmp", "test/ko/1.bmp", "test/ko/2.png", "test/ko/3.jpg")
    touch(tmp_path, "ground_truth/ko/1.png", "ground_truth/ko/2_mask.bmp")
    found = {t.path.name: (t.defect_type, t.anomalous, t.mask and t.mask.name) for t in labelled_images(tmp_path)}
    assert found == {
        "0.bmp": ("ok", False, None),
        "1.bmp": ("ko", True, "1.png"),
        "2.png": ("ko", True, "2_mask.bmp"),
        "3.jpg": ("ko", True, None),
    }
    touch(tmp_path, "test/ko/1.png")
    with pytest.raises(InputError, match=r"1.png.*same name.*1.bmp"):
        labelled_images(tmp_path)
    shutil.rmtree(tmp_path / "ground_truth")  # without masks two such images do not conflict
    assert len(labelled_images(tmp_path)) == 5


def test_good_images_are_found_in_every_layout_and_never_in_test(tmp_path):
    touch(tmp_path, "mvtec/train/good/a.png", "mvtec/x.png", "btad/train/ok/a.bmp", "own/a.JPG", "none/test/good/a.png")
    assert good_folder(tmp_path / "mvtec") == tmp_path / "mvtec/train/good"
    assert good_folder(tmp_path / "btad") == tmp_path / "btad/train/ok"
    assert good_folder(tmp_path / "own") == tmp_path / "own"
    for name, word in (("none", "no images"), ("nowhere", "no such folder")):
        with pytest.raises(InputError, match=word):
            good_folder(tmp_path / name)
    assert category_folders(tmp_path) == [tmp_path / "btad", tmp_path / "mvtec"]
    assert category_folders(tmp_path / "own") == [tmp_path / "own"]


def test_case_does_not_count_in_the_names_of_folders_of_good_images(tmp_path):
    touch(tmp_path, "a/train/Good/0.png", "a/test/Good/1.png", "a/test/OK/2.png", "a/test/Bad/3.png")
    assert good_folder(tmp_path / "a") == tmp_path / "a/train/Good"
    assert category_folders(tmp_path) == [tmp_path / "a"]
    labels = {test.path.name: test.anomalous for test in labelled_images(tmp_path / "a")}
    assert labels == {"1.png": False, "2.png": False, "3.png": True}


def test_a_category_that_contains_a_copy_of_itself_is_one_category(tmp_path):
    touch(tmp_path, "my/train/good/a.png", "my/backup/train/good/a.png")
    assert category_folders(tmp_path / "my") == [tmp_path / "my"]


def test_images_of_other_types_are_counted_and_tables_are_not(tmp_path, capsys):
    touch(tmp_path, "a.png", "b.gif", "deep/c.GIF")
    for name in ("d.HEIC", "._d.heic", "scores.csv", "notes.txt"):
        (tmp_path / name).touch()
    print_unread(tmp_path)
    print_unread(tmp_path, subfolders=True)
    of_folder, of_all = capsys.readouterr().out.splitlines()
    assert "skipped 2 files of types that are not read (.gif, .heic)" in of_folder and "skipped 3 files" in of_all
    (tmp_path / "none").mkdir()
    print_unread(tmp_path / "none")
    assert not capsys.readouterr().out


def test_no_folder_is_not_a_folder_without_test_images(tmp_path):
    with pytest.raises(InputError, match="no images in test/good"):
        labelled_images(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        labelled_images(tmp_path / "nowhere")


def test_subfolders_that_training_does_not_read_are_named(tmp_path):
    touch(tmp_path, "my/monday/a.png", "my/tuesday/deep/b.png", "my/test/good/c.png", "my/.thumbnails/d.png")
    (tmp_path / "my" / "empty").mkdir()
    assert unused_subfolders(tmp_path / "my") == [tmp_path / "my/monday", tmp_path / "my/tuesday"]
    with pytest.raises(InputError, match="one of its subfolders with images, for example .*monday"):
        good_folder(tmp_path / "my")


def test_images_in_subfolders_are_listed_if_wanted(tmp_path):
    touch(tmp_path, "b.png", "a/c.png", "a/d/e.tiff")
    (tmp_path / "notes.txt").write_text("no image")
    assert [p.name for p in list_images(tmp_path)] == ["b.png"]
    assert [p.name for p in list_images(tmp_path, subfolders=True)] == ["c.png", "e.tiff", "b.png"]


def test_hidden_files_and_folders_have_no_images(tmp_path):
    """macOS leaves ._x.png beside x.png; file managers and notebooks keep copies in hidden folders."""
    touch(tmp_path, "data/train/good/x.png", "data/train/good/.thumbs/x.png", "data/test/good/x.png")
    touch(tmp_path, "data/test/.ipynb_checkpoints/x.png", ".trash/train/good/x.png", ".mine/a/x.png")
    (tmp_path / "data/train/good/._x.png").write_bytes(b"no image")
    (tmp_path / "data/test/good/._x.png").write_bytes(b"no image")
    good = tmp_path / "data/train/good"
    assert list_images(good) == list_images(good, subfolders=True) == [good / "x.png"]
    assert [test.path for test in labelled_images(tmp_path / "data")] == [tmp_path / "data/test/good/x.png"]
    assert category_folders(tmp_path) == [tmp_path / "data"]
    found = list_images(tmp_path / ".mine", subfolders=True)  # the folder that the user names may be hidden
    assert found == [tmp_path / ".mine/a/x.png"]
    shutil.rmtree(tmp_path / "data/test/good")
    assert not has_tests(tmp_path / "data")


def test_a_category_that_is_a_link_has_the_name_of_the_link(tmp_path, monkeypatch):
    (tmp_path / "a" / "bottle").mkdir(parents=True)
    (tmp_path / "plant").symlink_to(tmp_path / "a" / "bottle")
    assert category_name(tmp_path / "plant") == "plant" and category_name(tmp_path / "a" / "bottle") == "bottle"
    monkeypatch.chdir(tmp_path / "a" / "bottle")
    assert category_name(Path(".")) == "bottle" and category_name(Path("..")) == "a"


def test_usable_files_and_a_line_on_each_other(tmp_path, capsys):
    touch(tmp_path, "a.png", "c.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    files = list_images(tmp_path)
    assert usable(files, skip_bad=False) == files and not capsys.readouterr().out
    assert [path.name for path in usable(files, skip_bad=True)] == ["a.png", "c.png"]
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("skipped: ") and "b.png" in first and last == "skipped 1 of 3 images in total"


def test_good_images_in_two_places_are_refused(tmp_path):
    """Otherwise some of them would be ignored without a word."""
    for name in ("two/train/good", "two/train/OK", "flat", "flat/backup/train/good"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / name / "a.png")
    with pytest.raises(InputError, match="--data .*both .*OK and .*good have good images"):
        good_folder(tmp_path / "two")
    with pytest.raises(InputError, match="--data .*both images and categories .backup."):
        category_folders(tmp_path / "flat")
