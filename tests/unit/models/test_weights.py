from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Annotated

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import nn

from trainer.components import weights_field
from trainer.models import weights
from trainer.models.weights import check_safetensors, load_safetensors


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
    with pytest.raises(
        ValueError,
        match=r"wrong shape of 2.last.weight \(3, 4, 1, 1\) instead of \(2, 4, 1, 1\), .*set "
        r"model.reset_layers=\[2.last\]",
    ):
        load_safetensors(model, file, [])
    assert torch.equal(model.state_dict()["0.weight"], before)


def test_missing_and_unexpected_tensors_are_named_and_counted(file: Path) -> None:
    model = nn.Sequential(*net(), *(nn.BatchNorm2d(1) for _ in range(3)))[1:]
    with pytest.raises(
        ValueError, match=r"missing 3.weight, .*3.num_batches_tracked and 10 more; unexpected 0.bias, 0.weight$"
    ):
        load_safetensors(model, file, [])


def test_a_file_of_another_network_is_said_to_be_one_with_three_examples(tmp_path: Path) -> None:
    save_file(
        {f"encoder.{index}.weight": torch.zeros(2, 2) for index in range(40)} | {"0.weight": torch.zeros(4, 3, 3, 3)},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(ValueError) as caught:
        load_safetensors(net(), tmp_path / "x.safetensors", [])
    assert str(caught.value).endswith(
        "x.safetensors doesn't fit the model: it is a file of another network "
        "(1 of its 41 tensors fit; e.g. missing 0.bias, unexpected encoder.0.weight, missing 1.weight)"
    )


def test_many_layers_to_reset_are_named_by_what_holds_them_or_not_at_all(file: Path) -> None:
    model = nn.Sequential(*net(), nn.ModuleDict({"head": nn.Sequential(*(nn.Linear(1, 1) for _ in range(7)))}))
    with pytest.raises(
        ValueError,
        match=r"missing 3.head.0.weight, .* and 9 more; to reset these layers, set model.reset_layers=\[3\]$",
    ):
        load_safetensors(model, file, [])
    wide = nn.Sequential(*(nn.Sequential(nn.BatchNorm2d(1), nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1)) for _ in range(7)))
    lacking = {name: tensor for name, tensor in wide.state_dict().items() if "2.bias" not in name}
    save_file(lacking, file)
    with pytest.raises(ValueError, match=r"missing 0.2.bias, .*, 4.2.bias and 2 more$"):
        load_safetensors(wide, file, [])


def test_the_settings_that_a_file_fits_are_named_with_the_layers_to_reset(file: Path) -> None:
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ModuleDict({"last": nn.Conv2d(8, 3, 1)}))
    alternatives = [("model.size=l", other), ("model.size=s", net())]
    with pytest.raises(ValueError, match=r"net.safetensors doesn't fit the model, but fits model.size=s$"):
        load_safetensors(copy.deepcopy(other), file, [], alternatives)
    alternatives[1] = ("model.size=s", net(classes=5))
    with pytest.raises(ValueError, match=r"but fits model.size=s with model.reset_layers=\[2.last\]$"):
        load_safetensors(copy.deepcopy(other), file, [], alternatives)
    load_safetensors(net(classes=2), file, ["2.last"], alternatives)  # nothing is compared where it fits
    with pytest.raises(
        ValueError, match=r"doesn't fit the model: wrong shape of .* set model.reset_layers=\[1, 2.last\]$"
    ):
        reshaped = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ModuleDict({"last": nn.Conv2d(4, 2, 1)}))
        save_file(net().state_dict(), file)
        load_safetensors(reshaped, file, ["1"], alternatives[:1])


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_the_header_alone_says_whether_a_file_fits_and_what_is_wrong_with_it(
    file: Path, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "load_file", lambda file: pytest.fail("tensors were read"))
    with torch.device("meta"):
        models = net(), net(classes=2)
    check_safetensors(models[0], file, [])
    check_safetensors(models[1], file, ["2.last"])
    for model, reset in ((models[1], []), (models[0], ["2.lost"])):
        with pytest.raises(ValueError) as expected:
            load_safetensors(net(classes=len(model[2]["last"].bias)), file, reset)  # type: ignore[index]
        with pytest.raises(ValueError, match=re.escape(str(expected.value))):
            check_safetensors(model, file, reset)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"net.safetensors is damaged, or not a safetensors file"):
        check_safetensors(models[0], file, [])


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
        with pytest.raises(
            ValidationError,
            match=r"must be coco, none or an existing .safetensors file; to start from scratch, set model.weights=none "
            r"\[",
        ):
            schema.validate_python(wrong, strict=True)
    with pytest.raises(ValidationError, match=r"existing .safetensors file; no such file"):
        schema.validate_python("absent.safetensors", strict=True)
