"""Timing, benchmarks, the results ledger and reports."""
