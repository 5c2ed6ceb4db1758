import functools
import http.server
import os
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.errors import ConfigError, LedgerError
from curation.sources.columns import TEXTS
from curation.sources.lists import UrlList
from curation.sources.pieces import Piece

SAME = {name: name for name in TEXTS.names}


def test_read__counts_the_rows_of_a_row_group(tmp_path):
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"url": [f"http://h/{i}" for i in range(9)]}), path, row_group_size=4)
    source = UrlList(path, SAME)
    assert [piece.num_rows for piece in source.pieces()] == [4, 4, 1]
    assert sum(source.read(piece).num_rows for piece in source.pieces()) == 9
    with pytest.raises(LedgerError, match="row group 2 has 1 rows, its footer says 4"):
        source.read(Piece(path, 2, num_rows=4))


BINARY = pa.array([b"x", b"\xff", None], pa.binary())
TEXT = pa.array(["x", "ÿ", None])
KINDS = [TEXT, TEXT.cast(pa.large_string()), TEXT.cast(pa.string_view()), BINARY]


@pytest.mark.parametrize("alt", [*KINDS, TEXT.dictionary_encode()], ids=lambda alt: str(alt.type))
def test_read__texts_of_any_type(tmp_path, alt):
    pq.write_table(pa.table({"url": ["u", "v", "w"], "alt": alt}), tmp_path / "a.parquet")
    source = UrlList(str(tmp_path / "a.parquet"), SAME)
    (piece,) = source.pieces()
    assert source.read(piece)["alt"].to_pylist() == ["x", "ÿ", None]
    assert source.read(piece)["page"].to_pylist() == [None] * 3


class _Counting(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


def test_files__of_a_list_on_a_web_server_are_not_looked_for_in_it(tmp_path):
    (tmp_path / "a.txt").write_text("http://h/1\n")
    handler = functools.partial(_Counting, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.txt"
        assert UrlList(url, SAME).files().texts == [url]
        server.shutdown()
    assert set(_Counting.asked) == {"/a.txt"}


def test_files__below_links_and_beside_odd_ones(tmp_path):
    folder = tmp_path / "lists"
    for name in ("lists/a.csv", "lists/_part.csv", "lists/.b.csv", "elsewhere/c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("url\n")
    os.mkfifo(folder / "pipe.csv")
    (folder / "gone.csv").symlink_to("nowhere")
    (folder / "linked").symlink_to("../elsewhere")
    (folder / "loop").symlink_to(".")
    (folder / "same.csv").symlink_to("a.csv")
    with pytest.raises(ConfigError, match="is a pipe or a device; lists are files"):
        UrlList(str(folder / "pipe.csv"), SAME).files()
    found = UrlList(str(folder), SAME).files()
    texts = ["a.csv", "linked/c.csv", "same.csv"]
    assert found.texts == [f"{folder}/{name}" for name in texts]
    left_out = [".b.csv", "_part.csv", "gone.csv", "pipe.csv"]
    assert found.left_out == [*(f"{folder}/{name}" for name in left_out), "1 links that lead back"]


def test_files__that_are_none_say_what_is_allowed(tmp_path):
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(ConfigError, match=r"no lists of URLs there; allowed: \.parquet, \.csv"):
        UrlList(str(tmp_path), SAME).files()
    with pytest.raises(ConfigError, match="no such list of URLs"):
        UrlList(str(tmp_path / "none.csv"), SAME).files()
