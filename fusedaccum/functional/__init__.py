"""The operations on lists of tensors, for framework authors and micro-benchmarks."""

from .adam_updates import adam_, adamax_, adamw_, nadam_, radam_
from .operations import accumulate_, global_norm
from .updates import adadelta_, adagrad_, asgd_, lion_, rmsprop_, rprop_, sgd_

__all__ = [
    "accumulate_", "adadelta_", "adagrad_", "adam_", "adamax_", "adamw_", "asgd_", "global_norm",
    "lion_", "nadam_", "radam_", "rmsprop_", "rprop_", "sgd_",
]  # fmt: skip
