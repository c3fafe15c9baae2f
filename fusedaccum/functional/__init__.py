"""The operations on lists of tensors, for framework authors and micro-benchmarks."""

from .operations import accumulate_, global_norm
from .updates import (
    adadelta_,
    adagrad_,
    adam_,
    adamax_,
    adamw_,
    asgd_,
    lion_,
    nadam_,
    radam_,
    rmsprop_,
    rprop_,
    sgd_,
)  # fmt: skip

__all__ = [
    "accumulate_", "adadelta_", "adagrad_", "adam_", "adamax_", "adamw_", "asgd_", "global_norm",
    "lion_", "nadam_", "radam_", "rmsprop_", "rprop_", "sgd_",
]  # fmt: skip
