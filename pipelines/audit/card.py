"""The data card of a finished set: Markdown for people, Croissant (JSON-LD) for machines."""

import json
from typing import Any

from curation import storage
from curation.dataset import MANIFEST, Dataset
from curation.errors import DatasetError
from embedder.checkpoint import license_in
from pipelines.audit.dataset_stats import Stats
from pipelines.audit.funnel import funnel
from pipelines.audit.markdown import as_code, as_text
from pipelines.audit.run_stats import run_stats
from pipelines.audit.work_folder import WorkFolder
from pipelines.run.run_record import POOL, RunRecord

Json = dict[str, Any]

_SHARDS = "shards"
"""Id of the files that fields name as their source."""
_MAX_FILES = 1000
"""Croissant lists so many files one by one."""
_TYPES = {
    "string": "sc:Text",
    "int32": "sc:Integer",
    "int64": "sc:Integer",
    "float": "sc:Float",
    "timestamp[ms, tz=UTC]": "sc:DateTime",
    "bool": "sc:Boolean",
}
_ABOUT = {
    "id": "32 hex characters: blake2b-128 of the normalized source",
    "source": "URL, or path below the set's folder",
    "source_set": "set that the image came with",
    "alt": "alternative text of the page, where the list had it",
    "page": "page that showed the image, where the list had it",
    "license": "license, where the list had it",
    "crawled_at": "when a crawler saw that page, for rows from web archives",
    "width": "pixels of the stored image",
    "height": "pixels of the stored image",
    "original_width": "pixels as downloaded",
    "original_height": "pixels as downloaded",
    "format": "format as downloaded",
    "num_bytes": "bytes as downloaded",
    "sha256": "SHA-256 of the bytes as downloaded",
    "pixel_hash": "BLAKE3 of the decoded pixels, 128 bits",
    "phash": "PDQ, 256 bits",
    "seed_set": "seed set that retrieved the image; null for sets taken as they are",
    "rule": "sample: nearest images of a seed; cluster: images of a cluster with seeds",
    "seed_id": "the seed image, for rule sample",
    "rank": "place among the images of the seed or the cluster",
    "similarity": "cosine to the seed, or to the cluster's center",
    "cluster": "number of the cluster, for rule cluster",
}
_LIMITS = (
    "Images come from the web: licenses are known only where the list of URLs told them.",
    "Filters err: harmless images are dropped, and unsafe ones can pass below the thresholds.",
    "Copies beyond the threshold's reach (heavy crops, collages) can remain, and so can leaks.",
    "Retrieval follows curated seeds: their bias toward places, people and objects is inherited.",
    "URLs rot: a later download gives fewer images; ids and hashes tell which.",
)


def write_card(work: str, out: str) -> list[str]:
    """Write README.md and croissant.json into a folder; give their paths.

    Raises:
        DatasetError: no finished run with a manifest there.
    """
    folder = WorkFolder(work.rstrip("/"))
    if folder.manifest is None:
        raise DatasetError(f"{work}: its recipe has no 'select', so there is no set to describe")
    paths = [storage.join(out, "README.md"), storage.join(out, "croissant.json")]
    storage.write_bytes(paths[0], card_text(folder).encode())
    described = json.dumps(croissant(folder.record, folder.manifest), indent=2) + "\n"
    storage.write_bytes(paths[1], described.encode())
    return paths


def card_text(work: WorkFolder) -> str:
    """The card for people."""
    facts = run_stats(work)
    record = work.record
    parts = [
        f"# {as_text(record.recipe)}\n",
        f"{facts['rows_out']:,} images, chosen from {facts['rows_in']:,} listed.\n",
        f"- content digest: `{facts['content_digest']}`",
        f"- recipe: {as_code(record.recipe_file)}, seed {record.seed}",
        f"- made with: {as_text(', '.join(f'{n} {v}' for n, v in record.versions.items()))}",
        "\n## Sources\n",
        *_sources(record),
        "\n## How it was made\n",
        "| stage | in | added | dropped | out | reasons |",
        "|---|---:|---:|---:|---:|---|",
        *(
            f"| {as_text(row.stage)} | {row.rows_in:,} | {row.added:,} | {row.num_dropped:,} "
            f"| {row.rows_out:,} | {as_text(row.reasons)} |"
            for row in funnel(record)
        ),
        "\n## Composition\n",
        *_composition(facts),
        "\n## Thresholds\n",
        *(
            f"- {as_text(score['stage'])}: {as_text(score['score'])} against "
            + ", ".join(f"{value:.6g}" for value in score["thresholds"])
            for score in facts["scores"]
            if score["thresholds"]  # an encoder's own, too
        ),
        *_encoders(work),
        "\n## Settings\n",
        *(
            f"- {as_text(one.stage)}: {as_code(json.dumps(one.record.settings, sort_keys=True))}"
            for one in record.pool
            if one.record.settings
        ),
        "\n## Known limits\n",
        *(f"- {limit}" for limit in _LIMITS),
        "\n## Columns\n",
        *(
            f"- {as_code(name)}: {_ABOUT.get(name, '')}"
            for name in (work.manifest.columns if work.manifest else ())
        ),
    ]
    return "\n".join(parts) + "\n"


def _encoders(work: WorkFolder) -> list[str]:
    """What made the vectors, and the license and origin of its weights."""
    outputs = [
        (name, stage.output(name).attributes)
        for stage in work.stages(POOL)
        for name in stage.entry.record.outputs
        if stage.has(name)
    ]
    lines = [
        f"- {as_text(name)}: {as_code(facts['encoder'])}, {facts['width']} dimensions; "
        f"weights: {as_text(license_in(facts))}"
        for name, facts in outputs
        if "encoder" in facts
    ]
    return ["\n## Encoders\n", *lines] if lines else []


def croissant(record: RunRecord, manifest: Dataset) -> Json:
    """The card for machines: Croissant 1.0, the Parquet files and the fields of their rows."""
    files = _files(manifest)
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": record.recipe,
        "description": f"{manifest.num_rows:,} images curated by the recipe '{record.recipe}'.",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "version": record.versions.get("lvd-curate", "0.0.0"),
        "identifier": manifest.manifest.content_digest,
        "distribution": files,
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "images",
                "name": "images",
                "description": "One image of the set a row.",
                "key": {"@id": "images/id"},
                "field": [
                    {
                        "@type": "cr:Field",
                        "@id": f"images/{name}",
                        "name": name,
                        "description": _ABOUT.get(name, ""),
                        "dataType": _TYPES.get(kind, "sc:Text"),
                        "source": {"fileSet": {"@id": _SHARDS}, "extract": {"column": name}},
                    }
                    for name, kind in manifest.manifest.columns.items()
                ],
            }
        ],
    }


def _files(manifest: Dataset) -> list[Json]:
    """What the data lies in."""
    shards = manifest.manifest.shards
    index = {
        "@type": "cr:FileObject",
        "@id": "index",
        "name": MANIFEST,
        "description": "Names, sizes and SHA-256 of all shards.",
        "contentUrl": f"manifest/{MANIFEST}",
        "encodingFormat": "application/json",
        "sha256": storage.digest_file(storage.join(manifest.path, MANIFEST))["sha256"],
    }
    listed = [
        {
            "@type": "cr:FileObject",
            "@id": one.name,
            "name": one.name,
            "contentUrl": f"manifest/{one.name}",
            "contentSize": f"{one.num_bytes} B",
            "encodingFormat": "application/x-parquet",
            "sha256": one.sha256,
        }
        for one in shards[:_MAX_FILES]
    ]
    together = {
        "@type": "cr:FileSet",
        "@id": _SHARDS,
        "name": _SHARDS,
        "containedIn": [{"@id": one["@id"]} for one in listed],
        "encodingFormat": "application/x-parquet",
        "includes": "*.parquet",
    }
    return [index, *listed, together]


def _sources(record: RunRecord) -> list[str]:
    lines = []
    for flow, entries in {"pool": record.pool, **record.sets}.items():
        settings = entries[0].record.settings
        place = settings.get("urls") or settings.get("images")
        used = ", ".join(record.roles.get(flow, ())) or "the pool"
        rows = entries[0].record.rows_in
        shown = f"{as_text(flow)} ({as_text(used)})"
        lines.append(f"- {shown}: {rows:,} rows of {as_code(place)}")
    return lines


def _composition(facts: Stats) -> list[str]:
    lines = []
    for column in facts["manifest"]["columns"]:
        if column["column"] in ("source_set", "seed_set", "format", "license"):
            values = column.get("values", [])
            shown = ", ".join(f"{_code(one['value'])} {one['rows']:,}" for one in values)
            if shown:
                lines.append(f"- {column['column']}: {shown}")
        elif column["column"] in ("width", "height", "num_bytes") and column.get("rows"):
            middle = column["quantiles"]["0.5"]
            ends = f"{column['min']:,} to {column['max']:,}"
            lines.append(f"- {column['column']}: {ends}, median {middle:,.0f}")
    hosts = ", ".join(f"{_code(row['host'])} {row['kept']:,}" for row in facts["hosts"][:10])
    return [*lines, *([f"- hosts: {hosts}"] if hosts else [])]


def _code(text: str | None) -> str:
    return "none" if text is None else as_code(text)


_CONTEXT: Json = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
