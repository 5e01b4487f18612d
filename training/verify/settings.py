"""What a verification is asked for, and how far a merged model may lie from base and adapter. No torch.

`docs/verify.md` has the measurements that the thresholds come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

ROWS = 64


@dataclass(frozen=True)
class Thresholds:
    """Limits of one format."""

    maximum_kl: float
    """D(base with adapter ‖ merged), mean over positions, nats"""
    minimum_agreement: float
    """share of positions where both find the same token likeliest"""
    minimum_effect: float
    """share of D(base with adapter ‖ base) that must be gone in the merged model"""
    loss_tolerance: float = 0.05
    """nats that the held-out loss may lie above that of base and adapter"""
    lossy: bool = False
    """the format loses a part of the adapter, so the held-out loss is only held against the worse of base and both"""
    rounding: float = 2.0
    """times what rounding alone does to base and adapter, a merged model may differ where that is more than the limits
    above: no logits could tell it from a right one"""
    smallest_effect: float = 0.05
    """D(base with adapter ‖ base) in nats from which on `minimum_effect` holds: rounding alone does a tenth"""


THRESHOLDS = {
    "bf16": Thresholds(maximum_kl=0.02, minimum_agreement=0.95, minimum_effect=0.9),
    "mxfp4": Thresholds(maximum_kl=0.1, minimum_agreement=0.9, minimum_effect=0.5, lossy=True),
    "adapter": Thresholds(maximum_kl=0.02, minimum_agreement=0.95, minimum_effect=0.9),
}


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    folder: str
    base: str | None = None
    adapter: str | None = None
    data: tuple[str, ...] = ()
    prompts: str | None = None
    device: str = "auto"
    limit: int = ROWS
    overrides: Mapping[str, float] = field(default_factory=dict)
    """fields of `Thresholds` that differ from those of the checkpoint's format"""

    def thresholds(self, format: str) -> Thresholds:
        """The limits for a checkpoint of this format; logits have no room for rounding beside a limit that was set."""
        set_here = {"maximum_kl", "minimum_agreement"} & self.overrides.keys()
        changed = {**({"rounding": 0.0} if set_here else {}), **self.overrides}
        return replace(THRESHOLDS[format], **changed)  # type: ignore[arg-type]
