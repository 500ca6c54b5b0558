"""FlyNet: the paper's network, one random network for any number of tasks.

    m = P x                          P sparse: fan_in ones per row
    r = relu(m - mean(m))
    logits = strength * D (context * r)     D dense, frozen

Only context and strength are learned: ``hidden_features + 1`` numbers a task.
"""

import torch
from torch import Tensor, nn

from nmkern.matrix import as_size
from nmkern.nn import ModulatedLinear, SparseProjection
from nmkern.nn.contexts import ContextModule
from nmkern.ops.flynet import flynet, flynet_hidden

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module does what ``kind`` does and nothing else, so that it need not be made."""
    state = module.__dict__
    return type(module) is kind and "forward" not in state and not any(state[name] for name in _HOOKS)


class FlyNet(ContextModule):
    """The network of arXiv:2204.04297 (the fruit fly's mushroom body), holding no weights.

    Args:
        in_features, num_classes: sizes of input and output.
        width_multiple: hidden units per input (10 in the paper).
        fan_in: inputs that each hidden unit sums (7 in the paper).
        contexts: how many tasks to begin with; ``add_context()`` adds one.
        seed: of both matrices and of the initial contexts.
        family: of the decoder's weights: ``"uniform"`` in the paper.
        device, dtype: of the contexts.

    Shapes: ``[..., in_features] -> [..., num_classes]``. The decoder's weights have the variance of
    U(-1/sqrt(hidden), 1/sqrt(hidden)); contexts start Xavier-normal, as in the paper.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        width_multiple: int = 10,
        fan_in: int = 7,
        contexts: int = 1,
        seed: int = 0,
        family: str = "uniform",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features, num_classes = as_size("in_features", in_features), as_size("num_classes", num_classes)
        self.hidden_features = in_features * as_size("width_multiple", width_multiple)
        self.encoder = SparseProjection(in_features, self.hidden_features, fan_in, seed=seed)
        self.decoder = ModulatedLinear(
            self.hidden_features,
            num_classes,
            bias=False,
            device=device,
            dtype=dtype,
            contexts=contexts,
            seed=seed,
            family=family,
            gain="in",
            strength=True,
            init="xavier_normal",
        )

    def hidden(self, x: Tensor) -> Tensor:
        """The representation r that every task shares: ``[..., hidden_features]``."""
        if _is_plain(self.encoder, SparseProjection):
            return flynet_hidden(x, self.encoder.matrix)
        m = self.encoder(x)
        return torch.relu(m - m.mean(-1, keepdim=True))

    def forward(self, x: Tensor, context: int | Tensor | None = None) -> Tensor:
        if not (_is_plain(self.encoder, SparseProjection) and _is_plain(self.decoder, ModulatedLinear)):
            hidden = self.hidden(x)
            return self.decoder(hidden) if context is None else self.decoder(hidden, context)
        selected = self.decoder.selected if context is None else context
        tensors = self.decoder.context_tensors(selected)
        return flynet(
            x,
            self.encoder.matrix,
            self.decoder.matrix,
            gain=tensors["in_gain"],
            context=None if isinstance(selected, int) else selected,
            strength=tensors["strength"].squeeze(-1),
        )
