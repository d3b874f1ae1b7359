"""A fixed classifier whose rows are embeddings of the names of the classes."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.checks import above
from cl_lightning.losses import full_precision
from cl_lightning.models.heads import FixedBlock, Head


def _plain(name: str) -> str:
    """A name without upper case, underscores and repeated spaces."""
    return re.sub(r"[\s_]+", " ", name).strip().lower()


def _check(rows: np.ndarray, names: np.ndarray, where: str) -> list[str]:
    """The names without upper case, after checks that each has a row with a direction."""
    fits = rows.ndim in (2, 3) and rows.dtype.kind == "f" and names.dtype.kind == "U" and names.shape == rows.shape[:1]
    if not fits or 0 in rows.shape[1:]:
        raise ValueError(
            f"{where} are {rows.dtype} {rows.shape} with {names.dtype} {names.shape}; they must be floats (N, D), or "
            "(N, templates, D), and strings (N,)"
        )
    if not np.isfinite(rows).all() or not np.abs(rows).max(axis=-1, initial=0).all():
        raise ValueError(f"{where} have a row that is not finite or 0, and has no direction")
    directions = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=-1, keepdims=True)
    if rows.ndim == 3 and np.linalg.norm(directions.mean(axis=1), axis=1).min(initial=1.0) < 1e-6:
        raise ValueError(f"{where} have templates of opposite directions, whose mean is 0 and has no direction")
    plain = [_plain(str(name)) for name in names]
    if repeated := sorted({name for name in plain if plain.count(name) > 1}):
        raise ValueError(f"{where} have several rows for the name {repeated[0]!r}; give one row for each name")
    return plain


def _read(path: str, key: str, names: str) -> tuple[np.ndarray, list[str]]:
    """Embeddings ``(N, D)`` or ``(N, M, D)`` and the name of each row; pickled objects in the file are refused."""
    try:
        with np.load(Path(path), allow_pickle=False) as file:
            keys = sorted(file.files)
            rows, found = (file[name] if name in keys else None for name in (key, names))
    except Exception as error:  # of numpy and zipfile, for a file that is missing or damaged
        raise ValueError(f"TextHead: embeddings {path}: {error}; give an .npz file of numpy.savez") from error
    if rows is None or found is None:
        missing = key if rows is None else names
        raise ValueError(f"TextHead: embeddings {path} has no {missing!r}; it has {', '.join(keys) or 'nothing'}")
    return rows, _check(rows, found, f"TextHead: embeddings {path}: {key} and {names}")


def template_mean(embeddings: Tensor) -> Tensor:
    """Direction of a class from the embeddings of several texts with its name: ``norm(mean_m norm(T_cm))``.

    The ensemble of prompts of CLIP (Radford et al., ICML 2021, arXiv:2103.00020, sec. 3.1.4), in the space of the
    embeddings: the mean of the logits of the templates would be another classifier.

    Args:
        embeddings: T, ``(C, M, D)``.

    Returns:
        ``(C, D)``, rows of norm 1.
    """
    return F.normalize(F.normalize(embeddings, dim=2).mean(dim=1), dim=1)


def save_text_embeddings(
    path: str | Path,
    embeddings: Tensor,
    names: Sequence[str],
    *,
    key: str = "clip_text512",
    names_key: str = "class_names",
) -> None:
    """Write embeddings of class names to a file that :class:`TextHead` reads; ``docs/text_embeddings.md`` shows how.

    Args:
        path: File to write, ``.npz``; an existing file is replaced.
        embeddings: ``(N, D)``, or ``(N, M, D)`` with one embedding for each of M templates.
        names: Name of each class, N different strings, as the data set spells them.
        key, names_key: Keys in the file.

    Raises:
        ValueError: If a row or a name is missing, a row has no direction, or two names are equal.
    """
    rows, strings = embeddings.detach().float().cpu().numpy(), np.array(list(names), dtype=np.str_)
    _check(rows, strings, "save_text_embeddings: embeddings and names")
    with open(path, "wb") as file:
        arrays: dict[str, Any] = {key: rows, names_key: strings}
        np.savez_compressed(file, **arrays)


class TextHead(Head):
    """Cosines to fixed embeddings of the class names: language-guided supervision (LingoCL, arXiv:2403.16124).

        z_c = s cos(P f(x), w_c),   w_c the embedding of the name of class c, of norm 1, frozen

    A file with several embeddings of each name, of texts such as "a photo of a {name}.", gives w_c by
    :func:`template_mean`. A head for any method that does not need a head of its own; nothing in it depends on the
    task. P is a trained linear map if the features have another size than the embeddings, else the identity; the
    features then need both signs (``last_relu=False`` of the ResNets). s is a parameter unless ``learn_scale`` is
    False: with s = 1 the cross-entropy cannot fall below ``log(1 + (C - 1) exp(-1))`` for orthogonal rows, 3.62 for 100
    classes. s is our choice, and so is ``center``: embeddings of text are narrow (the cosines of two names are often
    above 0.6), so that the differences of logits are small; the mean of all rows of the table, also of classes that
    come later, is subtracted before they are normalised. Names are compared without upper case and underscores.

    A method that aligns or scales the rows of the head (``WA``, ``WeightAlignment``) needs a ``LinearHead``.

    Args:
        num_features: Size of a feature vector, d.
        embeddings: Path of an ``.npz`` file with one embedding per class name.
        key: Key of the embeddings in the file, floats ``(N, D)``, or ``(N, M, D)`` for M templates.
        names: Key of the names, strings ``(N,)``.
        scale: Initial s, above 0.
        learn_scale: Whether s is trained.
        center: Whether the mean of the rows of the table is subtracted.

    Raises:
        ValueError: If the scale is not positive, or the file is missing, damaged or of another form.
    """

    needs_names = True

    def __init__(
        self,
        num_features: int,
        *,
        embeddings: str,
        key: str = "clip_text512",
        names: str = "class_names",
        scale: float = 16.0,
        learn_scale: bool = True,
        center: bool = False,
    ) -> None:
        super().__init__(num_features)
        above(self, 0, scale=scale)
        rows, found = _read(embeddings, key, names)
        table = torch.from_numpy(rows.astype(np.float64))
        if table.ndim == 3:
            table = template_mean(table)
        self._table = F.normalize(table - table.mean(dim=0) if center else table, dim=1)
        self._places = {name: place for place, name in enumerate(found)}
        self._origin = embeddings
        size = self._table.shape[1]
        self.projection: nn.Module = nn.Identity()
        if size != num_features:
            self.project()
        self.scale: Tensor
        if learn_scale:
            self.scale = nn.Parameter(torch.tensor(float(scale)))
        else:
            self.register_buffer("scale", torch.tensor(float(scale)))

    @property
    def num_embedding(self) -> int:
        """Size of an embedding."""
        return self._table.shape[1]

    @torch.no_grad()
    def project(self, *, identity: bool = False) -> nn.Linear:
        """Make P a new linear map without bias, also for features of the size of the embeddings; call it before a run.

        Args:
            identity: Whether P is the identity at first, instead of torch's random numbers.

        Raises:
            ValueError: If the identity is asked for and the sizes differ.
        """
        if identity and self.num_embedding != self.num_features:
            raise ValueError(
                f"TextHead: features have {self.num_features} numbers and embeddings {self.num_embedding}, so no "
                "projection of the features is the identity; give embeddings of the space of the features"
            )
        self.projection = linear = nn.Linear(self.num_features, self.num_embedding, bias=False)
        if identity:
            nn.init.eye_(linear.weight)
        return linear

    def new_block(self, num_new: int) -> nn.Module:
        return FixedBlock(self.num_embedding, num_new)

    def fill_names(self, names: Sequence[str]) -> None:
        missing = [name for name in names if _plain(name) not in self._places]
        if missing:
            raise ValueError(
                f"TextHead: embeddings {self._origin} has no row for the class {missing[0]!r} (and {len(missing) - 1} "
                "other classes); give a file with a row for each class name"
            )
        rows = self._table[[self._places[_plain(name)] for name in names]]
        for block, values in zip(self.blocks, torch.split(rows, self.block_sizes()), strict=True):
            weight = block.weight
            assert isinstance(weight, Tensor)
            weight.copy_(values)

    def embed(self, features: Tensor) -> Tensor:
        projected: Tensor = self.projection(features)
        return projected

    def forward(self, features: Tensor) -> Tensor:
        if not self.blocks:
            return features.new_zeros(len(features), 0)
        projected = self.embed(features)
        with torch.autocast(features.device.type, enabled=False):  # cosines near 1 differ by less than bf16 resolves
            directions = F.normalize(full_precision(projected), dim=1)
            return self.scale * F.linear(directions, self.weight().to(directions.dtype))
