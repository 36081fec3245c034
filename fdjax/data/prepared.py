"""Image sets that tensorflow-datasets prepared as array_record, read without TensorFlow."""

import hashlib
import io
import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from fdjax.errors import InputError

_BATCH = 1000


def default_data_dir() -> Path:
    """$TFDS_DATA_DIR, else ~/tensorflow_datasets, as tfds itself chooses."""
    return Path(os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets")


def locate(name: str, data_dir: str | os.PathLike | None) -> Path:
    """The folder `<data_dir>/<name>/<newest version>` of a finished preparation; raises InputError if there is none."""
    root = Path(data_dir) if data_dir is not None else default_data_dir()
    command = f"tfds build {name} --data_dir={root} --file_format=array_record"
    advice = f"prepare it with `{command}` (this step needs TensorFlow) or give another data_dir"
    if not root.is_dir():
        raise InputError(f"{name}: data_dir {str(root)!r} is no folder; {advice}")
    folder = root / name
    names = os.listdir(folder) if folder.is_dir() else []
    versions = [v for v in names if re.fullmatch(r"\d+\.\d+\.\d+", v) and (folder / v / "dataset_info.json").is_file()]
    if not versions:
        what = "an unfinished preparation" if names else "nothing prepared"
        raise InputError(f"{name}: {what} in {str(folder)!r}; {advice}")
    return folder / max(versions, key=lambda version: tuple(map(int, version.split("."))))


def found_in(folder: Path) -> Path | None:
    """The data_dir of what tfds prepared, if a folder is that, a data set's in it, or one version's; None otherwise."""
    for depth, pattern in enumerate(("features.json", "*/features.json", "*/*/features.json")):
        if next(folder.glob(pattern), None) is not None:
            return [folder.parent.parent, folder.parent, folder][depth]
    return None


def identity(folder: Path) -> str:
    """Twelve characters that change when the prepared files do: a hash of their place, names, sizes and times."""
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.iterdir())]
    return hashlib.sha256(repr((str(folder.resolve()), stats)).encode()).hexdigest()[:12]


def read(name: str, folder: Path) -> dict[str, np.ndarray]:
    """Arrays train_x, test_x uint8 `[N, height, width, channels]`, train_y, test_y int32 and num_classes.

    Raises InputError for another file format, a missing shard, a damaged record, or examples without image and label.
    """
    import tensorflow_datasets as tfds

    root = folder.parents[name.count("/") + 1]
    command = f"tfds build {name} --data_dir={root} --file_format=array_record"
    again = f"delete {str(folder)!r} and prepare {name} again with `{command}`"
    level = logging.getLogger("absl").level
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        builder: Any = tfds.builder_from_directory(folder)
        if builder.info.file_format.value != "array_record":
            found = builder.info.file_format.value
            raise InputError(f"{name}: {str(folder)!r} holds {found} files, expected array_record; {again}")
        arrays = {"num_classes": np.asarray(builder.info.features["label"].num_classes)}
        for split in ("train", "test"):
            missing = [p.name for p in builder.info.splits[split].filepaths if not p.exists()]
            if missing:
                raise InputError(f"{name}: {missing[0]!r} is missing in {str(folder)!r}; {again}")
            arrays[f"{split}_x"], arrays[f"{split}_y"] = _decode(builder, split)
        return arrays
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name}: cannot read {str(folder)!r} ({_line(error)}); {again}") from error
    finally:
        logging.getLogger("absl").setLevel(level)


def _decode(builder: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    import tensorflow_datasets as tfds
    from PIL import Image

    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    shape = builder.info.features["image"].shape
    x, y = np.empty((len(source), *shape), np.uint8), np.empty(len(source), np.int32)
    for first in range(0, len(source), _BATCH):
        # Asking for many at once costs a fifth of asking one by one.
        batch = source.__getitems__(list(range(first, min(first + _BATCH, len(source)))))
        for i, example in enumerate(batch, first):
            with Image.open(io.BytesIO(example["image"])) as image:
                x[i] = np.asarray(image).reshape(shape)
            y[i] = example["label"]
    return x, y


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
