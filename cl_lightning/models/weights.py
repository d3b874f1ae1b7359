"""Weight files: where they hold the weights of a network, and how these are copied into it."""

import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cl_lightning.stream import Stream

CLASSIFIERS = ("linear", "fc", "classifier", "head")
"""Names of the classifier in weight files; backbones have none."""
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "state_dict_ema", "model_ema")
_OWN = "network.backbone."
"""Prefix of the backbone of the network that predicts, in a checkpoint of a run."""


def read_weights(path: str, owner: str) -> tuple[dict[str, Tensor], bool]:
    """The state dict in a weight file, and whether the file is a checkpoint of a run of this package.

    Of a checkpoint the first dict under one of the usual keys (``state_dict``, ``model``, ...) is taken. Dicts inside
    it become prefixes of the keys. ``_orig_mod``, which ``torch.compile`` inserts, is removed from keys.

    Args:
        path: File (.pt, .pth, .ckpt, .safetensors). Pickled objects in it are refused.
        owner: Object to name in errors.

    Raises:
        ValueError: If the file cannot be read or holds no tensors.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{owner}: {path} is no file; give the path of a state_dict() saved with torch.save")
    try:
        state = load_file(path) if str(path).endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # unpickling a file that is no pickle raises exceptions of any type
        raise ValueError(
            f"{owner}: the weight file {path} cannot be read ({type(error).__name__}); give the path of a "
            "state_dict() saved with torch.save or safetensors, without other objects"
        ) from error
    own = isinstance(state, dict) and "cl_lightning" in state
    while isinstance(state, dict) and (wrapper := _wrapper(state)) is not None:
        state = state[wrapper]
    tensors = dict(_flat(state)) if isinstance(state, Mapping) else {}
    if not tensors:
        raise ValueError(f"{owner}: {path} holds no state dict of tensors; save a state_dict() with torch.save")
    return tensors, own


def _wrapper(state: Mapping[Any, Any]) -> str | None:
    return next((key for key in _WRAPPERS if isinstance(state.get(key), dict)), None)


def _flat(state: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            found.append((".".join(part for part in name.split(".") if part != "_orig_mod"), value))
        elif isinstance(value, Mapping):
            found += _flat(value, f"{name}.")
    return found


def read_classifier(path: str, num_features: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the classifier in a weight file; backbones ignore these keys.

    The classifier is called ``linear``, ``fc``, ``classifier`` or ``head`` in the file, possibly with a prefix. A head
    in blocks, as in a checkpoint of a run, is joined, and its rows are put into the order of the raw labels.

    Args:
        path: Weight file, as for :func:`load_weights`.
        num_features: Number of features of the backbone, d.

    Returns:
        Weight ``(classes, d)`` and bias ``(classes,)``, or None if it has no bias. Rows of labels that a run has not
        learnt are not a number.

    Raises:
        ValueError: If the file has no classifier, or a classifier for another number of features.
    """
    owner = "source_head"
    state, own = read_weights(path, owner)
    found = [
        key
        for key, weight in state.items()
        if weight.ndim == 2 and key.endswith(".weight") and set(key.split(".")[:-1]) & set(CLASSIFIERS)
    ]
    if not found:
        raise ValueError(
            f"{owner}: {path} has no classifier ({', '.join(CLASSIFIERS)}), only {_some(list(state))}; give a file "
            "that includes the classifier"
        )
    key = next((key for key in found if key.startswith("network.head.")), found[0])
    if state[key].shape[1] != num_features:
        raise ValueError(
            f"{owner}: {path}: {key} takes {state[key].shape[1]} features, the backbone gives {num_features}; "
            "give the weight file of this backbone"
        )
    keys = [key]
    if (block := re.fullmatch(r"(.*\.blocks\.)0\.weight", key)) is not None:
        count = sum(re.fullmatch(rf"{re.escape(block[1])}\d+\.weight", other) is not None for other in state)
        keys = [f"{block[1]}{number}.weight" for number in range(count)]
    biases = [state.get(key.removesuffix("weight") + "bias") for key in keys]
    weight = torch.cat([state[key] for key in keys])
    bias = None if any(bias is None for bias in biases) else torch.cat([b for b in biases if b is not None])
    labels = _labels_of_rows(path)[: len(weight)] if own else []
    if not labels:
        return weight, bias
    return _by_label(weight, labels), None if bias is None else _by_label(bias, labels)


def _labels_of_rows(path: str) -> list[int]:
    """Raw labels of a run's classes in the order of their arrival, in which the rows of its head stand."""
    part = torch.load(path, "cpu", weights_only=True)["cl_lightning"]
    if not isinstance(text := part.get("manifest"), str):
        return []
    stream = Stream.from_dict(json.loads(text), f"source_head: {path}: manifest")
    return [label for task in stream.tasks for label in task.new_classes]


def _by_label(rows: Tensor, labels: list[int]) -> Tensor:
    result = rows.new_full((max(labels) + 1, *rows.shape[1:]), torch.nan)
    result[labels] = rows
    return result


def load_weights(
    module: nn.Module,
    path: str,
    *,
    owner: str,
    left_out: Sequence[str],
    renamed: Mapping[str, str] | None = None,
    first_convs: Sequence[str] = (),
) -> None:
    """Copy the weights of a file into a module.

    The weights may lie under any prefix (``model.``, ``encoder.``, ``backbone.``, ``module.``): the one under which all
    keys of the module are found. In a checkpoint of a run it is the backbone of the network that predicts. Keys outside
    the prefix are left out with a warning, apart from classifiers. Weights of a first convolution for RGB images are
    adapted to another number of channels as timm does: summed for one channel, else repeated and scaled.

    Args:
        module: Network to load.
        path: Weight file, see :func:`read_weights`.
        owner: Object to name in errors.
        left_out: Submodules in the file that are ignored: the classifier.
        renamed: Parts of keys that have another name in the module.
        first_convs: Names of the convolutions that take the image.

    Raises:
        ValueError: If keys or shapes do not match, or weights of the network lie under several prefixes.
    """
    state, is_own = read_weights(path, owner)
    state = {
        ".".join((renamed or {}).get(part, part) for part in key.split(".")): value for key, value in state.items()
    }
    own = module.state_dict()
    prefix = _prefix_of(state, own, is_own, f"{owner}: {path}")
    file = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    file = {key: value for key, value in file.items() if not key.startswith(tuple(f"{name}." for name in left_out))}
    for key in (f"{name}.weight" for name in first_convs):
        if key in file and key in own:
            file[key] = _adapted(file[key], own[key])
    missing = [key for key in own if key not in file and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in file if key not in own]
    both = [key for key in file if key in own and file[key].shape != own[key].shape]
    shapes = [f"{key} {tuple(file[key].shape)} for {tuple(own[key].shape)}" for key in both]
    if missing or unexpected or shapes:
        where = f" (keys with {prefix!r})" if prefix else ""
        raise ValueError(
            f"{owner}: {path}{where} does not match this network: missing {_some(missing)}; unexpected "
            f"{_some(unexpected)}; of another shape {_some(shapes)}; give weights of the same architecture, or change "
            "the options to match"
        )
    others = [key for key in state if not key.startswith(prefix) and not set(key.split(".")) & set(CLASSIFIERS)]
    if others and not is_own:
        warnings.warn(
            f"{owner}: {path}: the weights with {prefix!r} are read, others left out: {_some(others)}", stacklevel=4
        )
    module.load_state_dict(file, strict=False)


def _prefix_of(state: Mapping[str, Tensor], own: Mapping[str, Tensor], is_own: bool, where: str) -> str:
    """Prefix under which a state dict has the keys of a module; the nearest one if none has all of them."""
    needed = {key for key in own if not key.endswith("num_batches_tracked")}
    counts = Counter[str]()
    for key in state:
        parts = key.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in needed:
                counts[".".join(parts[:start]) + "." if start else ""] += 1
    whole = [prefix for prefix, count in counts.items() if count == len(needed)]
    if is_own:
        whole = [prefix for prefix in whole if prefix.startswith(_OWN)] or whole
    if not whole:
        return min(counts, key=lambda prefix: (-counts[prefix], len(prefix)), default="")
    if "" in whole or len(whole) == 1:
        return "" if "" in whole else whole[0]
    first, *others = sorted(whole, key=len)
    if any(not torch.equal(state[first + key], state[other + key]) for other in others for key in needed):
        raise ValueError(
            f"{where} has weights of this network under {', '.join(map(repr, [first, *others]))}; save the keys of one "
            "of them in a file of their own"
        )
    return first


def _adapted(weight: Tensor, own: Tensor) -> Tensor:
    """Weight of a convolution for RGB images, for another number of channels; as it is if only others differ."""
    alike = weight.ndim == own.ndim == 4 and weight.shape[0] == own.shape[0] and weight.shape[2:] == own.shape[2:]
    if not alike or weight.shape[1] != 3 or own.shape[1] == 3:
        return weight
    from timm.models import adapt_input_conv  # the import takes about 1 s

    adapted: Tensor = adapt_input_conv(own.shape[1], weight)
    return adapted


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "") or "none"
