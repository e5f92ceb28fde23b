"""Muon for the matrices of the blocks and AdamW for the rest, as one optimizer with one state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """Steps groups with `muon=True` by `torch.optim.Muon` and the others by `torch.optim.AdamW`.

    Muon's update is scaled to the root mean square of AdamW's, so that one learning rate serves both.

    Args:
        groups: Parameter groups; each has `params` and `muon` (bool, its parameters are matrices).
        betas: Of AdamW.
        eps: Of AdamW.
        fused: Of AdamW.
        momentum: Of Muon.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the scale is that of Liu et
    al., arXiv 2502.16982, section 2.2.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        fused: bool,
        momentum: float,
    ) -> None:
        matrices, rest = ([group for group in groups if group["muon"] is muon] for muon in (True, False))
        self._muon = torch.optim.Muon(matrices, lr=0.0, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(
            rest, lr=0.0, betas=betas, eps=eps, fused=fused, foreach=None if fused else True
        )
        super().__init__([*self._adamw.param_groups, *self._muon.param_groups], {})
        self._share()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; the two parts share it."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step both parts."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._adamw.step()
        self._muon.step()  # type: ignore[no-untyped-call]
        return loss

    def _share(self) -> None:
        """Let both parts work on this optimizer's groups and state, so that there is one of each to save."""
        for part, muon in ((self._adamw, False), (self._muon, True)):
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group["muon"] is muon]
