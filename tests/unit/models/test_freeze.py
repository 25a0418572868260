from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from trainer.models.deeplabv3 import deeplabv3
from trainer.models.freeze import set_train_mode, train_only


def net() -> nn.Module:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4), nn.ReLU())
    head = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    return nn.ModuleDict({"trunk": trunk, "drop": nn.Dropout(0.5), "head": head})


def learning(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def training(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if module.training and not list(module.children())}


def test_no_layers_leave_everything_trainable() -> None:
    model = net().eval()
    train_only(model, [])
    set_train_mode(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_only_what_is_below_the_named_layers_is_trainable() -> None:
    model = net()
    train_only(model, ["head.3", "trunk.2"])
    assert learning(model) == {"head.3.weight", "head.3.bias", "trunk.2.weight", "trunk.2.bias"}


def test_a_layer_is_a_full_path_and_not_the_beginning_of_a_name() -> None:
    model = nn.ModuleDict({"head": nn.Linear(1, 1), "head2": nn.Linear(1, 1)})
    train_only(model, ["head"])
    assert learning(model) == {"head.weight", "head.bias"}


def test_batch_norms_and_dropouts_outside_the_trainable_layers_are_in_evaluation_mode() -> None:
    model = net()
    train_only(model, ["head.2", "head.3"])
    set_train_mode(model)
    assert training(model) == {"head.2", "head.3"}


def test_everything_inside_a_trainable_layer_is_in_training_mode() -> None:
    model = net()
    train_only(model, ["head"])
    set_train_mode(model)
    assert training(model) == {"head.0", "head.1", "head.2", "head.3"}


def test_evaluation_and_back_restores_the_same_modes() -> None:
    model = net()
    train_only(model, ["head.3"])
    set_train_mode(model)
    before = training(model)
    model.eval()
    set_train_mode(model)
    assert training(model) == before == {"head.3"}


def test_a_wrapper_around_the_model_changes_nothing() -> None:
    model = net()
    train_only(model, ["head"])
    plain = copy.deepcopy(model)
    set_train_mode(plain)
    set_train_mode(nn.Sequential(model))
    assert training(model) == training(plain)


def test_layers_are_checked_on_the_meta_device_too() -> None:
    with torch.device("meta"):
        model = deeplabv3(2, backbone="mobilenet_v3_large", weights="none")
    train_only(model, ["classifier.4"])
    assert learning(model) == {"classifier.4.weight", "classifier.4.bias"}


def test_an_unknown_layer_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"model.train_only: the model has no layer 'heed.3'; did you mean head.3"):
        train_only(net(), ["head.0", "heed.3"])


def test_a_layer_unlike_any_other_is_answered_with_the_parts_of_the_model() -> None:
    with pytest.raises(ValueError, match=r"no layer 'zzzzzzzz'; its parts are trunk, drop, head"):
        train_only(net(), ["zzzzzzzz"])


def test_fine_tuning_the_last_layer_leaves_every_other_tensor_bit_identical() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = deeplabv3(2, backbone="mobilenet_v3_large", weights="none")
    train_only(model, ["classifier.4"])
    before = copy.deepcopy(model.state_dict())
    set_train_mode(model)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9, weight_decay=0.1
    )
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 33, 33)).square().mean().backward()
        optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"classifier.4.weight", "classifier.4.bias"}
