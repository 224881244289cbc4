"""Every kernel compiled ahead of time, without a GPU: to the instructions it is written for, and with no more register spills
than it is known to have.

The calls in CASES are recorded instead of launched, so what is compiled is what the host code launches: the same argument
types, the same constants, the same options. A new kernel is a new row. All are compiled for capability 9.0, in the variants
that differ most (rows and columns, with corrections and without), not in every combination of recipe, dtype and shape.
Operands, codes, dequantisation, error statistics and decode products are compiled for 8.0 too; what converts to FP8 needs 8.9,
and grouped products TMA, which is 9.0's. The native product is compiled for 10.0 and 12.0, and for 9.0 in BF16.

What compilation cannot prove: that the numbers are right (`tests/kernels`, on a CPU under the interpreter or on a GPU), and how
fast they come. The native product (capability 10 and 12) has run on no GPU that has the instruction: what a scale byte of 255
does in the tensor core, how it rounds its sums, and whether the copies keep up with it, only such a GPU can tell.

Triton's conditions for the native product, found by compiling with 3.6 and 3.9, which agree: on capability 10.0 a tile of at
least 128 rows, 16 columns and 64 elements of K, and 4 or 8 warps. With 64 rows, 8 columns or 2 warps it multiplies in BF16
without a word. TMA is no condition, nor is the order of the scales, but only scales in the tensor core's order are copied by it
(`tcgen05.cp`); scales in rows pass byte by byte through registers. On capability 12.0 every tile tried is native, on 12.1 only
from Triton 3.7 on (its pull request 10010). 3.6 writes the instruction `.scale_vec::2X`, 3.9 `.block32`: synonyms.
"""

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch

# ruff: noqa: E402
triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, which the interpreter does not", allow_module_level=True)

from mxfp4_kernels.attention.decode import attend
from mxfp4_kernels.container.triton import containers
from mxfp4_kernels.error_stats.triton import partial_sums
from mxfp4_kernels.matmul import fp8, grouped, native, w8a8
from mxfp4_kernels.matmul.decode import Plan, decode_product
from mxfp4_kernels.matmul.grouped_operands import Experts, Tokens
from mxfp4_kernels.quantize import search
from mxfp4_kernels.quantize.dequantize import dequantize
from mxfp4_kernels.quantize.triton import operand, packed
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from mxfp4_rl import QuantRecipe
from mxfp4_rl.kv_cache.blocks import Blocks, Stored
from mxfp4_rl.quant.tensor import MXFP4Tensor

PLAIN, MBS, BOTH, DRAWN = (QuantRecipe.parse(name) for name in ("mxfp4", "mxfp4+mbs", "mxfp4+mbs+of0.5", "mxfp4+sr"))
MBS32, MBS256 = (QuantRecipe.parse(name) for name in ("mxfp4+mbs32", "mxfp4+mbs256"))
MMA, WGMMA, WGMMA_FP8 = r"mma\.sync\S*bf16", r"wgmma\S*bf16", r"wgmma\S*e4m3"
TO_FP8 = r"cvt\.rn\.satfinite\.e4m3x2\.f32"
BLOCK_SCALED = {  # by compute capability
    100: r"tcgen05\.mma\.cta_group::1\.kind::mxf4\.block_scale\.(scale_vec::2X|block32)",
    120: r"mma\.sync\S*kind::mxf4\S*\.block_scale\.scale_vec::2X\.f32\.e2m1\.e2m1\.f32\.ue8m0",
}
EMULATED = r"mma\S*\.(bf16|f16|tf32)|kind::(f16|tf32)"
_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8",
    torch.bool: "i1",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass
class Case:
    """A call of host code, and what its kernels have to become.

    Attributes:
        call: launches kernels; on tensors of the device "meta", which have shapes and strides and no numbers.
        capabilities: to compile for, 90 is the H100.
        expect: regular expressions for the PTX, by kernel.
        spilling: kernels that do spill (repairs, which are rare, and those that hold two programs a multiprocessor),
            and the most instructions that may: half as many again as the worse of Triton 3.6 and 3.9 writes.
    """

    name: str
    call: Callable[[], object]
    capabilities: tuple[int, ...] = (90,)
    expect: dict[str, str] = field(default_factory=dict)
    spilling: dict[str, int] = field(default_factory=dict)


@dataclass
class Launch:
    """A kernel with its signature, constants and options."""

    kernel: object
    signature: dict[str, str]
    constants: dict[str, object]
    divisible: list[str]  # pointers and numbers that are multiples of 16
    options: dict[str, object]


@dataclass
class Compiled:
    """The PTX, and the file of the machine code."""

    ptx: str
    cubin: Path

    def spills(self) -> int:
        """Instructions that store registers to local memory, or load them."""
        stack = re.search(r"STACK:(\d+)", self._printed("cuobjdump", "--dump-resource-usage"))
        if stack[1] == "0":  # disassembling takes a thousand times as long as asking
            return 0
        sass = self._printed("nvdisasm", "-c")
        assert "EXIT" in sass
        return len(re.findall(r"\b(?:STL|LDL)\b", sass))

    def _printed(self, tool: str, option: str) -> str:
        path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
        return subprocess.run([path, option, self.cubin], capture_output=True, text=True, check=True).stdout


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def quantised(rows, length, residual=False):
    def one_pass():
        return (
            meta(rows, length // 2, dtype=torch.uint8),
            meta(rows, length // 32, dtype=torch.uint8),
            torch.Size((rows, length)),
            1,
        )

    second = MXFP4Tensor(*one_pass()) if residual else None
    return native.Operand(MXFP4Tensor(*one_pass(), residual=second, alpha=0.5 if residual else 0.0))


def tensor(rows, length, axis=1, macro_size=0):
    """Of `rows` quantised rows of `length`, with a second pass and a factor every `macro_size` elements if that is not 0."""

    def one_pass(**more):
        codes, scales = (meta(rows, length // n, dtype=torch.uint8) for n in (2, 32))
        return MXFP4Tensor(codes, scales, torch.Size((rows, length) if axis else (length, rows)), axis, **more)

    if not macro_size:
        return one_pass()
    macro = meta(rows, length // macro_size, dtype=torch.float32)
    return one_pass(macro=macro, macro_size=macro_size, residual=one_pass(), alpha=0.5)


def native_product(capability, N, residual=False, bias=None, out_dtype=torch.bfloat16):
    a, b = quantised(512, 4096, residual), quantised(N, 4096)
    return native.multiply(a, b, out_dtype, bias, **native.tiling(capability, N))


def held(width, block, name="nvfp4", heads=8, room=8):
    """A KV cache of 4 sequences."""
    recipe, lead = QuantRecipe.parse(name), (4, heads, room)

    def blocks(rows, length):
        sizes = (rows, length // 2), (rows, length // recipe.block_size), ()
        stored = [meta(*lead, *size, dtype=torch.uint8) for size in sizes]
        return Blocks(*stored[:2], stored[2] if name == "nvfp4" else None)

    dense = [meta(4, heads, n, width) for n in (4, 4, block, block)]
    return Stored(blocks(block, width), blocks(width, block), *dense, *(meta(4, dtype=torch.int32) for _ in range(2)), recipe)


CASES = [
    Case("operand", lambda: operand(meta(512, 4096), PLAIN, 1, torch.bfloat16), (80, 90)),
    Case("operand, columns", lambda: operand(meta(512, 4096), PLAIN, 0, torch.bfloat16), (80, 90)),
    Case("operand, both corrections", lambda: operand(meta(512, 4096), BOTH, 1, torch.bfloat16)),
    Case("operand, stochastic", lambda: operand(meta(512, 4096), DRAWN, 1, torch.bfloat16)),
    Case("codes", lambda: packed(meta(512, 4096), PLAIN, 1), (80, 90)),
    Case("codes, columns, both corrections", lambda: packed(meta(512, 4096), BOTH, 0)),
    *(
        Case(f"{what}, {words}", lambda call=call, words=words: call(meta(512, 4096), QuantRecipe.parse(words), 1), (80, 90))
        for words in ("nvfp4", "nvfp4+four-over-six", "nvfp4+search", "mxfp4+search")
        for what, call in (("codes", search.packed), ("operand", partial(search.operand, dtype=torch.bfloat16)))
    ),
    *(
        Case(
            f"codes of weighed errors, {words}",
            lambda words=words: search.packed(
                meta(512, 4096), QuantRecipe.parse(words), 1, importance=meta(4096, dtype=torch.float32)
            ),
        )
        for words in ("nvfp4+search", "mxfp4+search")
    ),
    Case(
        "containers of whole rows", lambda: containers(meta(512, 4096), PLAIN, whole_rows=True), expect={"_rows_kernel": TO_FP8}
    ),
    Case(
        "containers of whole rows, long, and operand",
        lambda: containers(meta(512, 14336), PLAIN, None, torch.bfloat16, whole_rows=True),
        expect={"_rows_kernel": TO_FP8},
    ),
    Case(
        "containers of whole rows and columns",
        lambda: containers(meta(512, 4096), PLAIN, PLAIN, whole_rows=True),
        expect={"_tile_kernel": TO_FP8},
    ),
    Case(
        "product of whole rows",
        lambda: fp8.product(*(fp8.operands(meta(n, 4096), PLAIN, whole_rows=True)[0] for n in (512, 1024)), backend="triton"),
        expect={"_product_kernel": WGMMA_FP8, "_repair_kernel": WGMMA},
    ),
    Case(
        "containers of groups, rows and columns",
        lambda: containers(meta(512, 4096), rows=PLAIN, columns=PLAIN),
        expect={"_tile_kernel": TO_FP8},
    ),
    Case(
        "containers of groups, macro blocks",
        lambda: containers(meta(512, 4096), rows=MBS, columns=MBS, operand_dtype=torch.bfloat16),
        expect={"_tile_kernel": TO_FP8},
    ),
    Case(
        "containers of groups, macro blocks of 32",
        lambda: containers(meta(512, 4096), rows=MBS32, operand_dtype=torch.bfloat16),
        expect={"_tile_kernel": TO_FP8},
    ),
    Case(
        "product of groups",
        lambda: fp8.product(*(fp8.operands(meta(n, 4096), rows=MBS)[0] for n in (512, 1024)), backend="triton"),
        expect={"_product_kernel": WGMMA_FP8},
        spilling={"_repair_kernel": 16},  # none with Triton 3.6
    ),
    Case(
        "containers of groups and their product, macro blocks of 256",
        lambda: fp8.product(*fp8.operands(meta(4096, 4096), MBS256, MBS256, torch.bfloat16)[:2], backend="triton"),
        expect={"_tile_kernel": TO_FP8, "_product_kernel": WGMMA_FP8},
        spilling={"_repair_kernel": 1344},
    ),
    Case("W8A8", lambda: w8a8.quantize_rows(meta(512, 4096)), expect={"_rows_kernel": TO_FP8}),
    Case("W8A8, long rows", lambda: w8a8.quantize_rows(meta(512, 20480)), expect={"_rows_kernel": TO_FP8}),
    Case(
        "W8A8, columns",
        lambda: w8a8.quantize_rows(meta(512, 4096).t()),
        expect={"_columns_kernel": TO_FP8},
    ),
    Case("dequantise", lambda: dequantize(tensor(512, 4096), torch.bfloat16), (80, 90)),
    Case("dequantise, columns, both corrections", lambda: dequantize(tensor(4096, 512, 0, 128), torch.bfloat16)),
    Case(
        "error statistics",
        lambda: partial_sums(meta(512, 4096), PLAIN),
        (80, 90),
        spilling={"_sums_kernel": 176},
    ),
    Case(
        "error statistics, columns",
        lambda: partial_sums(meta(512, 4096).t(), PLAIN),
        spilling={"_sums_kernel": 152},
    ),
    Case("decode, one row", lambda: decode_product(meta(1, 4096), tensor(4096, 4096)), (80, 90), {"dot_kernel": MMA}),
    Case("decode, 64 rows", lambda: decode_product(meta(64, 4096), tensor(4096, 4096)), expect={"dot_kernel": WGMMA}),
    Case(
        "decode, 64 rows, no wgmma",
        lambda: decode_product(meta(64, 4096), tensor(4096, 4096)),
        (80,),
        {"dot_kernel": MMA},
        spilling={"dot_kernel": 102},
    ),
    Case(
        "decode, one row, both corrections",
        lambda: decode_product(meta(1, 4096), tensor(4096, 4096, macro_size=128)),
        expect={"dot_kernel": MMA},
    ),
    Case(
        "decode, 64 rows, in quarters",
        lambda: decode_product(meta(64, 4096), tensor(4096, 4096), how=Plan(128, 4, False, 2, True)),
        (80, 90),
        {"dot_kernel": MMA},
    ),
    Case(
        "decode, 64 rows, in quarters, both corrections",
        lambda: decode_product(meta(64, 4096), tensor(4096, 4096, macro_size=128), how=Plan(128, 4, False, 2, True)),
        expect={"dot_kernel": MMA},
        spilling={"dot_kernel": 5},
    ),
    Case(
        "decode, 64 rows, both corrections, macro blocks of 32",
        lambda: decode_product(meta(64, 4096), tensor(4096, 4096, macro_size=32)),
        expect={"dot_kernel": WGMMA},
        spilling={"dot_kernel": 92},
    ),
    Case(
        "grouped product",
        lambda: grouped.grouped_product(meta(2048, 4096), meta(8, 1024, 4096), meta(9, dtype=torch.int32)),
        expect={"_product_kernel": WGMMA},
    ),
    Case(
        "grouped product, transposed weights",
        lambda: grouped.grouped_product(meta(2048, 4096), meta(8, 4096, 1024).transpose(1, 2), meta(9, dtype=torch.int32)),
        expect={"_product_kernel": WGMMA},
    ),
    Case(
        "grouped product of containers",
        lambda: grouped.grouped_product(
            fp8.operands(meta(2048, 4096), PLAIN, whole_rows=True)[0],
            Experts(meta(8, 1024, 4096), PLAIN),
            meta(9, dtype=torch.int32),
        ),
        expect={"_product_kernel": WGMMA_FP8},
        spilling={"_product_kernel": 72},
    ),
    Case(
        "grouped wgrad",
        lambda: grouped.grouped_wgrad(meta(2048, 1024), meta(2048, 4096), meta(9, dtype=torch.int32)),
        expect={"_wgrad_kernel": WGMMA},
    ),
    Case(
        "grouped wgrad of containers",
        lambda: grouped.grouped_wgrad(
            *(Tokens(meta(2048, n), PLAIN, meta(9, dtype=torch.int32)) for n in (1024, 4096)), meta(9, dtype=torch.int32)
        ),
        expect={"_tokens_kernel": TO_FP8, "_wgrad_kernel": WGMMA_FP8},
        spilling={"_wgrad_kernel": 123},
    ),
    *(
        Case(
            f"attention, {name}, heads of {width}, blocks of {block}",
            lambda name=name, width=width, block=block: attend(meta(4, 32, width), held(width, block, name), 0.1),
            capabilities,
            {"partial_kernel": MMA},
        )
        for name, width, block, capabilities in (
            ("nvfp4", 64, 16, (80, 90)),
            ("nvfp4", 128, 64, (80, 90)),
            ("mxfp4", 128, 64, (90,)),
            ("nvfp4", 256, 64, (90,)),
        )
    ),
    Case("native product, emulated", lambda: native_product(9, 1024), expect={"_product_kernel": WGMMA}),
]


def recorded(call: Callable[[], object], monkeypatch) -> list[Launch]:
    """The launches of a call, none of which happens."""
    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        names = [p.name for p in kernel.params]
        given = dict(zip(names, args)) | {name: kwargs.pop(name) for name in names if name in kwargs}
        launches.append(_launch(kernel, given, kwargs))

    with monkeypatch.context() as patch:
        patch.setattr(triton.runtime.jit.JITFunction, "run", record)
        call()
    return launches


def _launch(kernel, given, options) -> Launch:
    signature, constants, divisible = {}, {}, []
    for p in kernel.params:
        value = given.get(p.name, p.default if p.has_default else None)
        if p.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not p.do_not_specialize):
            signature[p.name], constants[p.name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[p.name] = f"tensordesc<{_TYPES[value.base.dtype]}[{','.join(map(str, value.block_shape))}]>"
        elif isinstance(value, torch.Tensor):
            signature[p.name] = f"*{_TYPES[value.dtype]}"
            divisible.append(p.name)
        elif isinstance(value, float):
            signature[p.name] = "fp32"
        else:
            signature[p.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible += [p.name] if value % 16 == 0 and not p.do_not_specialize else []
    return Launch(kernel, signature, constants, divisible, options)


def compiled(launch: Launch, capability: int, tmp_path: Path) -> Compiled:
    at = {name: (i,) for i, name in enumerate(launch.signature)}
    source = triton.compiler.ASTSource(
        fn=launch.kernel,
        signature=launch.signature,
        constexprs={at[name]: value for name, value in launch.constants.items()},
        attrs={at[name]: [["tt.divisibility", 16]] for name in launch.divisible},
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    return Compiled(built.asm["ptx"], cubin)


@pytest.mark.parametrize(
    ("case", "capability"),
    [pytest.param(case, capability, id=f"{case.name}, sm_{capability}") for case in CASES for capability in case.capabilities],
)
def test_kernels_compile_to_the_instructions_they_are_written_for(case, capability, tmp_path, monkeypatch):
    launches = recorded(case.call, monkeypatch)
    assert launches and case.expect.keys() <= {launch.kernel.__name__ for launch in launches}
    for launch in launches:
        built = compiled(launch, capability, tmp_path)
        assert re.search(case.expect.get(launch.kernel.__name__, ""), built.ptx), launch.kernel.__name__
        most, spills = case.spilling.get(launch.kernel.__name__, 0), built.spills()
        assert spills <= most, f"{launch.kernel.__name__} spills registers in {spills} places, more than {most}"


@pytest.mark.parametrize(("capability", "N", "residual"), [(100, 4096, False), (100, 128, True), (120, 4096, False)], ids=str)
def test_the_native_product_is_native(capability, N, residual, tmp_path, monkeypatch):
    bias = meta(N, dtype=torch.float32)
    (launch,) = recorded(lambda: native_product(capability // 10, N, residual, bias), monkeypatch)
    built = compiled(launch, capability, tmp_path)
    assert re.search(BLOCK_SCALED[capability], built.ptx)
    assert not re.search(EMULATED, built.ptx)
    assert "cp.async.bulk.tensor" in built.ptx and "ld.global.b8" not in built.ptx, "codes and scales come by TMA"
    assert capability != 100 or "tcgen05.cp" in built.ptx, "and the tensor core takes the scales from there"
    assert capability != 100 or not built.spills()  # for 12.0 Triton 3.6 puts 8 bytes on the stack
