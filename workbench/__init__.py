"""workbench: watch DeepSeek-V4 work.

The public names below are loaded when first used, so that ``import workbench`` needs neither torch nor plotly.
`presets`, `devices` and `glossary`, standard library only, are there at once.
"""

from importlib import import_module
from typing import Any

# At once, because a module of the same name would otherwise take the place of the mapping when something imports it.
from workbench.devices import devices as devices
from workbench.glossary import glossary as glossary
from workbench.presets import presets as presets

__version__ = "0.1.0"

_HOME = {
    "load": "checkpoint",
    "run": "live",
    "read_transcript": "transcript",
    "Transcript": "transcript",
    "LiveRun": "live",
    "Trace": "trace",
    "capture": "ask_server",
    "attach": "attached",
    "Timeline": "trace",
    "Span": "trace",
    "overlap_experiment": "memory.overlap",
    "kv_bytes": "cost",
    "kv_bytes_per_token": "cost",
    "decode_bytes": "cost",
    "decode_flops": "cost",
    "true_size_layer": "true_size",
    "EngramTable": "memory.table",
    "HotRows": "memory.hot_rows",
    "use_tables": "model.engram",
    "write_tables": "model.engram",
    "hide_needle": "needle",
    "find_needle": "needle",
    "needle_rates": "needle",
    "needle_trials": "needle",
    "sample_text": "needle",
    "untrained_twin": "needle",
    "HideANeedle": "widgets.needle",
    "NeedleAnswer": "widgets.needle",
    "NeedleRates": "widgets.needle",
    "needle_chart": "figures.needle",
    "query_strip": "figures.query",
    "attention_tile": "figures.attention",
    "AttentionExplorer": "widgets.attention",
    "Microscope": "widgets.microscope",
    "selection_curve": "ways_to_choose",
    "selection_chart": "figures.microscope",
    "dense_beside": "beside",
    "record_text": "beside",
    "beside_maps": "figures.beside",
    "missed_chart": "figures.beside",
    "reuse_chart": "figures.beside",
    "DenseBeside": "widgets.beside",
    "compare_runs": "differences",
    "difference_tile": "figures.difference",
    "DifferenceOfRuns": "widgets.beside",
    "EngramExplorer": "widgets.engram",
    "article_claims": "claims",
    "ClaimsTable": "widgets.claims",
    "MemoryMeters": "widgets.claims",
    "memory_meters": "figures.claims",
    "check": "exercises",
    "Prediction": "widgets.predict",
    "toy_models": "caches",
    "measured_cache": "caches",
    "modelled_cache": "caches",
    "HeldAndRead": "widgets.caches",
    "CacheSlots": "widgets.caches",
    "held_and_read": "figures.caches",
    "read_shares": "figures.caches",
    "kv_changes": "figures.caches",
    "falling_steps": "figures.caches",
    "entry_masses": "choosing",
    "mass_kept": "choosing",
    "miss_cost": "choosing",
    "without_entries": "choosing",
    "Majorities": "choosing",
    "TopkTrials": "widgets.choosing",
    "index_choice": "figures.choosing",
    "score_against_mass": "figures.choosing",
    "mass_kept_chart": "figures.choosing",
    "outcome_bars": "figures.choosing",
    "work_shares": "figures.choosing",
    "gate_weights": "compressing",
    "attention_split": "compressing",
    "moved_text": "compressing",
    "EntryWeights": "widgets.compressing",
    "entry_weights": "figures.compressing",
    "effective_tokens_chart": "figures.compressing",
    "received_weights": "figures.compressing",
    "attention_split_chart": "figures.compressing",
    "moved_chart": "figures.compressing",
    "common_choices": "sharing",
    "replay_share": "sharing",
    "compare_prefills": "prefills",
    "needles_both_ways": "prefills",
    "sharing_chart": "figures.sharing",
    "choices_chart": "figures.sharing",
    "replay_chart": "figures.sharing",
    "agent_session": "agent",
    "session_context": "figures.fitting",
    "measured_and_modelled": "figures.fitting",
    "filling_chart": "figures.fitting",
    "filling": "cost",
    "fit": "cost",
    "sessions_chart": "figures.fitting",
    "pauses_chart": "figures.fitting",
    "when_full": "cost",
    "WillItFit": "widgets.fitting",
    "CardsNeeded": "widgets.fitting",
    "storage_cost": "training.score",
    "frontier_points": "frontier",
    "frontier_chart": "figures.frontier",
    "TrainYourOwn": "widgets.frontier",
    "engram_effect": "engram",
    "engram_off": "model.engram",
    "shipped_traces": "trace_files",
    "KVCacheGrowth": "widgets.memory",
    "OverlapTimeline": "widgets.timeline",
    "OverlapWhatIf": "widgets.whatif",
    "BreakEven": "widgets.break_even",
    "hidden_by_window": "figures.hidden",
    "record_mixing": "mixing",
    "loss_by_iterations": "mixing",
    "stored_rows": "rounding",
    "rounded_selections": "rounding",
    "kept_by_rank": "figures.rounding",
    "RoundedRows": "widgets.rounding",
    "SinkhornDial": "widgets.mixing",
    "StreamGain": "widgets.mixing",
    "stream_gain": "figures.mixing",
    "RunControls": "widgets.controls",
    "Demo": "widgets.demo",
    "Stepper": "widgets.stepper",
    "walk_token": "walk",
    "save_picture": "widgets.still",
    "WorkbenchError": "errors",
    "InputError": "errors",
}
_MODULES = ("chrome_trace", "schedule")  # reached as a whole
__all__ = sorted([*_HOME, *_MODULES, "devices", "glossary", "presets"])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"workbench.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    value = getattr(import_module(f"workbench.{_HOME[name]}"), name)
    globals()[name] = value  # the next access is a plain look-up
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])
