"""Choice of a backend: one ordered table per op, each row with a reason to refuse a call."""

import contextlib
import importlib.util
import os
import warnings
from typing import NamedTuple

import torch

NAMES = ("cuda", "triton", "cpu", "reference")


class FallbackWarning(UserWarning):
    """A call on a GPU ran the plain torch reference because every kernel refused it."""


class Backend(NamedTuple):
    """One row of an op's table. `refuse(*call)` returns None or the reason; `fwd` and `bwd` are its entry points."""

    name: str
    refuse: object
    fwd: object
    bwd: object = None


def _checked(name):
    if name is not None and name not in NAMES:
        raise ValueError(f"backend: must be one of {', '.join(NAMES)}; got {name!r}")
    return name


_forced = _checked(os.environ.get("FLOWATTN_BACKEND") or None)
_strict = os.environ.get("FLOWATTN_STRICT", "0") == "1"
_tables = {}
_warned = set()


@contextlib.contextmanager
def use_backend(name):
    """Force one backend ("cuda", "triton", "cpu", "reference") for every op inside the block, process-wide.

    A call that the backend refuses raises NotImplementedError with the reason. `None` gives back the free choice.
    """
    global _forced
    before, _forced = _forced, _checked(name)
    try:
        yield
    finally:
        _forced = before


class Table:
    """The backends of one op in order of preference.

    `prepare` turns the public arguments into the `call` tuple that every `refuse` sees, after checking them.
    `probe(device)` gives the positional arguments of a tiny legal call, for `python -m flowattn.info`.
    """

    def __init__(self, op, prepare, *backends, probe=None):
        self.op, self.prepare, self.backends, self.probe = op, prepare, backends, probe
        _tables[op] = self

    def choose(self, *call):
        if _forced is not None:
            return self._choose_forced(call)
        for backend in self.backends:
            if backend.refuse(*call) is None:
                if backend.name == "reference" and call[0].is_cuda:
                    self._fall_back(call)
                return backend
        raise NotImplementedError(f"{self.op}: no backend takes this call:\n{self.describe(call)}")

    def _choose_forced(self, call):
        for backend in self.backends:
            if backend.name == _forced:
                reason = backend.refuse(*call)
                if reason is not None:
                    raise NotImplementedError(f"{self.op}: backend {_forced!r} was forced; it refuses: {reason}")
                return backend
        names = ", ".join(b.name for b in self.backends)
        raise NotImplementedError(f"{self.op}: backend {_forced!r} was forced; this op has {names}")

    def _fall_back(self, call):
        message = f"{self.op}: runs the plain torch reference on a GPU:\n{self.describe(call)}"
        if _strict:
            raise NotImplementedError(message + "\n(FLOWATTN_STRICT=1)")
        if self.op not in _warned:
            _warned.add(self.op)
            warnings.warn(message, FallbackWarning, stacklevel=4)

    def describe(self, call):
        lines, taken = [], False
        for backend in self.backends:
            reason = backend.refuse(*call)
            if reason is None:
                lines.append(f"  {'->' if not taken else '  '} {backend.name:<10} {'ok' if taken else 'chosen'}")
                taken = True
            else:
                lines.append(f"     {backend.name:<10} refused: {reason}")
        return "\n".join(lines)


def explain(op, *args, **kwargs):
    """Print the backend table of `op` for a call with these arguments; return the name of the backend it would use.

    >>> q = torch.randn(5, 2, 8)
    >>> cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    >>> with use_backend("reference"):
    ...     explain("varlen_attention", q, q, q, cu)  # doctest: +ELLIPSIS
    varlen_attention
    ...
    'reference'
    """
    if op not in _tables:
        raise ValueError(f"explain: op must be one of {', '.join(sorted(_tables))}; got {op!r}")
    table = _tables[op]
    call = table.prepare(*args, **kwargs)
    print(table.op)
    print(table.describe(call))
    if _forced is not None:
        print(f"  forced: {_forced}")
    return table.choose(*call).name


def tables():
    """Every op's table, by name."""
    return dict(_tables)


_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def refuse_triton(tensor):
    """Reason why Triton kernels cannot take this tensor, or None."""
    if not _TRITON_INSTALLED:
        return "triton is not installed (pip install triton)"
    if not tensor.is_cuda and not _INTERPRETED:
        return f"needs CUDA tensors, or TRITON_INTERPRET=1; got {tensor.device.type}"
    if tensor.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return "needs compute capability 8.0 or later"
    return None


def never(*call):
    """The reference refuses nothing."""
    return None
