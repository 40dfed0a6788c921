"""Decode steps of few rows, many in one launch; see flow_decode_steps.py. For blocks that fit into registers."""

import torch
import triton

from . import flow_decode_configs as configs
from . import flow_decode_steps as phases
from .flow_decode import NO_NORM, FlowDecode, _plain, _signature
from .launch import Launcher, processors

_steps = Launcher(phases.flow_decode_steps_kernel)
WEIGHT_BYTES = 128 << 10  # of a program in registers: half of those of a multiprocessor


def _programs(device, config):
    return processors(device) if device.type == "cuda" else config.whole_programs


def _tiles(config, block, programs):
    """Of QKV, output, up and down product."""
    layer = block.layers[0]
    plain = [configs.whole_tile(config, programs, *x.weight.shape) for x in (layer.qkv, layer.up)]
    shared = [configs.whole_tile(config, programs, *x.weight.shape, True) for x in (layer.proj, layer.down)]
    return plain[0], shared[0], plain[1], shared[1]


def _parts(layer):
    """The pairs of tensors that the kernel takes of a layer, in its order."""
    gate = layer.gate or NO_NORM
    return [tuple(x) for x in (layer.norm1, layer.qkv, layer.proj, layer.norm2, layer.up, gate, layer.down)]


def _offsets(layers):
    """(layers + 1, 14): of the tensors of each layer, and again of the first, to those of the first, in units of 8
    numbers; None where there is no such number."""
    first = [x for part in _parts(layers[0]) for x in part]
    table = []
    for layer in (*layers, layers[0]):
        row = []
        for own, base in zip((x for part in _parts(layer) for x in part), first):
            if (own is None) != (base is None):
                return None
            if own is None:
                row.append(0)
                continue
            offset, rest = divmod(own.data_ptr() - base.data_ptr(), 8 * base.element_size())
            if rest or own.dtype != base.dtype:
                return None
            row.append(offset)
        table.append(row)
    return table


def _on_device(table, device):
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # which a copy from the host must not enter
        flat = torch.zeros(len(table) * len(table[0]), dtype=torch.int64, device=device)
        for place, number in enumerate(number for row in table for number in row):
            if number:
                flat[place].fill_(number)
        return flat
    return torch.tensor(table).to(device, non_blocking=True)


class FlowDecodeWhole(FlowDecode):
    """As FlowDecode, but a call does `steps` steps, on a GPU by one cooperative launch, else by one for each phase.

    A launch that the device refuses because its programs would not all run at once raises.
    """

    def __init__(self, *arguments):
        config = configs.DEFAULT
        super().__init__(*arguments, config._replace(few=config.whole))

    @staticmethod
    def takes(block, rows, batch, device):
        """Whether this class is for the block: few rows, no norms but those of a plain layer, weights that fit."""
        config, layer = configs.DEFAULT, block.layers[0]
        programs = _programs(device, config)
        if not 0 < rows <= config.whole or _offsets(block.layers) is None:
            return False
        if any(x is not None for x in (layer.q_norm, layer.post1, layer.post2)):
            return False
        features = configs.feature_block(block.features, block.width)
        if max(rows * triton.cdiv(block.width, 64), batch * triton.cdiv(block.features, features)) > programs:
            return False
        tiles = _tiles(config, block, programs)
        gates = 1 if layer.gate is None else 2
        sizes = [configs.whole_bytes(tile, layer.qkv.weight) for tile in tiles]
        return max(*sizes, gates * sizes[2]) <= WEIGHT_BYTES

    def _add_steps(self, tokens, z, conditions, feature_block):
        block, config, device = self.block, self.config, tokens.device
        affine, guidance = self.affine, self.affine.guidance
        heads, kv_heads, head_dim = self._heads()
        self.programs, self.arrived = _programs(device, config), 0
        self.counter = torch.zeros(1, dtype=torch.int32, device=device)
        offsets = _on_device(_offsets(block.layers), device)
        self.tensors = _plain((
            tokens, z, self.info, self.position, self.counter, block.start, block.proj_in, conditions.positions,
            conditions.cond, conditions.scale, self.rope, tuple(_parts(block.layers[0])), offsets,
            block.final_norm or NO_NORM, block.proj_out, guidance, self.streams[0], self.hidden, self.q, self.pieces,
            self.lse, self.keys, self.values,
        ))  # fmt: skip
        self.key = _signature(self.tensors)
        of_positions = (0, 0)
        if conditions.positions is not None:
            shape, strides = conditions.positions.shape, conditions.positions.stride()
            of_positions = (strides[0] if shape[0] > 1 else 0, strides[1])
        of_guidance = (0, 0) if guidance is None else guidance.stride()
        self.numbers = (
            self.rows, self.batch, self.length, self.keys.shape[3], self.prefix, *of_positions, *of_guidance,
            float(affine.clamp or 0.0), float(affine.soft_clip),
        )  # fmt: skip
        scales = block.proj_out.weight.shape[0] == 2 * self.features
        ending = (
            scales, affine.rule, "a" in affine.what, "b" in affine.what, affine.softplus, affine.soft_clip > 0,
            affine.clamp is not None,
        )  # fmt: skip
        begin_tile = (min(configs.power(self.width), 64), min(configs.power(self.features), 64))
        group = min(configs.power(self.rows), config.whole_rows)
        self.constants = (
            self.width, self.features, self.hidden_width, heads, kv_heads, head_dim, block.first, self.splits,
            *self.norms, ending, config.fetch, self.programs, begin_tile, (configs.power(self.width), feature_block),
            group, *_tiles(config, block, self.programs),
            configs.whole_tile(config, self.programs, *block.proj_out.weight.shape),
            *configs.attention_tile(config.whole_keys, heads // kv_heads, head_dim), config.whole_warps,
        )  # fmt: skip
        self.barriers = 5 * len(block.layers) + 2

    def __call__(self, steps=1):
        layers = len(self.block.layers)
        if self.position.is_cuda:
            self._launch(phases.ALL.value, steps, 0, layers, launch_cooperative_grid=True)
            self.arrived += steps * self.barriers * self.programs
            return
        for _ in range(steps):
            self._launch(phases.BEGIN.value, 1, 0, 0)
            for layer in range(layers):
                for phase in (phases.QKV, phases.ATTEND, phases.PROJ, phases.UP, phases.DOWN):
                    self._launch(phase.value, 1, layer, layer + 1)
            self._launch(phases.END.value, 1, 0, 0)

    def _launch(self, phase, steps, first_layer, last_layer, **options):
        arrived = (self.arrived + 2**31) % 2**32 - 2**31
        arguments = (*self.tensors, arrived, steps, first_layer, last_layer, *self.numbers)
        config = (self.config.whole_warps, 1)
        _steps(self.programs, self.key, arguments, (phase, *self.constants), config, **options)
