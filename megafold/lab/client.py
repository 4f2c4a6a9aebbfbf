"""The client that executes a notebook: in which kernel, and over a channel that does not stall."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import zmq
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbformat import NotebookNode

START_TIMEOUT = 120  # seconds for a kernel to start on a busy machine


class ShellChannel(AsyncZMQSocketChannel):
    """A channel on which one task may send while another waits for a reply.

    A ZMQ socket says once that a message has arrived, and a send takes that notice along.
    jupyter_client sends past the asyncio socket, which therefore never looks again: the reply
    lies there unread until the cell's time is up. It happens where a cell draws into an
    ``ipywidgets.Output``, because nbclient then sends the area's state back during the cell.
    """

    def send(self, msg: dict[str, Any]) -> None:
        """Send a message, then have the socket look for what arrived meanwhile."""
        super().send(msg)
        self.socket.get(zmq.EVENTS)


class Client(AsyncKernelClient):
    """A client of a kernel that never leaves a reply unread."""

    shell_channel_class = ShellChannel


def notebook_client(notebook: NotebookNode, folder: Path, timeout: int) -> NotebookClient:
    """What executes a notebook in a fresh kernel of this Python.

    Args:
        notebook: its outputs are filled in place.
        folder: the kernel's working directory.
        timeout: seconds allowed for one cell.
    """
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=timeout,
        startup_timeout=START_TIMEOUT,
        record_timing=False,
        extra_arguments=["--Application.log_level=ERROR"],
        resources={"metadata": {"path": str(folder)}},
    )
    manager = client.create_kernel_manager()
    manager.client_factory = Client
    # Without installed kernels to choose from, "python3" is the Python that runs this.
    manager.kernel_spec_manager = KernelSpecManager(kernel_dirs=[])
    return client
