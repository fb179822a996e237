"""Folders of images: which files are images, and the usual layouts of good images, test images and masks."""

import os
from dataclasses import dataclass
from pathlib import Path

from kit import InputError
from kit.images import SUFFIXES, read_image

GOOD_NAMES = ("good", "ok")  # MVTec AD's and BTAD's, in lower case: Good and OK count, too
# Types of images that are not read. Other files, such as tables and notes, may lie beside the images.
UNREAD_SUFFIXES = ".heic .heif .gif .pgm .ppm .avif .dng .cr2 .nef .raw .psd .svg".split()


@dataclass(frozen=True)
class LabelledImage:
    """An image with its label; `mask` is None for good images, and for defective ones without a mask."""

    path: Path
    anomalous: bool
    mask: Path | None

    @property
    def defect_type(self) -> str:
        """The type of its defect, or "good": its folder's name."""
        return self.path.parent.name


def list_images(folder: Path, subfolders: bool = False) -> list[Path]:
    """Image files in `folder`, sorted by path; none if there is no such folder. Hidden files and hidden subfolders are
    left out."""
    return sorted(path for path in visible(folder, subfolders) if is_image(path) and path.is_file())


def visible(folder: Path, subfolders: bool) -> list[Path]:
    """All that is in `folder`, except hidden files and subfolders."""
    paths = folder.rglob("*") if subfolders else folder.glob("*")
    return [path for path in paths if not any(map(is_hidden, path.relative_to(folder).parts))]


def is_image(path: Path) -> bool:
    """Whether the file has the suffix of an image and is not hidden."""
    return path.suffix.lower() in SUFFIXES and not is_hidden(path.name)


def print_unread(folder: Path, subfolders: bool = False) -> None:
    """Print a line if there are images in `folder` of types that are not read."""
    suffixes = [path.suffix.lower() for path in visible(folder, subfolders)]
    unread = [suffix for suffix in suffixes if suffix in UNREAD_SUFFIXES]
    if unread:
        types = ", ".join(sorted(set(unread)))
        print(f"{folder}: skipped {len(unread)} files of types that are not read ({types}); convert them first")


def is_hidden(name: str) -> bool:
    """Whether the name of a file or folder begins with a dot: macOS adds ._x.png to x.png, and file managers keep
    thumbnails in .thumbnails."""
    return name.startswith(".")


def category_name(category: Path) -> str:
    """The name of a category's folder. For a link it is the link's own name, since two links may point to folders of
    the same name."""
    return Path(os.path.abspath(category)).name


def good_folder(data: Path, flag: str = "--data") -> Path:
    """The folder with the good images: `train/good` (MVTec AD), `train/ok` (BTAD), or `data` itself; never `test/`.
    Raises InputError, naming the `flag`, if there are none."""
    if not data.is_dir():
        raise InputError(f"{flag} {data}: no such folder")
    candidates = [*good_folders(data / "train"), data]
    found = [folder for folder in candidates if list_images(folder)]
    if len(found) > 1 and found[1] != data:
        raise InputError(f"{flag} {data}: both {found[0]} and {found[1]} have good images; move them into one folder")
    if found:
        return found[0]
    for folder in candidates:
        print_unread(folder)
    remedy = f"add good images ({' '.join(SUFFIXES)})"
    if others := unused_subfolders(data):
        remedy = f"give one of its subfolders with images, for example {others[0]}, or move the images into one folder"
    raise InputError(f"{flag} {data}: no images in it or in its train/good; {remedy}")


def good_folders(parent: Path) -> list[Path]:
    """The subfolders of `parent`, normally one or none, whose names say that they contain good images."""
    return sorted(path for path in parent.glob("*") if is_good_name(path.name) and path.is_dir())


def is_good_name(name: str) -> bool:
    """Whether this is a name of folders with good images."""
    return name.lower() in GOOD_NAMES


def unused_subfolders(folder: Path) -> list[Path]:
    """The subfolders with images that training on `folder` does not read. The folders of the usual layout are not even
    listed."""
    layout = ("train", "test", "ground_truth")
    subfolders = [path for path in folder.iterdir() if path.is_dir() and path.name not in layout]
    return sorted(path for path in subfolders if not is_hidden(path.name) and list_images(path, subfolders=True))


def category_folders(data: Path) -> list[Path]:
    """The categories in the folder `data`, each with train/good or train/ok. It is `data` alone if that has train/good
    itself (a subfolder may be a backup), or if no subfolder has one."""
    if good_folders(data / "train"):
        return [data]
    found = {path.parents[1] for path in data.glob("*/train/*") if is_good_name(path.name)}
    categories = sorted(category for category in found if not is_hidden(category.name))
    if categories and list_images(data):
        raise InputError(
            f"--data {data}: contains both images and categories ({categories[0].name}); move one of them away, or "
            "give a category as --data"
        )
    return categories or [data]


def print_skipped(complaints: list[str], images: int) -> None:
    """A line for each image that was skipped, and one with their number."""
    for complaint in complaints:
        print(f"skipped: {complaint}")
    if complaints:
        print(f"skipped {len(complaints)} of {images} images in total")


def usable(files: list[Path], skip_bad: bool) -> list[Path]:
    """`files`; with `skip_bad`, which reads them all, without those that cannot be read. A line is printed for each of
    these."""
    if not skip_bad:
        return files
    good, complaints = [], []
    for path in files:
        try:
            read_image(path)
            good.append(path)
        except InputError as error:
            complaints.append(str(error))
    print_skipped(complaints, len(files))
    return good


def by_stem(files: list[Path]) -> dict[str, Path]:
    """Files by stem, without `_mask` at its end. Raises InputError if two have the same stem."""
    found: dict[str, Path] = {}
    for path in files:
        twin = found.setdefault(path.stem.removesuffix("_mask"), path)
        if twin != path:
            raise InputError(
                f"{path}: has the same name as {twin.name} apart from the ending, but masks and images are matched by "
                "name; rename one of them"
            )
    return found


def labelled_images(data: Path) -> list[LabelledImage]:
    """The labelled images of `test/<good|ok|defect>`, in MVTec AD or BTAD layout; masks in `ground_truth/<defect>` are
    matched by stem, with or without `_mask`. Raises InputError if there are no images."""
    if not data.is_dir():
        raise InputError(f"--data {data}: no such folder")
    found = []
    for folder in test_folders(data):
        files = list_images(folder)
        anomalous = not is_good_name(folder.name)
        masks = by_stem(list_images(data / "ground_truth" / folder.name)) if anomalous else {}
        if masks:
            by_stem(files)  # no two images may claim one mask
        found += [LabelledImage(path, anomalous, masks.get(path.stem)) for path in files]
    if not found:
        raise InputError(
            f"--data {data}: no images in test/good or test/<defect>; to judge unlabelled images, give --images"
        )
    return found


def has_tests(data: Path) -> bool:
    """Whether there are labelled images to measure a detector on."""
    return any(list_images(folder) for folder in test_folders(data))


def test_folders(data: Path) -> list[Path]:
    """The folders test/<kind> of a category, sorted by path, without hidden ones."""
    return sorted(path for path in data.glob("test/*") if path.is_dir() and not is_hidden(path.name))
