import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw, ImageFont

from curation.config import parse_settings
from curation.dataset import write_dataset
from curation.errors import ConfigError, SpaceError
from curation.schema import schema_of
from curation.stage import StageFolder, StageInputs
from curation.stages.relevance import Relevance, text_share
from embedder.images import canonicalize, decode, encode_jpeg
from pipelines.engines.local_engine import LocalEngine
from pipelines.run.stage_runner import Silent, run_stage

WORDS = ("the", "image", "of", "Monday", "12:45", "please", "find", "an", "invoice", "$19.99")


@pytest.fixture
def relevance(tmp_path):
    def run(pool, sets=None, *, name="out", workers=1, **settings):
        return run_stage(
            Relevance(**settings),
            StageInputs(pool, sets or {}),
            StageFolder(str(tmp_path / name), "relevance"),
            LocalEngine(workers),
            Silent(),
        )

    return run


def screenshot(seed: int) -> np.ndarray:
    """A page of text as a screen shows it, light or dark, with a picture in a corner or without."""
    rng = np.random.default_rng(seed)
    width, height = [(1080, 1920), (1280, 800), (800, 1200)][seed % 3]
    ground, ink = ((255, 255, 255), (20, 20, 30)) if seed % 2 else ((25, 25, 35), (220, 220, 210))
    image = Image.new("RGB", (width, height), ground)
    draw = ImageDraw.Draw(image)
    size = int(rng.integers(22, 34))
    font = ImageFont.load_default(size)
    for y in range(40, height - 2 * size, int(size * 1.4)):
        words = rng.choice(WORDS, int(rng.integers(4, 16)))
        draw.text((40, y), " ".join(words), font=font, fill=ink)
    if seed % 4 == 0:
        photo = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        image.paste(photo.resize((width // 3, height // 4)), (width // 2, height // 2))
    return decode(canonicalize(encode_jpeg(np.asarray(image))).data)


def test_text_share__tells_screenshots_from_pictures():
    shares = [text_share(screenshot(seed)) for seed in range(24)]
    assert min(shares) > Relevance().max_text
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(noise[:6, :8]).resize((400, 300)))
    flat = np.full((300, 400, 3), 200, np.uint8)
    for picture in (noise, smooth, flat, flat[:1, :1], flat[:3, :]):
        assert text_share(picture) <= 0.01


def test_text_share__photos_pass(shared_data):
    photos = sorted((shared_data / "photos").glob("*.jpg"))
    shares = np.array([text_share(decode(canonicalize(p.read_bytes()).data)) for p in photos])
    assert (shares > Relevance().max_text).mean() <= 0.01


def test_relevance__drops_text_and_keeps_its_score(tmp_path, embed, relevance):
    images = [encode_jpeg(screenshot(1)), encode_jpeg(np.zeros((9, 9, 3), np.uint8)), b"no image"]
    pool = embed(np.eye(3, 8))
    schema = schema_of(["id", "image"])
    table = pa.table([pool.live_ids(0), images], schema=schema)
    pool = pool.with_layer("images", write_dataset(str(tmp_path / "images"), [table], schema))
    record, outputs = relevance(pool)
    assert record.dropped == {"text": 1, "unreadable": 1}
    rows = outputs["decisions"].read().to_pylist()
    assert rows[0]["text_share"] == rows[0]["score"] > rows[0]["threshold"]
    assert (rows[1]["text_share"], rows[1]["seed_similarity"], rows[1]["keep"]) == (0, None, True)
    assert rows[2]["text_share"] is None


def vectors(*degrees: float) -> np.ndarray:
    rows = np.zeros((len(degrees), 8))
    rows[:, 0], rows[:, 1] = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return rows


SEEDED = {"max_text": None, "embeddings": "copy", "seeds": ("near",), "min_similarity": 0.5}


def test_relevance__drops_what_is_far_from_every_seed(embed, relevance):
    pool = embed(np.vstack([vectors(0, 45, 100, 180), np.zeros((1, 8))]), sizes=[2, 0, 3])
    sets = {"near": embed(vectors(-10), "near"), "other": embed(vectors(120, 121), "other")}
    record, outputs = relevance(pool, sets, **{**SEEDED, "seeds": ("near", "other")})
    assert record.dropped == {"bad_vector": 1}
    record, outputs = relevance(pool, sets, name="one", **SEEDED)
    assert record.dropped == {"bad_vector": 1, "far_from_seeds": 2}
    rows = outputs["decisions"].read().to_pylist()
    found = [row["seed_similarity"] for row in rows]
    assert found[:4] == pytest.approx(np.cos(np.deg2rad([10, 55, 110, 190])), abs=1e-3)
    assert rows[3]["score"] == rows[3]["seed_similarity"]


def test_relevance__content_is_free_of_shards_and_workers(embed, relevance):
    rng = np.random.default_rng(0)
    rows, seeds = rng.normal(size=(60, 8)), rng.normal(size=(40, 8))
    found = []
    for name, sizes, workers in (("a", [60], 1), ("b", [7, 53], 2)):
        sets = {"near": embed(seeds, "near", sizes=[len(seeds) - sizes[0] % 9, sizes[0] % 9])}
        pool = embed(rows, sizes=sizes)
        record, _ = relevance(pool, sets, name=name, workers=workers, max_seeds=9, **SEEDED)
        found.append(record.outputs)
        assert record.figures == {"seeds": 40, "seeds_compared": 9}
    assert found[0] == found[1]


def test_relevance__other_spaces_and_settings_are_refused(embed, relevance):
    sets = {"near": embed(vectors(0), "near", attributes={"space": "another"})}
    with pytest.raises(SpaceError, match="another"):
        relevance(embed(vectors(0)), sets, **SEEDED)
    with pytest.raises(ConfigError, match="give 'seeds' and 'embeddings' together"):
        parse_settings(Relevance, {"seeds": ["near"]}, "relevance")
    with pytest.raises(ConfigError, match="nothing to judge by"):
        parse_settings(Relevance, {"max_text": None}, "relevance")
