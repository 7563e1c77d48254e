"""Right answers by hand, typical wrong ones and folded solutions of the exercises about mechanisms, for test_exercises.py.

By hand from reference/engram-and-overlap.md, sections 0 and 3.
"""

NOTEBOOKS = {5}
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
}
SOLUTIONS = {
    "hidden share": "3 * 2.5 / 12",
    "hidden in a queue": "1 - ((18 - 6) + (36 - 30)) / 36",
    "bytes of a chunk": "24 * (256 + 256 // 32) * 8192",
    "link to spare": "25 / 5.82",
}
