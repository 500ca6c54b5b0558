"""Launches of Triton's kernels where there is no GPU, in a process of its own: see test_triton_variant.py.

    python simulated_launches.py CHECK [cuda | hip]

Triton binds, specializes and chooses as ever, for the GPU named. Its compiler is replaced by one that only
counts, and what would launch a kernel writes down what it got: ``launched``. Tensors lie on the CPU.
Prints "passed".
"""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
from formula import T, exact_matrix
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from nmkern import RandomMatrix
from nmkern.backends import primitives
from nmkern.backends.triton import dense, flynet, launch, sparse, variant

TARGETS = {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}
KERNELS = (
    *(dense.prepare_kernel, dense.prepare_rows_kernel, dense.product_kernel, dense.finish_kernel),
    *(sparse.draw_kernel, sparse.gather_kernel, sparse.scatter_kernel),
    *(flynet.mean_kernel, flynet.logits_kernel, flynet.gain_grad_kernel),
)


class Driver:
    """Of two devices of one kind, whose streams are 70 and 71."""

    device = 0

    def __init__(self, target):
        self.target = target

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 70 + device

    def get_current_target(self):
        return self.target


launched: list[SimpleNamespace] = []
chosen = 0  # by Triton, not by what is known
_run = triton.JITFunction.run


def counting_run(self, *args, **options):
    global chosen
    chosen += 1
    return _run(self, *args, **options)


class Compiled(CompiledKernel):
    count = 0

    def __init__(self, src, target, options):
        Compiled.count += 1
        self.src, self.function, self.packed_metadata = src, Compiled.count, ("packed", Compiled.count)
        self.name, self.metadata, self.module, self._run = src.fn.__name__, None, None, self.launch

    def _init_handles(self):
        pass

    def launch(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        assert (function, packed) == (self.function, self.packed_metadata)
        assert len(args) == len(self.src.fn.arg_names)
        if enter is not None:
            enter(metadata)
        launched.append(SimpleNamespace(kernel=self.name, function=function, of=(x, y, z, stream), args=args))
        if leave is not None:
            leave(metadata)


def seen(call):
    """What a call launches, and how often Triton had to choose: comparable to that of another."""
    before, count = len(launched), chosen
    call()
    found = [(one.kernel, one.function, one.of, tuple(map(shown, one.args))) for one in launched[before:]]
    return found, chosen - count


def shown(arg):
    # What the call itself allocates lies elsewhere each time.
    return (arg.dtype, arg.shape, arg.stride()) if torch.is_tensor(arg) else arg


def calls():
    """Calls of every launcher, which between them launch every kernel."""
    matrix = exact_matrix("uniform", 48, 4100)
    args, back = primitives.dense_args(matrix), primitives.dense_args(matrix[:, :60].T)
    found = {}
    for rows in (1, 20, 300):
        gain, out, bias = torch.ones(1, 4100), torch.ones(1, 48), torch.ones(T, 48)
        context = torch.zeros(rows, dtype=torch.int64)
        x, other = torch.ones(rows, 4100, dtype=torch.bfloat16), torch.ones(rows, 48, dtype=torch.bfloat16)
        found |= {
            f"{rows}": partial(launch.modulated_matmul, x, None, None, None, None, *args),
            f"{rows} gained": partial(launch.modulated_matmul, x, gain, out, bias, context, *args),
            f"{rows} back": partial(launch.modulated_matmul, other, None, None, gain[:, :60], None, *back),
            f"{rows} gradient": partial(
                *(launch.modulated_matmul_gain_grad, x, gain, out, other, context, T, True, *args)
            ),
        }
    encoder = RandomMatrix(640, 60, seed=1, family="sparse", fan_in=7)
    drawing = primitives.flynet_args(encoder, exact_matrix("normal", 10, 640))
    for rows in (1, 40):
        x, hidden, d_logits = torch.ones(rows, 60), torch.ones(rows, 640), torch.ones(rows, 10)
        for transposed, given in ((False, x), (True, hidden)):
            projection = (*drawing[:7], transposed, drawing[7])
            found[f"sparse {rows} {transposed}"] = partial(sparse.sparse_matmul, given, *projection)
        found[f"logits {rows}"] = partial(flynet.flynet_logits, x, torch.ones(1, 640), None, *drawing)
        found[f"gain_grad {rows}"] = partial(flynet.flynet_gain_grad, x, d_logits, None, 1, *drawing)
    return found


def check_what_is_known_launches_what_triton_would(target):
    """Same kernels, grids, streams and arguments as ``kernel[grid](...)``, which is not asked again."""
    launches = calls()
    want = {}
    for kernel in KERNELS:
        kernel.add_pre_run_hook(lambda *_, **__: None)  # such a hook must see every launch
    for name, call in launches.items():
        seen(call)
        want[name], asked = seen(call)
        assert asked == len(want[name]) > 0, name
    for kernel in KERNELS:
        kernel.pre_run_hooks.clear()
    for name, call in launches.items():
        assert seen(call)[0] == want[name], name  # of which some kernels are known from other calls
        assert seen(call) == (want[name], 0), name
    assert {one[0] for found in want.values() for one in found} == {kernel.__name__ for kernel in KERNELS}


def check_the_key_tells_apart_what_triton_does(target):
    """A call after one that differs in a single thing launches what Triton chooses for it."""
    memory = torch.zeros(64)
    two_bytes_on = torch.zeros(64, dtype=torch.bfloat16)[1:].view(torch.float16)
    tensors = [
        *(None, memory, memory[1:], memory[4:], torch.zeros(8, dtype=torch.int64)),
        *(torch.zeros(8, dtype=torch.bfloat16), two_bytes_on),
        *(torch.empty(size, device="meta") for size in (2**29 - 1, 2**29)),  # bytes: below 2^31, 2^31
    ]
    numbers = [2, 1, 0, 3, 16, 17, 2**31 - 1, 2**31, 2**31 + 16, 2**40, -1, -16, -(2**31) - 1]
    # The last as some, without a few constants.
    one = variant.Variant(sparse.gather_kernel, BN=32, num_warps=4, enable_fp_fusion=False)
    names, constant = sparse.gather_kernel.arg_names, 14
    assert names[constant:] == ["BN", "BM"]
    base = [memory, memory, memory, 0.5, *[2] * (constant - 4), 16]
    others = [[tensors[i % 9] if i < 3 else 0.25 if i == 3 else 2 for i in range(constant)] + [16]]
    for place in range(constant + 1):
        options = numbers if place < constant else [32]
        if place < 4:
            options = [1.0, 0.0] if place == 3 else tensors
        others += [[*base[:place], option, *base[place + 1 :]] for option in options]

    def launch_by_key(given):
        one(7, tuple(given[:4]), tuple(given[4:constant]), BM=given[constant])
        return launched[-1].function

    def launch_by_triton(given):
        constants = {"BM": given[constant], "BN": 32, "num_warps": 4, "enable_fp_fusion": False}
        sparse.gather_kernel[(7,)](*given[:constant], **constants)
        return launched[-1].function

    def agree(given):
        assert launch_by_key(given) == launch_by_triton(given), given
        before = chosen
        assert launch_by_key(given) == launched[-1].function
        assert chosen == before, given  # the second time it is known

    want = launch_by_triton(base)
    functions = set()
    for other in others:
        agree(base)
        assert launched[-1].function == want
        agree(other)
        functions.add(launched[-1].function)
    assert len(functions) > 20
    agree(base)
    for settings, name, value in (
        (driver.active, "device", 1),
        (knobs.runtime, "debug", True),
        (knobs.compilation, "instrumentation_mode", "anything"),
        (knobs.compilation, "fpsan_homomorphic_casts", True),
    ):
        if hasattr(settings, name):
            before = getattr(settings, name)
            setattr(settings, name, value)
            agree(base)
            assert launched[-1].function != want, name
            setattr(settings, name, before)
            agree(base)
            assert launched[-1].function == want, name


def check_hooks_see_every_launch(target):
    """Of profilers: called around each launch, with its kernel and stream."""
    call = calls()["1 gained"]
    quiet = [seen(call) for _ in range(2)][1]
    entered, left = [], []
    runtime = knobs.runtime
    chains = runtime.launch_enter_hook, runtime.launch_exit_hook
    for kind in ("chain", "function"):
        if kind == "chain":
            chains[0].add(entered.append)
            chains[1].add(left.append)
        else:
            runtime.launch_enter_hook, runtime.launch_exit_hook = entered.append, left.append
        assert seen(call) == quiet
        told = [metadata.get() for metadata in entered]
        assert [(one["name"], one["function"], one["stream"]) for one in told] == [
            (kernel, function, of[-1]) for kernel, function, of, _ in quiet[0]
        ]
        assert len(left) == len(entered) == len(quiet[0])
        entered.clear(), left.clear()
        if kind == "chain":
            chains[0].remove(entered.append)
            chains[1].remove(left.append)
            assert seen(call) == quiet
            assert not entered
    runtime.launch_enter_hook = runtime.launch_exit_hook = None
    assert seen(call) == quiet


def check_what_is_not_compiled_or_to_be_watched_goes_to_triton(target):
    """And what was known before stays so."""
    call = calls()["1"]
    want = [seen(call) for _ in range(2)][1][0]
    assert seen(call) == (want, 0)
    if hasattr(knobs.runtime, "add_stages_inspection_hook"):
        knobs.runtime.add_stages_inspection_hook = lambda *_: ("key", "hash")
        assert seen(call)[1] == len(want)
        knobs.runtime.add_stages_inspection_hook = None
    assert seen(call) == (want, 0)
    call = calls()["20 gained"]
    knobs.runtime.jit_cache_hook = lambda **_: True  # compiles elsewhere: Triton launches nothing
    for _ in range(2):
        found, asked = seen(call)
        assert found == []
        assert asked > 0
    knobs.runtime.jit_cache_hook = None
    want, asked = seen(call)
    assert asked == len(want) > 0
    assert seen(call) == (want, 0)


def check_of_another_triton_nothing_is_used_but_its_kernels(target):
    call = calls()["20 gained"]
    want = [seen(call) for _ in range(2)][1][0]
    variant.RUNS, CompiledKernel.run = False, None  # another interface, or none
    CompiledKernel.__getitem__ = lambda self, grid: partial(called, self, grid)
    assert seen(call) == (want, 0)
    CompiledKernel.run = property(lambda self: self._run)
    launch._plan.cache_clear()
    variant.native_specialize_impl = None
    launch._FINISH = variant.Variant(dense.finish_kernel, **launch._FINISH.constants)
    for _ in range(2):
        assert seen(call) == (want, len(want))


def called(compiled, grid, *args, stream):
    of = (*grid, stream)
    launched.append(SimpleNamespace(kernel=compiled.name, function=compiled.function, of=of, args=args))


def check_no_more_is_kept_than_said(target):
    variant.MOST = 3
    call = launch.modulated_matmul
    args = primitives.dense_args(exact_matrix("uniform", 48, 60))
    x = torch.ones(8, 600, dtype=torch.bfloat16)
    one = launch._plan(args[:-1], 8, x.dtype, False, False, False).product
    for step in range(1, 9):
        for _ in range(2):
            call(x[:, : 60 * step : step], None, None, None, None, *args)
        assert len(one.known) == (step - 1) % 3 + 1


if __name__ == "__main__":
    check, target = sys.argv[1:]
    triton.compiler.compile = Compiled
    triton.JITFunction.run = counting_run
    driver.set_active(Driver(TARGETS[target]))
    globals()[f"check_{check}"](target)
    print("passed")
