"""Every figure. Matplotlib is imported when one is drawn, and the user's backend and settings are left alone."""

from sadam_integrations.plots.runs import compare_figure, training_figure
from sadam_integrations.plots.studies import settings_figure

__all__ = ["compare_figure", "settings_figure", "training_figure"]
