"""What the page shows of single images: chosen by query, a bounded number of rows a gallery.

The rows with the smallest ids are a random sample (ids are hashes) that stays the same from one
page to the next.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pipelines.audit.tables import Row, select
from pipelines.audit.work_folder import FinishedStage, WorkFolder
from pipelines.run.run_record import POOL
from pipelines.web.galleries import Group, Shown, pair_of, rank_of, rounded
from pipelines.web.pictures import Pictures

_PAIRS = 12
_COMPONENTS = 5
_MEMBERS = 12
_SEEDS = 5
_HITS = 8
_FALLEN = 12
_FINAL = 16
_GROUPS = 12
"""Sets, reasons or seed sets that get a gallery of their own; the rest are counted."""
_FACTS = ("similarity", "score", "threshold", "rank", "seed_set", "cluster", "path", "num_faces")
"""Measures that a caption tells."""


@dataclass
class Gallery:
    """Groups of one kind."""

    title: str
    intro: str
    groups: list[Group] = field(default_factory=list)
    total: int = 0
    """Rows of this kind in the whole run."""


@dataclass(frozen=True)
class GalleryMaker:
    """Chooses the rows of all galleries of a run."""

    work: WorkFolder
    pictures: Pictures

    def copies(self) -> list[Gallery]:
        """Pairs and components of the pool's stages that look for copies."""
        made: list[Gallery] = []
        for stage in self.work.stages(POOL):
            columns = stage.decisions.columns
            if "twin" in columns:
                grouped = "component" in columns
                made += [self._largest(stage), self._chains(stage)] if grouped else []
                made += self._dropped_pairs(stage)
                made += [self._near_misses(stage)] if grouped else []
        return [gallery for gallery in made if gallery.groups]

    def _largest(self, stage: FinishedStage) -> Gallery:
        found = select(
            stage.decisions,
            "select component, max(component_size) as size, count(*) over () as n "
            "from rows where component_size > 1 group by component "
            "order by size desc, component limit ?",
            [_COMPONENTS],
        )
        groups = [self._component(stage, one) for one in found if one["size"] > 2]
        intro = "All rows joined by pairs above the threshold; one of them stays."
        total = found[0]["n"] if found else 0
        return Gallery("Largest groups of near duplicates", intro, groups, total)

    def _chains(self, stage: FinishedStage) -> Gallery:
        """Components whose members are least like their representative."""
        groups = []
        query = "select component, max(component_size) as size from rows where component = ? "
        for one in stage.entry.record.figures.get("least_alike", [])[:_COMPONENTS]:
            found = select(stage.decisions, f"{query} group by 1", [one["component"]])
            if found and (found[0]["size"] or 0) > 2:
                groups.append(self._component(stage, found[0]))
                lowest = one["lowest_similarity"]
                groups[-1].note = f"a member has only {lowest:.4f} to the kept one"
        intro = "Chains join images that need not be alike: the lowest similarity to the kept one."
        return Gallery("Widest chains", intro, groups, len(groups))

    def _component(self, stage: FinishedStage, row: Row) -> Group:
        members = select(
            stage.decisions,
            "select id, keep, similarity, reason from rows where component = ? "
            "order by id != component, similarity desc, id limit ?",
            [row["component"], _MEMBERS],
        )
        items = [self._shown(POOL, one, "kept" if one["keep"] else "dropped") for one in members]
        return Group(items, f"{row['size']:,} images", f"component {row['component']}")

    def _dropped_pairs(self, stage: FinishedStage) -> Iterator[Gallery]:
        """Pairs of each reason that names another image, leaks apart."""
        order, intro = "id", "Dropped, beside the image that it equals."
        if "similarity" in stage.decisions.columns:
            order = "similarity, id"
            intro = "Dropped, beside its most similar image; the least similar pairs first."
        query = f"select * from rows where reason = ? and twin is not null order by {order} limit ?"
        for reason, count in stage.entry.record.dropped.items():
            if _names_a_twin(stage, reason) and not reason.startswith("leak:"):
                groups = self._pairs(stage, select(stage.decisions, query, [reason, _PAIRS]))
                yield Gallery(f"{stage.name}: {reason}", intro, groups, count)

    def _near_misses(self, stage: FinishedStage) -> Gallery:
        rows = select(
            stage.decisions,
            "select * from rows where keep and twin is not null and similarity < threshold "
            "order by similarity desc, id limit ?",
            [_PAIRS],
        )
        groups = self._pairs(stage, rows)
        return Gallery("Kept, just below the threshold", "Near misses.", groups, len(rows))

    def leaks(self) -> list[Gallery]:
        """Images dropped because a benchmark holds them, beside the benchmark's image."""
        made = []
        where = "where not keep and twin_set is not null and starts_with(reason, 'leak:')"
        intro = "Dropped, beside the nearest benchmark image; the least similar pairs first."
        for stage in self.work.all_stages():
            if "twin_set" not in stage.decisions.columns:
                continue
            count = f"select twin_set, count(*) as n from rows {where} group by 1 order by n desc"
            query = f"select * from rows {where} and twin_set = ? order by similarity, id limit ?"
            for row in select(stage.decisions, count):
                pairs = select(stage.decisions, query, [row["twin_set"], _PAIRS])
                place = "the pool" if stage.flow == POOL else stage.flow
                groups = [self._pair(stage.flow, one) for one in pairs]
                made.append(Gallery(f"{row['twin_set']}: in {place}", intro, groups, row["n"]))
        return made[:_GROUPS]

    def _pairs(self, stage: FinishedStage, rows: Iterable[Row]) -> list[Group]:
        """Each pair once, whichever of its rows comes first."""
        kept: dict[frozenset[str], Row] = {}
        for row in rows:
            kept.setdefault(frozenset((row["id"], row["twin"])), row)
        return [self._pair(stage.flow, row) for row in kept.values()]

    def _pair(self, flow: str, row: Row) -> Group:
        twin_flow, similarity = row.get("twin_set") or flow, row.get("similarity")
        role = "kept" if similarity is None else "most similar"
        if twin_flow != flow:
            role = f"in {twin_flow}"
        items = [
            self._shown(flow, row, "kept" if row["keep"] else "dropped"),
            self._shown(twin_flow, {"id": row["twin"]}, role),
        ]
        chained = ", by a chain" if row.get("path") == "chain" else ""
        return pair_of(items, similarity, chained)

    def retrieval(self) -> list[Gallery]:
        """Seeds and what they fetched; clusters and what they gave."""
        query = "select seed_set, rule, count(*) as n from rows group by all order by all"
        made = []
        for part in select(self.work.hits, query)[:_GROUPS]:
            by_seed = part["rule"] == "sample"
            intro = "Clusters of the pool that seeds fell into, the fullest first."
            if by_seed:
                intro = "Seeds, each followed by the images that it fetched, the nearest first."
            groups = self._fetched(part["seed_set"], by_seed)
            title = f"{part['seed_set']}: rule {part['rule']}"
            made.append(Gallery(title, intro, groups, part["n"]))
        return made

    def _fetched(self, name: str, by_seed: bool) -> list[Group]:
        """What seeds of a set fetched, or the clusters that they fell into gave."""
        source, first, order = ("cluster", "n desc, cluster", "similarity desc, id")
        if by_seed:
            source, first, order = "seed_id", "seed_id", "rank"
        sources = select(
            self.work.hits,
            f"select {source} as source, count(*) as n from rows where seed_set = ? "
            f"group by {source} order by {first} limit ?",
            [name, _SEEDS],
        )
        query = f"select * from rows where seed_set = ? and {source} = ? order by {order} limit ?"
        groups = []
        for one in sources:
            hits = select(self.work.hits, query, [name, one["source"], _HITS])
            role = rank_of if by_seed else lambda _: ""
            items = [self._shown(POOL, hit, role(hit)) for hit in hits]
            title = f"cluster {one['source']}: {one['n']:,} images"
            if by_seed:
                items.insert(0, self._shown(name, {"id": one["source"]}, "seed"))
                title = f"{one['n']:,} images of one seed"
            groups.append(Group(items, title, kind="seed" if by_seed else "set"))
        return groups

    def filtered(self) -> list[Gallery]:
        """A sample of the images dropped for each reason that names no other image."""
        made = []
        query = "select * from rows where reason = ? order by id limit ?"
        for stage in self.work.stages(POOL):
            shows = stage.entry.kind.shows_dropped
            if shows == "hidden" or not self._has_images(stage):
                continue
            for reason, count in stage.entry.record.dropped.items():
                if not _names_a_twin(stage, reason):
                    rows = select(stage.decisions, query, [reason, _FALLEN])
                    intro = "Blurred: click an image to see it." if shows == "veiled" else ""
                    title = f"{stage.name}: {reason}"
                    made.append(self._sample(title, intro, [(POOL, row) for row in rows], count))
        return [gallery for gallery in made if gallery.groups][: 2 * _GROUPS]

    def faces(self) -> list[Gallery]:
        """Images with most faces found; they are blurred here as in the packed shards."""
        stage = self.work.deciding(POOL, "num_faces")
        if stage is None:
            return []
        rows = select(
            stage.decisions,
            "select *, count(*) over () as n from rows where num_faces > 0 "
            "order by num_faces desc, id limit ?",
            [_FALLEN],
        )
        intro = "Shown as every later stage and training see them."
        shown = [(POOL, row) for row in rows]
        return [self._sample(f"{stage.name}: found", intro, shown, rows[0]["n"])] if rows else []

    def final(self) -> list[Gallery]:
        """A sample of the finished set by seed set, or by source set where none was retrieved."""
        made, as_is = [], self.work.record.as_is
        parts = (
            "select coalesce(seed_set, source_set) as part, seed_set is null as as_is, "
            "count(*) as n from rows group by all order by n desc, part limit ?"
        )
        query = (
            "select * from rows where coalesce(seed_set, source_set) = ? "
            "and (seed_set is null) = ? order by id limit ?"
        )
        for part in select(self.work.manifest, parts, [_GROUPS]):
            rows = select(self.work.manifest, query, [part["part"], part["as_is"], _FINAL])
            intro = "Taken as it is." if part["as_is"] else "Retrieved from the pool."
            flows = (row["source_set"] if row["source_set"] in as_is else POOL for row in rows)
            shown = list(zip(flows, rows, strict=True))
            made.append(self._sample(str(part["part"]), intro, shown, part["n"]))
        return made

    def _sample(self, title: str, intro: str, rows: list[tuple[str, Row]], total: int) -> Gallery:
        items = [self._shown(flow, row) for flow, row in rows]
        return Gallery(title, intro, [Group(items)] if items else [], total)

    def _has_images(self, stage: FinishedStage) -> bool:
        """Whether rows that this stage dropped have an image: it ran after canonicalize."""
        names = [entry.stage for entry in self.work.record.pool]
        made = self.work.making(POOL, "images")
        return made is not None and names.index(stage.name) > names.index(made.name)

    def _shown(self, flow: str, row: Row, role: str = "") -> Shown:
        facts = {name: row.get(name) for name in _FACTS}
        if facts["score"] == facts["similarity"]:
            del facts["score"]
        return Shown(self.pictures.want(flow, row["id"]), role, rounded(facts))


def _names_a_twin(stage: FinishedStage, reason: str) -> bool:
    return "twin" in stage.decisions.columns and reason != "bad_vector"
