"""Measurements: the forecast of a run, the throughput of its loop and loader, and the comparison with peers."""

from sequencer.machine import describe_machine
from sequencer.measure.benchmarks import (
    Comparison,
    Settings,
    compare_exports,
    compare_growth,
    compare_layers,
    compare_models,
)
from sequencer.measure.contenders import check_model, check_peers, choose_backends
from sequencer.measure.forecast import plan
from sequencer.measure.page import Page
from sequencer.measure.peak import peak_rates
from sequencer.measure.plan_result import Plan
from sequencer.measure.throughput import measure_loader, measure_loops

__all__ = [
    "Comparison",
    "Page",
    "Plan",
    "Settings",
    "check_model",
    "check_peers",
    "choose_backends",
    "compare_exports",
    "compare_growth",
    "compare_layers",
    "compare_models",
    "describe_machine",
    "measure_loader",
    "measure_loops",
    "peak_rates",
    "plan",
]
