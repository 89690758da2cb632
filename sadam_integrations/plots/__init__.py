"""Every figure. Matplotlib is imported when one is drawn, and the user's backend and settings are left alone."""

from sadam_integrations.plots.calibration import calibration_figure
from sadam_integrations.plots.convergence import convergence_figure, sharpness_figure
from sadam_integrations.plots.monitor import alr_compare_figure, alr_figure
from sadam_integrations.plots.runs import compare_figure, training_figure
from sadam_integrations.plots.speed import speed_figure
from sadam_integrations.plots.studies import bands_figure, floors_figure, methods_figure, settings_figure

__all__ = [
    "alr_compare_figure",
    "alr_figure",
    "bands_figure",
    "calibration_figure",
    "compare_figure",
    "convergence_figure",
    "floors_figure",
    "methods_figure",
    "settings_figure",
    "sharpness_figure",
    "speed_figure",
    "training_figure",
]
