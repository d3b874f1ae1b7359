"""Which folders of a data set hold training and test images: a rule over their names and depth."""

import re
from dataclasses import dataclass
from pathlib import Path

from cl_lightning.data.images import levels_above_images, sub_folders

_PARTS = {
    "train": "train training",
    "val": "val valid validation dev development",
    "test": "test testing eval evaluation holdout heldout",
}
_PART_OF = {name: part for part, names in _PARTS.items() for name in names.split()}
_FILLERS = {"set", "split", "data", "dataset", "images", "image", "imgs", "img", "folder"}
_SET = re.compile(r"(.+?)(?:set|data|images)")


@dataclass(frozen=True)
class Layout:
    """Folders of a data set.

    Attributes:
        train: Folders whose sub-folders are the classes (or domains) of training images, at least one.
        test: The same for test images; None if a share of the training images has to be held out.
        left_out: Further folders without images.
    """

    train: tuple[Path, ...]
    test: Path | None
    left_out: tuple[Path, ...] = ()


def part_of(name: str) -> str | None:
    """Part of a data set that the name of a folder means: ``train``, ``val``, ``test``, or None.

    Upper case, digits, separators and words such as ``set`` and ``images`` do not matter: ``Train``, ``training_set``,
    ``train2017``, ``testset`` and ``hold-out`` are names of parts, ``testudo`` and ``train_station`` are not.
    """
    words = [word for word in re.findall(r"[a-z]+", name.lower()) if word not in _FILLERS]
    joined = "".join(words)
    if (whole := _SET.fullmatch(joined)) is not None and whole[1] in _PART_OF:
        joined = whole[1]
    return _PART_OF.get(joined)


def find_layout(
    root: Path, levels: int, *, owner: str, train_folder: str | None = None, test_folder: str | None = None
) -> Layout:
    """Find the folders of training and test images below a root.

    A folder is a *part* of the data if its name means one (:func:`part_of`) and its images lie at least ``levels``
    folders below it. Then

    1. If ``root`` has a training part and a test part, they are used. A validation part is joined to the training
       images; without a test part, it is the test part.
    2. If ``root`` has no part, its sub-folders are the classes, and a share of their images is held out. A folder
       called ``test`` that holds images directly is therefore a class.
    3. If the only folder with images in ``root`` has parts, it takes the place of ``root``; also several levels below.
    4. All else is ambiguous: two folders of one part, parts and classes side by side, a single folder that may be a
       class or a folder of classes, parts that hold images without class folders.

    Args:
        root: An existing folder.
        levels: Number of folders between a part and its images: 1 for classes, 2 for domains with classes.
        owner: Object to name in errors.
        train_folder: Folder of training images, relative to ``root``, in place of the rule; ``.`` for ``root`` itself.
        test_folder: Folder of test images, relative to ``root``.

    Raises:
        OSError: If a folder cannot be listed.
        ValueError: If the layout is ambiguous, or a part is missing.
    """
    if train_folder is not None or test_folder is not None:
        return _given(root, owner, train_folder, test_folder)
    remedy = "give data.train_folder and data.test_folder, relative to root"
    by_hand = f"rename them, or {remedy} ('.' for root itself as folder of the classes)"
    names = sub_folders(root)
    depths = {name: levels_above_images(root / name) for name in names}
    filled = [name for name in names if depths[name] is not None]
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name in filled:
        if (part := part_of(name)) is not None and (depths[name] or 0) >= levels:
            parts[part].append(name)
    found = [name for named in parts.values() for name in named]
    if not found:
        if filled and all(part_of(name) is not None for name in filled):
            raise ValueError(
                f"{owner}: {_listed(filled)} in {root} hold images without a folder for each class; put the images of "
                "each class in a folder of its own"
            )
        if len(filled) == 1 and (depths[filled[0]] or 0) >= levels:
            inner = root / filled[0]
            if (place := _with_parts(inner, levels)) is not None:
                return find_layout(place, levels, owner=owner)
            raise ValueError(
                f"{owner}: {root} holds the single folder {filled[0]!r} with further folders of images; give {inner} "
                "as root if these are the classes, or data.train_folder '.' if they belong to one class"
            )
        return Layout((root,), None)
    if others := [name for name in filled if name not in found]:
        raise ValueError(
            f"{owner}: {root} is ambiguous: {_listed(found)} look like parts of the data (train, test), "
            f"{_listed(others)} like classes; {by_hand}"
        )
    for part, named in parts.items():
        if len(named) > 1:
            raise ValueError(f"{owner}: {root} is ambiguous: {_listed(named)} may each be the {part} part; {remedy}")
    if not parts["train"]:
        raise ValueError(f"{owner}: {root} has {_listed(found)} but no `train`; add it, or {remedy}")
    test = parts["test"] or parts["val"]
    if not test:
        (train,) = parts["train"]
        raise ValueError(
            f"{owner}: {root} has `{train}` but no `test`; add `test`, or give {root / train} as root to hold out a "
            "share of it"
        )
    joined = [*parts["train"], *(parts["val"] if parts["test"] else [])]
    left_out = tuple(root / name for name in names if name not in found)
    return Layout(tuple(root / name for name in joined), root / test[0], left_out)


def _with_parts(folder: Path, levels: int) -> Path | None:
    """The folder, or the only one with images below it, whose sub-folders have names of parts."""
    names = sub_folders(folder)
    if any(part_of(name) is not None for name in names):
        return folder
    depths = [(name, depth) for name in names if (depth := levels_above_images(folder / name)) is not None]
    if len(depths) != 1 or depths[0][1] < levels:
        return None
    return _with_parts(folder / depths[0][0], levels)


def _given(root: Path, owner: str, train_folder: str | None, test_folder: str | None) -> Layout:
    if train_folder is None:
        raise ValueError(f"{owner}: give train_folder too; test_folder is {test_folder!r}")
    folders = []
    for option, name in (("train_folder", train_folder), ("test_folder", test_folder)):
        if name is None:
            continue
        folder = root / name
        if not folder.is_dir() or not folder.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{owner}: {option} is {name!r}; give a folder inside {root}")
        folders.append(folder)
    if len(folders) == 2 and (folders[0].resolve() == folders[1].resolve()):
        raise ValueError(f"{owner}: train_folder and test_folder are both {train_folder!r}; give two folders")
    return Layout((folders[0],), folders[1] if len(folders) == 2 else None)


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
