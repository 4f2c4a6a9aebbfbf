"""A notebook that draws into an output area runs to its end, and nothing it drew is lost."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import nbformat
import pytest
import zmq
import zmq.asyncio
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.session import Session
from nbformat.v4 import new_code_cell, new_notebook

from megafold import runner
from megafold.lab.client import ShellChannel

ARRIVES = 0.2  # seconds; a message between two sockets of one process takes microseconds
LOST = 2.0  # seconds after which a reply that has arrived counts as never read

AREA = "import ipywidgets\nfrom IPython.display import display\nshown = ipywidgets.Output()\nshown"
DRAW = """for i in range(5):
    with shown:
        display({"drawn": i})
        print(i)"""


async def seconds_to_a_reply(channel_class: type[AsyncZMQSocketChannel]) -> float:
    """How long a waiting task takes to see a reply that had arrived when another one sent."""
    context, session = zmq.asyncio.Context(), Session(key=b"")
    kernel, client = zmq.Socket(context, zmq.ROUTER), context.socket(zmq.DEALER)
    channel = channel_class(client, session)
    try:
        client.setsockopt(zmq.IDENTITY, b"client")
        client.connect(f"tcp://127.0.0.1:{kernel.bind_to_random_port('tcp://127.0.0.1')}")
        channel.send(session.msg("execute_request"))
        kernel.recv_multipart()
        waiting = asyncio.ensure_future(channel.get_msg(timeout=LOST))
        await asyncio.sleep(ARRIVES)
        session.send(kernel, "execute_reply", ident=b"client")
        time.sleep(ARRIVES)  # the loop is busy with the cell's output while the reply arrives
        channel.send(session.msg("comm_msg"))
        start = time.monotonic()
        assert (await waiting)["msg_type"] == "execute_reply"
        return time.monotonic() - start
    finally:
        channel.close()
        kernel.close(linger=0)
        context.term()


def test_a_reply_is_read_though_a_message_was_sent_after_it_arrived() -> None:
    assert asyncio.run(seconds_to_a_reply(ShellChannel)) < LOST / 2


def test_the_plain_channel_leaves_the_reply_unread() -> None:
    """Why there is one of our own; when this fails, ours has become superfluous."""
    assert asyncio.run(seconds_to_a_reply(AsyncZMQSocketChannel)) >= LOST / 2


@pytest.fixture
def drawing(tmp_path: Path) -> Path:
    """Draws into an output area in many cells, then looks at it and raises inside it."""
    cells = [AREA, *[DRAW] * 20, "assert len(shown.outputs) == 200", "with shown:\n    1 / 0"]
    path = tmp_path / "00_drawing.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell(cell) for cell in cells]), path)
    return path


def test_drawing_into_an_output_area_neither_stalls_nor_hides_an_error(drawing: Path) -> None:
    timeout = 60  # seconds; a stalled cell takes them all, and then goes on
    done = runner.execute(drawing, timeout=timeout)
    assert [failure.where for failure in done.failures] == ["a widget's output area"]
    assert done.failures[0].error == "ZeroDivisionError: division by zero"
    assert done.seconds < timeout
