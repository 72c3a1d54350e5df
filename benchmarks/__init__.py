"""Throughput tables: pytest-benchmark cases, the harness under them, and reports of their results."""
