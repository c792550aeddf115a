"""A rehearsal of CUDA where there is none: tensors that hold CPU memory and say that they are on cuda:0.

Every operation on such tensors runs on the CPU, with real values, and is judged as CUDA would judge it. Operands on
several devices are an error. A wait of the host for the device is recorded, with the place that caused it. Kernel
launches are counted. Random numbers come from a generator that is the device's own.

What it is not: autograd's thread for the device, CUDA's kernels and their rounding, streams and the allocator. Autocast
is that of the CPU under another name. Launches are those that torch's operations are known to make, one for most of
them; those inside a library (cuBLAS, cuDNN) are not seen.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

HOST, DEVICE = torch.device("cpu"), torch.device("cuda", 0)


def names(*short: str) -> frozenset[str]:
    """Operations by their full names."""
    return frozenset(f"aten::{name}" for line in short for name in line.split())


COPIES = names("copy_ _to_copy")
INDEXED = names("index index_put index_put_ _index_put_impl_")
# The size of the result, or the result itself, is a number on the host.
AWAITED = names(
    "_local_scalar_dense nonzero masked_select bincount histc equal is_nonzero",
    "_unique _unique2 unique_dim unique_consecutive _assert_async",
) - names("_assert_async")
# Views, and memory that nothing writes to.
WITHOUT_KERNEL = names(
    "view _unsafe_view _reshape_alias view_as_real reshape t transpose permute movedim expand slice select narrow",
    "unsqueeze squeeze detach alias split unsafe_split split_with_sizes unbind chunk diagonal as_strided unfold",
    "lift_fresh empty empty_like empty_strided new_empty new_empty_strided is_same_size set_ resize_",
    "_has_compatible_shallow_copy_type _local_scalar_dense",
)
# These take a tensor without dimensions from the host as a number, as all pointwise operations do.
NUMBERS = names("where fill_ masked_fill masked_fill_ _foreach_mul _foreach_mul_ _foreach_div _foreach_div_")
TENSORS_OF_CAT = 128  # that one kernel of torch.cat reads
# torch's multi_tensor_apply: how many tensors, chunks of numbers and blocks one kernel of a _foreach operation takes.
TENSORS_OF_FOREACH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
CHUNK, BLOCKS = 65536, 320
CLOSE = 50  # launches that take the device no longer than the host needs to go on
PACKAGES = ("deltasam_plugin", "fairseq", "fairseq_cli")


_leaving: list[bool] = []


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Within this context a copy to the CPU is meant. Otherwise C++ names the CPU because it knows no other device."""
    _leaving.append(True)
    try:
        yield
    finally:
        _leaving.pop()


class OnDevice(Tensor):
    """A tensor of the rehearsal."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, plain: Tensor) -> Any:
        return torch.Tensor._make_subclass(cls, plain)

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """C++ believes that the tensor is on the CPU. Say what is a copy and what is none."""
        args, kwargs = _with_device(args, kwargs)
        if kwargs.pop("copy", False):
            return self.clone().to(*args, **kwargs)
        if args and isinstance(args[0], Tensor):
            device, dtype, later = args[0].device, args[0].dtype, False
        else:
            device, dtype, later, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type == "cuda":
            return self if dtype in (None, self.dtype) else Tensor.to(self, dtype)
        with leaving():
            return torch.ops.aten._to_copy(self, dtype=dtype, device=device, non_blocking=later)

    def type_as(self, other: Tensor) -> Tensor:
        return self.to(other)

    def cpu(self, *_: Any) -> Tensor:
        return self.to("cpu")

    def cuda(self, *_: Any, **__: Any) -> Tensor:
        return self

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy  # type: ignore[assignment]

    def new(self, *args: Any) -> Tensor:
        with _disable_current_modes():
            return OnDevice(Tensor.new(torch.empty(0, dtype=self.dtype), *(plain(argument) for argument in args)))

    def new_tensor(self, data: Any, dtype: Any = None, **_: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=DEVICE)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.cpu().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a tensor of the rehearsal, outside of it.")


def plain(value: Any) -> Any:
    """The CPU tensor on the same memory; other values as they are."""
    if not isinstance(value, OnDevice):
        return value
    with torch._C._DisableTorchDispatch():
        storage = value.untyped_storage()
    return torch.empty(0, dtype=value.dtype).set_(storage, value.storage_offset(), value.size(), value.stride())


class Wait(NamedTuple):
    """A wait of the host for the device.

    Attributes:
        kind: the operation.
        owner: ``deltasam_plugin`` or ``fairseq``, whose code is the innermost of the two; ``autograd`` for the backward
            pass of an operation of torch; else empty.
        place: file, line and function there.
        in_pass: whether it is inside fairseq's forward and backward pass, not in the rest of the update.
    """

    kind: str
    owner: str
    place: str
    in_pass: bool


class Rehearsal(TorchDispatchMode):
    """Counts what happens on the device while :meth:`active`.

    Attributes:
        waits: in order.
        launches: of kernels, by operation.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self.since_wait = 0  # launches
        self.waited = 0  # how often, never cleared
        self.launches: Counter[str] = Counter()
        self._random = torch.Generator().manual_seed(seed).get_state()

    def clear(self) -> None:
        """Count anew."""
        self.waits.clear()
        self.launches.clear()

    @contextlib.contextmanager
    def active(self) -> Iterator[Rehearsal]:
        """Within this context torch has one CUDA device."""
        with contextlib.ExitStack() as stack:
            for target, replaced in self._replaced().items():
                for name, value in replaced.items():
                    stack.enter_context(mock.patch.object(target, name, value))
            stack.enter_context(self)
            yield self

    def manual_seed(self, seed: int) -> None:
        """Seed the device's generator."""
        self._random = torch.Generator().manual_seed(seed).get_state()

    def _replaced(self) -> dict[Any, dict[str, Any]]:
        generator, autocast, to, tensor_to = torch.Generator, torch.autocast, nn.Module.to, Tensor.to

        class Generator(generator):  # type: ignore[misc,valid-type]
            def __new__(cls, device: Any = "cpu") -> Any:
                return generator()

        class Autocast(autocast):  # type: ignore[misc,valid-type]
            def __init__(self, device_type: str, dtype: Any = None, **options: Any) -> None:
                super().__init__("cpu", dtype or (torch.float16 if device_type == "cuda" else None), **options)

        def cuda_autocast(enabled: bool = True, dtype: torch.dtype = torch.float16, **_: Any) -> Autocast:
            return Autocast("cuda", dtype, enabled=enabled)

        def of_the_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda device_type="cpu", *args: function("cpu", *args)

        def made(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def make(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
                if isinstance(data, OnDevice) and device is None:
                    device = DEVICE
                if device is None or not _is_device(device):
                    return function(data, *args, **kwargs, **({} if device is None else {"device": device}))
                if isinstance(data, OnDevice):
                    return data.to(**kwargs) if kwargs else data
                return function(data, *args, **kwargs).to(DEVICE)

            return make

        def set_state(state: Tensor, device: Any = 0) -> None:
            assert not isinstance(state, OnDevice)
            self._random = state.clone()

        def module_to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
            if device is None or device.type != "cuda":
                return to(module, *args, **kwargs)
            return moved(module if dtype is None else to(module, dtype))

        def tensor_to_device(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            args, kwargs = _with_device(args, kwargs)
            if args and isinstance(args[0], OnDevice):
                args = (DEVICE, args[0].dtype, *args[1:])
            return tensor_to(tensor, *args, **kwargs)

        properties = SimpleNamespace(name="rehearsed", major=7, minor=0, total_memory=2**34)
        return {
            torch.cuda: {
                **{name: lambda *_: True for name in ("is_available", "is_initialized", "is_bf16_supported")},
                **{
                    name: lambda *_, **__: None
                    for name in ("_lazy_init", "set_device", "empty_cache", "reset_peak_memory_stats", "synchronize")
                },
                **{name: lambda *_: 0 for name in ("current_device", "max_memory_allocated", "memory_allocated")},
                "device_count": lambda: 1,
                "current_stream": lambda *_: SimpleNamespace(record_event=partial(Event, self)),
                "get_device_properties": lambda *_: properties,
                "get_device_capability": lambda *_: (7, 0),
                "get_rng_state": lambda *_: self._random.clone(),
                "set_rng_state": set_state,
                "manual_seed": self.manual_seed,
                "manual_seed_all": self.manual_seed,
            },
            torch.cuda.amp: {"autocast": cuda_autocast},
            nn.Module: {"to": module_to, "cuda": lambda module, *_: moved(module)},
            Tensor: {
                "to": tensor_to_device,
                "type_as": lambda tensor, other: tensor.to(other.device, other.dtype),
                "cuda": lambda tensor, *_, non_blocking=False, **__: tensor.to(DEVICE, non_blocking=non_blocking),
            },
            torch: {
                "Generator": Generator,
                "autocast": Autocast,
                "tensor": made(torch.tensor),
                "as_tensor": made(torch.as_tensor),
                **{
                    name: of_the_cpu(getattr(torch, name))
                    for name in (
                        *("is_autocast_enabled", "get_autocast_dtype"),
                        *("set_autocast_enabled", "set_autocast_dtype"),
                    )
                },
            },
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        given = tensors_in((*args, *kwargs.values()))
        there = any(isinstance(value, OnDevice) for value in given)
        device = kwargs.get("device")
        if name == "aten::copy_":
            on_device = isinstance(args[0], OnDevice)
        elif there and isinstance(args[0], OnDevice) and not _leaving:
            on_device = True
        else:
            on_device = there if device is None else _is_device(device)
        if name == "prim::device":
            return DEVICE if there else HOST
        if not (there or on_device):
            pinned = kwargs.pop("pin_memory", None)
            found = func(*args, **kwargs)
            if pinned:
                found.pinned = True
            return found
        self._judge(func, args, kwargs, given, on_device)
        same: dict[int, Any] = {}  # the tensor that each plain one stands for

        def known_plain(value: Any) -> Any:
            inner = plain(value)
            same[id(inner)] = value
            return inner

        plain_args = mapped(known_plain, args)
        plain_kwargs = dict(zip(kwargs, mapped(known_plain, tuple(kwargs.values()))))
        if device is not None:
            plain_kwargs["device"] = HOST
        plain_kwargs.pop("pin_memory", None)
        with _disable_current_modes(), self._randomness(func, kwargs) if on_device else contextlib.nullcontext():
            found = _run(func, plain_args, plain_kwargs)
        if on_device:
            count = launches(name, args, found)
            self.launches[name] += count
            self.since_wait += count
        if found is None or not on_device or name == "aten::_local_scalar_dense":
            return found
        return mapped(lambda value: same[id(value)] if id(value) in same else OnDevice(value), found)

    def _judge(self, func: Any, args: Any, kwargs: Any, given: Sequence[Tensor], on_device: bool) -> None:
        """Record a wait, or refuse operands on several devices."""
        name = func._schema.name
        if name in COPIES:
            source = args[1] if name == "aten::copy_" else args[0]
            later = kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])
            if isinstance(source, OnDevice) != on_device and not (later and (on_device or hasattr(args[0], "pinned"))):
                self.wait("copy to the device" if on_device else "copy from the device")
            return
        indices = [i for i in args[1] or () if isinstance(i, Tensor)] if name in INDEXED else []
        pointwise = torch.Tag.pointwise in func.tags or name in NUMBERS or name in INDEXED
        foreign = [value for value in given if isinstance(value, OnDevice) != on_device]
        if not all(
            any(value is index for index in indices) or (pointwise and value.dim() == 0 and value is not args[0])
            for value in foreign
        ):
            shapes = [(tuple(value.shape), str(value.device)) for value in given]
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {shapes}")
        masks = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        if name in AWAITED or masks or any(not isinstance(index, OnDevice) for index in indices):
            self.wait(name.removeprefix("aten::") + (" by a mask" if masks else ""))
        elif name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            self.wait("repeat_interleave")

    def wait(self, kind: str) -> None:
        """Record a wait of the code that runs."""
        owner = place = ""
        in_pass = False
        for frame, line in traceback.walk_stack(None):
            file, name = frame.f_code.co_filename, frame.f_code.co_name
            in_pass |= (name == "train_step" and file.endswith("fairseq_task.py")) or "/fairseq/models/" in file
            if owner or name == "__torch_function__":  # there a call of somebody else's passes through
                continue
            package = next((package for package in PACKAGES if f"/{package}/" in file), None)
            if name == "_engine_run_backward":
                owner = "autograd"
            elif package is not None:
                owner, place = package, f"{file.split(f'/{package}/', 1)[1]}:{line} {name}"
        self.since_wait = 0
        self.waited += 1
        self.waits.append(Wait(kind, owner, place, in_pass))

    @contextlib.contextmanager
    def _randomness(self, func: Any, kwargs: Any) -> Iterator[None]:
        """Draw from the device's generator."""
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            yield
            return
        before = torch.get_rng_state()
        torch.set_rng_state(self._random)
        try:
            yield
        finally:
            self._random = torch.get_rng_state()
            torch.set_rng_state(before)


class Event:
    """A mark in the stream. To wait for it is to wait for the device, unless the device is past it or close before it.

    It is past it where the host has waited since. It is close before it where the host has waited shortly before the
    mark was made: there was little for the device to do since.
    """

    def __init__(self, rehearsal: Rehearsal) -> None:
        self._rehearsal, self._waited = rehearsal, rehearsal.waited
        self._close = rehearsal.since_wait <= CLOSE

    def synchronize(self) -> None:
        if not self._close and self._rehearsal.waited == self._waited:
            self._rehearsal.wait("event")


def _with_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of ``Tensor.to`` in which the device has its full name: for a number torch asks the accelerator."""

    def read(value: Any) -> Any:
        named = isinstance(value, int | str | torch.device) and not isinstance(value, bool)
        return DEVICE if named and _is_device(value) else value

    return (*map(read, args[:1]), *args[1:]), {n: read(v) if n == "device" else v for n, v in kwargs.items()}


def _is_device(device: Any) -> bool:
    return isinstance(device, int) or torch.device(device).type == "cuda"


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors in nested tuples and lists."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The same nested tuples and lists with the function's results in place of tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (list, tuple):
        return type(value)([mapped(function, item) for item in value])
    return value


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation on the CPU, also where only CUDA has a kernel for it."""
    name = func._schema.name
    if name in ("aten::_softmax", "aten::_log_softmax") and args[2]:
        return func(args[0].float(), args[1], False)
    if name in ("aten::_softmax_backward_data", "aten::_log_softmax_backward_data") and args[3] != args[0].dtype:
        return func(args[0], args[1], args[2], args[0].dtype).to(args[3])
    return func(*args, **kwargs)


def launches(name: str, args: Sequence[Any], found: Any) -> int:
    """The kernels that an operation launches on CUDA.

    Args:
        name: of the operation.
        args: its arguments.
        found: its result.
    """
    touched = tensors_in((args, found))
    if name in WITHOUT_KERNEL or not any(value.numel() for value in touched):
        return 0
    if name == "aten::cat":
        return -(-len(args[0]) // TENSORS_OF_CAT)
    if not name.startswith("aten::_foreach_"):
        return 1
    lists = [one for one in args if isinstance(one, list | tuple) and one and isinstance(one[0], Tensor)]
    sizes = [value.numel() for value in lists[0]]
    if name in ("aten::_foreach_norm", "aten::_foreach_max"):
        return foreach_launches(sizes, 1) + 1
    if len({value.dtype for one in lists for value in one}) > 1 and name != "aten::_foreach_copy_":
        return len(sizes)  # the slow way: tensor by tensor
    return foreach_launches(sizes, len(lists) + (not name.endswith("_")))


def foreach_launches(sizes: Sequence[int], depth: int) -> int:
    """Launches of a ``torch._foreach_*`` operation on CUDA.

    Args:
        sizes: numbers in each tensor of a list.
        depth: how many lists it reads and writes.
    """
    limit, total, tensors, blocks = TENSORS_OF_FOREACH[depth], 0, 0, 0
    for size in sizes:
        chunks = -(-size // CHUNK)
        if chunks == 0:
            continue
        tensors += 1
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if (tensors == limit and last) or blocks == BLOCKS:
                total, blocks, tensors = total + 1, 0, 0 if last else 1
    return total + (blocks > 0)


def moved(value: Any) -> Any:
    """A module, in place, or a tensor: on the device. Shared parameters stay shared."""
    if isinstance(value, Tensor):
        return _moved(value)
    known: dict[int, Any] = {}
    for module in value.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in known:
                    known[id(tensor)] = _moved(tensor)
                tensors[name] = None if tensor is None else known[id(tensor)]
    return value


def _moved(tensor: Tensor) -> Any:
    if isinstance(tensor, OnDevice):
        return tensor
    with _disable_current_modes():
        there = OnDevice(tensor.detach().clone()).requires_grad_(tensor.requires_grad)
    if isinstance(tensor, nn.Parameter):
        there._is_param = True
        there.__dict__.update(tensor.__dict__)
    return there
