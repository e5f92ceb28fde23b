"""Fixtures: shards behind a real HTTP server on this machine, and a cache for them."""

import http.server
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from hjepa_data.shards.cache import CacheConfig


class Server:
    """Serves a folder; ``fail(name, number)`` may answer otherwise, requests are counted."""

    def __init__(self, folder):
        self.requests = Counter()
        self.fail = lambda name, number: None
        self.cut = {}
        self.delay = 0.0
        # The first request of this name gets half of its bytes, then nothing until ``go_on``.
        self.stall = None
        self.stalled, self.go_on = threading.Event(), threading.Event()
        server = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args):
                super().__init__(*args, directory=folder)

            def log_message(self, *args):
                pass

            def do_GET(self):
                name = self.path.partition("?")[0].strip("/")
                server.requests[name] += 1
                status = server.fail(name, server.requests[name])
                if status == "redirect":
                    self.send_response(302)
                    self.send_header("Location", "file:///etc/hostname")
                    self.end_headers()
                elif status:
                    self.send_error(status)
                elif name == server.stall and server.requests[name] == 1:
                    data = (Path(folder) / name).read_bytes()
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data[: len(data) // 2])
                    self.wfile.flush()
                    server.stalled.set()
                    server.go_on.wait(120)
                elif name in server.cut:
                    data = (Path(folder) / name).read_bytes()
                    announced, sent = server.cut[name]
                    self.send_response(200)
                    if announced is not None:
                        self.send_header("Content-Length", str(announced or len(data)))
                    self.end_headers()
                    self.wfile.write(data[:sent])
                else:
                    time.sleep(server.delay)
                    super().do_GET()

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def close(self):
        self.go_on.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def tars(self):
        """Count the requests for shards, without those for their indexes."""
        return Counter({name: count for name, count in self.requests.items() if name.endswith(".tar")})


@pytest.fixture
def served(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "served"
    shutil.copytree(shards, folder)
    server = Server(folder)
    server.folder = folder
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path):
    return CacheConfig(folder=str(tmp_path / "cache"), first_wait=0.001, attempts=3, timeout=60.0, retry_after=0.0)
