"""Right answers by hand, typical wrong ones and folded solutions of the exercises about mechanisms, for test_exercises.py.

By hand from reference/engram-and-overlap.md, sections 0 and 3, and deepseek-v4.md, sections 0, 5 and 8.
"""

NOTEBOOKS = {5, 6, 7}
CASES = {
    "hidden share": (0.625, {10 / 12: "cannot hide", 5 / 12: "block is missing", 1.6: "other way round", 62.5: "percentage"}),
    "hidden in a queue": (
        0.5,
        {2 / 3: "to itself", 1 - 30 / 36: "moves the second layer", 0: "fetched ahead", 50: "percentage"},
    ),
    "bytes of a chunk": (
        24 * 264 * 8192,
        {
            24 * 256 * 8192: "scales are missing",
            2 * 24 * 264 * 8192: "both Engram layers",
            264 * 8192: "one row",
            51.9: "in MB",
        },
    ),
    "link to spare": (
        25 / 5.8162,
        {31.5 / 5.8162: "peak", 52 / 5.8162: "PCIe 5.0", 14 * 25 / 5.8162: "layer 14", 5.8162 / 25: "upside down"},
    ),
    "row after a column step": (
        1 / 12,
        {
            13 / 12: "sum itself",
            0.25: "its own column",
            0.2: "before the step",
            0: "dividing columns moves",
            8.33: "percentage",
        },
    ),
    "growth through depth": (
        1.1**122,
        {1.1**61: "two sublayers", 13.2: "added the growth", 134.2: "again and again", 1.1**86: "V4-Flash"},
    ),
    "bytes that make the mixing": (
        86 * 24 * 16384 * 4,
        {
            43 * 24 * 16384 * 4: "one sublayer a layer",
            86 * 16 * 16384 * 4: "matrix alone",
            86 * 24 * 4096 * 4: "all streams",
            135.27: "in MB",
        },
    ),
    "bytes of an index key": (
        68,
        {64: "scales are missing", 132: "half of one", 65: "several runs", 256: "BF16", 80: "four bytes", 544: "in bits"},
    ),
    "the largest of a run": (
        2 / 22,
        {10 / 22: "cut off", 16 / 22: "no scale", 6 / 22: "nearer", 2: "error itself", 9.09: "percentage"},
    ),
    "released against bf16": (
        6.72 * 2**30 / 3.688e9,
        {2: "half as large", 256 / 68: "index keys alone", 1024 / 584: "entries alone", 3.688 / 7.2156: "upside down"},
    ),
}
SOLUTIONS = {
    "bytes of an index key": "128 // 2 + 128 // 32",
    "the largest of a run": "(4 * 6 - 22) / 22",
    "released against bf16": 'wb.kv_bytes("v4-flash", 2**20, "bf16")["total"] / wb.kv_bytes("v4-flash", 2**20)["total"]',
    "hidden share": "3 * 2.5 / 12",
    "hidden in a queue": "1 - ((18 - 6) + (36 - 30)) / 36",
    "bytes of a chunk": "24 * (256 + 256 // 32) * 8192",
    "link to spare": "25 / 5.82",
    "row after a column step": "0.6 / 0.8 + 0.4 / 1.2 - 1",
    "growth through depth": "1.1 ** (2 * 61)",
    "bytes that make the mixing": "43 * 2 * (4 + 4 + 4 * 4) * (4 * 4096) * 4",
}
