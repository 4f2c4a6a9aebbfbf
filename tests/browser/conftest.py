"""A browser that is cut off from the network, and a JupyterLab for it to open."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from megafold.viz.browser import find_browser
from tests.browser.support import CHECKOUT, TOKEN, Traffic

_FLAGS = [
    "--no-sandbox",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
    # Should a page ask for another machine, there is none.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]


# Not for the whole session: while Playwright runs, an event loop does, and no test can start one.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The browser. In continuous integration a missing one is a failure, elsewhere a skip."""
    path = find_browser()
    if path is None:
        message = "no browser found: install one (Debian: apt-get install chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def traffic() -> Traffic:
    return Traffic()


@pytest.fixture
def page(chromium: Browser, traffic: Traffic) -> Iterator[Page]:
    context = chromium.new_context(viewport={"width": 1400, "height": 1000})
    traffic.watch(context)
    yield context.new_page()
    context.close()


@pytest.fixture
def jupyterlab(tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """Start JupyterLab on a copy of a notebook, with the project's own settings.

    Calling the fixture with the notebook's path gives the address to open.
    """
    servers: list[subprocess.Popen] = []

    def start(notebook: Path) -> str:
        folder, runtime = tmp_path / "notebooks", tmp_path / "runtime"
        folder.mkdir()
        runtime.mkdir()
        shutil.copy(notebook, folder)
        environment = {
            **os.environ,
            "JUPYTER_CONFIG_PATH": str(CHECKOUT / "config" / "jupyter"),
            "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
            "JUPYTER_RUNTIME_DIR": str(runtime),
            "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
            "MEGAFOLD_FIGURES": str(tmp_path / "figures"),
        }
        environment.pop("TRITON_INTERPRET", None)  # what a reader has, not what tests have
        command = [
            *(sys.executable, "-m", "jupyterlab", "--no-browser", "--port=0", "--allow-root"),
            f"--ServerApp.root_dir={tmp_path}",
            f"--IdentityProvider.token={TOKEN}",
            "--LabApp.expose_app_in_browser=True",
        ]
        log = (tmp_path / "jupyterlab.log").open("w")
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path)
        servers.append(server)
        return _address(server, runtime, tmp_path / "jupyterlab.log")

    yield start
    for server in servers:
        server.terminate()
        server.wait(30)


def _address(server: subprocess.Popen, runtime: Path, log: Path) -> str:
    """The server's address, once it says it."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        for info in runtime.glob("jpserver-*.json"):
            return json.loads(info.read_text())["url"]
        if server.poll() is not None:
            break
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")
