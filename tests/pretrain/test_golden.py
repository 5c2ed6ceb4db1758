"""The numbers that the public implementation prints."""

from typing import Any

import pytest
import torch

from embedder.vit import VisionTransformer, vit_config
from pretrain.batch import Batch, index_masks
from pretrain.config import HeadSettings, OptimSettings, PretrainConfig
from pretrain.heads import Projected, PrototypeHead
from pretrain.losses.centering import Center
from pretrain.losses.cross_entropy import cross_entropy
from pretrain.losses.ibot import ibot_loss
from pretrain.losses.koleo import koleo_loss
from pretrain.losses.sinkhorn import sinkhorn_knopp, sinkhorn_targets
from pretrain.losses.targets import Targets
from pretrain.methods.dinov2 import DINOv2
from pretrain.optim import clip_gradients, group_key
from pretrain.schedules import Cosine
from tests.pretrain.formula import fill_backbone, fill_head, g, golden, near

GOLDEN = golden("golden.json")
TEACHER, STUDENT = g((6, 8)), g((6, 8), 0.61)
HEAD = HeadSettings(prototypes=16, hidden=24, bottleneck=8)


def whole(logits: torch.Tensor) -> Projected:
    """Logits as the product of themselves and the identity."""
    return Projected(logits, torch.eye(logits.shape[1]))


def targets() -> Targets:
    return sinkhorn_targets(whole(TEACHER), 0.07)


def test_sinkhorn_knopp__golden() -> None:
    near(sinkhorn_knopp(TEACHER, 0.07)[0], GOLDEN["dino_sk_row0"])


def test_cross_entropy__golden() -> None:
    rows = torch.arange(6)[:, None]
    loss = cross_entropy(whole(STUDENT), targets(), rows, torch.full((6,), 1 / 6), 0.1)
    near(loss[None], GOLDEN["dino_ce(S;q)"])


def test_center__golden() -> None:
    center = Center(8, 0.9)
    near(
        center.targets(whole(TEACHER), 0.07).rows(torch.tensor([0]))[0],
        GOLDEN["dino_centering_row0_before"],
    )
    near(center.center, GOLDEN["dino_center"])


def test_ibot_loss__golden() -> None:
    masks = torch.zeros(4, 5, dtype=torch.bool)
    masks[0, :4] = True
    masks[2, 1:3] = True
    weights = index_masks(masks)[2]
    near(
        ibot_loss(whole(STUDENT), targets(), 0, weights, 4, 0.1)[None],
        GOLDEN["ibot_forward_masked"],
    )


def test_koleo_loss__golden() -> None:
    near(koleo_loss(g((6, 8), 0.61) + 0.3 * g((6, 8), 1.7))[None], GOLDEN["koleo(6x8)"])


def test_head__golden() -> None:
    head = PrototypeHead(12, HEAD)
    named = [[name, list(p.shape)] for name, p in head.named_parameters()]
    assert named == GOLDEN["head_params"]
    fill_head(head)
    near(head.logits(g((3, 12)))[0, :6], GOLDEN["head_out row0"])


def test_cosine__golden() -> None:
    schedule = Cosine(1.0, 0.1, 20, 5)
    near(torch.tensor([schedule(i) for i in (0, 1, 4, 5, 12, 19, 20, 99)]), GOLDEN["cosine 20/5"])


def test_group_key__golden() -> None:
    settings = OptimSettings(layer_decay=0.9, patch_embed_lr=0.2)
    with torch.device("meta"):
        model = VisionTransformer(vit_config("vits14", image_size=224))
    names = {name for name, _ in model.named_parameters()}
    for name, expected in GOLDEN["param groups decay .9 pe .2"].items():
        assert name in names
        near(torch.tensor(group_key("backbone." + name, 12, settings)[:2]), expected)


def step_config() -> PretrainConfig:
    values: dict[str, Any] = {
        "model": {"arch": "vits14", "width": 24, "depth": 2, "heads": 3, "drop_path": 0.0,
                  "layerscale": 1.0},
        "crops": {"global_size": 70, "local_size": 42, "local_count": 2},
        "loss": {"dino_head": HEAD.model_dump(), "ibot_head": HEAD.model_dump(), "block_rows": 4},
    }  # fmt: skip
    return PretrainConfig.model_validate(values)


def step_batch() -> Batch:
    masks = torch.zeros(6, 25, dtype=torch.bool)
    masks[0, 3:9] = True
    masks[4, [0, 1, 2, 12]] = True
    crops = g((6, 3, 70, 70), 0.013), g((6, 3, 42, 42), 0.029)
    return Batch(*crops, *index_masks(masks))


def formula_method() -> DINOv2:
    method = DINOv2(step_config()).train()
    for network, shift in ((method.student, 0.0), (method.teacher, 0.5)):
        fill_backbone(network.backbone, shift)
        fill_head(network.dino_head, shift)
        fill_head(network.ibot_head, shift)
    return method


@pytest.mark.parametrize("max_logit_bytes", [2**31, 1])
def test_step__golden(max_logit_bytes: int) -> None:
    method, batch = formula_method(), step_batch()
    method.config = method.config.replace(
        loss={**method.config.loss.model_dump(), "max_logit_bytes": max_logit_bytes}
    )
    for call in golden("golden_step.json")["sk_untied"].values():
        method.zero_grad()
        losses = method.losses(batch, method.targets([batch], 0.07), 0, torch.Generator())
        losses["total_loss"].backward()
        for name, value in call["loss_dict"].items():
            near(losses[name], value)
        near(losses["total_loss"], call["total_backpropagated"])
        norms = clip_gradients(method.submodules(), 3.0)
        for name, value in call["grad_norm"].items():
            near(norms[name], value)


def test_step__public_names() -> None:
    names = {name.split(".")[0] for name in DINOv2(step_config()).teacher.state_dict()}
    assert names == {"backbone", "dino_head", "ibot_head"}
