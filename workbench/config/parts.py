"""What the parts of a KV cache are called and how its rows may be stored: one list for models, caches and the accounting."""

PARTS = ("window", "compressed", "index", "tail", "engram")
KV_PART = "kv"  # one row for every token: the keys and values of MHA and GQA, the latents of MLA
STORAGES = ("fp32", "bf16", "released")  # "released": the packed mixed formats of the published models
