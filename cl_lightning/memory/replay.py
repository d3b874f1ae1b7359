"""Replay memory: samples of earlier batches and tasks, chosen by a policy, the same on every process.

A sample gets a key when it is added and keeps it. A policy computes priorities from keys, classes and tasks, and a full
memory holds the ``size`` samples of the highest priority. Hence a smaller memory is a subset of a larger one, a step is
a few operations on whole tensors, and there is no generator whose state must be saved.
"""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_lightning.batch import Batch, Draw
from cl_lightning.checks import one_of
from cl_lightning.distributed import all_gather_rows, all_gather_together, world_size
from cl_lightning.memory.policies import Group, Policy, Reservoir, group_ids, rank_in_group

_SAMPLE, _ORDER = 102, 103  # salts that keep the draws of one step apart
_OWN = ("images", "labels", "tasks", "keys")
_SCALARS = ("num_seen", "size")
_RAW = (torch.uint8, torch.float32, torch.int64)  # of images of 8 bits, other numbers, tokens


class Memory(nn.Module):
    """Replay memory of at most ``size`` samples of the stream, the same on every process.

    The tensors are part of ``state_dict``, without the unused room, and move to another device with the module; they
    keep their dtype. They are not registered as buffers, since DistributedDataParallel would broadcast the whole memory
    before every forward pass. The first ``add`` allocates room for ``size`` samples.

    Labels in a memory are columns of the logits, as in a ``Batch``. The raw labels of the data set end in the loaders
    of the data module, which map them to columns.

    Args:
        size: Maximum number of samples, over all processes, at least 0; 0 disables the memory. Loading a state restores
            its size.
        policy: Selection of the samples that a full memory keeps; None for ``Reservoir()``.
        device: "module": samples are on the device of the module. "cpu": they stay in host memory, and a sampled batch
            is moved to the device of the module.

    Attributes:
        images: Raw samples, ``(held, *shape)``, in the dtype of the first that was added: images uint8, others float32
            or int64; ``(0,)``, as torch.cat accepts, before the first add. A subclass may set a ``dtype``.
        labels: Column of each sample's class, int64 ``(held,)``.
        tasks: Index of each sample's task, int64 ``(held,)``.
        keys: Key of each sample, int64 ``(held,)``; within a class, samples of larger keys are kept longer.
        num_seen: Number of samples added so far, the dropped ones included; int64 scalar, always on the CPU.

    Raises:
        ValueError: If an option is outside its range.
    """

    kept_as: ClassVar[str] = "exemplars"
    dtype: ClassVar[torch.dtype | None] = None

    def __init__(self, size: int, policy: Policy | None = None, device: Literal["module", "cpu"] = "module") -> None:
        super().__init__()
        if policy is not None and not isinstance(policy, Policy):
            raise ValueError(
                f"Memory: policy is {policy!r}; give Reservoir(), ClassBalanced(), ... or another instance of Policy"
            )
        one_of(self, ("module", "cpu"), device=device)
        self.size = _checked_size(size)
        self.policy = policy or Reservoir()
        self.on_host = device == "cpu"
        self.num_seen = torch.zeros((), dtype=torch.int64)
        self._held = 0
        self._store: dict[str, Tensor] = {}  # each (size, ...); the first _held rows are in use
        self._anchor = torch.empty(0)  # moves with the module

    def __len__(self) -> int:
        return self._held

    @property
    def images(self) -> Tensor:
        return self._rows("images", self.dtype or torch.uint8)

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
        """Further tensors given to :meth:`add`, by name, ``(held, ...)`` each."""
        return {name: value[: self._held] for name, value in self._store.items() if name not in _OWN}

    def num_bytes(self) -> int:
        """Size of the held samples in bytes, with labels, keys and further fields."""
        return sum(value[: self._held].nbytes for value in self._store.values())

    def counts(self, num_classes: int = 0) -> Tensor:
        """Number of held samples of each class, int64 ``(max(num_classes, largest label + 1),)``."""
        return torch.bincount(self.labels[self.labels >= 0], minlength=num_classes)

    def rows_of(self, label: int) -> Tensor:
        """Rows of a class by decreasing key, int64 ``(n,)``: herded exemplars in order of choice."""
        rows = (self.labels == label).nonzero().flatten()
        return rows[self.keys[rows].argsort(descending=True)]

    @torch.no_grad()
    def add(
        self, images: Tensor, labels: Tensor, tasks: Tensor, draw: Draw, *, gathered: bool = False, **fields: Tensor
    ) -> None:
        """Add samples; if the memory is full, the policy selects which samples stay.

        Every process must call this, since rows are exchanged. A single process with ``device="module"`` does not
        synchronise with its GPU.

        Args:
            images: Raw samples, neither augmented nor normalised, such as uint8 ``(n, C, H, W)``: this process's rows
                of the global batch.
            labels: Columns, int64 ``(n,)``.
            tasks: Task indices, int64 ``(n,)``.
            draw: Random numbers of the step; only its key is used.
            gathered: Whether the rows are already gathered from all processes, and so the same everywhere.
            fields: Further tensors of n rows to keep, with the same names in every call. A floating-point field ``(n,
                columns)`` may grow in width with the number of classes; see :func:`valid_columns`.

        Raises:
            ValueError: If names, dtypes or shapes differ from the held ones, or images are normalised.
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
        """Drop all held samples of the classes in ``labels``, then :meth:`add`; for the end of a task."""
        dropped = labels if gathered else all_gather_rows(labels.to(self._anchor.device))
        self.keep((~torch.isin(self.labels, dropped.to(self.labels.device))).nonzero().flatten())
        self.add(images, labels, tasks, draw, gathered=gathered, **fields)

    def pick(
        self, count: int, draw: Draw, *, classes: Iterable[int] | None = None, tasks: Iterable[int] | None = None
    ) -> tuple[Tensor, Draw]:
        """Rows of a uniform sample without replacement, and their draw; arguments as in :meth:`sample`.

        Returns:
            This process's share of the rows, int64 ``(n,)`` on the device of the samples, and the draw of all rows.
        """
        pool: Tensor | None = None
        if classes is not None or tasks is not None:  # on a GPU, counting the rows that pass synchronises
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
        """Sample without replacement, every subset with equal probability; the same for any number of processes.

        The same draw gives the same samples: call ``draw.fork(...)`` for a second sample in one step. With 2 processes
        and ``count=64``, each process gets 32 rows.

        Args:
            count: Number of samples over all processes; all samples if the memory holds fewer.
            draw: Random numbers of the step, and this process's share of its rows.
            classes: Columns to sample from; None for all.
            tasks: Task indices to sample from; None for all.

        Returns:
            This process's share on the device of the module: ``labels`` are columns, ``indices`` are -1, ``extra`` has
            the further fields, and ``draw`` is a new one for the augmentation.
        """
        return self.at(*self.pick(count, draw, classes=classes, tasks=tasks))

    def at(self, rows: Tensor, share: Draw) -> Batch:
        """Batch of the samples in the given rows, as :meth:`sample` returns it.

        Args:
            rows: This process's share of the rows, int64 ``(n,)`` on the device of the samples.
            share: Draw of the rows of all processes.
        """
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
        """Images, labels and tasks of the given rows, on the device of the samples."""
        return self.images[rows], self.labels[rows], self.tasks[rows]

    @torch.no_grad()
    def keep(self, rows: Tensor) -> None:
        """Keep only the given rows, in the given order.

        Args:
            rows: Distinct rows, int64 ``(n,)``.
        """
        for value in self._store.values():
            value[: rows.shape[0]] = value[rows]
        self._held = rows.shape[0]

    def reduce_per_class(self, quota: int, *, by: Group = "class") -> None:
        """Keep at most ``quota`` samples of each class: the first herded exemplars, or a random subset of a reservoir.

        Args:
            quota: Number of samples, at least 0.
            by: Groups to which the quota applies: ``class``, ``task``, or ``both``, classes within tasks.
        """
        level, _ = rank_in_group(self.keys, group_ids(self.labels, self.tasks, by))
        self.keep((level < quota).nonzero().flatten())

    def resize(self, size: int) -> None:
        """Change the size; a smaller memory keeps the samples that the policy selects.

        A reservoir reduced to M samples is a reservoir of size M. A larger memory keeps its samples but does not
        recover dropped ones, so an enlarged reservoir prefers later samples.

        Args:
            size: New maximum number of samples, at least 0.
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
        held = self._store.get("images")
        needed = self.dtype or (images.dtype if held is None else held.dtype)
        if images.dtype != needed or (needed not in _RAW and self.dtype is None):
            name = str(needed if needed in _RAW else _RAW[0]).removeprefix("torch.")
            raise ValueError(f"Memory.add: images are {images.dtype}; give raw {name} images, not augmented ones")
        if wrong := {"keys", *_SCALARS} & set(rows):
            raise ValueError(f"Memory.add: fields are named {sorted(wrong)}, which the memory uses itself; use others")
        if kept and kept != set(rows):
            raise ValueError(
                f"Memory.add: fields are {sorted(rows)}, the memory holds {sorted(kept)}; give the same in every call"
            )
        for name, value in rows.items():
            shape, stored = value.shape[1:], self._store.get(name)
            if value.shape[:1] != images.shape[:1] or (name in ("labels", "tasks") and shape):
                shapes = f"{name} {tuple(value.shape)}, images {tuple(images.shape)}"
                raise ValueError(f"Memory.add: shapes are {shapes}; give one row for each image")
            if stored is not None and shape != stored.shape[1:] and not _may_widen(value, stored):
                shapes = f"{tuple(shape)} given, {tuple(stored.shape[1:])} held"
                raise ValueError(f"Memory.add: shapes of one sample's {name}: {shapes}; use one memory for each shape")

    def _fitted(self, name: str, value: Tensor) -> Tensor:
        """New rows in the device, dtype and width of the stored rows; allocates or widens the stored ones if needed."""
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
        """Write new rows into the free room, then over held rows of lower priority; all shapes are known in advance."""
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
        slots = old.topk(min(held, total - free), largest=False).indices
        entry = new.topk(slots.shape[0]).indices  # worst held row against best new one, and so on: the joint order
        self._overwrite(slots, rows, entry, new[entry] > old[slots])

    def _overwrite(self, slots: Tensor, rows: dict[str, Tensor], entry: Tensor, wins: Tensor) -> None:
        """Write the new row ``entry[i]`` into the slot ``slots[i]`` where it wins; slots are distinct."""
        if wins.device.type == "cpu":  # on a GPU, counting the winners would synchronise
            picked = wins.nonzero().squeeze(1)
            if len(picked):  # few in a long stream
                slots, entry = slots[picked], entry[picked]
                for name, value in rows.items():
                    self._store[name][slots] = value[entry]
            return
        for name, value in rows.items():
            stored = self._store[name]
            mask = wins.view(-1, *(1 for _ in value.shape[1:]))
            stored.index_copy_(0, slots, torch.where(mask, value[entry], stored[slots]))

    def _with_room(self, rows: Tensor) -> Tensor:
        """Copy of the held rows in a tensor of ``size`` rows."""
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
        for name, value in self._store.items():  # torch.save would write all rows behind a view
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
        """Take the size, and the names and shapes of all fields, from the state.

        ``GrowingBuffers`` does not apply here: the rows are not buffers, and are saved without the unused room.
        """
        state = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        needed = _SCALARS + (_OWN if set(state) - set(_SCALARS) else ())
        if absent := [prefix + name for name in needed if name not in state]:
            missing_keys += absent
            return
        size, seen = int(state.pop("size")), int(state.pop("num_seen"))
        lengths = {name: value.shape[0] for name, value in state.items()}
        if any(length != lengths["keys"] or length > size for length in lengths.values()):
            error_msgs.append(f"Memory: the state is damaged: it has rows {lengths} and size {size}")
            return
        self.size, self.num_seen, self._held = size, torch.tensor(seen), lengths.get("keys", 0)
        self._store = {name: self._with_room(value) for name, value in state.items()}


def valid_columns(values: Tensor) -> Tensor:
    """Entries of a field that were added, bool: rows from before the field became wider end with NaN.

    Args:
        values: A floating-point field, ``(n, columns)``.
    """
    return ~values.isnan()


def _may_widen(value: Tensor, stored: Tensor) -> bool:
    return value.dim() == stored.dim() == 2 and value.is_floating_point() and stored.is_floating_point()


def _moved(value: Tensor, device: torch.device) -> Tensor:
    """Copy to the device; to a GPU without synchronising."""
    return value.to(device, non_blocking=device.type == "cuda")


def _checked_size(size: int) -> int:
    if size < 0:
        raise ValueError(f"Memory: size is {size}; it must be at least 0, and 0 disables the memory")
    return size
