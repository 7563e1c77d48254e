"""Closed-form bytes and FLOPs of one sequence, and what follows for a device: arithmetic only, no torch.

`sequence` counts what one sequence holds, reads and computes; `capacity` says whether it fits, how long and how many could be,
and what bounds a decode step.
"""

from workbench.config.parts import KV_PART as KV_PART
from workbench.config.parts import PARTS as PARTS
from workbench.config.parts import STORAGES as STORAGES
from workbench.cost.capacity import FORMULA as FORMULA
from workbench.cost.capacity import Fit as Fit
from workbench.cost.capacity import Step as Step
from workbench.cost.capacity import fit as fit
from workbench.cost.capacity import layout as layout
from workbench.cost.capacity import report as report
from workbench.cost.filling import cards_needed as cards_needed
from workbench.cost.filling import filling as filling
from workbench.cost.filling import prefill_flops as prefill_flops
from workbench.cost.filling import when_full as when_full
from workbench.cost.sequence import Model as Model
from workbench.cost.sequence import Term as Term
from workbench.cost.sequence import decode_bytes as decode_bytes
from workbench.cost.sequence import decode_flops as decode_flops
from workbench.cost.sequence import dense_kv_bytes as dense_kv_bytes
from workbench.cost.sequence import entry_bytes as entry_bytes
from workbench.cost.sequence import extrapolated as extrapolated
from workbench.cost.sequence import formula as formula
from workbench.cost.sequence import index_key_bytes as index_key_bytes
from workbench.cost.sequence import kv_bytes as kv_bytes
from workbench.cost.sequence import kv_bytes_per_token as kv_bytes_per_token
from workbench.cost.sequence import terms as terms
from workbench.cost.sequence import units as units
from workbench.cost.sequence import window_entry_bytes as window_entry_bytes
