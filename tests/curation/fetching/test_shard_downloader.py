import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from curation.fetching.client import Fetched
from curation.fetching.outcomes import FetchError, Trail
from curation.fetching.shard_downloader import ShardDownloader
from embedder.images import Limits, encode_jpeg

ROOT = Path(__file__).resolve().parents[3]


class Answers:
    """A client that answers from a list of functions, one a URL."""

    def __init__(self, *answers) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def rest(self) -> None:
        pass

    def fetch(self, url: str, trail: Trail) -> Fetched:
        self.asked.append(url)
        return Fetched(self.answers[int(url)](), url, 200, "image/jpeg")


def downloader(client, **changes) -> ShardDownloader:
    settings = {"threads": 4, "retries": 2, "back_off_s": 0.01, "per_host": 4, "delay_s": 0.0}
    return ShardDownloader(client=client, limits=Limits(), **{**settings, **changes})


def small() -> bytes:
    import numpy as np

    return encode_jpeg(np.zeros((8, 8, 3), np.uint8))


def failing(*reasons: str):
    left = list(reasons)

    def answer() -> bytes:
        if left:
            raise FetchError(left.pop(0))
        return small()

    return answer


def test_download__temporary_failures_are_tried_again_others_not():
    client = Answers(
        small, failing("timeout", "http_503"), failing("timeout"), failing("http_404"),
        failing("timeout", "timeout", "connection"), failing("opted_out:tdm"), lambda: b"<html>",
    )  # fmt: skip
    outcomes = downloader(client).download([str(i) for i in range(7)])
    assert [one.reason for one in outcomes] == [
        *(None, None, None, "http_404", "connection", "opted_out:tdm", "not_an_image")
    ]
    assert [one.attempts for one in outcomes] == [1, 3, 2, 1, 3, 1, 1]
    assert [one.num_bytes is None for one in outcomes] == [False] * 3 + [True] * 4


def test_download__our_own_mistakes_fail_the_shard():
    def mistake() -> bytes:
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError, match="a mistake of ours"):
        downloader(Answers(small, mistake)).download(["0", "1"])


def test_download__other_users_of_urllib_are_left_alone():
    def through_urllib() -> bytes:
        with urllib.request.urlopen("data:text/plain,hello") as response:
            assert response.read() == b"hello"
        return small()

    (outcome,) = downloader(Answers(through_urllib)).download(["0"])
    assert outcome.reason is None


def test_download__doubtful_answers_are_asked_for_again():
    class Late(Answers):
        """Says after the shard that the second answer was another URL's."""

        def fetch(self, url: str, trail: Trail) -> Fetched:
            trail.is_doubtful = self.asked.count(url) == 0 and url == "1"
            return super().fetch(url, trail)

    client = Late(small, small, failing("http_404"))
    outcomes = downloader(client).download(["0", "1", "2"])
    assert sorted(client.asked) == ["0", "1", "1", "2"]
    assert [one.attempts for one in outcomes] == [1, 2, 1]
    assert [one.reason for one in outcomes] == [None, None, "http_404"]


def test_download__no_rows():
    assert downloader(Answers()).download([]) == []


def test_pause_s__doubles_and_listens_to_the_server():
    one = downloader(Answers(), back_off_s=1.0)
    error = FetchError("http_503")
    assert 0.5 <= one.pause_s(7, 1, error) <= 1.5
    assert 2.0 <= one.pause_s(7, 3, error) <= 6.0
    assert len({one.pause_s(row, 1, error) for row in range(50)}) == 50
    error.retry_after_s = 20.0
    assert one.pause_s(7, 1, error) == 20.0
    error.retry_after_s = 1e6
    assert one.pause_s(7, 1, error) == 60.0


def test_download__says_how_far_a_long_shard_is(monkeypatch, caplog):
    monkeypatch.setattr("curation.fetching.shard_downloader._SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level("INFO", "curation.progress"):
        downloader(Answers(small, failing("http_404"), small)).download([str(i) for i in range(3)])
    assert len(caplog.messages) == 2
    assert "2 of 3 rows" in caplog.messages[-1]
    assert "s left" in caplog.messages[-1]


def test_load_downloader__imports_little_and_calls_nobody():
    script = """
import socket, sys
def refuse(*args): raise AssertionError(f"connects to {args}")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from curation.fetching.shard_downloader import load_downloader
assert load_downloader() is load_downloader()
heavy = {"torch", "albumentations", "cv2", "webdataset", "img2dataset", "wandb"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
