"""A device that is not there: its tensors lie in the memory of the CPU, and behave as those of a GPU do.

An operation on tensors of both devices is an error but for the few that CUDA allows, so is a random generator of the
other device, and so is an exchange between processes of what does not lie on the device. What a program waits for, as
for ``item()`` or the rows of a mask, is noted. Kernels are those of the CPU: a run gives the numbers of one on the CPU.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from cl_lightning import distributed
from cl_lightning.models import normalization
from cl_lightning.testing import Outcome, difference

AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
NAME = "remote"

aten = torch.ops.aten
_COPIES = (aten._to_copy.default, aten.copy_.default)
_INDEXED = ("aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim")
_STEP = ("on_train_batch_start", "training_step", "on_before_optimizer_step", "optimizer_step", "on_train_batch_end")
MAY_WAIT = {"_summed", "_agree", "_gather_parts"}
"""What every step may wait for: numbers to show, twice a second whether to stop, how many rows other processes have."""
_OURS = ("/cl_lightning/", "/callbacks/", "/datamodules/", "/test_")

waits: Counter[str] = Counter()
"""How often a step had to wait for the device, by the function of the package or of a test that asked."""


def _note_wait() -> None:
    """Count a wait, where a training step asks for it, not the probe of a test, and no checkpoint is written in it."""
    frame: Any = sys._getframe(1)
    names, asking = [], None
    while frame is not None:
        code = frame.f_code
        names.append(code.co_name)
        if asking is None and code.co_name[0] != "<" and any(part in code.co_filename for part in _OURS):
            asking = code
        frame = frame.f_back
    if asking is None or "cl_lightning/testing/" in asking.co_filename or "save" in names:
        return
    if any(name in _STEP for name in names):
        waits[asking.co_name] += 1


class Remote(Tensor):
    """A tensor of the device, which holds one of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Remote":
        made: Remote = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        _note_wait()
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert a tensor of the device to numpy; use Tensor.cpu() first")

    __array__ = numpy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = Remote(self.held.clone()).requires_grad_(self.requires_grad)
            for name, value in vars(self).items():
                if name != "held":
                    setattr(copied, name, value)
            memo[id(self)] = copied
        return memo[id(self)]


class _Generator(torch.Generator):
    """A generator of the device."""


def _generator(device: Any = "cpu") -> torch.Generator:
    return _Generator() if _is_remote(device) else _OF_CPU(device)


_OF_CPU = torch.Generator


def _is_remote(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _check_devices(name: str, args: Any, kwargs: Any) -> None:
    """Raise where CUDA would: scalars of the CPU are welcome, and indices of the CPU into a tensor of the device."""
    tensors = [part for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
    if all(isinstance(part, Remote) for part in tensors) or not any(isinstance(part, Remote) for part in tensors):
        return
    first = args[0] if isinstance(args[0], Tensor) else None
    allowed = {id(part) for part in tensors if isinstance(part, Remote) or part.dim() == 0}
    if name.startswith(_INDEXED) and isinstance(first, Remote):
        allowed |= {id(part) for part in tree_leaves(args[1])}
    in_place = name.partition(".")[0].endswith("_") and first is not None and not isinstance(first, Remote)
    if in_place or any(id(part) not in allowed for part in tensors):
        places = [f"{part.device}{tuple(part.shape)}" for part in tensors]
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, got {places}")


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    name, device = func.name(), kwargs.get("device")
    remote = any(isinstance(part, Remote) for part in tree_leaves((args, kwargs)))
    if func not in _COPIES:
        _check_devices(name, args, kwargs)
    fetched = func is aten._to_copy.default and device is not None and not _is_remote(device)
    if remote and (fetched or name.partition("::")[2].partition(".")[0] in _WAITS):
        _note_wait()
    plain_args, plain = tree_map(lambda part: part.held if isinstance(part, Remote) else part, (args, kwargs))
    if _is_remote(device):
        plain["device"] = torch.device("cpu")
    result = func(*plain_args, **plain)
    if func is aten.copy_.default:
        return args[0]
    if not (_is_remote(device) if device is not None else remote):
        return result
    wrapped = tree_map(lambda part: Remote(part) if isinstance(part, Tensor) else part, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


class _Operations(TorchDispatchMode):
    """Catches what makes tensors of the device from none, or from those of the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Catches what torch would do out of sight of the operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if (generator := options.get("generator")) is not None:
            device = options.get("device")
            there = _is_remote(device) or (device is None and any(isinstance(p, Remote) for p in tree_leaves(args)))
            if isinstance(generator, _Generator) != there:
                raise RuntimeError(f"{func.__name__}: the generator is one of another device")
        if func in (torch.tensor, torch.as_tensor) and _is_remote(options.get("device")):
            device = options.pop("device")
            return func(*args, **options).to(device)
        if func is Tensor.new_tensor and isinstance(args[0], Remote):
            device = options.pop("device", args[0].device)
            return torch.tensor(args[1], **{"dtype": args[0].dtype, **options}).to(device)
        return func(*args, **options)


class _Module(backend_registration._DummyBackendModule if AVAILABLE else object):  # type: ignore[misc]
    """What torch asks of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class _Accelerator(Accelerator):
    """What Lightning asks of a device."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return [0]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}


def trainer_options() -> dict[str, Any]:
    """Of a Trainer that uses the device; made and used within :func:`running`."""
    return {
        "accelerator": "auto",
        "strategy": SingleDeviceStrategy(device=torch.device(NAME, 0), accelerator=_Accelerator()),
    }


def _on_the_device(tensor: Tensor, *_: Any, **__: Any) -> None:
    """What NCCL takes: contiguous tensors of the device. The sum over the one process there is changes nothing."""
    if not isinstance(tensor, Remote):
        raise RuntimeError(f"an exchange of a tensor of the CPU, {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise RuntimeError(f"an exchange of a tensor that is not contiguous, {tuple(tensor.shape)}")


def _gather(parts: list[Tensor], tensor: Tensor) -> None:
    _on_the_device(tensor)
    for part in parts:
        _on_the_device(part)
        part.copy_(tensor)


@contextlib.contextmanager
def running(monkeypatch: Any) -> Iterator[None]:
    """The device exists, and this process believes that it is one of several, whose exchange needs the device."""
    if not hasattr(torch, NAME):
        backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "Generator", _generator)
        for module in (distributed, normalization):
            patch.setattr(module, "is_distributed", lambda: True)
        patch.setattr(dist, "get_world_size", lambda *_: 1)
        patch.setattr(dist, "get_rank", lambda *_: 0)
        patch.setattr(dist, "all_reduce", _on_the_device)
        patch.setattr(dist, "all_gather", _gather)
        patch.setattr(dist, "all_gather_object", lambda parts, mine: parts.__setitem__(0, mine))
        torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the objects that they are
        waits.clear()
        try:
            with _Functions(), torch.autograd.set_multithreading_enabled(False), _Operations():
                yield
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swaps)


def on_the_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copies on the CPU of the tensors of a state."""
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}


def assert_like(expected: Outcome, outcome: Outcome) -> None:
    """The state and accuracies of a run on the CPU and of a run on the device are equal within rounding."""
    for kind in ("state", "matrix"):
        there = on_the_cpu(getattr(outcome, kind))
        assert difference(getattr(expected, kind), there, rtol=1e-5, atol=1e-6) is None
