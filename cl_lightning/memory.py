"""Replay memory: samples of the past, kept by a policy, the same on every process.

A sample gets a key when it is added and keeps it. A policy turns keys, classes and tasks into priorities, and a full
memory holds the ``size`` samples of the highest priority. So a memory shrinks by a cut, a step is a few operations on
whole tensors, and no generator has a state to save.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_lightning.batch import Batch, Draw
from cl_lightning.distributed import all_gather_rows, all_gather_together, world_size

Group = Literal["class", "task", "both"]

_KEYS, _SAMPLE, _ORDER = 101, 102, 103  # salts that keep the draws of one step apart
_OWN = ("images", "labels", "tasks", "keys")
_SCALARS = ("num_seen", "size")


def check_replay(owner: str, visible: str, replay_size: int | None = None) -> None:
    """Tell of options with which samples of earlier tasks cannot be replayed.

    Args:
        owner: Names the strategy in errors.
        visible: Logits that its classification loss sees.
        replay_size: Samples drawn at a time; None for the default.

    Raises:
        ValueError: If ``visible`` is "current", or fewer than one sample is drawn.
    """
    if visible == "current":
        raise ValueError(
            f"{owner}: visible is 'current', but samples of earlier tasks are replayed; use 'all' or 'task'"
        )
    if replay_size is not None and replay_size < 1:
        raise ValueError(f"{owner}: replay_size is {replay_size}; it must be at least 1, or null for the default")


class Policy(ABC):
    """Which samples a full memory keeps."""

    def keys(self, count: int, seen: int, draw: Draw) -> Tensor:
        """Keys of ``count`` new samples that follow ``seen`` others, int64 on the CPU: uniform random numbers."""
        return Draw.of(count, draw.key, _KEYS).randint((1 << 63) - 1)  # of 63 bits, so that ties do not occur

    @abstractmethod
    def priority(self, keys: Tensor, labels: Tensor, tasks: Tensor) -> Tensor:
        """Priority of each of n samples, int64 ``(n,)`` without ties; the highest are kept."""


class Reservoir(Policy):
    """Every sample of the stream is held with equal probability, whatever its class.

    The samples with the largest of independent uniform keys are a uniform subset without replacement (Efraimidis &
    Spirakis 2006, with equal weights). In law this is algorithm R (Vitter 1985): the n-th sample has one of the M
    largest keys with probability M / n, and the one it drives out, the smallest held key, is any of the held ones with
    equal probability. A stream of N samples leaves each of them in memory with probability M / N. Feed each sample
    once: what is added in every epoch counts as new samples.
    """

    def priority(self, keys: Tensor, labels: Tensor, tasks: Tensor) -> Tensor:
        return keys


class ClassBalanced(Policy):
    """Equal numbers of every class, and within a class every sample with equal probability.

    Candidates are ordered by (place within the class by decreasing key, key), and the first ``size`` stay: classes are
    filled level by level, so that counts differ by at most one among classes that delivered enough. What is held
    depends only on the set of (key, class) seen so far, not on its order or on the batch size.
    Departs from GDumb's greedy rule (Prabhu et al., ECCV 2020), which never replaces a sample by one of the same class
    while the number of classes stands, and so prefers the early samples of each class.

    Args:
        by: What is balanced: classes, tasks, or classes within tasks (for domain-incremental streams).
    """

    def __init__(self, by: Group = "class") -> None:
        if by not in ("class", "task", "both"):
            raise ValueError(f"{type(self).__name__}: by={by!r}; allowed are 'class', 'task' and 'both'")
        self.by = by

    def priority(self, keys: Tensor, labels: Tensor, tasks: Tensor) -> Tensor:
        level, place = standing(keys, grouped(labels, tasks, self.by))
        return -(level * keys.shape[0] + place)


class Ring(ClassBalanced):
    """The latest samples of each class (or task), first in first out; counts are balanced as in ``ClassBalanced``."""

    def keys(self, count: int, seen: int, draw: Draw) -> Tensor:
        return torch.arange(seen, seen + count)


class Herding(ClassBalanced):
    """The first samples of each class (or task): add lists in order of choice, as ``herd`` returns them.

    When a new class arrives, the lists of the others lose their ends (iCaRL, Rebuffi et al., CVPR 2017, alg. 5).
    Departs from iCaRL: the remainder of ``size`` over the number of classes is used too, one sample more for the
    classes that came first; ``reduce_per_class(size // num_classes)`` gives the paper's quota.
    """

    def keys(self, count: int, seen: int, draw: Draw) -> Tensor:
        return -torch.arange(seen, seen + count)


def grouped(labels: Tensor, tasks: Tensor, by: Group) -> Tensor:
    """A number for the group of each row, int64 ``(n,)``: its class, its task, or the two together."""
    return {"class": labels, "task": tasks, "both": (tasks << 32) + labels}[by]


def standing(keys: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Place of each row in its group, and among all rows, by decreasing key from 0; int64 ``(n,)`` each."""
    count = torch.arange(keys.shape[0], device=keys.device)
    by_key = keys.argsort(descending=True, stable=True)
    order = by_key[groups[by_key].argsort(stable=True)]
    ordered = groups[order]
    starts = F.pad(ordered[1:] != ordered[:-1], (1, 0), value=True)[: keys.shape[0]]
    level = count - torch.where(starts, count, 0).cummax(0).values
    return torch.empty_like(count).index_copy_(0, order, level), torch.empty_like(count).index_copy_(0, by_key, count)


class Memory(nn.Module):
    """At most ``size`` samples of the stream, the same on every process.

    The tensors are part of ``state_dict``, which holds only what is held, and of a move to another device, where they
    keep their dtype. They are not registered as buffers, since DistributedDataParallel would broadcast the whole
    memory before every forward pass. Room for ``size`` samples is made by the first ``add``.

    Args:
        size: Most samples to hold, over all processes; 0 switches the memory off. Loading a state restores its size.
        policy: Which samples a full memory keeps; ``Reservoir()`` if not given.
        device: "module": the samples lie where the module lies. "cpu": they stay in host memory, and what is sampled
            is moved to the module's device.

    Attributes:
        images: Raw images, uint8 ``(held, C, H, W)``; ``(0,)``, as torch.cat accepts, before the first add.
        labels: Column of each sample's class, int64 ``(held,)``.
        tasks: Index of each sample's task, int64 ``(held,)``.
        keys: Key of each sample, int64 ``(held,)``; within a class, those of larger keys are kept longer.
        num_seen: Samples offered so far, int64 scalar, always on the CPU.
    """

    def __init__(self, size: int, policy: Policy | None = None, device: Literal["module", "cpu"] = "module") -> None:
        super().__init__()
        if policy is not None and not isinstance(policy, Policy):
            raise ValueError(
                f"Memory: policy {policy!r} is unknown; give Reservoir(), ClassBalanced(), ... or your Policy"
            )
        if device not in ("module", "cpu"):
            raise ValueError(f"Memory: device {device!r}; allowed are 'module' and 'cpu'")
        self.size = _checked_size(size)
        self.policy = policy or Reservoir()
        self.on_host = device == "cpu"
        self.num_seen = torch.zeros((), dtype=torch.int64)
        self._held = 0
        self._store: dict[str, Tensor] = {}  # each (size, ...), of which the first _held rows are in use
        self._anchor = torch.empty(0)  # lies where the module lies

    def __len__(self) -> int:
        return self._held

    @property
    def images(self) -> Tensor:
        return self._rows("images", torch.uint8)

    @property
    def labels(self) -> Tensor:
        return self._rows("labels")

    @property
    def tasks(self) -> Tensor:
        return self._rows("tasks")

    @property
    def keys(self) -> Tensor:
        return self._rows("keys")

    @property
    def fields(self) -> dict[str, Tensor]:
        """What further was added, by name, ``(held, ...)`` each."""
        return {name: value[: self._held] for name, value in self._store.items() if name not in _OWN}

    def num_bytes(self) -> int:
        """Bytes of all that is kept of the held samples."""
        return sum(value[: self._held].nbytes for value in self._store.values())

    def counts(self, num_classes: int = 0) -> Tensor:
        """Held samples of each class, int64 ``(max(num_classes, largest label + 1),)``."""
        return torch.bincount(self.labels[self.labels >= 0], minlength=num_classes)

    def rows_of(self, label: int) -> Tensor:
        """Rows of a class, by decreasing key: a herded list in order of choice."""
        rows = (self.labels == label).nonzero().flatten()
        return rows[self.keys[rows].argsort(descending=True)]

    @torch.no_grad()
    def add(
        self, images: Tensor, labels: Tensor, tasks: Tensor, draw: Draw, *, gathered: bool = False, **fields: Tensor
    ) -> None:
        """Offer samples to the memory. Every process calls this, since rows are exchanged.

        One process with ``device="module"`` does not wait for its GPU.

        Args:
            images: Neither augmented nor normalised, uint8 ``(n, C, H, W)``: this process's rows of the global batch.
            labels: Columns, int64 ``(n,)``.
            tasks: Task indices, int64 ``(n,)``.
            draw: Random numbers of the step; only its key is used.
            gathered: Whether the rows are already those of all processes, and so the same everywhere.
            fields: Further tensors of n rows to keep, the same names with every call. A 2-d floating field may grow in
                width with the number of classes; see ``valid_columns``.

        Raises:
            ValueError: Names, types or shapes differ from what is held.
        """
        if self.size == 0:
            return
        rows = {"images": images, "labels": labels, "tasks": tasks, **fields}
        self._check(rows)
        if not gathered:
            mine = (value.to(self._anchor.device) for value in rows.values())
            rows = dict(zip(rows, all_gather_together(mine), strict=True))
        count = rows["images"].shape[0]
        rows["keys"] = self.policy.keys(count, int(self.num_seen), draw)
        self.num_seen += count
        self._insert({name: self._fitted(name, value.detach()) for name, value in rows.items()})

    def replace(
        self, images: Tensor, labels: Tensor, tasks: Tensor, draw: Draw, *, gathered: bool = False, **fields: Tensor
    ) -> None:
        """As ``add``, after all held samples of the classes in ``labels`` are dropped. For the end of a task."""
        dropped = labels if gathered else all_gather_rows(labels.to(self._anchor.device))
        self.keep((~torch.isin(self.labels, dropped.to(self.labels.device))).nonzero().flatten())
        self.add(images, labels, tasks, draw, gathered=gathered, **fields)

    def pick(
        self, count: int, draw: Draw, *, classes: Iterable[int] | None = None, tasks: Iterable[int] | None = None
    ) -> tuple[Tensor, Draw]:
        """Rows of a uniform sample without replacement, and the draw that goes with them; see ``sample``."""
        pool: Tensor | None = None
        if classes is not None or tasks is not None:  # on a GPU the number of rows that pass has to be waited for
            passed = torch.ones_like(self.labels, dtype=torch.bool)
            for values, allowed in ((self.labels, classes), (self.tasks, tasks)):
                if allowed is not None:
                    passed &= torch.isin(values, values.new_tensor(list(allowed)))
            pool = passed.nonzero().flatten()
        available = self._held if pool is None else pool.shape[0]
        share = draw.share(min(count, available), _SAMPLE)
        order = torch.randperm(available, generator=share.fork(_ORDER).generator())
        rows = _moved(order[: share.total][share.start : share.stop], self.labels.device)
        return rows if pool is None else pool[rows], share

    def sample(
        self, count: int, draw: Draw, *, classes: Iterable[int] | None = None, tasks: Iterable[int] | None = None
    ) -> Batch:
        """Distinct samples, every set of them with equal probability, the same for any number of processes.

        A draw always gives the same samples; two samples of one step need ``draw.fork(...)``.

        Args:
            count: Samples over all processes; fewer where the memory holds fewer.
            draw: Random numbers of the step; says this process's share too.
            classes: Columns to draw from; all if not given.
            tasks: Tasks to draw from; all if not given.

        Returns:
            This process's share on the module's device, with the further fields in ``extra``, -1 as ``indices``, and
            a draw of its own for the augmentation.
        """
        rows, share = self.pick(count, draw, classes=classes, tasks=tasks)
        device = self._anchor.device
        images, labels, ids = (_moved(value, device) for value in self.gather(rows))
        return Batch(
            images=images,
            labels=labels,
            tasks=ids,
            indices=torch.full_like(labels, -1),
            raw=images,
            draw=share,
            extra={name: _moved(value[rows], device) for name, value in self.fields.items()},
            weight=(share.stop - share.start) * world_size() / share.total if share.total else 1.0,
        )

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and tasks of the given rows, where the memory lies."""
        return self.images[rows], self.labels[rows], self.tasks[rows]

    @torch.no_grad()
    def keep(self, rows: Tensor) -> None:
        """Drop all but the given rows, which are held in the given order."""
        for value in self._store.values():
            value[: rows.shape[0]] = value[rows]
        self._held = rows.shape[0]

    def reduce_per_class(self, quota: int, *, by: Group = "class") -> None:
        """Keep at most ``quota`` samples of each class: the first of a herded list, a random subset of a reservoir.

        Args:
            quota: At least 0.
            by: Of each ``class``, ``task``, or class within a task (``both``).
        """
        level, _ = standing(self.keys, grouped(self.labels, self.tasks, by))
        self.keep((level < quota).nonzero().flatten())

    def resize(self, size: int) -> None:
        """Change the size. What no longer fits goes by the policy: a cut reservoir is a reservoir of that size.

        A memory that grows holds what it held; samples that were dropped before do not come back, so that a grown
        reservoir prefers later ones.
        """
        self.size = _checked_size(size)
        if size < self._held:
            priority = self.policy.priority(self.keys, self.labels, self.tasks)
            self.keep(priority.topk(size).indices.sort().values)
        self._store = {name: self._with_room(value[: self._held]) for name, value in self._store.items()}

    def extra_repr(self) -> str:
        return f"size={self.size}, held={self._held}, policy={type(self.policy).__name__}"

    def _rows(self, name: str, dtype: torch.dtype = torch.int64) -> Tensor:
        stored = self._store.get(name)
        return torch.empty(0, dtype=dtype, device=self._place) if stored is None else stored[: self._held]

    @property
    def _place(self) -> torch.device:
        return torch.device("cpu") if self.on_host else self._anchor.device

    def _check(self, rows: dict[str, Tensor]) -> None:
        images, kept = rows["images"], set(self._store) - {"keys"}
        if images.dtype != torch.uint8:
            raise ValueError(f"Memory.add: images are {images.dtype}; give raw uint8 images, not augmented ones")
        if wrong := {"keys", *_SCALARS} & set(rows):
            raise ValueError(f"Memory.add: fields named {sorted(wrong)}; the memory has its own, give other names")
        if kept and kept != set(rows):
            raise ValueError(f"Memory.add: {sorted(rows)} given, {sorted(kept)} kept; add the same fields every time")
        for name, value in rows.items():
            shape, stored = value.shape[1:], self._store.get(name)
            if value.shape[:1] != images.shape[:1] or (name in ("labels", "tasks") and shape):
                shapes = f"{name} {tuple(value.shape)}, images {tuple(images.shape)}"
                raise ValueError(f"Memory.add: shapes are {shapes}; give one row for each image")
            if stored is not None and shape != stored.shape[1:] and not _may_grow(value, stored):
                shapes = f"{tuple(shape)} given, {tuple(stored.shape[1:])} held"
                raise ValueError(f"Memory.add: shapes of one sample's {name}: {shapes}; use one memory for each shape")

    def _fitted(self, name: str, value: Tensor) -> Tensor:
        """New rows in the place, dtype and width of the stored ones, for which room is made where it lacks."""
        value = _moved(value, self._place)
        if name not in self._store:
            self._store[name] = self._with_room(value[:0])
        stored = self._store[name]
        if value.shape[1:] != stored.shape[1:]:
            width = max(value.shape[1], stored.shape[1])
            value, stored = (F.pad(rows, (0, width - rows.shape[1]), value=float("nan")) for rows in (value, stored))
            self._store[name] = stored
        return value.to(stored.dtype)

    def _insert(self, rows: dict[str, Tensor]) -> None:
        """Let new rows take the free room, then the place of held rows of lower priority. Shapes are known ahead."""
        total = rows["keys"].shape[0]
        free = min(self.size - self._held, total)
        for name, value in rows.items():
            self._store[name][self._held : self._held + free] = value[:free]
        self._held += free
        if free == total:
            return
        held, rows = self._held, {name: value[free:] for name, value in rows.items()}
        keys, labels, tasks = (torch.cat([self._store[name], rows[name]]) for name in ("keys", "labels", "tasks"))
        priority = self.policy.priority(keys, labels, tasks)
        old, new = priority[:held], priority[held:]
        slots = old.topk(min(held, total - free), largest=False).indices  # the worst held row faces the best new one,
        entry = new.topk(slots.shape[0]).indices  # and so on: the winners are those of the joint order
        wins = new[entry] > old[slots]
        if wins.device.type == "cpu":  # on a GPU the number of winners would have to be waited for
            picked = wins.nonzero().squeeze(1)
            if len(picked):  # in a long stream few come in
                slots, entry = slots[picked], entry[picked]
                for name, value in rows.items():
                    self._store[name][slots] = value[entry]
            return
        for name, value in rows.items():
            stored = self._store[name]
            mask = wins.view(-1, *(1 for _ in value.shape[1:]))
            stored.index_copy_(0, slots, torch.where(mask, value[entry], stored[slots]))

    def _with_room(self, rows: Tensor) -> Tensor:
        """Copy of held rows with room for ``size``."""
        room = torch.empty((self.size, *rows.shape[1:]), dtype=rows.dtype, device=self._place)
        room[: rows.shape[0]] = rows
        return room

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._anchor = fn(self._anchor)
        self._store = {name: value.to(self._place) for name, value in self._store.items()}
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "num_seen"] = self.num_seen.clone()
        destination[prefix + "size"] = torch.tensor(self.size)
        for name, value in self._store.items():  # a view would be saved with all the room behind it
            destination[prefix + name] = value if self._held == self.size else value[: self._held].clone()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take any size, shapes and fields from the state."""
        state = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        needed = _SCALARS + (_OWN if set(state) - set(_SCALARS) else ())
        if absent := [prefix + name for name in needed if name not in state]:
            missing_keys += absent
            return
        size, seen = int(state.pop("size")), int(state.pop("num_seen"))
        lengths = {name: value.shape[0] for name, value in state.items()}
        if any(length != lengths["keys"] or length > size for length in lengths.values()):
            error_msgs.append(f"Memory: the state has rows {lengths} and size {size}; it is damaged")
            return
        self.size, self.num_seen, self._held = size, torch.tensor(seen), lengths.get("keys", 0)
        self._store = {name: self._with_room(value) for name, value in state.items()}


def herding(features: Tensor, count: int, *, normalize: bool = True, normalize_mean: bool = False) -> Tensor:
    """Rows whose running mean stays nearest to the mean of all (iCaRL, Rebuffi et al., CVPR 2017, alg. 4).

    With S the sum of the rows chosen before, the k-th choice is

        argmin_i || mu - (S + phi_i) / k ||  =  argmin_i  ||phi_i||^2 + 2 <S, phi_i> - 2 k <mu, phi_i>,

    since k^2 times the square differs from the right side by terms without i. Each choice costs one product of the
    feature matrix with a vector. The first m choices are those of ``herding(features, m)``.

    Args:
        features: Of one class, ``(n, d)``; computed in float64.
        count: Rows to choose, all where there are fewer.
        normalize: Whether rows are brought to unit length first.
        normalize_mean: Whether their mean is brought to unit length too.

    Returns:
        Distinct rows in order of choice, int64 ``(min(count, n),)``.
    """
    phi = features.detach().double()
    phi = F.normalize(phi, dim=1) if normalize else phi
    mu = phi.mean(0)
    mu = F.normalize(mu, dim=0) if normalize_mean else mu
    square, towards, beside = phi.square().sum(1), phi @ mu, torch.zeros_like(phi[:, 0])  # (n,); beside is <S, phi_i>
    chosen = []
    for k in range(1, min(count, phi.shape[0]) + 1):
        row = (square + 2 * beside - 2 * k * towards).argmin(0, keepdim=True)  # stays a tensor: no wait for a GPU
        chosen.append(row)
        beside += phi @ phi.index_select(0, row)[0]
        square.index_fill_(0, row, float("inf"))  # each row once
    return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64, device=phi.device)


def herd(features: Tensor, labels: Tensor, quota: int, **options: bool) -> Tensor:
    """``herding`` of each class: rows class by class, each list in order of choice, for a memory with ``Herding()``.

    Args:
        features: ``(n, d)``.
        labels: ``(n,)``.
        quota: Rows to choose of each class.
        options: As for ``herding``.
    """
    members = [(labels == label).nonzero().flatten() for label in torch.bincount(labels).nonzero()]
    return torch.cat([labels.new_empty(0), *(rows[herding(features[rows], quota, **options)] for rows in members)])


def valid_columns(values: Tensor) -> Tensor:
    """Which entries of a field were added, bool: rows from before it grew are padded with nan on the right."""
    return ~values.isnan()


def _may_grow(value: Tensor, stored: Tensor) -> bool:
    return value.dim() == stored.dim() == 2 and value.is_floating_point() and stored.is_floating_point()


def _moved(value: Tensor, device: torch.device) -> Tensor:
    """On the device; towards a GPU without waiting for it."""
    return value.to(device, non_blocking=device.type == "cuda")


def _checked_size(size: int) -> int:
    if size < 0:
        raise ValueError(f"Memory: size {size}; give the number of samples to hold, or 0 for no memory")
    return size
