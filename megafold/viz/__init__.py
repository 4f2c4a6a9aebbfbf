"""Figures (Plotly), structure views (3Dmol.js) and widgets. Needs the extra ``lab``."""

from megafold.viz.structures import show, show_frames, structure_view
from megafold.viz.tuner import KernelTuner
from megafold.viz.widgets import frame_browser

__all__ = ["KernelTuner", "frame_browser", "show", "show_frames", "structure_view"]
