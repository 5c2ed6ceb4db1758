"""Commands on models: training, evaluation, pictures of what a model sees, export."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.options import AllowChanged, Changes, Json, Out, Recipe, TrainingData

if TYPE_CHECKING:
    from pretrain.config import TrainConfig


def pretrain(
    data: TrainingData,
    config: Annotated[
        str | None, typer.Argument(help="A YAML file, or the name of one that ships.")
    ] = None,
    out: Annotated[str | None, typer.Option("--out", help="Folder of the run.")] = None,
    config_file: Annotated[
        str | None, typer.Option("--config", help="The same, as an option.")
    ] = None,
    continued: Annotated[
        str | None,
        typer.Option("--continue", help="Run or checkpoint to go on from at another resolution."),
    ] = None,
    changes: Changes = None,
    allow_changed: AllowChanged = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Take two steps; show settings, schedules, time, memory."),
    ] = False,
) -> None:
    """Pretrain DINOv2, or a copy encoder, on a manifest; the same command resumes a stopped run.

    Examples:

        curate pretrain demo --data build/demo/manifest --out build/demo/pretrain

        curate pretrain vits14 --data build/demo/manifest --dry-run

        curate pretrain highres_518 --continue runs/vitl14 --data manifest --out runs/vitl14-518

        curate pretrain copy --data build/demo/manifest --out build/demo/copy
    """
    from curation.errors import ConfigError
    from pipelines.operate import console
    from pipelines.run.training import train
    from pretrain.config import TrainConfig
    from pretrain.continuing import load_continued_config
    from pretrain.copy_config import load_training_config

    if config and config_file:
        raise ConfigError(f"curate pretrain {config}: and --config {config_file}; give one of them")
    if out is None and not dry_run:
        raise typer.BadParameter("is missing: name the folder of the run", param_hint="--out")
    name = config or config_file
    if name is None:
        raise ConfigError("curate pretrain: name a config, a YAML file or one that ships")
    console.set_up_logging(True)
    settings: TrainConfig
    if continued is None:
        settings = load_training_config(name, changes or [])
    else:
        settings = load_continued_config(name, changes or [], continued, out)
    if out is None or dry_run:
        _rehearse(settings, data)
        return
    result = train(settings, data, out, allow_changed=allow_changed)
    console.print_pairs(result, title="pretrain")


def _rehearse(settings: "TrainConfig", data: str) -> None:
    """Take two steps, and show settings, schedules, time and memory."""
    from pipelines.operate import console
    from pretrain.rehearsal import rehearse

    found = rehearse(settings, data)
    for line in settings.as_yaml().splitlines():
        console.print_line(line)
    names = list(found.schedules[0])
    rows = [[f"{row[name]:.4g}" for name in names] for row in found.schedules]
    console.print_rows(names, rows, title="schedules")
    seconds = found.seconds_before + found.seconds_per_step * settings.optim.steps
    console.print_pairs(
        {
            "data": found.data["path"],
            "images": found.data["images"],
            "images a step": found.batch,
            "epochs": f"{found.batch * settings.optim.steps / found.data['images']:,.2f}",
            "seconds a step": f"{found.seconds_per_step:,.3f}",
            "hours before the first step": f"{found.seconds_before / 3600:,.2f}",
            "hours in all": f"{seconds / 3600:,.2f}",
            "peak memory, GB": f"{found.peak_bytes / 1e9:,.2f}",
        },
        title="dry run: nothing is written",
    )


def distill(
    config: Recipe,
    data: TrainingData,
    out: Out,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="Folder of the teacher's pretraining run.")
    ] = None,
    changes: Changes = None,
    allow_changed: AllowChanged = False,
) -> None:
    """Distill a pretrained model into a smaller one; the same command resumes a stopped run.

    Example:

        curate distill tiny --teacher build/demo/pretrain --data build/demo/manifest --out small
    """
    from pipelines.operate import console
    from pipelines.run.training import train
    from pretrain.config import load_distill_config

    console.set_up_logging(True)
    settings = load_distill_config(config, changes or [])
    if teacher is not None:
        settings = settings.replace(teacher_run=str(Path(teacher).resolve()))
    result = train(settings, data, out, allow_changed=allow_changed)
    console.print_pairs(result, title="distill")


def evaluate(
    task: Annotated[
        str,
        typer.Argument(
            help="knn, linear, logreg, retrieval, segmentation, depth, artifacts; or table."
        ),
    ],
    encoder: Annotated[
        str | None,
        typer.Option("--encoder", "--backbone", help="An encoder, or a file with a backbone."),
    ] = None,
    train: Annotated[
        str | None, typer.Option("--train", help="Data to learn from, or its embeddings.")
    ] = None,
    test: Annotated[
        str | None, typer.Option("--test", help="Data to test on, or its embeddings.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Folder of results: one Parquet row a run.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", min=1, help="Side in pixels; the model's own.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    allow_hub: Annotated[
        bool, typer.Option("--allow-hub", help="Fetch weights from a hub where needed.")
    ] = False,
    changes: Changes = None,
    json: Json = False,
) -> None:
    """Evaluate any encoder on frozen features, and set the result beside the paper's.

    Examples:

        curate evaluate knn --encoder runs/vits14/backbone.safetensors --train train --test val

        curate evaluate linear --encoder dinov2:vitl14:w.pth --train in1k/train --test in1k/val

        curate evaluate segmentation --encoder w.pth --train ade20k:ADE --test ade20k:ADE

        curate evaluate table --out results
    """
    import pyarrow as pa

    from curation.errors import ConfigError
    from pipelines.operate import console
    from pretrain.evaluation.results import SCHEMA, comparison, read_results, write_result

    console.set_up_logging(False)
    columns = ("model", "data", "metric", "value")
    if task == "table":
        if out is None:
            raise ConfigError("curate evaluate table: name the folder of results: --out")
        rows = read_results(out)
        if json:
            console.print_json(rows.to_pylist())
        else:
            console.print_rows(columns, comparison(rows), "results")
        return
    if test is None:
        raise ConfigError(f"curate evaluate {task}: name the images to test: --test")
    from pretrain.evaluation.tasks import Request, run_task  # loads torch

    request = Request(task, encoder, train, test, image_size, device, allow_hub, changes or [])
    result = run_task(request)
    if os.environ.get("RANK", "0") != "0":
        return
    written = {} if out is None else {"result": write_result(result, out)}
    counts = {"train": result.num_train, "test": result.num_test}
    if json:
        about = {"task": result.task, "encoder": result.encoder, "seconds": result.seconds}
        console.print_json({**result.metrics, **counts, **about, **written})
        return
    rows = pa.Table.from_pylist([result.row()], schema=SCHEMA)
    console.print_rows(columns, comparison(rows), task)
    figures = {name: f"{value:.4g}" for name, value in result.metrics.items()}
    seconds = {"seconds": f"{result.seconds:.1f}"}
    console.print_pairs({**counts, **figures, **seconds, **written}, title="")


def show(
    kind: Annotated[str, typer.Argument(help="pca, attention or knn.")],
    images: Annotated[list[str], typer.Argument(help="Images, folders of them, tars.")],
    out: Annotated[str, typer.Option("--out", help="A page (.html) or a picture (.png).")],
    encoder: Annotated[
        str, typer.Option("--encoder", "--backbone", help="An encoder, or a file with a backbone.")
    ],
    among: Annotated[
        str | None, typer.Option("--among", help="knn: images to search; these by default.")
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="knn: neighbors shown.")] = 6,
    image_size: Annotated[
        int | None, typer.Option("--image-size", min=1, help="Short side in pixels.")
    ] = None,
) -> None:
    """Show what a model sees: components of its patches, attention, nearest neighbors.

    Examples:

        curate show pca photos/ --encoder backbone.safetensors --image-size 448 --out page.html

        curate show knn query.jpg --among photos/ --encoder lite-semantic --out neighbors.png
    """
    from curation.errors import ConfigError
    from curation.sources.shards import images_below
    from pipelines.cli.model_pictures import MAX_IMAGES, knn_rows, map_rows, page, sheet
    from pipelines.operate import console

    suffix = Path(out).suffix.lower()
    if kind not in ("pca", "attention", "knn") or suffix not in (".html", ".png"):
        raise ConfigError(
            f"curate show {kind} --out {out}: want pca, attention or knn, and .html or .png"
        )
    files = [file for path in images for file in images_below(path)]
    if len(files) > MAX_IMAGES:
        raise ConfigError(f"{len(files)} images are too many for a page; name {MAX_IMAGES} at most")
    if kind == "knn":
        rows = knn_rows(files, encoder, images_below(among) if among else files, k)
    else:
        rows = map_rows(kind, files, encoder, image_size)
    title = f"{kind} of {encoder}"
    if suffix == ".html":
        Path(out).write_text(page(title, rows))
    else:
        sheet(rows).save(out)
    pictures = sum(map(len, rows))
    console.print_pairs({"images": len(files), "pictures": pictures, "out": out}, title=title)


def export(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder of a run, one of its checkpoints, or a file of weights.")
    ],
    out: Out,
    step: Annotated[
        int | None, typer.Option("--step", min=0, help="Checkpoint of the run; its last.")
    ] = None,
    format: Annotated[
        str, typer.Option("--format", help="safetensors, onnx, huggingface or timm.")
    ] = "safetensors",
    data: Annotated[
        str | None,
        typer.Option("--data", help="Work folder or manifest that it learned from, for the card."),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            "--license", "--licence", help="License of the weights; that of the file, else unknown."
        ),
    ] = None,
) -> None:
    """Write a backbone for others: for transformers, timm, ONNX runtimes; with a model card.

    Examples:

        curate export build/demo/pretrain --format huggingface --out model --data build/demo

        curate export runs/vits14 --step 5000 --out model

        curate export dinov2_vits14_pretrain.pth --format onnx --out model
    """
    from curation.errors import ConfigError
    from embedder.checkpoint import UNKNOWN
    from embedder.export import FORMATS, export_backbone
    from pipelines.audit.model_card import data_facts, model_card, write_card
    from pipelines.cli.weights import find_weights
    from pipelines.operate import console

    if format not in FORMATS:
        raise ConfigError(f"--format {format}: unknown; known: {', '.join(FORMATS)}")
    found = find_weights(Path(checkpoint), step)
    facts = data_facts(data, found.recorded.get("data"))
    about = {**found.training(), "license": license or found.license}
    # Into the weight file, too: it may be parted from its card.
    metadata = {
        "manifest_digest": facts.digest,
        "recipe": facts.recipe,
        "license": about["license"],
    }
    files = export_backbone(found.model, format, Path(out), metadata)
    card = write_card(model_card(found.model, format, out, facts, about), out)
    console.print_pairs(
        {
            "format": format,
            "step": found.recorded.get("step", UNKNOWN),
            "files": ", ".join(path.name for path in files),
            "card": card,
            "manifest digest": facts.digest,
        },
        title="export",
    )
