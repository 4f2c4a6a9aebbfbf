"""A control for notebooks: block sizes of a kernel, and what compiler and clock make of them."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import ipywidgets as widgets
import plotly.graph_objects as go
import torch
from IPython.display import HTML, display

import megafold
from megafold.bench import records, roofline, tuning_records
from megafold.bench.cases import Case
from megafold.bench.compile import TARGETS, compile_config, target_of
from megafold.bench.launches import tunables
from megafold.bench.occupancy import occupancy, too_large
from megafold.bench.tuning_records import TuningRecord
from megafold.ops.precision import TF32, name_of
from megafold.ops.tuning import Config
from megafold.ops.tuning.candidates import candidates
from megafold.viz.tuning_figures import TunerTrial, trials_figure, trials_table
from megafold.viz.widgets import shown_by

if TYPE_CHECKING:
    from megafold.bench.tune import Trial
    from megafold.ops.tuning import Found

BLOCKS, WARPS = (16, 32, 64, 128, 256), (1, 2, 4, 8, 16)
STAGES = (1, 2, 3, 4, 5)
WIDE = widgets.Layout(width="420px")
CHIP = "sm_90"  # compiled for where there is no GPU


class KernelTuner:
    """Sliders over the block sizes of an operator's kernels, and a button that tries them.

    A trial compiles the kernel ahead of time for a chosen chip. On a GPU the result is then held
    to that of the configuration in force, and if it is right its time is measured. Without a GPU
    recorded measurements stand in, and that is said. Make it the last expression of a cell::

        tuner = KernelTuner(cases.case("evo_attention", "B1 S384 N384 H4 D32"))
        tuner.run(Config({"ROWS": 1, "BLOCK_Q": 64, "BLOCK_K": 64}, num_warps=4, num_stages=2))
        tuner

    ``trials`` has every trial. ``records`` has the recorded measurements of this case, and after
    them those made here; ``tuning_records.append`` keeps them.
    """

    def __init__(
        self,
        case: Case,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        target: str | None = None,
    ) -> None:
        """Begin with the first kernel that the case launches, at the configuration in force.

        Args:
            case: of an operator; its kernels are those it launches that have block sizes in
                tables.
            dtype: of the inputs.
            device: None for the one ``megafold.device()`` gives; times are taken on a GPU only.
            target: the chip to compile for, a name in ``megafold.bench.compile.TARGETS``; None
                for the GPU's own, and for ``"sm_90"`` without one.

        Raises:
            ValueError: a case that launches no such kernel, or an unknown target.
        """
        self.case, self.dtype = case, dtype
        self._tunables = tunables(case, dtype)
        self.device = megafold.device() if device is None else torch.device(device)
        self.trials: list[TunerTrial] = []
        self._stored = _stored(case, dtype)
        self.records = list(self._stored)
        if target is None:
            target = target_of(records.device_name(self.device)) if self._on_gpu else CHIP
        if target not in TARGETS:
            raise ValueError(f"unknown target {target!r}; choose one of {tuple(TARGETS)}")
        chips = [(f"{name}, {chip[-1]}", name) for name, chip in TARGETS.items()]
        self.kernel = widgets.Dropdown(
            options=tuple(self._tunables), description="kernel", layout=WIDE
        )
        self.target = widgets.Dropdown(options=chips, value=target, description="chip")
        self.blocks: dict[str, widgets.SelectionSlider] = {}  # by the kernel's block arguments
        self.warps, self.stages = _slider("warps", WARPS), _slider("stages", STAGES)
        self.registers = widgets.BoundedIntText(
            min=0, max=255, description="registers", layout=widgets.Layout(width="180px")
        )
        no_limit = widgets.Label("at most; 0: as the compiler likes")
        self.button = widgets.Button(description="Run", button_style="primary", icon="play")
        self.status = widgets.Label()
        self.area = widgets.Output()
        self._block_box = widgets.VBox()
        others = widgets.VBox([self.warps, self.stages, widgets.HBox([self.registers, no_limit])])
        self.box = widgets.VBox(
            [
                widgets.HBox([self.kernel, self.target]),
                widgets.HBox([self._block_box, others]),
                widgets.HBox([self.button, self.status]),
                self.area,
            ]
        )
        self._show_kernel()
        self.kernel.observe(lambda _change: self._show_kernel(), names="value")
        self.button.on_click(lambda _button: self.run())

    @property
    def config(self) -> Config:
        """What the controls say."""
        blocks = {name: slider.value for name, slider in self.blocks.items()}
        return Config(blocks, self.warps.value, self.stages.value, self.registers.value or None)

    @config.setter
    def config(self, config: Config) -> None:
        if set(config.blocks) != set(self.blocks):
            raise ValueError(
                f"{self.kernel.value} has the blocks {tuple(self.blocks)}, "
                f"not {tuple(config.blocks)}"
            )
        chosen = [(name, self.blocks[name], size) for name, size in config.blocks.items()]
        chosen += [("num_warps", self.warps, config.num_warps)]
        chosen += [("num_stages", self.stages, config.num_stages)]
        for name, slider, value in chosen:
            if value not in slider.options:
                raise ValueError(f"{name} must be one of {slider.options}, not {value}")
        for _, slider, value in chosen:
            slider.value = value
        self.registers.value = config.max_registers or 0

    def run(self, config: Config | None = None) -> TunerTrial:
        """Try one configuration of the chosen kernel and show it, as the button does.

        Args:
            config: the controls are set to it; None for what they say.

        Returns:
            The trial, which is also appended to ``trials``.

        Raises:
            ValueError: ``config`` has other block arguments than the kernel, or sizes that the
                sliders do not have.
        """
        if config is not None:
            self.config = config
        self.button.disabled = True
        self.status.value = f"trying {self.config} ..."
        try:
            trial = self._try(self.config)
        finally:
            self.button.disabled = False
            self.status.value = ""
        self.trials.append(trial)
        self._draw()
        return trial

    def fastest(self) -> Config | None:
        """The configuration of the chosen kernel with the least time on record, of any device."""
        timed = [r for r in self._of_kernel(self.records) if r.ms is not None]
        return min(timed, key=lambda r: r.ms).config if timed else None

    def figure(self) -> go.Figure | None:
        """The trials and records of the chosen kernel; None where there is nothing to draw."""
        trials, kept = self._of_kernel(self.trials), self._of_kernel(self._stored)
        if not any(t.compiled or t.ms for t in trials) and not any(r.ms for r in kept):
            return None
        device = records.device_description(self.device)
        return trials_figure(
            trials,
            kept,
            title=f"{self.kernel.value}, {self.case.shape}, {name_of(self.dtype)}",
            device=device,
            bounds=self._bounds({r.device for r in kept} | ({device} if self._on_gpu else set())),
        )

    def text(self) -> str:
        """HTML: where times come from, and the trials of the chosen kernel as a table."""
        trials, kept = self._of_kernel(self.trials), self._of_kernel(self._stored)
        times: dict[str, list[str]] = {}
        for r in kept:
            if r.ms is not None:
                times.setdefault(str(r.config), []).append(f"{r.ms:.4g} on {r.device}")
        table = trials_table(trials, {c: "; ".join(ms) for c, ms in times.items()})
        return f"<p>{html.escape(self._source(kept))}</p>" + (table if trials else "")

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _of_kernel(self, tried: list) -> list:
        return [t for t in tried if t.kernel == self.kernel.value]

    def _in_force(self) -> Found:
        return self._tunables[self.kernel.value].in_force(self.device)

    def _choices(self, config: Config) -> dict[str, tuple[int, ...]]:
        """What the sliders of the chosen kernel offer: what is worth trying, and what is run."""
        of = self._tunables[self.kernel.value]
        recorded = [r.config.blocks for r in self._of_kernel(self.records)]
        found = {}
        for name, sizes in candidates(of.kernel, of.bits).blocks.items():
            more = {blocks[name] for blocks in (config.blocks, *recorded) if name in blocks}
            usual = BLOCKS if name.startswith("BLOCK") else ()
            found[name] = tuple(sorted({*sizes, *usual, *more}))
        return {name: found[name] for name in config.blocks}

    def _show_kernel(self) -> None:
        """Sliders for the blocks of the chosen kernel, at the configuration in force."""
        config = self._in_force().config
        self.blocks = {n: _slider(n, sizes) for n, sizes in self._choices(config).items()}
        self._block_box.children = tuple(self.blocks.values())
        self.config = config
        self._draw()

    def _try(self, config: Config) -> TunerTrial:
        kernel, target = self.kernel.value, self.target.value
        compiled, ms, notes = None, None, []
        try:
            compiled = compile_config(self.case, kernel, config, self.dtype, target)
        except RuntimeError as error:
            notes.append(f"does not compile for {target}: {str(error).splitlines()[-1]}")
        else:
            notes.append(too_large(compiled))
            if compiled.spill_bytes:
                notes.append(f"{compiled.spill_bytes:,} bytes of registers spilt on {target}")
        if self._on_gpu:
            trial = self._measure(config)
            ms = trial.ms
            notes.append(trial.note)
        return TunerTrial(
            kernel=kernel,
            config=config,
            target=target,
            compiled=compiled,
            occupancy=None if compiled is None else occupancy(compiled),
            ms=ms,
            note="; ".join(dict.fromkeys(note for note in notes if note)),
        )

    def _measure(self, config: Config) -> Trial:
        from megafold.bench import tune

        trial = tune.try_config(self.case, self.kernel.value, config, self.device, self.dtype)
        self.records += tuning_records.rows(self.case, self.dtype, [trial], self.device)
        return trial

    def _bounds(self, devices: set[str]) -> dict[str, float]:
        """The roofline of a forward kernel on devices that have a data sheet, ms."""
        # Of a kernel that is a part of a pass it is not written down what it needs alone.
        # TF32 is not among the peaks.
        if self.kernel.value != f"{self.case.op}.forward" or name_of(self.dtype) == TF32:
            return {}
        known = {name: roofline.known_peaks(name) for name in sorted(devices)}
        return {
            name: roofline.bound_ms(self.case, "forward", self.dtype, peaks)
            for name, peaks in known.items()
            if peaks is not None
        }

    def _source(self, kept: list[TuningRecord]) -> str:
        if self._on_gpu:
            return (
                f"Times are of {records.device_description(self.device)}; each result is first "
                "held to that of the configuration in force."
            )
        if not kept:
            return (
                f"No GPU here, and no recorded measurements of {self.kernel.value} on "
                f"{self.case.shape} in {name_of(self.dtype)}: this is what the compiler says."
            )
        devices = ", ".join(sorted({f"{r.device} ({r.date[:10]})" for r in kept}))
        return f"No GPU here: times are recorded measurements of {devices}."

    def _draw(self) -> None:
        figure = self.figure()
        shown = [HTML(self.text())] + ([] if figure is None else [figure])
        self.area.outputs = tuple(output for one in shown for output in shown_by(one))

    def _ipython_display_(self) -> None:
        display(self.box)


def _slider(name: str, options: tuple[int, ...]) -> widgets.SelectionSlider:
    return widgets.SelectionSlider(options=options, description=name, continuous_update=False)


def _stored(case: Case, dtype: torch.dtype) -> list[TuningRecord]:
    """The checkout's records; none where this is an installation without one."""
    try:
        return tuning_records.stored(case, dtype)
    except FileNotFoundError:
        return []
