"""Sadam and SAMSGrad: Adam with a smoothly capped step, for PyTorch, Hugging Face and Lightning."""

from sadam_integrations.calibration import chosen_betas
from sadam_integrations.conversion import advise
from sadam_integrations.factory import create_optimizer, list_optimizers
from sadam_integrations.optimizer import PUBLISHED, Sadam, SadamW, SAMSGrad, SAMSGradW
from sadam_integrations.param_groups import param_groups
from sadam_integrations.version import __version__

__all__ = [
    "PUBLISHED",
    "SAMSGrad",
    "SAMSGradW",
    "Sadam",
    "SadamW",
    "__version__",
    "advise",
    "chosen_betas",
    "create_optimizer",
    "list_optimizers",
    "param_groups",
]
