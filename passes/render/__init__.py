"""Reports for people: a table in the terminal, and one self-contained HTML page."""

from recast.passes.render.page import page
from recast.passes.render.table import comparison_table, report_tables, table_text

__all__ = ["comparison_table", "page", "report_tables", "table_text"]
