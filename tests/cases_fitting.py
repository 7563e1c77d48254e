"""Right and wrong answers to the exercises of notebooks 8 and 9, for tests/test_exercises.py; by hand from the reference.

reference/deepseek-v41.md, sections 1.1, 4, 9.1 and 10; reference/deepseek-v4.md, section 5; a link of 63 GB/s.
"""

from __future__ import annotations

CASES = {
    "v4.1 bytes per token": (
        890,
        {(18 / 2 + 20) * 356: "read those of a layer", 720: "index key", 1424: "every other", 3514: "V4-Flash", 7120: "bits"},
    ),
    "whose choice": (32, {20: "made the stream", 34: "no indexer", 33: "further back", 36: "later", 28: "still before"}),
    "keys of one reindex": (
        16384 * 68,
        {2**20 * 68: "every key", 2048 * 68: "blocks", 512 * 68: "kept at the end", 16384 * 288: "entries", 1088: "KiB"},
    ),
    "work of a replay": (
        (20 * 1024 + 20 * 128) / (40 * 1024),
        {0.5: "not left out", 0.0625: "alone", 0.125: "reads everything", 56.25: "percentage"},
    ),
    "sessions in the room": (21, {22: "round down", 11: "BF16", 15: "V4-Pro", 85: "V4.1-Flash", 23: "not 2**30"}),
    "tokens in the room": (
        320184,
        {80e9 // 4096: "one layer", 640368: "factor of two", 20011: "query heads", 320183: "numbered from 0"},
    ),
    "cache on one card of sixteen": (
        262.0 / 8,
        {262.0 / 16: "whole KV heads", 262.0: "whole cache", 262.0 / 128: "Query heads", 32.75e9: "bytes", 30.5: "GiB"},
    ),
    "seconds of a swap": (
        3.6906 / 63,
        {2 * 3.6906 / 63: "there and back", 5.283 / 63: "V4-Pro", 58.58: "milliseconds", 8 * 3.6906 / 63: "bits"},
    ),
}
# Exercise -> its folded solution, as it stands in the notebook.
SOLUTIONS = {
    "v4.1 bytes per token": "(3 * 1 / 2 + 1) * (288 + 68)",
    "whose choice": "max(layer for layer in config.index_source_layer_ids if layer <= 34)",
    "keys of one reindex": "2048 * 8 * 68",
    "work of a replay": "(20 * 1024 + 20 * 128) / (40 * 1024)",
    "sessions in the room": 'int(80e9 // wb.kv_bytes("v4-flash", 2**20)["total"])',
    "tokens in the room": "int(80e9 // (61 * 8 * 128 * 2 * 2))",
    "cache on one card of sixteen": 'wb.kv_bytes("gqa-8", 2**20)["total"] / 8 / 1e9',
    "seconds of a swap": 'wb.kv_bytes("v4-flash", 2**20)["total"] / wb.devices["h100"].host_link_bytes_per_s',
}
