"""The exercises of notebooks 2 and 3: right answers by hand, typical wrong ones, and the folded solutions; see test_exercises.

From reference/deepseek-v4.md, sections 0, 1.2, 2, 3 and 6.
"""

import math

import workbench as wb

E = math.e
# FLOPs of V4-Pro at 2**20 tokens in G, from the table of section 6: 98 of projections, 76.7 of attention, 128.9 of the indexer.
CASES = {
    "index keys of a token": (
        30 * 262_144,
        {262_144: "one layer", 61 * 262_144: "every layer", 30 * 2**20: "for every token", 30 * 1024: "kept entries"},
    ),
    "entries left out": (
        25_000 - 512,
        {25_000: "are visible", 512: "are kept", 99_489: "counted tokens", 23_976: "V4-Pro", 24_487: "numbered from 0"},
    ),
    "first real choice": (
        513 * 4 - 1,
        {2047: "just as many", 512: "tokens as entries", 4099: "V4-Pro", 640: "share their places", 2052: "numbered from 0"},
    ),
    "share of choosing": (
        128.9 / 303.6,
        {0.7579: "bytes read", 0.906: "V3.2", 0.645: "V4-Flash", 0.2526: "attention itself", 42.45: "percentage"},
    ),
    "without choosing": (
        (30 * 262_144 + 31 * 8192 + 61 * 128) / (30 * 1024 + 31 * 8192 + 61 * 128),
        {256: "Windows and HCA", 10.365: "indexer's own work", 1024: "every token", 512: "V3.2", 0.036: "upside down"},
    ),
    "last entry to read a token": (
        251,
        {250: "its own block", 249: "overlap backwards", 7: "HCA", 1000: "numbers tokens", 252: "numbered from 0"},
    ),
    "weights of an entry": (
        8 * 512,
        {8: "Every channel", 4 * 512: "block before", 512: "channels the entry has", 128 * 512: "HCA"},
    ),
    "position of an entry": (
        1000,
        {250: "entry's number", 1003: "last token", 996: "first token it reads", 32_000: "HCA"},
    ),
    "the sink's share": (
        E / (3 + E),
        {1 / 4: "logit for 0", E / 3: "denominator", 1 / 5: "exponentiated", 3 / (3 + E): "all the rest", 47.5: "percentage"},
    ),
}

# Exercise -> its folded solution, as it stands in the notebook.
SOLUTIONS = {
    "index keys of a token": 'pro.count("csa") * (2**20 // 4)',
    "entries left out": "(100_000 + 1) // 4 - 512",
    "first real choice": "(512 + 1) * 4 - 1",
    "share of choosing": 'flops["indexer"] / flops["total"]',
    "without choosing": "(every + rest) / (kept + rest)",
    "last entry to read a token": "1000 // 4 + 1",
    "weights of an entry": "2 * 4 * 512",
    "position of an entry": "250 * 4",
    "the sink's share": "math.exp(1) / (3 * math.exp(0) + math.exp(1))",
}
_PRO = wb.presets["v4-pro"].layer_kinds
KNOWN = {
    "math": math,
    "pro": _PRO,
    "flops": wb.decode_flops("v4-pro", 2**20),
    "every": _PRO.count("csa") * (2**20 // 4),
    "kept": _PRO.count("csa") * 1024,
    "rest": _PRO.count("hca") * (2**20 // 128) + len(_PRO) * 128,
}
