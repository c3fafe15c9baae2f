"""How the precise value of a parameter is kept."""

from __future__ import annotations

from enum import Enum

import torch


class Keep(Enum):
    """How the precise value of a parameter is kept. The values are the kernels' names for it."""

    PARAM = "none"  # The parameter is all there is.
    STOCHASTIC = "stochastic"  # So too, and it is rounded at random. bf16 only.
    SPLIT = "split"  # An int16 remainder and the bf16 parameter are an fp32 number together.
    FP32 = "fp32"  # An fp32 master beside the parameter.

    def __init__(self, value: str) -> None:
        # Of what is kept beside the parameter; None where nothing is.
        self.master_dtype = {"split": torch.int16, "fp32": torch.float32}.get(value)

    # Enum's own hashes the name, in Python; updates look a `Keep` up for every parameter.
    __hash__ = object.__hash__

    @classmethod
    def of(
        cls, master_weights: str | None, dtype: torch.dtype, is_stochastic: bool = False
    ) -> Keep:
        """What `master_weights` means for a parameter of `dtype`.

        Args:
            master_weights: see `FusedAccumOptimizer`.
            dtype: of the parameter.
            is_stochastic: whether bf16 parameters without a master are rounded at random.

        Raises:
            ValueError: for an unknown word, and for "split" on fp16.
        """
        if master_weights not in (None, "split", "fp32", "none"):
            raise ValueError(
                'master_weights must be None (automatic), "split", "fp32" or "none", got '
                f"{master_weights!r}"
            )
        if master_weights == "none" and is_stochastic and dtype == torch.bfloat16:
            return cls.STOCHASTIC
        if dtype == torch.float32 or master_weights == "none":
            return cls.PARAM
        if dtype == torch.bfloat16:
            return cls(master_weights or "split")
        if master_weights == "split":
            raise ValueError(
                'master_weights="split" needs bfloat16 parameters (the high half of a float32 '
                'number is a bfloat16), but the model has float16 ones; use None or "fp32"'
            )
        return cls.FP32
