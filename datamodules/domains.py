"""Image folders by domain and class."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from cl_lightning.data.images import sub_folders, visible_files
from cl_lightning.datamodules.folder import File, ImageFolder
from cl_lightning.stream import DatasetInfo, DomainIncremental, Scenario


class DomainFolder(ImageFolder):
    """Images in ``root/<domain>/<class>/``, or in ``root/train/<domain>/<class>/`` and ``root/test/<domain>/<class>/``.

    By default each domain is a task. Options and layout are as for :class:`ImageFolder`; without a test folder, test
    images are chosen within each class of each domain. A domain may lack some classes.
    """

    levels: ClassVar[int] = 2

    def default_scenario(self, info: DatasetInfo) -> Scenario:
        return DomainIncremental()

    def scan(self, folder: Path, left_out: Counter[str]) -> list[File]:
        names = sub_folders(folder)
        if not names:
            raise ValueError(
                f"{self._name}: {folder} holds no folders; make one for each domain, with a folder for each class in it"
            )
        found = []
        for name in names:
            found += [replace(file, domain=name) for file in super().scan(folder / name, left_out)]
        left_out.update(path.suffix.lower() or "no ending" for path in visible_files(folder))
        return found
