"""Compile what an op would launch for sm_90, without a GPU, and follow the addresses of its tensor-core operands.

ptxas 12.8, which Triton 3.6 brings, takes the address of a wgmma operand from the wrong register in some kernels whose
operands are swizzled in different ways: results are garbage, or the read is illegal. Only the machine code shows it.

python tests/triton_code.py prints a line for each program: what was compiled, its products, those with a stray address.
Without TRITON_INTERPRET, whose kernels cannot be compiled.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import flowattn as fa
from flowattn import dispatch
from flowattn.triton_kernels import launch, linear_attention_carry, linear_attention_configs

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
BF16, F16 = torch.bfloat16, torch.float16
# dtype, key width, value width
LINEAR = [
    (BF16, 16, 32), (BF16, 32, 16), (BF16, 64, 32), (BF16, 64, 64), (BF16, 72, 36), (BF16, 128, 64), (BF16, 256, 128),
    (F16, 64, 32),
]  # fmt: skip


def specialised(value, free=False):
    """(type, is it a multiple of 16) of an argument as Triton sees it; ("constexpr", False) where it compiles it in."""
    if value is None or (type(value) is int and value == 1 and not free):
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype], True
    return {bool: "i1", int: "i32", float: "fp32"}[type(value)], type(value) is int and value % 16 == 0 and not free


def machine_code(kernel, arguments, constants, config, **options):
    """SASS of a kernel as `Launcher` launches it; all pointers are multiples of 16 bytes."""
    values = [*arguments, *constants, *config[:-2]]
    signature, fixed, hints = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, values, strict=True)):
        if parameter.is_constexpr:
            signature[parameter.name], fixed[(i,)] = "constexpr", value
            continue
        free = parameter.name in (kernel.do_not_specialize or ())
        parts = [((i, j), part) for j, part in enumerate(value)] if isinstance(value, tuple) else [((i,), value)]
        kinds = []
        for place, part in parts:
            kind, aligned = specialised(part, free)
            kinds.append(kind)
            if kind == "constexpr":
                fixed[place] = part
            elif aligned:
                hints[place] = [["tt.divisibility", 16]]
        signature[parameter.name] = type(value)(*kinds) if isinstance(value, tuple) else kinds[0]
    options = {name: value for name, value in options.items() if value is not None}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=hints), target=GPUTarget("cuda", 90, 32),
        options={"num_warps": config[-2], "num_stages": config[-1], **options},
    )  # fmt: skip
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True).stdout


class Origins:
    """What the numbers in registers were made of: "shared" memory's base, "memory", "parameter", "thread"."""

    def __init__(self):
        self.of = {}  # register or spilled word -> frozenset of origins
        self.exchanged = {}  # register -> the values whose exclusive or it is: three in a row swap two registers

    def get(self, register):
        return self.of.get(register, frozenset(["unknown"]))

    def put(self, register, origins):
        self.of[register] = frozenset(origins)
        self.exchanged.pop(register, None)

    def exclusive_or(self, at, target, sources):
        for i, name in enumerate(sources):
            if name not in self.exchanged:
                self.exchanged[name] = frozenset([(at, i, self.get(name))])
        mixed = self.exchanged[sources[0]] ^ self.exchanged[sources[1]]
        self.of[target] = frozenset().union(*(origins for _, _, origins in mixed))
        self.exchanged[target] = mixed


def shifted(register, words):
    kind, number = re.match(r"(U?R)(\d+)", register).groups()
    return f"{kind}{int(number) + words}"


def words_of(operation):
    return 4 if re.search(r"\.128|\.4$", operation) else 2 if re.search(r"\.64|\.WIDE|\.2$", operation) else 1


def stray_products(sass):
    """(products, those with an operand whose address is not made of shared memory's base, or of data too)."""
    origins, products, strays = Origins(), 0, []
    for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass):
        predicated = text.startswith("@")
        text = re.sub(r"^@!?U?P\w+\s+", "", text.strip()).replace(".reuse", "")
        operation, _, rest = text.partition(" ")
        first, *others = (part.strip() for part in rest.split(","))
        sources = re.findall(r"\bU?R\d+\b", ",".join(others))
        if operation.startswith("HGMMA"):
            products += 1
            pair = re.search(r"gdesc\[(UR\d+)\]", text)[
                1
            ]  # addresses of the left operand, unless in registers, and right
            places = (2,) if re.fullmatch(r"R\d+", others[0]) else (0, 2)
            found = [origins.get(shifted(pair, place)) for place in places]
            if not all("shared" in made and not made & {"memory", "parameter"} for made in found):
                strays.append(text)
        elif operation.startswith("STL"):  # a spilled register
            for word in range(words_of(operation)):
                origins.of[(first, word)] = (
                    origins.get(shifted(sources[0], word)) if sources else frozenset(["constant"])
                )
        elif not re.fullmatch(r"U?R\d+", first):
            continue
        elif operation.startswith("LDL"):
            for word in range(words_of(operation)):
                origins.put(shifted(first, word), origins.of.get((others[0], word), frozenset(["unknown"])))
        elif operation.startswith(("LDG", "LDS")):
            for word in range(words_of(operation)):
                origins.put(shifted(first, word), ["memory"])
        elif operation.startswith(("S2R", "S2UR", "CS2R")):
            origins.put(first, ["shared" if "CgaCta" in rest else "thread"])
        elif operation.startswith(("LOP3", "ULOP3")) and "0x3c" in rest and len(sources) == 2:
            origins.exclusive_or(at, first, sources)
        else:
            wide = ".WIDE" in operation
            for word in range(words_of(operation)):
                made = {"parameter"} if "c[0x0]" in rest else set()
                for source in sources:
                    made |= origins.get(source if wide else shifted(source, word))
                if predicated:
                    made |= origins.get(shifted(first, word))
                origins.put(shifted(first, word), made - {"constant"} or {"constant"})
    return products, strays


def linear_attention(dtype, width, value_width, **options):
    """Forward and backward on two heads that share keys."""
    q, k, v = (torch.randn(1, 200, h, n, dtype=dtype) for h, n in ((2, width), (1, width), (1, value_width)))
    leaves = [x.requires_grad_() for x in (q, k, v, *([options["decay"]] if "decay" in options else []))]
    out = fa.linear_attention(q, k, v, **options)
    torch.autograd.grad(out, leaves, torch.randn_like(out))


def others(dtype, width):
    """Calls of the other ops with tensor-core products, each on heads of `width` columns."""

    def rows(*shape):
        return [torch.randn(*shape, width, dtype=dtype, requires_grad=True) for _ in range(3)]

    ends = torch.tensor([0, 300, 600], dtype=torch.int32)
    bias = torch.randn(2, 4, 300, 300, dtype=dtype, requires_grad=True)
    packed, longest = rows(600, 4), {"max_seqlen_q": 300, "max_seqlen_k": 300}
    yield fa.varlen_attention(*packed, ends, causal=True, **longest), packed
    yield fa.varlen_attention(*packed, ends, bias=bias, **longest), [*packed, bias]
    lines = rows(2, 40, 40, 4)
    yield fa.axial_attention(*lines, axis=1), lines
    images = rows(2, 320, 4)
    yield fa.chunk_hybrid_attention(*images, torch.randn(2, 320, 4), chunk=64), images
    for causal in (False, True):
        yield fa.flow_attention(*images, causal=causal), images


def main(control):
    """control: with the tiles as wide as the heads, which ptxas 12.8 gets wrong."""
    seen = []

    def call(self, programs, key, arguments, constants, config, **options):
        seen.append((self.kernel.__name__, machine_code(self.kernel, arguments, constants, config, **options)))

    def report(*words):
        for name, sass in seen:
            products, strays = stray_products(sass)
            print(*words, name, products, len(strays), *strays[:1])
        seen.clear()

    launch.Launcher.__call__ = call
    launch.processors = linear_attention_configs.processors = lambda device: 132
    dispatch.refuse_triton = lambda *arguments, **options: None  # these tensors are never read
    if control:
        padded = linear_attention_carry.padded
        linear_attention_carry.padded = lambda width, *rest: padded(width)
    with fa.use_backend("triton"):
        for shape in [(BF16, 64, 32)] if control else LINEAR:
            for options in ({"decay": -torch.rand(1, 200, 2)}, {"normalize": True, "feature_map": "elu1"}):
                linear_attention(*shape, **options)
                report(*shape, *options)
        for shape in () if control else ((BF16, 32),):  # rows of 64 bytes, beside scores of 128
            for out, leaves in others(*shape):
                torch.autograd.grad(out, leaves, torch.randn_like(out))
                report(*shape)


if __name__ == "__main__":
    main(control="control" in sys.argv)
