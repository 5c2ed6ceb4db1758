from pipelines.audit.tombstones import FILES, folders_of, id_files, list_file, with_tombstones


def test_with_tombstones__beside_the_lists_of_the_recipe():
    given = {"sha256": {"mine": "a.txt"}, "md5": {"x": "b.txt"}}
    found = with_tombstones(given, ["one/forgotten", "two/forgotten"])
    assert found["sha256"] == {
        "mine": "a.txt",
        "forgotten": "one/forgotten/sha256.txt",
        "forgotten-2": "two/forgotten/sha256.txt",
    }
    assert list(found["pdq"]) == ["forgotten", "forgotten-2"]
    assert found["md5"] == {"x": "b.txt"}
    assert given == {"sha256": {"mine": "a.txt"}, "md5": {"x": "b.txt"}}
    assert with_tombstones(None, []) == {"sha256": {}, "pdq": {}}


def test_folders_of__work_folders_that_forgot_something(tmp_path):
    for name in FILES:
        (tmp_path / "one" / "forgotten").mkdir(parents=True, exist_ok=True)
        (tmp_path / "one" / "forgotten" / f"{name}.txt").write_text("")
    works = [str(tmp_path / name) for name in ("one", "two")]
    (folder,) = folders_of(works)
    assert id_files([folder]) == (list_file(folder, "ids"),)
