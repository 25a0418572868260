"""Packs prepared data sets for a machine without network: images re-encoded at the size that a recipe trains at.

python benchmarks/pack.py recipes/deeplab_iou.yaml recipes/quickstart.yaml --out DIR
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from pyarrow.parquet import ParquetFile

from trainer.data.objects import ROLES
from trainer.data.prepare import archives_dir, data_dir, ensure_prepared, prepare
from trainer.data.source import Instance, Row
from trainer.recipe.load import load_recipe


def resized(data: bytes, size: tuple[int, int] | None, mask: bool) -> bytes:
    """An encoded image at `size` (height, width), or its own: JPEG of quality 92, masks as PNG by nearest neighbour."""
    image = Image.open(io.BytesIO(data))
    if size:
        image = image.resize((size[1], size[0]), Image.Resampling.NEAREST if mask else Image.Resampling.BILINEAR)
    out = io.BytesIO()
    image.save(out, "PNG") if mask else image.convert("RGB").save(out, "JPEG", quality=92)
    return out.getvalue()


def repacked(value: Any, role: str, size: tuple[int, int] | None) -> Any:
    """A value of a prepared row, as a source's `rows` yields it."""
    if role in ROLES:
        return [Instance(tuple(each["box"]), each["label"], each["mask"], each["crowd"]) for each in value]
    return value if role == "label" else resized(value["bytes"], size, role == "mask")


NOTES = ("Packed: resized copies of the prepared rows.",)


def main() -> None:
    """Writes each recipe's set into the folder, in the format of `trainer prepare`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    for recipe in map(load_recipe, options.recipes):
        source = recipe.source
        card = ensure_prepared(source, data_dir(), archives_dir())
        with_objects = not {*card.columns.values()}.isdisjoint(ROLES)  # boxes and masks would have to be resized too
        folder, size = data_dir() / card.name, None if with_objects else recipe.data.resize

        def rows(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
            for split in card.splits:  # noqa: B023  consumed before the next iteration
                for file in card.files(folder, split):  # noqa: B023
                    for row in ParquetFile(file).read(list(card.columns)).to_pylist():  # noqa: B023
                        columns = card.columns.items()  # noqa: B023
                        yield split, {column: repacked(row[column], role, size) for column, role in columns}  # noqa: B023

        packed = prepare(replace(source, rows=rows, archives=(), notes=NOTES), options.out, None)
        total = sum(
            file.stat().st_size for split in packed.splits for file in packed.files(options.out / packed.name, split)
        )
        print(f"{packed.name}: {total / 2**20:.1f} MiB in {options.out / packed.name}")


if __name__ == "__main__":
    main()
