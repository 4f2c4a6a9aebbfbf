"""Figures (Plotly), structure views (3Dmol.js) and widgets. Needs the extra ``lab``."""

from megafold.viz.structures import show, structure_view

__all__ = ["show", "structure_view"]
