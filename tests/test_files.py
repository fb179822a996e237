"""Nothing on disk is lost: atomic writing, tables that survive a kill, run folders."""

import csv
import os
from pathlib import Path

import pytest
import torch

from kit import InputError, files
from kit.demo import draw_demo
from kit.detector import FORMAT
from kit.files import (
    GrowingTable,
    OwnFiles,
    fitting,
    plain_cell,
    single_file,
    table_of,
    write_atomically,
    write_rows,
    write_text,
)


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), RuntimeError("torch"), KeyboardInterrupt()]
)
def test_nothing_is_lost_or_left_behind_when_a_write_fails(tmp_path, failure):
    target = tmp_path / "model.pt"
    target.write_text("precious")

    def fail(to):
        to.write_text("half")
        raise failure

    with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else InputError):
        write_atomically(target, fail)
    assert target.read_text() == "precious" and list(tmp_path.iterdir()) == [target]


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """To survive a power cut, the contents are synced first, then the file is renamed, then the folder is synced."""
    done = []
    replace, fsync = os.replace, os.fsync

    def syncing(descriptor):
        what = os.stat(descriptor)
        for path in (tmp_path, *tmp_path.iterdir()):
            if os.path.samestat(what, path.stat()):
                done.append(("sync", path.name.split(".tmp")[0]))
        fsync(descriptor)

    def renaming(source, target):
        done.append(("rename", target.name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", renaming)
    write_text(tmp_path / "a.json", "{}")
    assert done == [("sync", "a.json"), ("rename", "a.json"), ("sync", tmp_path.name)]


def test_a_growing_table_has_each_row_on_disk_at_once_and_drops_half_a_line(tmp_path):
    path = tmp_path / "scores.csv"
    table = GrowingTable(path, ["file", "score"], [])
    table.add(["a, b.png", 0.5])
    assert path.read_text() == 'file,score\n"a, b.png",0.5\n'  # the table is still open
    table.close()
    path.write_text(path.read_text() + "c.png,0.")  # killed within a row
    assert table_of(path) == [["file", "score"], ["a, b.png", "0.5"]]
    again = GrowingTable(path, ["file", "score"], table_of(path)[1:])
    again.add(["c.png", 0.25])
    again.close()
    with open(path, newline="") as file:
        assert list(csv.reader(file)) == [["file", "score"], ["a, b.png", "0.5"], ["c.png", "0.25"]]


def test_a_table_killed_within_its_header_has_none(tmp_path):
    (tmp_path / "scores.csv").write_text("file,sc")
    assert table_of(tmp_path / "scores.csv") == table_of(tmp_path / "none.csv") == []


@pytest.mark.parametrize("letter", ["a", "\u00e4", "\u4e2d"])  # one, two and three bytes in UTF-8
def test_a_long_name_leaves_room_for_what_is_added_to_it(tmp_path, letter):
    size = len(letter.encode())
    names = [letter * (count // size) for count in (100, 250, 255)]
    names.append(names[-1][:-1] + "z")
    found = [fitting(f"tray/{name}") for name in names]
    assert found[0] == f"tray/{names[0]}" and len(set(found)) == 4
    for name in found:
        write_text(tmp_path / f"{name}.png", "")
        assert (tmp_path / f"{name}.png").exists()


def test_no_cell_is_a_formula():
    assert plain_cell("=1+1.png") == "'=1+1.png" and plain_cell("@x") == "'@x" and plain_cell("-1.png") == "'-1.png"
    assert plain_cell("'a.png") == "''a.png"  # so that this apostrophe differs from ours
    assert plain_cell("a=1.png") == "a=1.png" and "\n" not in plain_cell("a\nb")


def test_write_rows(tmp_path):
    write_rows(tmp_path / "log.csv", [["epoch", "loss"], [1, 0.5], [2, 0.25]])
    assert (tmp_path / "log.csv").read_text() == "epoch,loss\n1,0.5\n2,0.25\n"


# ---------------------------------------------------------------- run folders


def checkpoint(path, data) -> None:
    OwnFiles(path.parent, "trained").claim(path.name)
    torch.save({"format": FORMAT, "settings": {"data": str(data.resolve())}}, path)


def test_what_a_new_run_may_not_write_over(tmp_path):
    mine, other, out = tmp_path / "a" / "good", tmp_path / "b" / "good", tmp_path / "runs" / "good"
    files.check_out(out, mine, [mine], resume=False)  # nothing there
    checkpoint(out / "model.pt", mine)
    files.check_out(out, mine, [mine], resume=False)  # a finished run on the same data
    with pytest.raises(InputError, match=f"a run that was trained on .*{mine.parent.name}"):
        files.check_out(out, other, [other], resume=False)
    checkpoint(out / "unfinished" / "state.pt", mine)
    files.check_out(out, mine, [mine], resume=True)
    with pytest.raises(InputError, match="unfinished training.*--resume"):
        files.check_out(out, mine, [mine], resume=False)
    for inside in (mine, mine / "runs"):
        with pytest.raises(InputError, match="images are read from there"):
            files.check_out(inside, mine, [mine], resume=False)
    torch.save({"format": 3}, out / "unfinished" / "state.pt")
    with pytest.raises(InputError, match="another version.*state.pt.*train again"):
        files.check_out(out, mine, [mine], resume=False)
    files.check_out(tmp_path / "kept", mine, [mine], resume=False, epochs=2)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "epoch_02.pt").touch()
    files.check_out(tmp_path / "kept", mine, [mine], resume=False)
    with pytest.raises(InputError, match=f"epoch_02.pt, but {files.LIST} does not list it"):
        files.check_out(tmp_path / "kept", mine, [mine], resume=False, epochs=2)


def test_an_unfinished_training_counts_only_where_there_is_no_other(tmp_path):
    state = tmp_path / "unfinished" / "state.pt"
    state.parent.mkdir()
    state.touch()
    assert files.checkpoint_of(tmp_path) == state and files.folder_of(state) == tmp_path
    (tmp_path / "model.pt").touch()
    assert files.checkpoint_of(tmp_path).name == "model.pt"
    assert files.folder_of(tmp_path / "model.pt") == tmp_path
    assert files.checkpoint_of(state) == state


OLD = ("model.pt", "log.csv", "suspects.png", "epoch_01.pt", "epoch_02.pt", "recalibrated.pt")
NEW = ("model.pt", "log.csv", "epoch_01.pt")
FIGURES = ("metrics.json", "pictures/chip/a.png", "pictures/crack/b.png")
FOREIGN = ("notes.txt", "pictures/chip/mine.png", "tests/plan.txt")


def run_with_a_complete_successor(run) -> None:
    """A run folder with a finished training that is not installed yet. Its files contain "new", the earlier ones
    "old"."""
    for name in FOREIGN:
        write_text(run / name, "foreign")
    for name in OLD:
        write_text(OwnFiles(run, "trained").claim(name), "old")
    for name in FIGURES:
        write_text(OwnFiles(run, "measured").claim(name), "old")
    write_text(OwnFiles(run / "tests" / "b", "measured").claim("metrics.json"), "old")
    for name in ("state.pt", *NEW):
        write_text(files.unfinished_files(run).claim(name), "new")


def said_by_files(run) -> dict[str, str]:
    found = [path for path in run.rglob("*") if path.is_file() and not path.name.startswith(files.LIST)]
    return {path.relative_to(run).as_posix(): path.read_text() for path in found}


def test_a_new_detector_takes_the_place_of_the_old_one_and_foreign_files_stay(tmp_path):
    run_with_a_complete_successor(tmp_path)
    files.install(tmp_path)
    assert said_by_files(tmp_path) == dict.fromkeys(NEW, "new") | dict.fromkeys(FOREIGN, "foreign")
    assert set(OwnFiles(tmp_path, "trained").names()) == set(NEW) and not files.is_unfinished(tmp_path)
    assert not (tmp_path / "unfinished").exists() and not (tmp_path / "pictures" / "crack").exists()


def test_a_kill_while_a_detector_takes_its_place_leaves_no_mixture(tmp_path, monkeypatch):
    """The kill comes one step later each time, until the call gets through. There is always one detector, and no file
    of the other one."""

    class Kill(BaseException):
        pass

    steps_left = 0

    def killing(function):
        def step(*args, **kwargs):
            nonlocal steps_left
            if steps_left == 0:
                raise Kill
            steps_left -= 1
            return function(*args, **kwargs)

        return step

    for number in range(100):
        run = tmp_path / str(number)
        run_with_a_complete_successor(run)
        steps_left = number
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killing(os.replace))
            patch.setattr("pathlib.Path.unlink", killing(Path.unlink))
            patch.setattr("pathlib.Path.rmdir", killing(Path.rmdir))
            try:
                files.install(run)
                was_killed = False
            except Kill:
                was_killed = True
        there = {name: text for name, text in said_by_files(run).items() if not name.startswith("unfinished/")}
        assert len(set(there.values()) - {"foreign"}) == 1 and "model.pt" in there, there
        files.install(run)
        assert said_by_files(run) == dict.fromkeys(NEW, "new") | dict.fromkeys(FOREIGN, "foreign")
        if not was_killed:
            break
    assert number > 10 and not was_killed


def test_a_training_that_is_not_complete_is_not_put_in_place(tmp_path):
    run_with_a_complete_successor(tmp_path)
    files.unfinished_files(tmp_path).remove(["model.pt"])
    before = said_by_files(tmp_path)
    files.install(tmp_path)
    assert said_by_files(tmp_path) == before and files.resumable(tmp_path).name == "state.pt"


def test_what_is_there_already_is_claimed_by_nobody(tmp_path):
    (tmp_path / "model.pt").write_text("mine")
    with pytest.raises(InputError, match="model.pt.*does not list it.*another --out"):
        OwnFiles(tmp_path, "trained").claim("model.pt")
    OwnFiles(tmp_path, "trained").claim("log.csv").touch()
    (tmp_path / files.LIST).open("a").write('["trained", "mod')  # cut off by a kill
    OwnFiles(tmp_path, "measured").claim("metrics.json").touch()  # the entry after the one that was cut off
    OwnFiles(tmp_path, "measured").claim("metrics.json")
    OwnFiles(tmp_path, "measured").claim("log.csv")  # ours, even if another kind of call wrote it
    OwnFiles(tmp_path, "trained").remove_all()
    assert (tmp_path / "model.pt").read_text() == "mine" and not (tmp_path / "log.csv").exists()


def test_two_processes_may_write_the_same_file_at_the_same_time(tmp_path):
    """As when two processes finish the last two runs of one call together, and both write the table."""
    first, second = OwnFiles(tmp_path, "trained"), OwnFiles(tmp_path, "trained")
    for own in (first, second):
        write_text(own.claim("table.md"), "the table")
    first.remove_all()
    assert not (tmp_path / "table.md").exists()


# ---------------------------------------------------------------- single files


def test_a_default_name_never_takes_the_place_of_a_file(tmp_path):
    default = tmp_path / "explained.png"
    for name in ("explained.png", "explained-2.png", "explained-3.png"):
        found = single_file(None, default, "--out")
        assert found == tmp_path / name
        found.touch()


def test_a_named_file_replaces_a_foreign_one_but_nothing_that_is_read_or_listed(tmp_path):
    checkpoint(tmp_path / "run" / "model.pt", tmp_path)
    copy = tmp_path / "copy.pt"
    torch.save({"format": 3, "settings": {}, "state": {}}, copy)  # from another version, and not listed
    write_text(OwnFiles(tmp_path / "run", "trained").claim("log.csv"), "epoch")
    image, foreign = tmp_path / "image.png", tmp_path / "foreign.png"
    for path in (image, foreign):
        path.write_text("mine")
    (tmp_path / "link.png").symlink_to(image)
    for path in (foreign, tmp_path / "new.png"):
        assert single_file(path, Path("x.png"), "--out", [image]) == path
    refused = {
        image: "files that are read",
        tmp_path / "link.png": "files that are read",
        copy: "is a checkpoint",
        tmp_path / "run" / "model.pt": "belongs to a run",
        tmp_path / "run" / "log.csv": "belongs to a run",
        tmp_path / "run": "is a folder",
    }
    for path, reason in refused.items():
        with pytest.raises(InputError, match=f"--out {path}: .*{reason}.*another file"):
            single_file(path, Path("x.png"), "--out", [image])


# ---------------------------------------------------------------- the demo's images


def test_the_demo_replaces_no_foreign_file(tmp_path):
    counts = {"train/good": 2, "test/chip": 1}
    draw_demo(tmp_path, counts)
    drawn = said_by_pictures(tmp_path)
    first = tmp_path / "train" / "good" / "000.png"
    first.write_text("cut off")  # ours, so it is drawn again
    draw_demo(tmp_path, counts)
    assert said_by_pictures(tmp_path) == drawn
    (tmp_path / files.LIST).unlink()
    first.write_text("foreign")
    with pytest.raises(InputError, match="train/good/000.png.*does not list it.*another --out"):
        draw_demo(tmp_path, counts)
    assert first.read_text() == "foreign"


def said_by_pictures(folder) -> dict[str, bytes]:
    return {path.name + path.parent.name: path.read_bytes() for path in folder.rglob("*.png")}


def test_a_link_in_the_folder_leads_to_no_removal_elsewhere(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a.png").touch()
    own = OwnFiles(tmp_path / "out", "measured")
    own.claim("pictures/a.png")
    (tmp_path / "out" / "pictures").symlink_to(tmp_path / "theirs")
    own.remove_all()
    assert (tmp_path / "theirs" / "a.png").exists()
