"""From what a caller passes as gains, bias, context and strength to what the primitives take."""

from collections.abc import Mapping

from torch import Tensor

from nmkern.matrix import RandomMatrix
from nmkern.ops import checks


def modulate(
    x: Tensor,
    matrix: RandomMatrix,
    banks: Mapping[str, Tensor | None],
    features: Mapping[str, int],
    context: Tensor | int | None,
    strength: Tensor | float | None,
    fold_into: str,
    cast: bool,
) -> tuple[dict[str, Tensor | None], Tensor | None, float]:
    """Banks ``[T, features]`` by name, the context of each row (or None), and the matrix's factor.

    A strength that is a number goes into the factor, a tensor into the bank ``fold_into``. ``cast`` says
    that autocast chose the dtype of x, so that banks may come in another.
    """
    selector = checks.check_context(context, x)
    if isinstance(selector, int):
        banks = {name: checks.select_row(name, bank, selector) for name, bank in banks.items()}
        if isinstance(strength, Tensor) and strength.ndim:
            strength = checks.select_row("strength", strength, selector)
        selector = None
    ready = {
        name: checks.normalize_bank(name, bank, features[name], x, selector, cast)
        for name, bank in banks.items()
    }
    factor = matrix.factor
    if isinstance(strength, Tensor):
        # A scalar that Inductor takes for a constant of a program can be expanded, but not reshaped.
        column = strength.expand(1) if strength.ndim == 0 else strength[..., None]
        s = checks.normalize_bank("strength", column, 1, x, selector, cast)
        assert s is not None
        gain = ready[fold_into]
        ready[fold_into] = s.expand(-1, features[fold_into]) if gain is None else gain * s
    elif strength is not None:
        factor = checks.scaled_factor(matrix, strength)
    if selector is not None:
        many = any(bank is not None and bank.shape[0] > 1 for bank in ready.values())
        selector = selector.reshape(-1) if many else None
    return ready, selector, factor
