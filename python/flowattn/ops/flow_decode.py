"""A flow block's network on a GPU: single steps by Triton kernels, replayed as a CUDA graph; windows in plain torch but
for their attention."""

import torch

from flowattn import _native, dispatch
from flowattn.ops.flow_network import ReferenceNetwork
from flowattn.reference import flow_affine

WIDEST = 8192  # C, which a program with few rows holds at once


def refuse_decode(z, block):
    """Why the decode kernels cannot take this block, or None."""
    reason = dispatch.refuse_triton(z)
    if reason is not None or not block.layers:
        return reason
    spec = block.spec
    if z.dtype == torch.float64 or any(x.dtype == torch.float64 for x in block.tensors()):
        return "no float64"
    if spec.head_dim < 16 or spec.head_dim & (spec.head_dim - 1):
        return f"head_dim must be a power of 2 from 16 on; got {spec.head_dim}"
    if block.width > WIDEST:
        return f"C must be at most {WIDEST}; got {block.width}"
    products = {x.weight.dtype for layer in block.layers for x in (layer.qkv, layer.proj, layer.up, layer.down)}
    products |= {layer.gate.weight.dtype for layer in block.layers if layer.gate is not None}
    if len(products) > 1:
        return f"the products of the layers must have one dtype; got {', '.join(sorted(map(str, products)))}"
    return None


def _dense(tree):
    """The same tree of weights, contiguous and without gradients."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().contiguous()
    if isinstance(tree, tuple):
        parts = [_dense(part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


class TritonNetwork(ReferenceNetwork):
    """`sequential` by kernels; windows of more than a step, and the prefix, as ReferenceNetwork, in the same cache."""

    @staticmethod
    def attention(*arguments):
        from flowattn.triton_kernels.flow_window_attention import flow_window_attention  # imports triton

        return flow_window_attention(*arguments)

    def sequential(self, tokens, z, guidance, begin, rule, what, clamp):
        """Overwrite the tokens of the steps from `begin` on; (B, 4): the first token that is not finite or -1, the
        largest log scale, entries clamped, scales that are not positive."""
        from flowattn.triton_kernels.flow_decode import Affine, FlowDecode  # imports triton
        from flowattn.triton_kernels.flow_decode_whole import FlowDecodeWhole

        spec, device, count = self.block.spec, tokens.device, self.steps - begin
        guidance = guidance if self.conditions.streams == 2 else None
        which = flow_affine.RULES.index(rule)
        affine = Affine(guidance, which, what, spec.scale == "softplus", spec.soft_clip, clamp)
        early = device.type == "cuda" and torch.version.hip is None and _native.capability(device) >= (9, 0)
        block, conditions = _dense(self.block), _dense(self.conditions)
        # Barriers within a launch need what programmatic launches need: the same devices, the same releases.
        rows = self.batch * conditions.streams
        whole = (early or device.type == "cpu") and FlowDecodeWhole.takes(block, rows, self.batch, device)
        kind = FlowDecodeWhole if whole else FlowDecode
        decode = kind(block, conditions, tokens, z.contiguous(), self.keys, self.values, begin, affine, early)
        if whole:
            together = decode.config.whole_steps
            for done in range(0, count, together):
                decode(min(together, count - done))
        elif device.type == "cuda":
            with torch.cuda.device(device):
                _replay(decode, count, decode.config.graph_steps)
        else:
            for _ in range(count):
                decode()
        info = decode.info.double()
        first_bad = info[..., 0].amin(1)
        first_bad = torch.where(first_bad.isinf(), -1.0, first_bad)
        return torch.stack([first_bad, info[..., 1].amax(1), info[..., 2].sum(1), info[..., 3].sum(1)], 1)


def _replay(step, count, together):
    """Call `step` count times, outside of a caller's capture as a graph of `together` steps. No sync with the host."""
    plain = count
    if not torch.cuda.is_current_stream_capturing():
        # The first steps run by themselves: the compiler must be done before a capture.
        plain = min(count, 1 + (count - 1) % together)
    for _ in range(plain):
        step()
    if plain == count:
        return
    graph, current, side = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        graph.capture_begin(capture_error_mode="thread_local")
        for _ in range(together):
            step()
        graph.capture_end()
    current.wait_stream(side)
    for _ in range((count - plain) // together):
        graph.replay()
