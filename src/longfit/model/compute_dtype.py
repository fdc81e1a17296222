"""Another dtype to compute in, for a model that has its weights already.

What a base in few bits is depends on the dtype that its weights were rounded to before they were quantised: loaded
again in another one, a base from float32 files has other codes in some places, and SmolLM2 drifts by 6e-3 nats a token.
Whoever reads a run's model in another dtype than the run's therefore loads it as the run did, and casts what is dense.
"""

from __future__ import annotations

from typing import Any

import torch


def compute_in(model: Any, dtype: torch.dtype) -> None:
    """Have a model compute in another dtype, in place: dense weights are cast, bytes stay bytes."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
