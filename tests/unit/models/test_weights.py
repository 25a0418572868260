from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import nn

from trainer.models.weights import load_safetensors, weights_field


def net(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ModuleDict({"last": nn.Conv2d(4, classes, 1)}))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    path = tmp_path / "net.safetensors"
    save_file(net().state_dict(), path)
    return path


def test_all_tensors_arrive_bit_identical(file: Path) -> None:
    torch.manual_seed(1)
    expected = net().state_dict()
    model = net()
    load_safetensors(model, file, [])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_layers_that_are_reset_keep_their_initial_values_and_the_others_are_loaded(file: Path) -> None:
    model = net(classes=2)
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_safetensors(model, file, ["2.last"])
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, initial[name])}
    assert {"2.last.weight", "2.last.bias"} <= same
    assert "0.weight" not in same


def test_other_shapes_are_named_with_the_layers_to_reset_and_nothing_is_loaded(file: Path) -> None:
    model = net(classes=2)
    before = model.state_dict()["0.weight"].clone()
    with pytest.raises(ValueError, match=r"wrong shape of 2.last.weight \(3, 4, 1, 1\) instead of \(2, 4, 1, 1\), .*set model.reset_layers=\[2.last\]"):
        load_safetensors(model, file, [])
    assert torch.equal(model.state_dict()["0.weight"], before)


def test_missing_and_unexpected_tensors_are_named_and_counted(file: Path) -> None:
    model = nn.Sequential(*net(), *(nn.BatchNorm2d(1) for _ in range(3)))[1:]
    with pytest.raises(ValueError, match=r"missing 3.weight, .*3.num_batches_tracked and 10 more; unexpected 0.bias, 0.weight$"):
        load_safetensors(model, file, [])


def test_layers_of_the_file_that_the_model_leaves_out_are_ignored(file: Path) -> None:
    torch.manual_seed(1)
    expected = net()[0].state_dict()
    model = net()[:1]
    model.unused_layers = ("1", "2.last")  # type: ignore[assignment]
    load_safetensors(model, file, [])
    assert torch.equal(model.state_dict()["0.weight"], expected["weight"])


def test_an_unknown_layer_to_reset_names_the_nearest(file: Path) -> None:
    with pytest.raises(ValueError, match=r"model.reset_layers: the model has no layer '2.lost'; did you mean 2.last"):
        load_safetensors(net(), file, ["2.lost"])


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_damaged_file_is_said_to_be_damaged(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"net.safetensors is damaged, or not a safetensors file"):
        load_safetensors(net(), file, [])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_written_by_torch_save_comes_with_the_way_to_convert_it(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "net.pth"
    torch.save(net().state_dict(), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"not a safetensors file but one written by torch.save; convert it with"):
        load_safetensors(net(), path, [])


def test_a_missing_file_or_a_folder_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent.safetensors can't be read: No such file"):
        load_safetensors(net(), tmp_path / "absent.safetensors", [])
    with pytest.raises(ValueError, match=r"can't be read"):
        load_safetensors(net(), tmp_path, [])


def test_a_recipe_may_say_a_published_name_none_or_an_existing_file(file: Path) -> None:
    schema: TypeAdapter[str] = TypeAdapter(Annotated[str, weights_field("coco")])
    for allowed in ("coco", "none", str(file)):
        assert schema.validate_python(allowed, strict=True) == allowed
    for wrong in ("cocoa", "net.pth", ""):
        with pytest.raises(ValidationError, match=r"must be coco, none or an existing .safetensors file; to start from scratch, set model.weights=none \["):
            schema.validate_python(wrong, strict=True)
    with pytest.raises(ValidationError, match=r"existing .safetensors file, and there is no such file"):
        schema.validate_python("absent.safetensors", strict=True)
