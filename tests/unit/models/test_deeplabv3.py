from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import segmentation

from trainer.components import catalogue
from trainer.models.deeplabv3 import BACKBONES, deeplabv3
from trainer.models.weights import load_safetensors

MOBILENET_FILE = Path(BACKBONES["mobilenet_v3_large"][1].url).name


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("size", [(64, 96), (65, 33)])
def test_logits_have_the_resolution_of_the_images(backbone: str, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        model = deeplabv3(5, backbone=backbone, weights="none")  # type: ignore[arg-type]
        assert model(torch.empty(2, 3, *size)).shape == (2, 5, *size)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_tensors_are_torchvisions_without_the_auxiliary_classifier(backbone: str) -> None:
    with torch.device("meta"):
        ours = deeplabv3(2, backbone=backbone, weights="none").state_dict()  # type: ignore[arg-type]
        theirs = getattr(segmentation, f"deeplabv3_{backbone}")(
            weights=None, weights_backbone=None, num_classes=2, aux_loss=True
        ).state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in theirs.items() if not name.startswith("aux_classifier.")
    }
    assert ours["classifier.4.weight"].shape == (2, 256, 1, 1)


def test_from_scratch_the_batch_norms_of_mobilenet_follow_the_data_within_a_short_training() -> None:
    with torch.device("meta"):
        model = deeplabv3(2, backbone="mobilenet_v3_large", weights="none")
    assert {module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.1}


def test_coco_weights_are_all_kept_except_a_new_last_layer(checkpoints: Path) -> None:
    torch.manual_seed(0)
    published = segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=21, aux_loss=True
    ).state_dict()
    torch.save(published, checkpoints / MOBILENET_FILE)
    torch.manual_seed(1)
    state = deeplabv3(2, backbone="mobilenet_v3_large", weights="coco").state_dict()
    assert {name for name in state if not torch.equal(state[name], published[name])} == {
        "classifier.4.weight",
        "classifier.4.bias",
    }
    assert state["classifier.4.weight"].shape == (2, 256, 1, 1)


def test_a_converted_coco_file_loads_though_it_holds_the_auxiliary_classifier(tmp_path: Path) -> None:
    published = segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=21, aux_loss=True
    ).state_dict()
    save_file(published, tmp_path / "coco.safetensors")
    model = deeplabv3(2, backbone="mobilenet_v3_large", weights="none")
    load_safetensors(model, tmp_path / "coco.safetensors", ["classifier.4"])
    assert torch.equal(model.state_dict()["backbone.0.0.weight"], published["backbone.0.0.weight"])


def test_without_a_network_one_error_says_what_to_do(checkpoints: Path) -> None:
    with pytest.raises(ConnectionError) as caught:
        deeplabv3(2, backbone="mobilenet_v3_large", weights="coco")
    message = str(caught.value)
    assert message.startswith("could not download https://")
    assert "no network here" in message
    assert "model.weights=none" in message
    assert "model.weights=FILE.safetensors" in message
    assert f"put {MOBILENET_FILE} into {checkpoints}" in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"half a file", b"PK\x03\x04 half a file"])
def test_a_damaged_download_is_named(checkpoints: Path, content: bytes) -> None:
    (checkpoints / MOBILENET_FILE).write_bytes(content)
    with pytest.raises(ConnectionError, match=rf"{MOBILENET_FILE} is damaged; delete it"):
        deeplabv3(2, backbone="mobilenet_v3_large", weights="coco")


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_downloaded_file_is_not_executed(checkpoints: Path, tmp_path: Path) -> None:
    torch.save({"weight": Payload(tmp_path / "executed")}, checkpoints / MOBILENET_FILE)
    with pytest.raises(ConnectionError, match="is damaged"):
        deeplabv3(2, backbone="mobilenet_v3_large", weights="coco")
    assert not (tmp_path / "executed").exists()


def test_recipes_know_its_keys() -> None:
    schema = catalogue("model")["deeplabv3"].schema
    assert schema.model_validate({}).model_dump() == {"backbone": "resnet101", "weights": "coco"}
    with pytest.raises(ValueError, match="resnet101"):
        schema.model_validate({"backbone": "resnet18"})
