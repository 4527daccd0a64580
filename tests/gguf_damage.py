"""Ways to damage a GGUF file: bytes anywhere, or one wrong number, text or type where the format has such a one.

`damage` draws one of them. A file is taken apart by the rules of the format, changed in one place and put together
again without a check, so that what follows the damage is read as it was meant.
"""

import math
import struct
from dataclasses import dataclass
from random import Random

SIZES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
COUNTS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
NUMBERS = [0, 1, 2, 3, 7, 31, 2**16, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1, -1, -(2**31), 0.5, 1e38, math.nan]
TEXTS = [b"", b"\xff\xfe", b"\xed\xa0\x80", b"\0" * 9, b"x", b"llama", b"gpt2", b"qwen2", b"{}", b"a b", b"\xf0" * 99]


@dataclass
class Parts:
    """A file in pieces: keys as [name, type, packed value], tensors as [name, dimensions, type, offset]."""

    counts: list[int]
    keys: list[list]
    tensors: list[list]
    data: bytes

    def join(self) -> bytes:
        """The file again."""
        head = b"GGUF" + struct.pack("<IQQ", 3, *self.counts)
        head += b"".join(_text(name) + struct.pack("<I", kind) + value for name, kind, value in self.keys)
        for name, shape, kind, offset in self.tensors:
            head += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        return head + bytes(-len(head) % 32) + self.data


def damage(whole: bytes, generator: Random) -> bytes:
    """One damage, half of them to bytes, half to what they mean."""
    if generator.random() < 0.5:
        return _damage_bytes(whole, generator)
    parts = _split(whole)
    generator.choice(CHANGES)(parts, generator)
    return parts.join()


def _text(content) -> bytes:
    return struct.pack("<Q", len(content)) + content


def _split(whole) -> Parts:
    """Takes a whole file apart; it is one of the tests' own."""
    position = 24
    tensor_count, key_count = struct.unpack_from("<QQ", whole, 8)

    def text():
        nonlocal position
        (size,) = struct.unpack_from("<Q", whole, position)
        position += 8 + size
        return whole[position - size : position]

    def number(letter):
        nonlocal position
        (value,) = struct.unpack_from(f"<{letter}", whole, position)
        position += struct.calcsize(f"<{letter}")
        return value

    def value(kind):
        start = position
        if kind == STRING:
            text()
        elif kind == ARRAY:
            inner = number("I")
            for _ in range(number("Q")):
                text() if inner == STRING else number(SIZES[inner])
        else:
            number(SIZES[kind])
        return whole[start:position]

    keys = [[text(), kind := number("I"), value(kind)] for _ in range(key_count)]
    tensors = [
        [text(), [number("Q") for _ in range(number("I"))], number("I"), number("Q")] for _ in range(tensor_count)
    ]
    return Parts([tensor_count, key_count], keys, tensors, whole[position + -position % 32 :])


def _damage_bytes(whole, generator) -> bytes:
    """Most of them in the head, where counts and offsets are."""
    data, head = bytearray(whole), max(len(whole) // 10, 1000)
    place = generator.randrange(min(head, len(data)) if generator.random() < 0.9 else len(data))
    kind = generator.randrange(6)
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        data[place] ^= 1 << generator.randrange(8)
    elif kind == 2:
        data[place] = generator.randrange(256)
    elif kind == 3:
        data[place : place + 8] = struct.pack("<Q", generator.choice([*COUNTS, len(data), generator.getrandbits(64)]))
    elif kind == 4:
        del data[place : place + generator.choice([1, 4, 8, 100])]
    else:
        other = generator.randrange(min(head, len(data)))
        data[place : place + 16] = data[other : other + 16]
    return bytes(data)


def _count(parts, generator):
    parts.counts[generator.randrange(2)] = generator.choice(COUNTS)


def _key_type(parts, generator):
    generator.choice(parts.keys)[1] = generator.choice([*range(14), 2**32 - 1])


def _key_text(parts, generator):
    generator.choice(parts.keys)[0] = generator.choice([*TEXTS, generator.choice(parts.keys)[0]])


def _key_gone(parts, generator):
    parts.keys.remove(generator.choice(parts.keys))
    parts.counts[1] -= 1


def _value_number(parts, generator):
    """A number where one is, of the size that its type has."""
    key = generator.choice([key for key in parts.keys if key[1] in SIZES])
    value = generator.choice(NUMBERS)
    if SIZES[key[1]] in "fd":
        key[2] = struct.pack(f"<{SIZES[key[1]]}", value)
    else:
        size = struct.calcsize(f"<{SIZES[key[1]]}")
        key[2] = (int(value) if math.isfinite(value) else 0).to_bytes(32, "little", signed=True)[:size]


def _value_text(parts, generator):
    key = generator.choice([key for key in parts.keys if key[1] == STRING])
    key[2] = generator.choice([_text(generator.choice(TEXTS)), struct.pack("<Q", generator.choice(COUNTS))])


def _array_count(parts, generator):
    key = generator.choice([key for key in parts.keys if key[1] == ARRAY])
    key[2] = key[2][:4] + struct.pack("<Q", generator.choice(COUNTS)) + key[2][12:]


def _array_type(parts, generator):
    key = generator.choice([key for key in parts.keys if key[1] == ARRAY])
    key[2] = struct.pack("<I", generator.randrange(14)) + key[2][4:]


def _array_nested(parts, generator):
    generator.choice(parts.keys)[1:] = [ARRAY, struct.pack("<IQ", ARRAY, 1) * generator.choice([1, 5, 5000])]


def _array_of_another_length(parts, generator):
    """Tokens, scores and kinds that do not go together; texts that are none."""
    key = generator.choice([key for key in parts.keys if key[1] == ARRAY])
    count = generator.choice([0, 1, 2, 23, 25, 100])
    kind = generator.choice([STRING, 5, 6])  # texts, int32 or float32
    if kind == STRING:
        content = b"".join(_text(generator.choice(TEXTS)) for _ in range(count))
    else:
        content = count * struct.pack(f"<{SIZES[kind]}", generator.choice([-1, 0, 6, 99]))
    key[2] = struct.pack("<IQ", kind, count) + content


def _tensor_text(parts, generator):
    generator.choice(parts.tensors)[0] = generator.choice([*TEXTS, generator.choice(parts.tensors)[0]])


def _tensor_dimension(parts, generator):
    shape = generator.choice(parts.tensors)[1]
    shape[generator.randrange(len(shape))] = generator.choice([*COUNTS, 2**32, 2**32 + 1, 64, 96])


def _tensor_dimensions(parts, generator):
    tensor = generator.choice(parts.tensors)
    count = generator.choice([0, 1, 2, 3, 4, 5, 100])
    tensor[1] = [generator.choice([1, 32, 2**16, 2**32, 2**63]) for _ in range(count)]


def _tensor_type(parts, generator):
    generator.choice(parts.tensors)[2] = generator.choice([*range(45), 2**31, 2**32 - 1])


def _tensor_offset(parts, generator):
    tensor, other = generator.choice(parts.tensors), generator.choice(parts.tensors)
    tensor[3] = generator.choice([other[3], other[3] + 32, tensor[3] + 1, *COUNTS])


def _tensors_swapped(parts, generator):
    """Two tensors that lie in each other's place."""
    one, other = generator.sample(parts.tensors, 2)
    one[3], other[3] = other[3], one[3]


def _tensor_gone(parts, generator):
    parts.tensors.remove(generator.choice(parts.tensors))
    parts.counts[0] -= 1


def _data_cut(parts, generator):
    parts.data = parts.data[: generator.randrange(len(parts.data))]


CHANGES = [
    _count, _key_type, _key_text, _key_gone, _value_number, _value_number, _value_text, _array_count, _array_type,
    _array_nested, _array_of_another_length, _array_of_another_length, _tensor_text, _tensor_dimension,
    _tensor_dimensions, _tensor_type, _tensor_offset, _tensors_swapped, _tensor_gone, _data_cut,
]  # fmt: skip
