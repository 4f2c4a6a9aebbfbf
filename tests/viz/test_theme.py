"""One look for every figure."""

from __future__ import annotations

import plotly.graph_objects as go
import plotly.io as pio
import pytest

from megafold.bench.records import IMPLEMENTATIONS
from megafold.viz import theme


def test_every_implementation_that_is_measured_has_a_look_of_its_own() -> None:
    looks = [theme.look(name) for name in (*IMPLEMENTATIONS, "paper", "deepspeed")]
    assert len({look.label for look in looks}) == len(looks)
    assert len({(look.color, look.symbol) for look in looks}) == len(looks)


def test_an_unknown_implementation_is_named_with_those_known() -> None:
    with pytest.raises(KeyError, match=r"'tpu'.*megafold"):
        theme.look("tpu")


def test_installing_makes_the_template_the_default() -> None:
    pio.templates.default = "plotly"
    theme.install()
    assert pio.templates.default == "megafold"
    assert go.Figure().layout.template.layout.colorway == theme.PALETTE


def test_a_longer_caption_makes_more_room_below() -> None:
    one = theme.caption(go.Figure(), "a line")
    two = theme.caption(go.Figure(), "a line<br>and another")
    assert two.layout.margin.b > one.layout.margin.b
    assert one.layout.annotations[0].text == "a line"
