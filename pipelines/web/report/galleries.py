"""What the page shows of single images: chosen by query, a bounded number of rows a gallery.

The rows with the smallest ids are a random sample (ids are hashes) that stays the same from one
page to the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipelines.audit.tables import Row, Tables
from pipelines.audit.work_folder import FinishedStage, WorkFolder
from pipelines.run.run_record import POOL
from pipelines.web.report.pictures import Key, Picture, Pictures

_PAIRS = 12
_COMPONENTS = 5
_MEMBERS = 12
_SEEDS = 5
_HITS = 8
_FALLEN = 12
_FINAL = 16
_GROUPS = 12
"""Sets, reasons or seed sets that get a gallery of their own; the rest are counted."""


@dataclass
class Shown:
    """One image of a group."""

    key: Key
    role: str = ""
    """What it is here: dropped, kept, seed."""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Group:
    """Images that belong together: a pair, a component, a seed and its images."""

    items: list[Shown]
    title: str = ""
    note: str = ""
    kind: str = "set"
    """pair, seed or set."""


@dataclass
class Gallery:
    """Groups of one kind."""

    title: str
    intro: str
    groups: list[Group] = field(default_factory=list)
    total: int = 0
    """Rows of this kind in the whole run."""


class Book(Protocol):
    """Holds pictures by key."""

    def get(self, key: Key) -> Picture:
        """The picture of a key."""


class GalleryMaker:
    """Chooses the rows of all galleries of a run."""

    def __init__(self, work: WorkFolder, pictures: Pictures) -> None:
        self._work = work
        self._pictures = pictures

    def copies(self) -> list[Gallery]:
        """Pairs and components of the pool's stages that look for copies."""
        made: list[Gallery] = []
        for stage in self._work.stages(POOL):
            columns = stage.decisions.columns
            with Tables() as tables:
                if "twin" not in columns or not tables.add("verdicts", stage.decisions):
                    continue
                if "component" in columns:
                    made += self._components(tables)
                    made += self._chains(stage, tables)
                made += self._pairs(stage, tables)
        return [gallery for gallery in made if gallery.groups]

    def leaks(self) -> list[Gallery]:
        """Images dropped because a benchmark holds them, beside the benchmark's image."""
        made = []
        for stage in self._work.all_stages():
            if "twin_set" not in stage.decisions.columns:
                continue
            with Tables() as tables:
                if tables.add("verdicts", stage.decisions):
                    made += self._leaks_of(stage, tables)
        return made[:_GROUPS]

    def retrieval(self) -> list[Gallery]:
        """Seeds and what they fetched; clusters and what they gave."""
        hits = self._work.hits
        with Tables() as tables:
            if hits is None or not tables.add("hits", hits):
                return []
            query = "select seed_set, rule, count(*) as n from hits group by all order by all"
            return [self._hits_of(row, tables) for row in tables.rows(query)[:_GROUPS]]

    def filtered(self) -> list[Gallery]:
        """A sample of the images dropped for each reason that names no other image."""
        made = []
        for stage in self._work.stages(POOL):
            if stage.entry.kind.shows_dropped == "hidden" or not self._has_images(stage):
                continue
            with Tables() as tables:
                if not tables.add("verdicts", stage.decisions):
                    continue
                for reason, count in stage.entry.record.dropped.items():
                    if not _names_a_twin(stage, reason):
                        made.append(self._fallen(stage, reason, count, tables))
        return [gallery for gallery in made if gallery.groups][: 2 * _GROUPS]

    def faces(self) -> list[Gallery]:
        """Images with most faces found; they are blurred here as in the packed shards."""
        stage = self._work.deciding(POOL, "num_faces")
        if stage is None:
            return []
        with Tables() as tables:
            if not tables.add("verdicts", stage.decisions):
                return []
            count = tables.first("select count(*) as n from verdicts where num_faces > 0")["n"]
            rows = tables.rows(
                "select * from verdicts where num_faces > 0 order by num_faces desc, id limit ?",
                [_FALLEN],
            )
        items = [self._shown(POOL, row["id"], "", row) for row in rows]
        intro = "Shown as every later stage and training see them."
        return [Gallery(f"{stage.name}: found", intro, [Group(items)], count)] if items else []

    def final(self) -> list[Gallery]:
        """A sample of the finished set by seed set, or by source set where none was retrieved."""
        manifest = self._work.manifest
        with Tables() as tables:
            if manifest is None or not tables.add("manifest", manifest):
                return []
            query = (
                "select coalesce(seed_set, source_set) as part, seed_set is null as as_is, "
                "count(*) as n from manifest group by all order by n desc, part limit ?"
            )
            return [self._part(row, tables) for row in tables.rows(query, [_GROUPS])]

    def _components(self, tables: Tables) -> list[Gallery]:
        largest = tables.rows(
            "select component, max(component_size) as size, min(similarity) as lowest "
            "from verdicts where component_size > 1 group by component "
            "order by size desc, component limit ?",
            [_COMPONENTS],
        )
        count = tables.first(
            "select count(distinct component) as n from verdicts where component_size > 1"
        )["n"]
        groups = [self._component(row, tables) for row in largest if row["size"] > 2]
        intro = "All rows joined by pairs above the threshold; one of them stays."
        return [Gallery("Largest groups of near duplicates", intro, groups, count)]

    def _chains(self, stage: FinishedStage, tables: Tables) -> list[Gallery]:
        """Components whose members are least like their representative."""
        groups = []
        for found in stage.entry.record.figures.get("least_alike", [])[:_COMPONENTS]:
            row = tables.first(
                "select max(component_size) as size from verdicts where component = ?",
                [found["component"]],
            )
            if (row["size"] or 0) > 2:
                group = self._component({**row, "component": found["component"]}, tables)
                group.note = f"a member has only {found['lowest_similarity']:.4f} to the kept one"
                groups.append(group)
        intro = "Chains join images that need not be alike: the lowest similarity to the kept one."
        return [Gallery("Widest chains", intro, groups, len(groups))]

    def _component(self, row: Row, tables: Tables) -> Group:
        members = tables.rows(
            "select id, keep, similarity, reason from verdicts where component = ? "
            "order by id != component, similarity desc, id limit ?",
            [row["component"], _MEMBERS],
        )
        items = [self._shown(POOL, one["id"], _fate(one), one) for one in members]
        return Group(items, f"{row['size']:,} images", f"component {row['component']}")

    def _pairs(self, stage: FinishedStage, tables: Tables) -> list[Gallery]:
        made = []
        for reason, count in stage.entry.record.dropped.items():
            if not _names_a_twin(stage, reason) or reason.startswith("leak:"):
                continue
            similar = "similarity" in stage.decisions.columns
            order = "similarity, id" if similar else "id"
            rows = tables.rows(
                f"select * from verdicts where reason = ? and twin is not null order by {order} "
                "limit ?",
                [reason, _PAIRS],
            )
            intro = "Dropped, beside the image that it equals."
            if similar:
                intro = "Dropped, beside its most similar image; the least similar pairs first."
            groups = [self._pair(stage.flow, row) for row in _once_a_pair(rows)]
            made.append(Gallery(f"{stage.name}: {reason}", intro, groups, count))
        return [*made, *self._near_misses(stage, tables)]

    def _near_misses(self, stage: FinishedStage, tables: Tables) -> list[Gallery]:
        if "component" not in stage.decisions.columns:
            return []
        rows = tables.rows(
            "select * from verdicts where keep and twin is not null and similarity < threshold "
            "order by similarity desc, id limit ?",
            [_PAIRS],
        )
        groups = [self._pair(stage.flow, row) for row in _once_a_pair(rows)]
        return [Gallery("Kept, just below the threshold", "Near misses.", groups, len(rows))]

    def _leaks_of(self, stage: FinishedStage, tables: Tables) -> list[Gallery]:
        counts = tables.rows(
            "select twin_set, count(*) as n from verdicts where not keep and twin_set is not null "
            "and starts_with(reason, 'leak:') group by twin_set order by n desc"
        )
        made = []
        for row in counts:
            query = (
                "select * from verdicts where not keep and twin_set = ? "
                "and starts_with(reason, 'leak:') order by similarity, id limit ?"
            )
            pairs = tables.rows(query, [row["twin_set"], _PAIRS])
            groups = [self._pair(stage.flow, one) for one in pairs]
            title = f"{row['twin_set']}: in {_flow_name(stage.flow)}"
            intro = "Dropped, beside the nearest benchmark image; the least similar pairs first."
            made.append(Gallery(title, intro, groups, row["n"]))
        return made

    def _pair(self, flow: str, row: Row) -> Group:
        twin_flow = row.get("twin_set") or flow
        one = self._shown(flow, row["id"], _fate(row), row)
        other = self._shown(twin_flow, row["twin"], _twin_role(row, twin_flow, flow), {})
        similarity = row.get("similarity")
        note = "" if similarity is None else f"similarity {similarity:.4f}"
        if row.get("path") == "chain":
            note += ", by a chain"
        return Group([one, other], "", note, "pair")

    def _hits_of(self, part: Row, tables: Tables) -> Gallery:
        name, rule = part["seed_set"], part["rule"]
        if rule == "sample":
            groups = self._seeds(name, tables)
            intro = "Seeds, each followed by the images that it fetched, the nearest first."
        else:
            groups = self._clusters(name, tables)
            intro = "Clusters of the pool that seeds fell into, the fullest first."
        return Gallery(f"{name}: rule {rule}", intro, groups, part["n"])

    def _seeds(self, name: str, tables: Tables) -> list[Group]:
        seeds = tables.rows(
            "select seed_id, count(*) as n from hits where seed_set = ? group by seed_id "
            "order by seed_id limit ?",
            [name, _SEEDS],
        )
        groups = []
        for seed in seeds:
            hits = tables.rows(
                "select * from hits where seed_set = ? and seed_id = ? order by rank limit ?",
                [name, seed["seed_id"], _HITS],
            )
            items = [self._shown(name, seed["seed_id"], "seed", {})]
            items += [self._shown(POOL, hit["id"], _rank(hit), hit) for hit in hits]
            groups.append(Group(items, f"{seed['n']:,} images of one seed", "", "seed"))
        return groups

    def _clusters(self, name: str, tables: Tables) -> list[Group]:
        clusters = tables.rows(
            "select cluster, count(*) as n from hits where seed_set = ? group by cluster "
            "order by n desc, cluster limit ?",
            [name, _SEEDS],
        )
        groups = []
        for row in clusters:
            hits = tables.rows(
                "select * from hits where seed_set = ? and cluster = ? "
                "order by similarity desc, id limit ?",
                [name, row["cluster"], _HITS],
            )
            items = [self._shown(POOL, hit["id"], "", hit) for hit in hits]
            groups.append(Group(items, f"cluster {row['cluster']}: {row['n']:,} images"))
        return groups

    def _fallen(self, stage: FinishedStage, reason: str, count: int, tables: Tables) -> Gallery:
        rows = tables.rows(
            "select * from verdicts where reason = ? order by id limit ?", [reason, _FALLEN]
        )
        items = [self._shown(stage.flow, row["id"], "", row) for row in rows]
        veiled = stage.entry.kind.shows_dropped == "veiled"
        intro = "Blurred: click an image to see it." if veiled else ""
        groups = [Group(items)] if items else []
        return Gallery(f"{stage.name}: {reason}", intro, groups, count)

    def _part(self, part: Row, tables: Tables) -> Gallery:
        rows = tables.rows(
            "select * from manifest where coalesce(seed_set, source_set) = ? "
            "and (seed_set is null) = ? order by id limit ?",
            [part["part"], part["as_is"], _FINAL],
        )
        items = [self._shown(self._flow_of(row), row["id"], "", row) for row in rows]
        intro = "Taken as it is." if part["as_is"] else "Retrieved from the pool."
        return Gallery(str(part["part"]), intro, [Group(items)], part["n"])

    def _flow_of(self, row: Row) -> str:
        return row["source_set"] if row["source_set"] in self._work.record.as_is else POOL

    def _has_images(self, stage: FinishedStage) -> bool:
        """Whether rows that this stage dropped have an image: it ran after canonicalize."""
        names = [entry.stage for entry in self._work.record.pool]
        made = self._work.making(POOL, "images")
        return made is not None and names.index(stage.name) > names.index(made.name)

    def _shown(self, flow: str, row_id: str, role: str, row: Row) -> Shown:
        return Shown(self._pictures.want(flow, row_id), role, facts_of(row))


def facts_of(row: Row) -> Row:
    """What a caption says of a row: its measures, without empty ones."""
    wanted = (
        "similarity",
        "score",
        "threshold",
        "rank",
        "seed_set",
        "cluster",
        "path",
        "num_faces",
    )
    facts = {name: row[name] for name in wanted if row.get(name) is not None}
    if facts.get("score") == facts.get("similarity"):
        facts.pop("score", None)
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in facts.items()}


def veil_together(groups: Sequence[Group], pictures: Book) -> None:
    """Treat copies alike: what is veiled or hidden in one image of a pair is so in the other."""
    for group in groups:
        if group.kind == "pair":
            both = [pictures.get(item.key) for item in group.items]
            for picture in both:
                picture.veiled = any(one.veiled for one in both)
                picture.hidden = any(one.hidden for one in both)


def _names_a_twin(stage: FinishedStage, reason: str) -> bool:
    return "twin" in stage.decisions.columns and reason != "bad_vector"


def _once_a_pair(rows: list[Row]) -> list[Row]:
    """Leave out a pair that was there the other way round."""
    kept: dict[frozenset[str], Row] = {}
    for row in rows:
        kept.setdefault(frozenset((row["id"], row["twin"])), row)
    return list(kept.values())


def _fate(row: Row) -> str:
    return "kept" if row.get("keep") else "dropped"


def _twin_role(row: Row, twin_flow: str, flow: str) -> str:
    if twin_flow != flow:
        return f"in {twin_flow}"
    return "its likest" if row.get("similarity") is not None else "kept"


def _rank(hit: Row) -> str:
    return f"#{hit['rank']}" if hit.get("rank") is not None else ""


def _flow_name(flow: str) -> str:
    return "the pool" if flow == POOL else flow
