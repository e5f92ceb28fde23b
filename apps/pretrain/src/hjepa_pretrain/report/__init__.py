"""The report of a run: what people look at before they read."""

from hjepa_pretrain.report.write import write_report

__all__ = ["write_report"]
