"""``python -m benchmarks resources [--out FILE]``: what the Triton kernels compile to, without a GPU.

Compiles the kernels ahead of time for sm_80 and sm_90, disassembles them with the tools of Triton's wheel,
and records registers, spilled bytes and shared memory; of the main loop of products, machine instructions
per weight and thread, what multiplies (HMMA or HGMMA), asynchronous copies of 16 bytes, and stores to shared
memory, where weights have no business. The committed table is what tests/backends/test_triton_resources.py
holds kernels to.

They compile for AMD, too, where the table says nothing and that test holds them to spilling nothing, to the
64 KiB of shared memory (LDS) that a workgroup has there, and some to the instructions that they took.
Triton then has to be imported as for AMD: with ``torch.version.hip`` set.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.machine_code import hazards, loops, run_tool, write_table
from nmkern import stream
from nmkern.backends.triton import configs, dense, flynet, launch, sparse

_POINTERS = {
    *("x", "in_gain", "out_gain", "bias", "context", "y", "table", "partial", "other", "sums", "products"),
    *("columns", "counts", "starts", "order", "total", "mean", "gain", "d_logits", "out"),
    "row_scale",
}
_WIDE = {"shift"}  # integers that pass 2^31
_ALIGNED = {"N", "o_skip"}  # multiples of 16, as of most layers
_INPUTS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
_TYPES = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}


# A compute capability of NVIDIA's, or the name of an AMD GPU.
Arch = int | str


def _name_of(arch: Arch) -> str:
    return arch if isinstance(arch, str) else f"sm_{arch}"


def variants(*archs: Arch) -> dict[str, dict[str, Any]]:
    """Name of each kernel that is kept in the table, and what it is compiled for (default: the table's)."""
    found: dict[str, dict[str, Any]] = {}

    def product(arch: Arch, family: str, batch: int, dtype: str, **also: bool) -> None:
        for transposed in (False, True):
            said = "".join(f" {word}" for word in also)
            way = "transposed" if transposed else "forward"
            found[f"{_name_of(arch)} {family} {way} {batch} {dtype}{said}"] = {
                **{"arch": arch, "family": family, "transposed": transposed, "batch": batch, "dtype": dtype},
                **also,
            }

    for arch in archs or (80, 90):
        for family in stream.DENSE_FAMILIES:
            for batch, dtypes in (*_PRODUCTS.items(), *(_UNIFORM.items() if family == "uniform" else ())):
                for dtype in dtypes:
                    product(arch, family, batch, dtype)
        product(arch, "uniform", 16, "bfloat16", gained=True)
        for family in ("uniform", "normal"):
            product(arch, family, 128, "float32", tf32=True)
        for name, build in _OTHERS.items():
            found[f"{_name_of(arch)} {name}"] = {"arch": arch, "build": build}
    return found


def measure(variant: dict[str, Any]) -> dict[str, float | str]:
    """The row of a variant in the table."""
    weights = None
    if "build" in variant:
        kernel, given, pointers, warps = variant["build"]
        compiled = _compile(kernel, given, pointers, variant["arch"], warps)
    else:
        compiled, weights = _compile_product(**variant)
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        used = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size): +(\d+)", code))
        row: dict[str, float | str] = {
            "registers": int(used["vgpr_count"]),
            "spilled_bytes": int(used["private_segment_fixed_size"]),
            "shared_bytes": compiled.metadata.shared,
        }
        if weights is not None:
            threads = compiled.metadata.warp_size * compiled.metadata.num_warps
            loop = max(loops(code, amd=True), key=len)
            row["instructions_per_weight"] = round(len(loop) * threads / weights, 2)
        return row
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run_tool("cuobjdump", "-res-usage", file.name)
        code = "" if weights is None else run_tool("nvdisasm", "-c", file.name)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match is not None, usage
    row = {
        "registers": int(match[1]),
        "spilled_bytes": int(match[2]),  # the stack: nothing else of these kernels lives there
        "shared_bytes": compiled.metadata.shared,
    }
    if weights is not None:
        loop = max(loops(code), key=len)
        operations = [re.sub(r"^@!?U?P\w+ +", "", instruction).split()[0] for instruction in loop]
        multiplying = {operation.partition(".")[0] for operation in operations if "MMA." in operation}
        row["instructions_per_weight"] = round(len(loop) * 32 * compiled.metadata.num_warps / weights, 2)
        row["multiplied_by"] = " ".join(sorted(multiplying))
        row["hazards"] = len(hazards(loop))  # see nmkern.backends.triton.launch.stages
        row["copies_of_16_bytes"] = sum(re.match(r"LDGSTS.*\.128", name) is not None for name in operations)
        row["stores_to_shared"] = sum(name.startswith("STS") for name in operations)
    return row


def _compile(
    kernel,
    given: dict[str, Any],
    pointers: dict[str, str],
    arch: Arch,
    warps: int,
    stages: int = 2,
    **options: Any,
):
    """Compile for int32 sizes; ``given`` are constants, pointers that are not given are None."""
    signature, constants = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in given or (name in _POINTERS and name not in pointers):
            signature[name] = "constexpr"
            constants[(place,)] = given.get(name)
        else:
            plain = "fp32" if name.endswith("factor") else "i64" if name in _WIDE else "i32"
            signature[name] = pointers.get(name, plain)
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (name in _ALIGNED and signature[name] != "constexpr")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options |= {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    return triton.compile(source, target=_target(arch), options=options)


def _target(arch: Arch) -> GPUTarget:
    if isinstance(arch, str):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    return GPUTarget("cuda", arch, 32)


def _major(arch: Arch) -> int:
    """As PyTorch tells it: of gfx942, 9."""
    return int(arch[3:-2]) if isinstance(arch, str) else arch // 10


def _compile_product(
    arch: Arch,
    family: str,
    transposed: bool,
    batch: int,
    dtype: str,
    gained: bool = False,
    tf32: bool = False,
    tile: configs.Tile | None = None,
):
    tag = stream.DENSE_FAMILIES[family].tag
    split = 2 if dtype == "float32" and not tf32 else 1
    scaled = gained or dtype == "float32"
    parts = split if scaled or batch > configs.DIRECT_ROWS else 0
    tile = tile or configs.tile_of(tag, transposed, batch, split, _target(arch).warp_size)
    step = configs.REDUCTION[tag][transposed]
    operand = "float16" if scaled else dtype
    partial = batch <= configs.DIRECT_ROWS  # these are split, others modulate in the kernel
    given = {
        **{"stride_xr": 1, "TAG": tag, "TRANSPOSED": transposed, "PARTIAL": partial, "PARTS": parts},
        **{"CHAINS": split > 1, "DTYPE": _TYPES[operand], "FIELDS": tile.fields},
        **{"BO": tile.outputs, "BR": step},
        **{"BM": tile.batch, "WARPS": tile.warps, "PIECES": launch.pieces(_major(arch), tile.batch)},
    }
    pointers = {
        "x": _INPUTS[operand if parts else dtype],
        "y": "*fp32" if partial else _INPUTS[dtype],
        "table": _INPUTS[operand],
    }
    if not partial:
        pointers |= {"out_gain": "*fp32", "bias": "*fp32"}
    if scaled:
        pointers |= {"row_scale": "*fp32"}
    stages = launch.stages(tile, _major(arch))
    compiled = _compile(
        dense.product_kernel, given, pointers, arch, tile.warps, stages, **launch.product_options()
    )
    return compiled, tile.outputs * step


def _prepare(dtype: str, gained: bool = False, bank: bool = False):
    matrix = (stream.UNIFORM.tag, 0, 0, 0, 8192, 8192, False)
    plan = launch._plan(matrix, 128, _TORCH[dtype], gained, False, False)
    operand = next(name for name, torchs in _TORCH.items() if torchs == plan.table)
    given = {"stride_xr": 1, **plan.prepare.constants}
    pointers = {"x": _INPUTS[dtype], "out": _INPUTS[operand]}
    if plan.scaled:
        given |= {"stride_if": 1, "IN_BANK": bank}
        pointers |= {"row_scale": "*fp32"} | ({"in_gain": "*fp32"} if gained else {})
    if bank:
        pointers |= {"context": "*i64"}
    return plan.prepare.kernel, given, pointers, given["num_warps"]


def _finish(grad: bool):
    given = {"OUT_BANK": True, "BIAS_BANK": True, "BM": launch.FINISH_ROWS, "BN": launch.FINISH_COLS}
    pointers = {"partial": "*fp32", "y": "*bf16", "out_gain": "*fp32", "bias": "*fp32", "context": "*i64"}
    if grad:
        pointers |= {"other": "*bf16", "sums": "*fp32", "order": "*i64", "starts": "*i64"}
    return dense.finish_kernel, given, pointers, 4


def _draw(lanes: int, counted: bool = False, held: bool = True):
    given = {"HELD": held, "BR": sparse.tile_rows(lanes), "BF": lanes}
    pointers = {"columns": "*i32", **({"counts": "*i32"} if counted else {})}
    return sparse.draw_kernel, given, pointers, 4


def _gather(dtype: str):
    given = {"stride_xm": 1, "BN": sparse.OUTPUTS, "BM": sparse.BATCH}
    return sparse.gather_kernel, given, {"x": _INPUTS[dtype], "columns": "*i32", "y": _INPUTS[dtype]}, 4


def _scatter(dtype: str):
    given = {"stride_xm": 1, "ADD": True, "DONE": True, "BN": sparse.OUTPUTS, "BM": sparse.BATCH}
    pointers = {"x": _INPUTS[dtype], "starts": "*i32", "order": "*i64", "total": "*fp32", "y": _INPUTS[dtype]}
    return sparse.scatter_kernel, given, pointers, 4


def _flynet(family: str, dtype: str, classes: int, rows: int, bank: bool = False):
    """The kernels of a forward and of a backward sweep."""
    x = {"x": _INPUTS[dtype], "columns": "*i32", "mean": "*fp32"}
    decoder = (stream.DENSE_FAMILIES[family].tag, 0, 0, 0, classes)
    plan = flynet.plan_of(decoder, 10**4, rows, _TORCH[dtype], True)
    forward = plan.logits.constants
    warps = forward["num_warps"]
    back = flynet.plan_of(decoder, 10**4, rows, _TORCH[dtype], False).gain_grad.constants
    name = f"{family} {rows} {classes} {dtype}{' bank' * bank}"
    operand = {theirs: name for name, theirs in _TYPES.items()}
    to_logits = {"stride_gf": 1, "BANK": bank, **forward}
    pointers = {**x, "gain": "*fp32", "partial": "*fp32", "table": _INPUTS[operand[forward["DTYPE"]]]}
    to_gain = {"stride_dc": 1, "EACH": False, **back}
    back_pointers = {
        **x,
        "d_logits": _INPUTS[dtype],
        "out": "*fp32",
        "table": _INPUTS[operand[back["DTYPE"]]],
    }
    if bank:
        pointers["context"] = "*i64"
        back_pointers["starts"] = "*i64"
    return {
        f"flynet logits {name}": (flynet.logits_kernel, to_logits, pointers, warps),
        f"flynet gain_grad {name}": (flynet.gain_grad_kernel, to_gain, back_pointers, warps),
    }


# Batches and dtypes that products of every family are compiled for, and those of uniform alone.
_PRODUCTS = {16: ("bfloat16", "float32"), 64: ("bfloat16",), 128: ("bfloat16", "float32")}
_UNIFORM = {32: ("bfloat16",), 128: ("float16",)}
_TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Kernel, constants and pointers of the kernels that do not follow from a dense product.
_OTHERS = {
    "prepare bfloat16": _prepare("bfloat16"),
    "prepare bfloat16 gained": _prepare("bfloat16", gained=True),
    "prepare bfloat16 bank": _prepare("bfloat16", gained=True, bank=True),
    "prepare float32": _prepare("float32"),
    "finish": _finish(grad=False),
    "finish gain_grad": _finish(grad=True),
    "draw 8": _draw(8),
    "draw 8 counted": _draw(8, counted=True),
    "draw 2048": _draw(sparse.HELD),
    "draw in memory": _draw(sparse.HELD, held=False),
    **{f"gather {dtype}": _gather(dtype) for dtype in ("bfloat16", "float32")},
    **{f"scatter {dtype}": _scatter(dtype) for dtype in ("bfloat16", "float32")},
    "flynet mean": (
        flynet.mean_kernel,
        {"BI": 64, "BM": 16},
        {"x": "*fp32", "counts": "*i32", "mean": "*fp32"},
        4,
    ),
    **_flynet("uniform", "float32", 10, 128),
    **_flynet("uniform", "float32", 10, 128, bank=True),
    **_flynet("uniform", "bfloat16", 10, 16),
    **_flynet("uniform", "float16", 300, 128),
    **_flynet("rademacher", "float32", 64, 128),
    **_flynet("normal", "float32", 64, 128),
    **_flynet("normal", "bfloat16", 10, 128),
}


def run(out: Path) -> None:
    write_table(
        out, {"triton": triton.__version__}, {name: measure(variant) for name, variant in variants().items()}
    )
