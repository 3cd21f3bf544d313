"""Weight files in the forms that people have, written without the package."""

import json
import struct

import ml_dtypes
import numpy as np

NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e5m2): "F8_E5M2",
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
}


def write_safetensors(path, tensors, metadata=None):
    """Writes arrays of any of `NAMES`' types; returns the path."""
    header, offset = {"__metadata__": metadata} if metadata else {}, 0
    for name, value in tensors.items():
        end = offset + value.nbytes
        header[name] = {"dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in tensors.values():
            file.write(value.tobytes())
    return path


def write_torch(path, tensors):
    """Writes arrays as torch does since 1.6, with torch's opcodes put together by hand."""
    import zipfile

    types = {np.dtype(np.float32): "FloatStorage", np.dtype(np.float16): "HalfStorage"}
    text = b"\x80\x02}("
    for key, (name, value) in enumerate(tensors.items()):
        strides = [int(np.prod(value.shape[axis + 1 :], dtype=int)) for axis in range(value.ndim)]
        text += _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        text += _text("storage") + f"ctorch\n{types[value.dtype]}\n".encode() + _text(str(key)) + _text("cpu")
        text += _number(value.size) + b"tQK\x00(" + b"".join(map(_number, value.shape)) + b"t("
        text += b"".join(map(_number, strides)) + b"t\x89ccollections\nOrderedDict\n)RtR"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", text + b"u.")
        for key, value in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{key}", value.tobytes())
    return path


def _text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _number(value):
    return b"J" + struct.pack("<i", value)
