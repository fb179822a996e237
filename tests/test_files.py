"""Nothing on disk is lost: atomic writing, tables that survive a kill, run folders."""

import csv

import pytest
import torch

from kit import files
from kit.detector import FORMAT
from kit.errors import InputError
from kit.files import GrowingTable, OwnFiles, plain_cell, write_atomically, write_table


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


def test_a_growing_table_has_each_row_on_disk_at_once_and_drops_half_a_line(tmp_path):
    path = tmp_path / "scores.csv"
    table = GrowingTable(path, ["file", "score"], resume=False)
    table.add(["a, b.png", 0.5])
    assert path.read_text() == 'file,score\n"a, b.png",0.5\n'  # the table is still open
    table.close()
    path.write_text(path.read_text() + "c.png,0.")  # killed within a row
    again = GrowingTable(path, ["file", "score"], resume=True)
    assert again.keys == {"a, b.png"}
    again.add(["c.png", 0.25])
    again.close()
    with open(path, newline="") as file:
        assert list(csv.reader(file)) == [["file", "score"], ["a, b.png", "0.5"], ["c.png", "0.25"]]
    anew = GrowingTable(path, ["file", "score"], resume=False)
    anew.close()
    assert path.read_text() == "file,score\n" and not anew.keys


def test_a_table_killed_within_its_header_begins_again(tmp_path):
    (tmp_path / "scores.csv").write_text("file,sc")
    table = GrowingTable(tmp_path / "scores.csv", ["file", "score"], resume=True)
    table.close()
    assert (tmp_path / "scores.csv").read_text() == "file,score\n"


def test_no_cell_is_a_formula():
    assert plain_cell("=1+1.png") == "'=1+1.png" and plain_cell("@x") == "'@x" and plain_cell("-1.png") == "'-1.png"
    assert plain_cell("'a.png") == "''a.png"  # so that its own can be told from ours
    assert plain_cell("a=1.png") == "a=1.png" and "\n" not in plain_cell("a\nb")


def test_write_table(tmp_path):
    write_table(tmp_path / "log.csv", [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}])
    assert (tmp_path / "log.csv").read_text() == "epoch,loss\n1,0.5\n2,0.25\n"


# ---------------------------------------------------------------- run folders


def checkpoint(path, data) -> None:
    OwnFiles(path.parent, "trained").claim(path.name)
    torch.save({"format": FORMAT, "settings": {"data": str(data.resolve())}}, path)


def test_what_a_new_run_may_not_write_over(tmp_path):
    mine, other, out = tmp_path / "a" / "good", tmp_path / "b" / "good", tmp_path / "runs" / "good"
    files.check_out(out, mine, [mine], resume=False)  # nothing there
    checkpoint(out / "model.pt", mine)
    files.check_out(out, mine, [mine], resume=False)  # finished, of the same folder
    with pytest.raises(InputError, match=f"a run of .*{mine.parent.name}"):
        files.check_out(out, other, [other], resume=False)
    checkpoint(out / "state.pt", mine)
    files.check_out(out, mine, [mine], resume=True)
    with pytest.raises(InputError, match="stopped run.*--resume"):
        files.check_out(out, mine, [mine], resume=False)
    for inside in (mine, mine / "runs"):
        with pytest.raises(InputError, match="whose images are read"):
            files.check_out(inside, mine, [mine], resume=False)
    torch.save({"format": 3}, out / "state.pt")
    with pytest.raises(InputError, match="format 3.*--out"):
        files.check_out(out, mine, [mine], resume=False)


def test_the_state_of_an_unfinished_training_counts(tmp_path):
    (tmp_path / "model.pt").touch()
    assert files.checkpoint_of(tmp_path).name == "model.pt"
    (tmp_path / "state.pt").touch()
    assert files.checkpoint_of(tmp_path).name == "state.pt"
    assert files.checkpoint_of(tmp_path / "model.pt").name == "model.pt"


def test_stale_files_are_removed_and_others_stay(tmp_path):
    mine = ("notes.txt", "pictures/chip/mine.png", "tests/plan.txt")
    trained, measured = OwnFiles(tmp_path, "trained"), OwnFiles(tmp_path, "measured")
    other = OwnFiles(tmp_path / "tests" / "b", "measured")
    ours = [trained.claim(name) for name in ("model.pt", "epoch_03.pt", "state.pt")]
    ours += [measured.claim(name) for name in ("metrics.json", "pictures/chip/a.png", "pictures/crack/b.png")]
    for path in (*ours, other.claim("metrics.json"), *(tmp_path / name for name in mine)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    files.remove_stale(tmp_path)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*mine, "state.pt", files.LIST}
    assert not (tmp_path / "pictures" / "crack").exists() and not (tmp_path / "tests" / "b").exists()


def test_what_is_there_already_is_claimed_by_nobody(tmp_path):
    (tmp_path / "model.pt").write_text("mine")
    with pytest.raises(InputError, match="model.pt.*did not write.*another --out"):
        OwnFiles(tmp_path, "trained").claim("model.pt")
    OwnFiles(tmp_path, "trained").claim("log.csv").touch()
    (tmp_path / files.LIST).open("a").write('["trained", "mod')  # cut off by a kill
    OwnFiles(tmp_path, "measured").claim("log.csv")  # ours, whatever wrote it
    OwnFiles(tmp_path, "trained").remove_all()
    assert (tmp_path / "model.pt").read_text() == "mine" and not (tmp_path / "log.csv").exists()


def test_a_link_in_the_folder_leads_to_no_removal_elsewhere(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a.png").touch()
    own = OwnFiles(tmp_path / "out", "measured")
    own.claim("pictures/a.png")
    (tmp_path / "out" / "pictures").symlink_to(tmp_path / "theirs")
    own.remove_all()
    assert (tmp_path / "theirs" / "a.png").exists()
