"""Writes vectors.txt, the known answers of the weight stream, from an implementation of its own.

    python tests/make_vectors.py

Python's integers only, one element at a time, straight from the definition of stream version 1: nothing
here is shared with nmkern.stream, so that an error would have to be made twice. A test runs ``render``
again and compares it with the file. The file does not change while the stream version is 1.
"""

import statistics
from pathlib import Path

PATH = Path(__file__).with_name("vectors.txt")

HEADER = """\
# Known answers of nmkern's weight stream, version 1. Written by make_vectors.py; do not edit.
# One record a line, fields separated by one space; the first field says which kind:
#   philox c0 c1 c2 c3 k0 k1 w0 w1 w2 w3     Philox4x32-7: counter, key and words, 8 hex digits each
#   dense family seed row col word code      the 32-bit word that holds the element (hex), and its code
#   sparse seed row n k c_1 ... c_k          the k distinct columns out of n, in drawing order
# All other numbers are decimal; seeds go up to 2^64 - 1, rows and columns up to 2^34 - 1.
"""

# family: (bits of a code, tag of the counter)
FAMILIES = {"rademacher": (1, 0x101), "uniform": (4, 0x102), "normal": (8, 0x103)}
SPARSE_TAG = 0x104

SEEDS = (0, 1, 12345678901, 2**32, 2**63, 2**64 - 1)
PLACES = (  # (row, col): every row of a patch, both ends of a word, the borders of 32 and 64 bits
    (0, 0),
    (1, 3),
    (2, 7),
    (3, 31),
    (4, 32),
    (7, 1),
    (1001, 4095),
    (65537, 99999),
    (2**31 - 1, 2**31 - 1),
    (2**31, 2**31),
    (2**31 + 2, 5),
    (6, 2**32 - 1),
    (2**32 - 1, 2**32),
    (2**32, 2**32 + 1),
    (2**32 + 3, 0),
    (2**33 - 1, 2**33),
    (2**33 + 1, 2**33 - 1),
    (17, 2**34 - 1),
    (2**34 - 1, 17),
    (2**34 - 1, 2**34 - 1),
    (2**34 - 2, 2**34 - 6),
)
DRAWS = (  # (n, k)
    (1, 1),
    (2, 1),
    (2, 2),
    (3, 3),
    (5, 4),
    (9, 9),
    (17, 5),
    (784, 7),
    (7840, 13),
    (2**16 + 1, 6),
    (2**31 - 1, 5),
    (2**31 + 1, 5),
    (2**32 - 2, 6),
    (2**32 - 1, 7),
)
DRAW_ROWS = (0, 3, 1000003, 2**31, 2**32 - 2)
COUNTERS = (  # the published known answers of Random123 (kat_vectors, philox4x32 7), and three more
    ((0, 0, 0, 0), (0, 0)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)),
    ((1, 0, 0, 0x101), (0, 1)),
    ((0, 2**32 - 1, 0, 0x103), (0xFFFFFFFF, 0)),
    ((2**31, 2**31 - 1, 0, 0x104), (12345678901 % 2**32, 12345678901 // 2**32)),
)


def philox4x32_7(counter, key):
    """The four words of Philox4x32 with seven rounds (Salmon et al., SC'11, section 3.2)."""
    a, b, c, d = counter
    left, right = key
    for _ in range(7):
        first = 0xD2511F53 * a
        second = 0xCD9E8D57 * c
        a, b, c, d = (
            (second // 2**32) ^ b ^ left,
            second % 2**32,
            (first // 2**32) ^ d ^ right,
            first % 2**32,
        )
        left = (left + 0x9E3779B9) % 2**32
        right = (right + 0xBB67AE85) % 2**32
    return a, b, c, d


def normal_table():
    """The 256 codes of ``normal``: 85 times the centroids of equally likely bins, rounded."""
    gauss = statistics.NormalDist()
    edges = [gauss.pdf(gauss.inv_cdf((128 + j) / 256)) for j in range(128)] + [0.0]
    upper = [round(85 * 256 * (edges[j] - edges[j + 1])) for j in range(128)]
    return [-code for code in reversed(upper)] + upper


TABLE = normal_table()


def element(family, seed, row, col):
    """(word, code) of one element of a dense family."""
    bits, tag = FAMILIES[family]
    per_word = 32 // bits
    key = (seed % 2**32, seed // 2**32)
    word = philox4x32_7((col // per_word, row // 4, 0, tag), key)[row % 4]
    field = word // 2 ** (bits * (col % per_word)) % 2**bits
    if family == "rademacher":
        return word, 1 if field else -1
    return word, 2 * field - 15 if family == "uniform" else TABLE[field]


def draw(seed, row, n, k):
    """The k distinct columns out of n of one sparse row, in drawing order."""
    key = (seed % 2**32, seed // 2**32)
    chosen = []
    for s in range(k):
        j = n - k + s
        word = philox4x32_7((s // 4, row, 0, SPARSE_TAG), key)[s % 4]
        t = word * (j + 1) // 2**32
        chosen.append(j if t in chosen else t)
    return chosen


def render():
    """The text of vectors.txt."""
    lines = [HEADER.rstrip("\n")]
    for counter, key in COUNTERS:
        numbers = (*counter, *key, *philox4x32_7(counter, key))
        lines.append("philox " + " ".join(f"{number:08x}" for number in numbers))
    for family in FAMILIES:
        for seed in SEEDS:
            for row, col in PLACES:
                word, code = element(family, seed, row, col)
                lines.append(f"dense {family} {seed} {row} {col} {word:08x} {code}")
    for index, (n, k) in enumerate(DRAWS):
        for row in DRAW_ROWS:
            seed = SEEDS[(index + row) % len(SEEDS)]
            lines.append(f"sparse {seed} {row} {n} {k} " + " ".join(map(str, draw(seed, row, n, k))))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PATH.write_text(render())
    print(f"wrote {PATH}")
