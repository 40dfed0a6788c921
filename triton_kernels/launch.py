"""Launches a compiled Triton kernel without its Python binder.

Binding 40 arguments takes about 100 us on an H100 host (2026-11-23), several times the run time of a short kernel. The
binder's answer depends only on dtypes, alignments, strides and constants, so it is asked once for each of them.
"""

import contextlib
import functools

import torch


def alignments(*tensors):
    """What Triton specialises a pointer on: None, or its element type and whether it is a multiple of 16 bytes."""
    return tuple(None if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in tensors)


@functools.cache
def processors(device):
    """Multiprocessors of a GPU; 1 in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class Launcher:
    """A @triton.jit kernel whose integers outside `key` are all in its `do_not_specialize`."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.compiled = {}

    def __call__(self, programs, key, arguments, constants, config, **options):
        """Launch `programs` programs.

        key: all that changes the compiled code: dtypes, alignments, strides, constants.
        arguments: run-time arguments in order; constants: the constexpr ones, in the kernel's order; config: the tile
        shape, as (constexpr values, num_warps, num_stages); options: further ones of the compiler, such as maxnreg.
        """
        device = next(x for x in arguments if x is not None).device
        other = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if other else contextlib.nullcontext():
            key = (device.index, config, tuple(options.items()), constants, key)
            compiled = self.compiled.get(key)
            if compiled is not None:
                compiled[(programs, 1, 1)](*arguments, *constants, *config[:-2])
            else:  # Triton's interpreter returns None
                self.compiled[key] = self.kernel[(programs,)](
                    *arguments, *constants, *config[:-2], num_warps=config[-2], num_stages=config[-1], **options
                )
