"""Folders of images: which folders are classes, which are splits, and which files are images.

A file is taken for an image unless its suffix is known for something else: what then cannot be read is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from harness.errors import InputError
from tasks.own import is_system, labelled, split_of, tables_in
from tasks.tables import OwnRows

NO_IMAGES = """
.txt .csv .tsv .json .jsonl .xml .yaml .yml .toml .ini .cfg .md .rst .html .htm .css .js .py .pyc .ipynb .sh .bat .log
.db .sqlite .pdf .doc .docx .xls .xlsx .ppt .pptx .zip .gz .tar .tgz .bz2 .xz .7z .rar .npy .npz .mat .pkl .parquet
.arrow .h5 .hdf5 .pt .pth .safetensors .onnx .bin .mp4 .mov .avi .mkv .webm .mp3 .wav .flac .tmp .part .crdownload .lnk
.url .exe .dll .so .c .h .cpp .java .aae .xmp .license
"""
NAMES_OF_NO_IMAGES = ("readme", "license", "makefile", "changelog", "notice")
OTHER_SUFFIXES = frozenset(NO_IMAGES.split())


def class_folders(path: str) -> dict[str, OwnRows]:
    """The images below PATH by split, labelled by the name of their class's folder; none where PATH is a table, or a
    folder of tables.

    Raises InputError where it cannot be told which folders are classes and which are splits, a class has no images or
    there are none at all.
    """
    place = Path(path).expanduser()
    if not place.is_dir() or "train" in tables_in(place):
        return {}
    if not any(has_images(folder) for folder in folders(place)):
        return {}
    splits, notes = _splits(place)
    rows = {split: folder_rows(folder) for split, folder in splits.items()}
    train = rows["train"]
    rows["train"] = OwnRows(train.table, train.source, notes=(*notes, *train.notes))
    return labelled(rows, "label")


def folders(place: Path) -> list[Path]:
    """The folders in a folder by name, without those of the operating system."""
    return sorted(child for child in place.iterdir() if child.is_dir() and not is_system(child.name))


def pictures(place: Path) -> list[Path]:
    """The images directly in a folder, by name."""
    return sorted(child for child in place.iterdir() if _is_image(child))


def images(folder: Path) -> list[Path]:
    """The images below a folder, at any depth, by name."""
    return sorted(file for file in _files(folder) if _is_image(file))


def has_images(folder: Path) -> bool:
    """Whether there is any image below a folder."""
    return any(_is_image(file) for file in _files(folder))


def _files(folder: Path) -> Iterator[Path]:
    """The files and folders below a folder, without those of the operating system."""
    for file in folder.rglob("*"):
        if not any(is_system(part) for part in file.relative_to(folder).parts):
            yield file


def _is_image(file: Path) -> bool:
    if is_system(file.name) or file.suffix.lower() in OTHER_SUFFIXES or file.name.lower() in NAMES_OF_NO_IMAGES:
        return False
    return not file.is_dir()


def _splits(place: Path) -> tuple[dict[str, Path], list[str]]:
    """(the folder of each split, notes). A folder is a split if it has the name of one and holds folders of images."""
    named: dict[str, Path] = {}
    others = []
    for child in filter(has_images, folders(place)):
        split = split_of(child.name)
        if split is None:
            others.append(child)
        elif split in named:
            raise InputError(
                f"'{named[split]}' and '{child}' are both taken for the {split} split; keep one", str(place)
            )
        else:
            named[split] = child
    inner = {split: _inner(folder, split) for split, folder in named.items()}
    nested = {split: folder for split, folder in inner.items() if any(map(has_images, folders(folder)))}
    if not named or (others and not nested):  # folders of nothing but images are classes, whatever their names
        return {"train": place}, []
    if "train" not in nested or (others and len(named) == 1):
        raise InputError(_question(place, named, list(nested), others), str(place))
    bare = [
        f"'{named[split].name}' is left out, not scored on: it holds no folders of classes, so no labels"
        for split in named
        if split not in nested
    ]
    beside = [f"folders that are no split are left out: {_listed(others)}"] if others else []
    return nested, [*bare, *beside]


def _inner(folder: Path, split: str) -> Path:
    """The folder itself, or the one that is all there is in it and has the same name: training_set/training_set."""
    while not pictures(folder) and len(inside := folders(folder)) == 1 and split_of(inside[0].name) == split:
        folder = inside[0]
    return folder


def _question(place: Path, named: dict[str, Path], nested: Sequence[str], others: Sequence[Path]) -> str:
    """What is asked where it is not clear what is a split and what a class."""
    if others:
        one = named[nested[0]].name
        return (
            f"folder '{place}': is '{one}' a split or a class? It holds folders of images, and beside it are "
            f"{_listed(others)}: if it is a split, put these into a folder train/, or take them out; if it is a class, "
            "put its images directly into it"
        )
    train = named.get("train")
    if train is None:
        return (
            f"folder '{place}' holds {_listed(named.values())}, taken for splits, and no training split: it needs a "
            "folder train/ with one folder a class"
        )
    table = next((train / name for name in ("metadata.csv", "metadata.jsonl") if (train / name).is_file()), None)
    hint = f"; for its table write image:{table}[image=file_name,label=...]" if table else ""
    return (
        f"folder '{train}' is taken for the training split, but holds its images in no folders: it needs one folder a "
        f"class, with images in it (as a class, it needs folders of other classes beside it){hint}"
    )


def folder_rows(folder: Path) -> OwnRows:
    """The images below a folder of class folders, in the order of their names. Raises InputError for a class without
    images, and where the classes rather look like splits."""
    import pyarrow as pa

    classes = folders(folder)
    found = {child: images(child) for child in classes}
    if empty := [child for child in classes if not found[child]]:
        suffixes = _by_suffix([file for file in _files(empty[0]) if not file.is_dir()])
        held = f" (it holds {suffixes})" if suffixes else ""
        raise InputError(
            f"class folder '{empty[0]}' holds no images{held}: put some there, or take it out", str(folder)
        )
    within = [{child.name for child in folders(each) if has_images(child)} for each in classes]
    same = set.intersection(*within) if within else set()
    if len(classes) > 1 and len(same) > 1 and not any(pictures(each) for each in classes):
        raise InputError(
            f"folder '{folder}': {_listed(classes)} all hold the folders {_listed(sorted(same))} and no other images: "
            "if these are the classes, name the folders above them train/ and test/ (or validation/); else put the "
            "images directly into the folders of their classes",
            str(folder),
        )
    files = [(file, child.name) for child in classes for file in found[child]]
    table = pa.table({"image": [str(file.absolute()) for file, _ in files], "label": [name for _, name in files]})
    return OwnRows(table, f"'{folder}'", notes=tuple(_left_out(folder, classes)))


def _left_out(folder: Path, classes: Sequence[Path]) -> list[str]:
    """What the folder has besides images of the classes."""
    notes = []
    if stray := pictures(folder):
        names = ", ".join(file.name for file in stray[:3])
        notes.append(f"left out: {len(stray):,} files beside the folders of the classes: {names}")
    others = [file for child in classes for file in _files(child) if not file.is_dir() and not _is_image(file)]
    if others:
        notes.append(f"left out: {len(others):,} files that are no images: {_by_suffix(others)}")
    return notes


def _by_suffix(files: Sequence[Path]) -> str:
    counts = Counter(file.suffix.lower() or file.name for file in files)
    return ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common(8))


def _listed(paths: Iterable[Path | str]) -> str:
    names = [path.name if isinstance(path, Path) else path for path in paths]
    return ", ".join(f"'{name}'" for name in names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
