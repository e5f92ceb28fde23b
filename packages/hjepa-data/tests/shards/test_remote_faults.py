"""What a stream does when a real server fails, falls silent or is slow while shards are being read."""

import http.server
import itertools
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hjepa_data import DataError, ShardSource, StreamConfig, ViewGroup, WorkerConfig
from hjepa_data.shards import cache as cache_module
from hjepa_data.shards import remote

NAMES = "train-{000000..000005}.tar"
GONE = "train-000003.tar"


def stream(source, workers=0, **fields):
    config = StreamConfig(
        global_batch_size=6,
        window_shards=2,
        views=(ViewGroup(size=(8, 8)),),
        workers=WorkerConfig(count=workers),
        **fields,
    )
    return config.build(source, seed=3)


def take(batches, count):
    return list(itertools.islice(batches, count))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ["fails", "is cut"])
def test_a_shard_that_cannot_be_fetched(served, cache, workers, fault):
    """It stops the stream, or its ten samples are skipped and counted, each epoch."""
    source = ShardSource(f"{served.url}/{NAMES}", cache=replace(cache, retry_after=3600.0))
    if fault == "fails":
        served.fail = lambda name, number: 503 if name == GONE else None
    else:
        served.cut[GONE] = (0, 3000)
    with pytest.raises(DataError, match=rf"{GONE}' cannot be fetched: .*\(3 attempts\)"):
        take(stream(source, workers), 9)
    asked = served.requests[GONE]
    skipping = stream(source, workers, unreadable="skip", max_skipped_fraction=0.5)
    batches = take(skipping, 18)
    # 18 batches of 6 are two epochs of 53 and two positions of the third.
    planned = skipping._order.span(0, 200)[1].tolist()
    assert skipping.skipped == {"unreadable": sum(30 <= sample < 40 for sample in planned[:108])}
    shown = torch.cat([batch.sample for batch in batches]).tolist()
    for position, sample in enumerate(shown):
        assert sample == next(s for s in planned[position:] if not 30 <= s < 40)
    # Each process asked three times, not three times for each sample.
    assert served.requests[GONE] - asked <= 3 * max(1, workers)
    skipping.close()


def test_a_shard_comes_back_after_a_while(served, cache, jpeg, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(cache_module, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep))
    source = ShardSource(f"{served.url}/{GONE}", cache=replace(cache, retry_after=30.0))
    served.fail = lambda name, number: 500
    for _ in range(2):
        with pytest.raises(DataError, match="HTTP 500"):
            source.read(0)
    assert served.tars().total() == 3
    served.fail = lambda name, number: None
    now[0] += 29.0
    with pytest.raises(DataError, match="HTTP 500"):
        source.read(0)
    now[0] += 1.0
    assert source.read(0).image == jpeg(30)


def test_a_server_that_drips_counts_as_silent(shards, cache, monkeypatch):
    """A byte now and then would keep any limit on silence from ever being reached."""

    class Drip(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            if self.path.endswith(".json"):
                data = (shards / self.path.strip("/")).read_bytes()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(data)
                return
            self.send_response(200)
            self.send_header("Content-Length", str((shards / self.path.strip("/")).stat().st_size))
            self.end_headers()
            try:
                for _ in range(100):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.05)
            except OSError:
                pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Drip)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/train-000000.tar"
        source = ShardSource(url, cache=replace(cache, timeout=60.0, attempts=2))
        # A minute of this clock is a tenth of a second.
        monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: 600 * time.monotonic(), sleep=time.sleep))
        with pytest.raises(DataError, match=r"cannot be fetched: it gave \d+ bytes in \d+ s \(2 attempts\)"):
            source.read(0)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
