"""timm: importing this makes the optimizers' names valid for ``create_optimizer_v2(opt=...)`` and ``--opt``.

>>> import sadam_integrations.timm
>>> optimizer = timm.optim.create_optimizer_v2(model, opt="sadamw", lr=1e-3, weight_decay=0.05, beta=50)

Each name stands for its class. timm makes the groups of parameters and passes ``lr``, ``weight_decay``, ``betas`` and
``foreach``; it leaves ``eps`` out, which these optimizers do not have. ``layer_decay`` and ``lookahead_sadamw`` work as
with timm's own. timm's own ``train.py`` has the names with
``python -m sadam_integrations.launch --timm train.py --opt sadamw --opt-kwargs beta=50 ...``.
"""

from __future__ import annotations

import inspect

from sadam_integrations.factory import OPTIMIZERS

try:
    from timm.optim import OptimInfo
    from timm.optim._optim_factory import default_registry  # timm offers no public way to register
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing not in ("timm", "torchvision"):
        raise
    raise ImportError(
        f'sadam_integrations.timm needs {missing}, which is not installed: pip install "sadam-integrations[timm]"'
    ) from error
except ImportError as error:
    raise ImportError(
        "sadam_integrations.timm needs timm 1.0.12 or later, which has a registry of optimizers: pip install -U timm"
    ) from error

for _name, _cls in OPTIMIZERS.items():
    if _name not in default_registry.list_optimizers():  # a second registration makes timm warn
        _title = (inspect.getdoc(_cls) or "").partition("\n")[0]
        default_registry.register(
            OptimInfo(name=_name, opt_class=_cls, description=_title, has_eps=False, has_betas=True)
        )
