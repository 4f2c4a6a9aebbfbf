"""Controls for notebooks (ipywidgets)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch
from IPython.display import HTML, display
from IPython.utils.capture import capture_output

from megafold.data.structure import Structure
from megafold.metrics import superpose
from megafold.viz import scene, viewer
from megafold.viz.session import headless
from megafold.viz.structures import (
    HEIGHT,
    WIDTH,
    StructureView,
    aim,
    check_frames,
    draw,
    with_positions,
)


class FrameBrowser:
    """A slider over frames and a view of the chosen one; made by :func:`frame_browser`.

    ``slider.value`` chooses the frame, from code as well as by hand; ``structure`` is what is
    shown. The camera stays where it is between frames.
    """

    def __init__(
        self, frames: Sequence[Structure], labels: Sequence[str], truth: Structure | None
    ) -> None:
        self._frames, self._labels, self._truth = list(frames), list(labels), truth
        self._place = scene.orientation(truth or self._frames[-1])
        self.slider = widgets.IntSlider(
            value=len(frames) - 1,
            min=0,
            max=len(frames) - 1,
            description="frame",
            continuous_update=False,
            layout=widgets.Layout(width=f"{WIDTH}px"),
        )
        self.area = widgets.Output()
        self._script = widgets.Output(layout=widgets.Layout(display="none"))
        self.box = widgets.VBox([self.slider, self.area, self._script])
        self._shown = self._draw()
        self.slider.observe(self._on_frame, names="value")

    @property
    def structure(self) -> Structure:
        """The frame that is shown."""
        return self._frames[self.slider.value]

    @property
    def label(self) -> str:
        """The label of the frame that is shown."""
        return self._labels[self.slider.value]

    def _draw(self) -> StructureView:
        """A view of the current frame."""
        named = {self.label: self.structure}
        if self._truth is not None:
            named = {"truth": self._truth, **named}
        view = viewer.new_view(WIDTH, HEIGHT)
        legend, notes = draw(view, named, self._place)
        return StructureView(view, self.label, legend, notes)

    def _on_frame(self, _change: dict[str, Any]) -> None:
        if headless():  # what is stored needs the still of this frame, not a script
            self._fill()
            return
        drawn = self._draw()
        script = viewer.update_html(drawn.view, drawn.legend_html(), self._shown.view)
        self._script.outputs = shown_by(HTML(script))

    def _fill(self) -> None:
        """Begin with a view of its own, and the still that stays without a kernel."""
        self._shown = self._draw()
        aim(self._shown.view, {"": self._truth or self.structure}, self._place)
        self.area.outputs = shown_by(self._shown)

    def _ipython_display_(self) -> None:
        viewer.publish_library()
        self._fill()
        display(self.box)


def shown_by(shown: Any) -> tuple[dict[str, Any], ...]:
    """What displaying something gives, for ``Output.outputs``.

    Not ``with output: display(...)``: an error is raised here, where an output area would
    swallow it, and clients other than ours (nbconvert, papermill) can miss the cell's reply when
    it draws (:class:`megafold.lab.client.ShellChannel`).
    """
    with capture_output() as captured:
        display(shown)
    outputs = [
        {"output_type": "display_data", "data": o.data, "metadata": o.metadata or {}}
        for o in captured.outputs
    ]
    if captured.stdout:
        outputs.append({"output_type": "stream", "name": "stdout", "text": captured.stdout})
    return tuple(outputs)


def frame_browser(
    structure: Structure,
    frames: np.ndarray,
    *,
    labels: Sequence[str] | None = None,
    truth: Structure | None = None,
) -> FrameBrowser:
    """Look through frames of a sampler, or through samples, one at a time.

    Every frame is superposed on the truth, or on the last frame where there is none. Where a
    frame's backbone does not hang together it is drawn as a trace, and the caption says so.

    Args:
        structure: whose layout names the atoms; its own coordinates are not shown.
        frames: `[F, A, 3]` float, angstrom.
        labels: one per frame, such as its noise level; ``frame 1 of F`` if left out.
        truth: drawn beside each frame; its layout must be that of ``structure``.

    Returns:
        A widget: make it the last expression of a cell. Without a kernel (an exported page)
        the last frame stays, with its still.

    Raises:
        ValueError: frames, labels or truth do not fit together.
    """
    array = check_frames(structure, frames)
    names = (
        [f"frame {i + 1} of {len(array)}" for i in range(len(array))]
        if labels is None
        else list(labels)
    )
    if len(names) != len(array):
        raise ValueError(f"{len(names)} labels for {len(array)} frames")
    if truth is not None and len(truth.layout) != len(structure.layout):
        raise ValueError(
            f"truth has {len(truth.layout)} atoms and structure {len(structure.layout)}: "
            "not the same layout"
        )
    target = array[-1] if truth is None else truth.positions
    mask = np.ones(len(target), bool) if truth is None else truth.resolved
    moved = superpose(
        torch.from_numpy(array).float(),
        torch.as_tensor(target, dtype=torch.float32),
        torch.from_numpy(mask),
    )
    return FrameBrowser([with_positions(structure, frame) for frame in moved.numpy()], names, truth)
