from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from trainer.components import catalogue
from trainer.models.resnet_unet import BACKBONES, resnet_unet
from trainer.models.weights import load_safetensors

PUBLISHED = Path(BACKBONES["resnet18"][2].url).name


def classifier(seed: int = 0) -> torch.nn.Module:
    """torchvision's own, with its 1000 classes."""
    torch.manual_seed(seed)
    return torchvision.models.resnet18(weights=None)


def encoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(("decoder.", "fc."))}


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("size", [(224, 288), (65, 33), (5, 1)])
def test_logits_have_the_resolution_of_the_images(backbone: str, skips: bool, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        model = resnet_unet(5, backbone=backbone, weights="none", skips=skips)  # type: ignore[arg-type]
        assert model(torch.empty(2, 3, *size)).shape == (2, 5, *size)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_tensors_of_the_encoder_are_torchvisions_without_the_classifier(backbone: str) -> None:
    with torch.device("meta"):
        ours = resnet_unet(2, backbone=backbone, weights="none").state_dict()  # type: ignore[arg-type]
        theirs = getattr(torchvision.models, backbone)(weights=None).state_dict()
    assert {name: tensor.shape for name, tensor in encoder(ours).items()} == {
        name: tensor.shape for name, tensor in encoder(theirs).items()
    }
    assert not any(name.startswith("fc.") for name in ours)


def test_the_encoder_computes_what_torchvisions_does() -> None:
    theirs = classifier().eval()
    ours = resnet_unet(2, weights="none").eval()
    ours.load_state_dict(encoder(theirs.state_dict()), strict=False)
    outputs: list[Tensor] = []
    for net in (ours, theirs):
        net.get_submodule("layer4").register_forward_hook(lambda module, inputs, output: outputs.append(output))
        net(torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("skips", [False, True])
def test_every_parameter_gets_a_gradient_and_only_skips_reach_around_deeper_levels(skips: bool) -> None:
    model = resnet_unet(2, weights="none", skips=skips)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    model.zero_grad()
    model.get_submodule("layer1").register_forward_hook(lambda module, inputs, output: output.detach())
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert (model.get_parameter("conv1.weight").grad is not None) == skips


def test_a_file_of_a_torchvision_classifier_gives_the_encoder(tmp_path: Path) -> None:
    theirs = classifier().state_dict()
    save_file(theirs, tmp_path / "resnet18.safetensors")
    model = resnet_unet(2, weights="none")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_safetensors(model, tmp_path / "resnet18.safetensors", ["decoder"])
    after = model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in encoder(after).items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items() if name.startswith("decoder."))
    with pytest.raises(ValueError, match=r"doesn't fit the model: missing decoder\."):
        load_safetensors(model, tmp_path / "resnet18.safetensors", [])


def test_its_own_file_gives_the_decoder_too(tmp_path: Path) -> None:
    trained = resnet_unet(2, weights="none").state_dict()
    save_file(trained, tmp_path / "trained.safetensors")
    model = resnet_unet(2, weights="none")
    load_safetensors(model, tmp_path / "trained.safetensors", [])
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())


def test_imagenet_weights_are_all_kept_beside_a_new_decoder(checkpoints: Path) -> None:
    published = classifier().state_dict()
    torch.save(published, checkpoints / PUBLISHED)
    state = resnet_unet(2, weights="imagenet").state_dict()
    assert all(torch.equal(tensor, published[name]) for name, tensor in encoder(state).items())
    assert state["decoder.head.weight"].shape == (2, 32, 1, 1)


def test_without_a_network_one_error_says_what_to_do(checkpoints: Path) -> None:
    with pytest.raises(ConnectionError) as caught:
        resnet_unet(2, weights="imagenet")
    message = str(caught.value)
    assert message.startswith("could not download https://")
    assert "model.weights=none" in message
    assert f"put {PUBLISHED} into {checkpoints}" in message


def test_recipes_know_its_keys() -> None:
    schema = catalogue("model")["resnet_unet"].schema
    assert schema.model_validate({}).model_dump() == {"backbone": "resnet18", "weights": "imagenet", "skips": True}
    with pytest.raises(ValueError, match="resnet34"):
        schema.model_validate({"backbone": "resnet101"})
