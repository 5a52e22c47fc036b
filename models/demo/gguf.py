"""Just enough of GGUF, version 3, for the demo model: everything is little
endian, tensors are F32 or Q8_0.  Standard library and, to write, numpy.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
import struct

ALIGNMENT = 32
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # metadata value types
FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", U32: "<I", I32: "<i", F32: "<f", BOOL: "<?",
           10: "<Q", 11: "<q", 12: "<d"}
TENSOR_F32, TENSOR_Q8_0 = 0, 8  # ggml tensor types
BLOCK = 32  # values that share one scale in Q8_0


def _string(s):
    b = s.encode()
    return struct.pack("<Q", len(b)) + b


def _value(kind, v):
    if kind == STRING:
        return _string(v)
    if isinstance(kind, tuple):  # (ARRAY, element type)
        return struct.pack("<IQ", kind[1], len(v)) + b"".join(_value(kind[1], x) for x in v)
    return struct.pack(FORMATS[kind], v)


def q8_0(a):
    """Blocks of 32 values: a half-precision scale, then 32 signed bytes."""
    import numpy as np
    blocks = a.astype(np.float32).reshape(-1, BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    q = np.rint(blocks * inverse).astype(np.int8)
    return scale.astype(np.float16), q


def through_q8_0(a):
    """The values that an engine sees after Q8_0."""
    import numpy as np
    scale, q = q8_0(a)
    return (scale.astype(np.float32) * q).reshape(a.shape)


def write(path, metadata, tensors):
    """metadata: [(key, type, value)]; tensors: [(name, array)], where a matrix
    is rows x columns and is stored as Q8_0, a vector as F32."""
    import numpy as np
    infos, data = b"", b""
    for name, a in tensors:
        if a.ndim == 2:
            scale, q = q8_0(a)
            raw = np.concatenate([scale.view(np.int8).reshape(-1, 2), q], axis=1).tobytes()
        else:
            raw = a.astype("<f4").tobytes()
        dims = a.shape[::-1]  # the fastest-running one first
        infos += _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims,
                                             TENSOR_Q8_0 if a.ndim == 2 else TENSOR_F32, len(data))
        data += raw + bytes(-len(raw) % ALIGNMENT)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, kind, v in metadata:
        head += _string(key) + struct.pack("<I", kind[0] if isinstance(kind, tuple) else kind) + _value(kind, v)
    head += infos
    with open(path, "wb") as f:
        f.write(head + bytes(-len(head) % ALIGNMENT) + data)


def metadata(path):
    """{key: value} of a file; only the head is read."""
    with open(path, "rb") as f:
        def take(fmt):
            return struct.unpack(fmt, f.read(struct.calcsize(fmt)))[0]

        def value(kind):
            if kind == STRING:
                return f.read(take("<Q")).decode()
            if kind == ARRAY:
                element, n = take("<I"), take("<Q")
                return [value(element) for _ in range(n)]
            return take(FORMATS[kind])

        if f.read(4) != b"GGUF" or take("<I") != 3:
            raise ValueError(f"{path}: not a GGUF file of version 3")
        take("<Q")
        n = take("<Q")
        return {value(STRING): value(take("<I")) for _ in range(n)}
