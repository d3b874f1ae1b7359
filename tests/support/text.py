"""Files of text embeddings for tests: the digits as a text tower could see them."""

import os
from pathlib import Path
from uuid import uuid4

from torch import Tensor

from cl_lightning.models import save_text_embeddings
from support import shared
from support.fakes import normal

DIGITS = [str(digit) for digit in range(10)]


def digit_rows(size: int) -> Tensor:
    """An embedding of each digit, ``(10, size)``, float64, the same at each call; digits n and n + 1 are close."""
    independent = normal(10, size, seed=7)
    return independent + 0.7 * independent.roll(1, dims=0)


def digits_file(size: int) -> str:
    """Path of a file with :func:`digit_rows`; the first process of a session that asks for it writes it."""
    shared.begin()
    path = Path(os.environ[shared.FOLDER]) / f"digits_{size}.npz"
    if not path.exists():
        draft = path.with_suffix(f".{uuid4().hex}")
        save_text_embeddings(draft, digit_rows(size), DIGITS)
        os.replace(draft, path)
    return str(path)
