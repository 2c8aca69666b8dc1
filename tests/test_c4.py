"""C4 from a server on loopback that answers as the Hub does for allenai/c4, and cuts connections."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from layerprune.model.data import C4_REVISION

NAME = re.compile(rf"/datasets/allenai/c4/resolve/{C4_REVISION}/(en/c4-(train|validation)\.(\d{{5}})-of-(01024|00008)\.json\.gz)")
DOCUMENTS = 600
"""Documents of a shard: more than healing tokenises at once."""
BIG = 12 << 20
"""Bytes of a big shard: more than one chunk of the Hub's client, so that a cut download is gone on with."""


def document(split: str, shard: int, number: int) -> str:
    """A document that says where it is from, with an accent and a line break."""
    rng = random.Random(f"{split} {shard} {number}")
    return f"{split} {shard} {number}: café\n" + " ".join(rng.choice(("river", "stone", "tower", "bird")) for _ in range(30))


def shard_bytes(split: str, shard: int, padding: int) -> bytes:
    """A shard as C4 has it: gzip, a JSON object with text, timestamp and url in every line."""
    noise = random.Random(shard)
    made = []
    for number in range(DOCUMENTS):
        more = noise.randbytes(padding // DOCUMENTS).hex()  # compresses to half: `padding` bytes in all
        line = {"text": document(split, shard, number), "timestamp": "2019-04-25T12:57:54Z", "url": more}
        made.append(json.dumps(line))
    return gzip.compress(("\n".join(made) + "\n").encode(), compresslevel=1, mtime=0)


class Hub(ThreadingHTTPServer):
    """Serves every shard of C4; `cuts` connections end after a part of the body, `how` is closed or reset."""

    daemon_threads = True

    def __init__(self, padding: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.padding = padding
        self.shards: dict[str, bytes] = {}
        self.cuts, self.how, self.then_down = 0, "closed", False
        self.down = False
        self.seen: list[tuple[str, str, str | None]] = []
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def body(self, path: str) -> bytes | None:
        match = NAME.fullmatch(path)
        if match is None or (match[2] == "train") != (match[4] == "01024"):
            return None
        with self.lock:
            if path not in self.shards:
                self.shards[path] = shard_bytes(match[2], int(match[3]), self.padding)
            return self.shards[path]

    def fetched(self) -> list[str]:
        """The names of the files whose content was asked for, in order, each once."""
        return list(dict.fromkeys(path.rpartition("/")[2] for method, path, _ in self.seen if method == "GET"))


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        hub = self.server
        if not self.path.startswith("/api/"):  # some clients ask the Hub about themselves, too
            hub.seen.append((self.command, self.path, self.headers.get("Range")))
        body = None if hub.down else hub.body(self.path)
        if body is None:
            self.send_response(503 if hub.down else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = 0
        if with_body and (wanted := self.headers.get("Range")):
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", C4_REVISION)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if not with_body:
            return
        if hub.cuts > 0:
            hub.cuts -= 1
            hub.down = hub.then_down
            self.wfile.write(body[start : start + (len(body) - start) * 15 // 16])
            self.wfile.flush()
            if hub.how == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return
        self.wfile.write(body[start:])

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    yield from serve(Hub())


@pytest.fixture
def big_hub() -> Iterator[Hub]:
    yield from serve(Hub(BIG))


def serve(server: Hub) -> Iterator[Hub]:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


READ = """
import json, sys, time
time.sleep = lambda seconds: None  # the Hub's client waits between its attempts
from itertools import islice
from layerprune.model.data import check_data, read_documents, stream_documents
from layerprune.model.errors import LayerpruneError
try:
    made = []
    for kind, split, count, seed in json.loads(sys.argv[1]):
        check_data("c4", "--calibration", split, seed)
        streamed = islice(stream_documents("c4", split, seed), count)
        made.append(read_documents("c4", split, count, seed) if kind == "read" else list(streamed))
    print(json.dumps({"documents": made}))
except LayerpruneError as error:
    print(json.dumps({"refused": str(error)}))
"""


def python(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with a Hub cache of its own and the server as the Hub."""
    hidden = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "LAYERPRUNE_", "XDG_CACHE_HOME")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden) and "proxy" not in key.lower()}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": hub.address, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, *arguments]
    return subprocess.run(line, env=environment, cwd=home.parent, capture_output=True, text=True, check=False, timeout=200)


def read(hub: Hub, home: Path, *asked: tuple[str, str, int, int]) -> Any:
    """What reading C4 gives: for each (read or stream, split, count, seed) a list of documents, or the refusal."""
    done = python(hub, home, "-c", READ, json.dumps(asked))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return found["refused"] if "refused" in found else found["documents"]


def places(documents: list[str], split: str) -> list[tuple[int, int]]:
    """(shard, number) of each document; every character of it is checked."""
    found = []
    for text in documents:
        name, shard, number = text.partition(":")[0].split()
        assert name == split and text == document(split, int(shard), int(number))
        found.append((int(shard), int(number)))
    return found


@pytest.mark.parametrize("how", ["closed", "reset"])
def test_a_download_that_is_cut_in_mid_shard_goes_on(how: str, big_hub: Hub, tmp_path: Path) -> None:
    big_hub.cuts, big_hub.how = 1, how
    (documents,) = read(big_hub, tmp_path / "hf", ("read", "validation", 8, 0))
    assert big_hub.cuts == 0, "the connection was cut"
    found = places(documents, "validation")
    assert len(set(found)) == 8 and len({shard for shard, _ in found}) == 1
    assert big_hub.fetched() == [f"c4-validation.{found[0][0]:05d}-of-00008.json.gz"]
    gets = [wanted for method, _, wanted in big_hub.seen if method == "GET"]
    assert len(gets) == 2 and gets[0] is None
    # a connection that was closed is gone on with; after a reset the client forgets what it had
    assert gets[1] == (f"bytes={10 << 20}-" if how == "closed" else None)
    (blob,) = [p for p in (tmp_path / "hf").rglob("blobs/*") if p.is_file()]
    assert blob.read_bytes() in big_hub.shards.values()


def test_documents_are_drawn_by_the_seed_alone_from_as_few_shards_as_hold_them(hub: Hub, tmp_path: Path) -> None:
    asked = [("read", "validation", n, seed) for n, seed in ((8, 0), (8, 0), (DOCUMENTS, 0), (DOCUMENTS + 1, 0), (8, 1), (8, 2))]
    first, same, whole, more, *others = read(hub, tmp_path / "a", *asked)
    assert first == same == whole[:8] == more[:8]
    assert len(set(whole)) == DOCUMENTS and len({shard for shard, _ in places(whole, "validation")}) == 1
    assert places(whole, "validation") != sorted(places(whole, "validation")), "the order is not the file's"
    assert len({shard for shard, _ in places(more, "validation")}) == 2
    drawn = [tuple(places(documents, "validation")) for documents in (first, *others)]
    assert len(set(drawn)) == 3
    wanted = {shard for documents in (more, *others) for shard, _ in places(documents, "validation")}
    assert sorted(hub.fetched()) == [f"c4-validation.{shard:05d}-of-00008.json.gz" for shard in sorted(wanted)]
    # another machine, another cache: the same documents
    assert read(hub, tmp_path / "b", *asked) == [first, same, whole, more, *others]


def test_healing_streams_the_train_split_shard_by_shard(hub: Hub, tmp_path: Path) -> None:
    (documents,) = read(hub, tmp_path / "hf", ("stream", "train", DOCUMENTS + 5, 0))
    found = places(documents, "train")
    shards = list(dict.fromkeys(shard for shard, _ in found))
    assert len(set(found)) == DOCUMENTS + 5 and [shard for shard, _ in found] == [shards[0]] * DOCUMENTS + [shards[1]] * 5
    assert hub.fetched() == [f"c4-train.{shard:05d}-of-01024.json.gz" for shard in shards]


def test_what_was_fetched_once_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    before = read(hub, tmp_path / "hf", ("read", "validation", 8, 0))
    hub.seen.clear()
    hub.down = True
    assert read(hub, tmp_path / "hf", ("read", "validation", 8, 0)) == before
    assert hub.seen == []


def test_a_server_that_goes_down_in_mid_shard_for_good(hub: Hub, tmp_path: Path) -> None:
    hub.cuts, hub.then_down = 1, True
    told = read(hub, tmp_path / "hf", ("read", "validation", 8, 0))
    assert isinstance(told, str) and re.match(r"C4 \(en/c4-validation\.\d{5}-of-00008\.json\.gz\) ", told), told
    assert "\n" not in told and ("could not be downloaded" in told or "cannot be reached" in told)
    assert not list((tmp_path / "hf").rglob("*.incomplete"))


def test_a_server_that_is_down_is_found_before_anything_starts(hub: Hub, tmp_path: Path) -> None:
    hub.down = True
    told = read(hub, tmp_path / "hf", ("read", "validation", 8, 0))
    assert told.startswith("--calibration c4: en/c4-validation.") and "the Hub cannot be reached" in told, told
    assert "--calibration FILE.jsonl" in told and hub.fetched() == []


def test_a_whole_run_on_c4(hub: Hub, tiny_llama: Path, tmp_path: Path) -> None:
    hub.cuts = 1
    done = python(
        hub, tmp_path / "hf", "-m", "layerprune", "run", "--model", str(tiny_llama), "--drop", "0.4", "--samples", "6",
        "--length", "16", "--heal-steps", "1", "--curve", "", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert hub.cuts == 0
    splits = sorted(name.split("-")[1].split(".")[0] for name in hub.fetched())
    assert splits == ["train", "validation"], "one shard of each split and nothing else"
    ranking = json.loads((tmp_path / "out" / "rank.json").read_text())
    assert ranking["settings"]["documents"] == 6 and ranking["settings"]["data_fingerprint"] == f"allenai/c4@{C4_REVISION}"
