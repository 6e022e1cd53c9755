"""Servers in processes of their own, on this machine's loopback."""

import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from tests import native_llava

VLMOE = [str(Path(sys.executable).parent / "vlmoe"), "serve"]
# `transformers serve` in a process that cannot import this package.
HOST = [
    sys.executable,
    "-c",
    "import sys; sys.modules['modeling_vlmoe'] = None\n"
    "from transformers.cli.transformers import app; app(sys.argv[1:])",
    "serve",
]
MAX_SECONDS = 120


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def is_up(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=5).ok
    except requests.ConnectionError:
        return False


@contextmanager
def running(command: list[str], *words: str):
    """A server's address, while it runs."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    where = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(
        [*command, *map(str, words), *where], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        end = time.monotonic() + MAX_SECONDS
        while not is_up(url):
            assert server.poll() is None, server.stdout.read()[-3000:]
            assert time.monotonic() < end, "the server does not come up"
            time.sleep(0.3)
        yield url
    finally:
        server.terminate()
        server.communicate(timeout=60)


@pytest.fixture(scope="session")
def vlmoe_folder(tmp_path_factory):
    return native_llava.save_vlmoe(tmp_path_factory.mktemp("vlmoe"))


@pytest.fixture(scope="session")
def native_folder(tmp_path_factory):
    return native_llava.save_native(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="session")
def vlmoe_server(vlmoe_folder):
    with running(VLMOE, vlmoe_folder) as url:
        yield url


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
