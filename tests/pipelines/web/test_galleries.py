from pipelines.audit.tables import select
from pipelines.audit.work_folder import WorkFolder
from pipelines.web.galleries import Group, Shown, pair_of, rank_of, rounded, veil_together
from pipelines.web.pictures import Picture, Pictures, picture_of
from pipelines.web.report.galleries import GalleryMaker
from tests.pipelines.audited_run import finished_run


class Book(dict):
    """Pictures by key."""

    def get(self, key):
        return self.setdefault(key, Picture(*key))


def test_veil_together__what_is_known_of_one_of_a_pair_holds_for_both():
    book = Book()
    keys = [("pool", one) for one in "abc"]
    book.get(keys[0]).veiled = True
    pair = pair_of([Shown(keys[0]), Shown(keys[1])], 0.91234, ", by a chain")
    assert (pair.kind, pair.note) == ("pair", "similarity 0.9123, by a chain")
    veil_together([pair, Group([Shown(keys[0]), Shown(keys[2])])], book)
    assert [book.get(key).veiled for key in keys] == [True, True, False]


def test_rounded__leaves_out_what_is_not_known():
    assert rounded({"a": 0.123456, "b": None, "c": "x", "d": 0}) == {"a": 0.1235, "c": "x", "d": 0}
    assert [rank_of({"rank": 3}), rank_of({"rank": None}), rank_of({})] == ["#3", "", ""]


def test_gallery_maker__shows_what_the_decisions_say():
    work = WorkFolder(str(finished_run()))
    maker = GalleryMaker(work, Pictures(work))
    (leak,) = maker.leaks()
    assert (leak.title, leak.total) == ("bench: in the pool", 1)
    assert [item.role for item in leak.groups[0].items] == ["dropped", "in bench"]
    for gallery in maker.final():
        query = "select count(*) as n from rows where coalesce(seed_set, source_set) = ?"
        assert select(work.manifest, query, [gallery.title]) == [{"n": gallery.total}]
    (retrieved,) = maker.retrieval()
    for group in retrieved.groups:
        roles = [item.role for item in group.items]
        assert roles == ["seed", *(f"#{n}" for n in range(1, len(roles)))]
    reasons = {gallery.title for gallery in maker.filtered()}
    assert "quality: blank" in reasons
    assert not any(title.startswith("near_dedup") for title in reasons)


def test_picture_of__stored_and_packed_images_but_no_hidden_one():
    work = WorkFolder(str(finished_run()))
    row = {"flow": "pool", "hidden": False, "veiled": False}
    kept = select(work.manifest, "select id from rows where source_set != 'taken' limit 1")[0]["id"]
    stage = work.stage("pool", "near_dedup")
    fallen = select(stage.decisions, "select id from rows where not keep limit 1")[0]["id"]
    for row_id in (kept, fallen):
        small = picture_of(work, row | {"id": row_id}, "small", False)
        assert small[:2] == b"\xff\xd8"
        blots = picture_of(work, row | {"id": row_id, "veiled": True}, "small", False)
        assert len(blots) < len(small)
        assert picture_of(work, row | {"id": row_id, "hidden": True}, "full", True) is None
    assert picture_of(work, row | {"id": "f" * 32}, "small", False) is None
