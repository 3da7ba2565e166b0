"""A pretend GPU: tensors of device `lazy` whose numbers lie in main memory, under the rules of CUDA.

What mixes devices fails as it would there. What a GPU would have to wait for, or what crosses between it and the host,
is counted by the line of this project that asked for it: `Device.seen[(what, line)]`.
"""
import collections
import contextlib
import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

import mgdarts

NAME = torch.device("lazy")
PACKAGE = str(Path(mgdarts.__file__).parent)
# operations whose result, or its shape, the host has to know before it can go on
WAITS = {"nonzero", "masked_select", "unique_consecutive", "_unique2", "unique_dim", "bincount", "equal", "is_nonzero",
         "_local_scalar_dense"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class WrongDevice(RuntimeError): pass


def line() -> str:
    "The innermost line of the package on the stack."
    frame = sys._getframe(2)
    while frame:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE): return f"{name[len(PACKAGE) + 1:]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class There(torch.Tensor):
    "A tensor on the pretend device; `here` holds its numbers."

    @staticmethod
    def __new__(cls, here):
        out = torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=NAME)
        out.here = here
        return out

    def __init__(self, here): pass
    def __repr__(self): return f"There({self.here})"
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return computed(func, args, kwargs or {})

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            note("copy on the device")
            out = There(self.here.detach().clone())
            is_parameter = getattr(self, "_is_param", False)
            memo[id(self)] = torch.nn.Parameter(out, self.requires_grad) if is_parameter else out
        return memo[id(self)]

    def tolist(self):
        note("read back")
        return self.here.tolist()

    def __getitem__(self, i):
        if isinstance(i, list):
            note("copy to the device: an index")
            i = There(torch.tensor(i))
        return torch.Tensor.__getitem__(self, i)

    def numpy(self, *args, **more): raise TypeError("can't convert a tensor on a device to numpy")


_devices: list = []


def note(what: str):
    for device in _devices: device.seen[what, line()] += 1


def leaves(x):
    "What lies in lists, tuples and dictionaries; PyTorch's own walk takes most of the time of these tests."
    if isinstance(x, (list, tuple)):
        for y in x: yield from leaves(y)
    elif isinstance(x, dict): yield from leaves([*x.values()])
    else: yield x


def each(f, x):
    "The same lists, tuples and dictionaries, of what `f` makes of it."
    if type(x) in (list, tuple): return type(x)([each(f, y) for y in x])
    return {k: each(f, y) for k, y in x.items()} if type(x) is dict else f(x)


def there(x): return There(x) if type(x) is torch.Tensor or type(x) is torch.nn.Parameter else x
def here(x): return x.here if isinstance(x, There) else x
def is_there(device) -> bool: return device is not None and torch.device(device).type == NAME.type


def check_index(func, name, args):
    "Indices may come from the host, which is a copy; masks have as many results as the host has to count."
    given = [i for i in args[1] if i is not None]
    if not isinstance(args[0], There):
        raise WrongDevice(f"{func}: an index on the device, values on the host, {line()}")
    masked = any(i.dtype in (torch.bool, torch.uint8) for i in given)
    filled = name.startswith("index_put") and len(given) == 1 and args[2].numel() == 1  # becomes a masked_fill
    if masked and not filled: note("a mask as an index")
    if any(not isinstance(i, There) for i in given): note("copy to the device: an index")
    if name.startswith("index_put") and not isinstance(args[2], There) and args[2].dim():
        raise WrongDevice(f"{func}: values on the host, {line()}")


def computed(func, args, kwargs):
    name = func._schema.name.split("::")[1]
    given = [*leaves((args, kwargs))]
    tensors = [t for t in given if isinstance(t, torch.Tensor)]
    ours, others = [t for t in tensors if type(t) is There], [t for t in tensors if type(t) is not There]
    wanted = kwargs.get("device")
    to, back = is_there(wanted), wanted is not None and torch.device(wanted).type == "cpu"
    if (ours or to) and any(isinstance(g, torch.Generator) for g in given):
        raise WrongDevice(f"{func}: a generator of the host, a tensor on the device, {line()}")
    plain = each(here, args), each(here, kwargs)
    if wanted is not None: plain[1]["device"] = torch.device("cpu")
    def run(): return func(*plain[0], **plain[1])
    if name == "_to_copy" and (to and not ours or back and ours):
        note("copy to the device" if to else "read back")
        return There(run()) if to else run()
    if name == "copy_":
        if isinstance(args[0], There) != isinstance(args[1], There):
            note("copy to the device" if isinstance(args[0], There) else "read back")
        run()
        return args[0]
    if not ours: return There(run()) if to else func(*args, **kwargs)
    if name in WAITS: note("read back" if name == "_local_scalar_dense" else name)
    if name == "_local_scalar_dense": return run()
    if name in INDEXED: check_index(func, name, args)
    elif name == "repeat_interleave" and kwargs.get("output_size") is None: note("repeat_interleave without a size")
    elif name != "set_" and any(t.dim() for t in others):
        raise WrongDevice(f"{func}: tensors on the device and on the host, {line()}")
    out = each(there, run())
    return return_and_correct_aliasing(func, args, kwargs, out)


class _Made(TorchFunctionMode):
    "`torch.tensor` makes its numbers on the host, and copies them."
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        there = func in (torch.tensor, torch.as_tensor) and is_there(kwargs.get("device"))
        if not there: return func(*args, **kwargs)
        del kwargs["device"]
        note("copy to the device")
        asked = kwargs.pop("requires_grad", False)
        return There(func(*args, **kwargs)).requires_grad_(asked)


class Device(TorchDispatchMode):
    "While it is on there is such a device. `seen` counts what crosses, by (what, line)."
    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return computed(func, args, kwargs or {})
    def __enter__(self):
        _devices.append(self)
        self.made = contextlib.ExitStack()
        self.made.enter_context(_Made())
        return super().__enter__()
    def __exit__(self, *error):
        _devices.remove(self)
        self.made.close()
        return super().__exit__(*error)
