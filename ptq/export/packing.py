"""Integer codes to the int32 words of a GPTQ file and back.

Every column is one little-endian bit stream down dimension 0: code i occupies bits [i*bits, (i+1)*bits) and word w
holds bits [32*w, 32*w+32), so codes of 3 bits straddle words. Pure tensor work on whatever device the codes are on;
what they mean (grids, zero points, the stored zero-1) is not known here. Legend: I rows, N columns.
"""

import math

import torch

from calibration.errors import InputError

WIDTHS = (1, 2, 3, 4, 8)
WORD = 32


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack (I, N) uint8 codes into (I*bits/32, N) int32 words."""
    per_unit, words_per_unit = _unit(bits)
    rows, columns = codes.shape
    if rows % per_unit:
        raise InputError(f"{rows} codes of {bits} bits do not fill whole {WORD}-bit words: {per_unit} must divide them")
    assert codes.dtype == torch.uint8
    assert codes.numel() == 0 or int(codes.max()) < 2**bits, "a code wider than its field would corrupt its neighbours"
    units = codes.contiguous().view(-1, per_unit, columns)
    words = torch.zeros(len(units), words_per_unit, columns, dtype=torch.int32, device=codes.device)
    for i in range(per_unit):
        word, shift = divmod(i * bits, WORD)
        code = units[:, i].int()
        words[:, word] |= code << shift
        if shift + bits > WORD:
            words[:, word + 1] |= code >> (WORD - shift)
    return words.view(-1, columns)


def unpack_rows(words: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """Unpack (rows*bits/32, N) int32 words into (rows, N) uint8 codes."""
    per_unit, words_per_unit = _unit(bits)
    if rows % per_unit or words.shape[0] * WORD != rows * bits:
        raise InputError(f"{words.shape[0]} words of {WORD} bits do not hold exactly {rows} codes of {bits} bits")
    assert words.dtype == torch.int32
    columns = words.shape[1]
    units = words.contiguous().view(-1, words_per_unit, columns)
    codes = torch.empty(len(units), per_unit, columns, dtype=torch.uint8, device=words.device)
    for i in range(per_unit):
        word, shift = divmod(i * bits, WORD)
        code = units[:, word] >> shift
        if shift + bits > WORD:
            # The shift is arithmetic: copies of the sign bit must go before the next word's bits take their place.
            low = WORD - shift
            code = (code & (2**low - 1)) | (units[:, word + 1] << low)
        codes[:, i] = code & (2**bits - 1)
    return codes.view(rows, columns)


def pack_columns(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack (G, O) uint8 codes into (G, O*bits/32) int32 words: the layout of `qzeros`."""
    return pack_rows(codes.T, bits).T.contiguous()


def unpack_columns(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Unpack (G, columns*bits/32) int32 words into (G, columns) uint8 codes."""
    return unpack_rows(words.T, bits, columns).T.contiguous()


def _unit(bits: int) -> tuple[int, int]:
    """Codes and words of the shortest run of whole codes that fills whole words."""
    if bits not in WIDTHS:
        raise InputError(f"bits {bits} has no bit-stream layout: packable widths are {WIDTHS}")
    shared = math.gcd(WORD, bits)
    return WORD // shared, bits // shared
