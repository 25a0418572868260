"""Weights, outputs and connections, against numbers computed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from trainer.commands import main
from trainer.components import catalogue
from trainer.profiling.arithmetic import layers, polynomial

RECIPE = """
task: segmentation
data: {name: shapes, batch_size: 2}
model: {name: unet, width: 4, depth: 2, train_only: [head]}
loss: cross_entropy
optimizer: {name: adamw, lr: 1e-3}
train: {duration: 1 epochs, threads: 1}
"""


def totals(model: nn.Module, *shape: int) -> dict[str, int]:
    found = layers(model, shape)
    return {what: sum(getattr(layer, what) for layer in found) for what in ("weights", "outputs", "connections")}


@pytest.mark.parametrize(
    ("layer", "weights", "outputs", "connections"),
    [
        (nn.Conv2d(2, 6, 4, stride=2, padding=1), 6 * 2 * 16 + 6, 6 * 4 * 4, 16 * 2 * 6 * 4 * 4),
        (nn.Conv2d(4, 6, 5, padding=2, groups=2, bias=False), 6 * 2 * 25, 6 * 8 * 8, 25 * 4 * 6 // 2 * 8 * 8),
        (nn.ConvTranspose2d(2, 6, 4, stride=2, padding=1), 6 * 2 * 16 + 6, 6 * 16 * 16, 16 * 2 * 6 * 8 * 8),
        (
            nn.ConvTranspose2d(2, 3, 5, stride=2, padding=2, output_padding=1),
            3 * 2 * 25 + 3,
            3 * 16 * 16,
            25 * 2 * 3 * 8 * 8,
        ),
        (nn.MaxPool2d(2), 0, 2 * 4 * 4, 4 * 2 * 4 * 4),
        (nn.BatchNorm2d(2), 4, 2 * 8 * 8, 2 * 8 * 8),
        (nn.Upsample(scale_factor=2), 0, 2 * 16 * 16, 2 * 16 * 16),
        (nn.AdaptiveAvgPool2d(1), 0, 2, 2 * 8 * 8),
        (nn.Sequential(nn.Flatten(), nn.Linear(128, 5)), 128 * 5 + 5, 128 + 5, 128 + 128 * 5),
    ],
)
def test_a_layer_counts_as_by_hand(layer: nn.Module, weights: int, outputs: int, connections: int) -> None:
    channels = next((p.in_channels for p in layer.modules() if isinstance(p, nn.Conv2d | nn.ConvTranspose2d)), 2)
    with_weights = nn.ModuleList([layer, nn.Linear(1, 1)])[0]  # a net without weights has no device
    if not list(with_weights.parameters()):
        with_weights = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), layer)
        weights, outputs, connections = weights + 4, outputs + 128, connections + 256
    assert totals(with_weights, channels, 8, 8) == {"weights": weights, "outputs": outputs, "connections": connections}


def test_the_assignments_net_has_its_polynomial_and_grows_by_four() -> None:
    def count(NIC: int, NF: int, NC: int, side: int = 32) -> dict[str, int]:
        net = catalogue("model")["pool_upsample_net"].build({"num_filters": NF, "num_in_channels": NIC}, num_classes=NC)
        return totals(net, NIC, side, side)

    assert count(1, 32, 24)["weights"] == 49_728
    small, large = count(1, 32, 24), count(1, 32, 24, side=64)
    assert large == {
        "weights": small["weights"],
        "outputs": 4 * small["outputs"],
        "connections": 4 * small["connections"],
    }
    found = polynomial(count, {"NIC": (1, 2, 3), "NF": (2, 3, 4), "NC": (3, 4, 5)})
    assert set(found["weights"].split(" + ")) == {"36·NF²", "9·NC²", "9·NF·NC", "9·NIC·NF", "12·NF", "4·NC"}
    with pytest.raises(ValueError, match="not a polynomial of degree 2"):
        polynomial(lambda n: {"cube": n**3}, {"n": (1, 2, 3, 4)})


def test_a_layer_used_twice_has_its_weights_once() -> None:
    shared = nn.Conv2d(3, 3, 1, bias=False)
    found = layers(nn.Sequential(shared, nn.ReLU(), shared), (3, 4, 4))
    assert [layer.weights for layer in found] == [9, 0, 0] and [layer.connections for layer in found] == [144, 48, 144]


def test_summary_counts_and_measures_everything_against_the_last_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    (tmp_path / "r.yaml").write_text(RECIPE)
    assert main(["summary", str(tmp_path / "r.yaml"), "--input-size", "16x16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    model = catalogue("model")["unet"].build({"width": 4, "depth": 2}, num_classes=4)
    assert report["totals"]["weights"] == sum(p.numel() for p in model.parameters())
    everything, last, everything_doubled, _ = report["training"]
    assert (
        everything["trainable"] == report["totals"]["weights"]
        and last["trainable"] == report["totals"]["trainable"] == 4 * 4 + 4
    )
    assert everything["gradient_bytes"] == 4 * everything["trainable"]
    assert last["saved_bytes"] < everything["saved_bytes"] / 3 and last["flops"] < everything["flops"]
    assert 3.5 < everything_doubled["saved_bytes"] / everything["saved_bytes"] < 4.5
    assert main(["summary", str(tmp_path / "r.yaml"), "--input-size", "16"]) == 2
