"""Named arrays in one compressed `.npz` file, written whole or not at all.

Unlike `numpy.savez`, equal arrays give equal bytes (no dates inside), so a file in version control
changes only when its contents do; any name will do; and a kill leaves the earlier file as it was.
`numpy.load` reads the result.
"""

import io
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def write(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes `arrays`; raises ValueError for a type that NumPy cannot give back, bfloat16 say."""
    path = Path(path)
    for name, array in arrays.items():
        if array.dtype.kind not in "biufcUS":
            raise ValueError(f"{path.name}: {name} has type {array.dtype}, which .npz cannot hold")
    partial = path.with_name(path.name + ".partial")
    with zipfile.ZipFile(partial, "w") as archive:
        for name, array in sorted(arrays.items()):
            content = io.BytesIO()
            np.lib.format.write_array(content, array, allow_pickle=False)
            undated = zipfile.ZipInfo(f"{name}.npy")
            archive.writestr(undated, content.getvalue(), zipfile.ZIP_DEFLATED)
    os.replace(partial, path)


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Reads every array of a file. Raises FileNotFoundError, or ValueError for a damaged file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {
                name.removesuffix(".npy"): np.lib.format.read_array(io.BytesIO(archive.read(name)), allow_pickle=False)
                for name in archive.namelist()
            }
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or not an .npz file: {error}") from error
