"""Rivals by name: what else computes a product with these weights, or with random weights at all.

``prepare`` builds and checks those that were asked for. The invariant: one that cannot take part is named
with the reason, and a rival's failure never costs the figures of another.
"""

from collections.abc import Iterable

from nmkern.bench.clocks import Call
from nmkern.bench.rivals import quantized, regenerated, stored
from nmkern.bench.rivals.base import Operands, RefusedError, Rival, check, gate, in_turn, needs

__all__ = ["RIVALS", "VERA", "Operands", "Rival", "check", "in_turn", "names_of", "prepare", "vera_missing"]

# PEFT's layer is no product with one matrix, so that it has a case of its own.
VERA = "vera"

_RIVALS = (
    Rival("stored", "torch.nn.functional.linear with stored weights", stored.DENSE, stored.linear),
    Rival("compiled", "the same under torch.compile", stored.DENSE, stored.compiled),
    Rival(
        "generate",
        "PyTorch's generator fills a buffer in every call, then the same product",
        stored.DENSE,
        regenerated.torch_generator,
        own_weights=True,
    ),
    Rival(
        "numpy",
        "NumPy's Philox fills a buffer in every call, then NumPy's product",
        stored.DENSE,
        regenerated.numpy_philox,
        own_weights=True,
    ),
    Rival("dense", "torch.nn.functional.linear with a stored dense projection", ("sparse",), stored.linear),
    Rival("csr", "torch.sparse's product in CSR form", ("sparse",), stored.csr),
    Rival(
        "sklearn",
        "scikit-learn's random projection",
        (*stored.DENSE, "sparse"),
        stored.sklearn,
        needs("sklearn", package="scikit-learn"),
    ),
    Rival(
        "brainevent",
        "brainevent's just-in-time matrix",
        ("uniform", "normal"),
        regenerated.brainevent,
        needs("jax", "brainevent", package="brainevent"),
        own_weights=True,
    ),
    Rival(
        "fast_jl",
        "TRAK's projection",
        ("rademacher", "normal"),
        regenerated.fast_jl,
        needs("fast_jl", package="fast_jl", device="cuda"),
        own_weights=True,
    ),
    Rival(
        "int4", "PyTorch's product with the same weights in 4 bits", ("uniform", "rademacher"), quantized.int4
    ),
    *(
        Rival(
            name,
            f"{name}'s 4-bit weights",
            stored.DENSE,
            build,
            needs(name, package=name, device="cuda"),
            own_weights=True,
        )
        for name, build in (
            ("bitsandbytes", quantized.bitsandbytes),
            ("torchao", quantized.torchao),
            ("marlin", quantized.marlin),
        )
    ),
)
RIVALS = {rival.name: rival for rival in _RIVALS}


def vera_missing() -> str | None:
    """Why PEFT's layer cannot be measured; None where it can."""
    return needs("peft", package="peft")("cpu")


def names_of(family: str, names: Iterable[str] | None = None) -> list[str]:
    """The rivals of a family, in the order of ``RIVALS``; ``names`` limits them."""
    wanted = RIVALS if names is None else set(names)
    return [name for name, rival in RIVALS.items() if name in wanted and family in rival.families]


def prepare(
    names: Iterable[str], operands: Operands
) -> tuple[dict[str, Call], dict[str, str], tuple[str, ...]]:
    """Calls that passed their gate, reasons why others are missing, and who has weights of its own."""
    calls: dict[str, Call] = {}
    not_timed: dict[str, str] = {}
    for name in names:
        rival = RIVALS[name]
        if reason := rival.missing(operands.device):
            not_timed[name] = f"missing: {reason}"
            continue
        try:
            product = rival.build(operands)
            gate(rival, product, operands)
        except RefusedError as refused:
            not_timed[name] = f"refused: {refused}"
        except Exception as error:  # whatever another library does, our figures are worth having
            not_timed[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            calls[name] = product.call()
    return calls, not_timed, tuple(name for name in calls if RIVALS[name].own_weights)
