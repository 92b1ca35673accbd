"""What a report is made of: figures with intervals, tables, plots, a page."""
